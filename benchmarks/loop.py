"""Times the training loop: against bare forward and backward, and against the conventional loop.

Bare: the same network and precision, one batch that is ready on the device, over and over.
Ours: `train`'s epoch, with gathering, augmentation, schedule and bookkeeping. Conventional:
torchvision's transforms of PIL images, a `DataLoader` with two workers, fp32, contiguous. All three
take turns in one run; peak memory is that of the whole process. The images are noise.

    python benchmarks/loop.py [--out FILE.json] [--models small_cnn resnet18] [--repeats 5]
"""

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from augment import CROP_FLIP, TENSOR, Images
from torch.utils.data import DataLoader
from torchvision import transforms

from cifar_lib.config import TrainConfig
from cifar_lib.data import DataInfo, ImageSet, Splits
from cifar_lib.execution import Execution, choose_execution, describe_environment, describe_hardware
from cifar_lib.models import build_model
from cifar_lib.train import train_epoch
from cifar_lib.train_state import TrainState

BATCH = 128


def noise(count: int) -> Splits:
    """Random images with random labels, all for training."""
    info = DataInfo("noise", "embedded", False, "0" * 64, count, 0, 0)
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)
    every = ImageSet(images, torch.randint(0, 10, (count,)), tuple("0123456789"), info)
    return Splits(every, every.subset(torch.arange(0)), every.subset(torch.arange(0)), info)


def bare(state: TrainState, execution: Execution) -> None:
    """As many forward and backward passes and steps as an epoch has, on one ready batch."""
    layout = torch.channels_last if state.config.channels_last else torch.contiguous_format
    x = torch.randn(BATCH, 3, 32, 32, device=execution.device, dtype=execution.dtype)
    x, y = x.contiguous(memory_format=layout), state.data.labels[:BATCH]
    state.model.train()
    for _ in range(state.steps_per_epoch):
        state.optimizer.zero_grad(set_to_none=True)
        with execution.autocast():
            logits = state.model(x)
        F.cross_entropy(logits.float(), y).backward()
        state.optimizer.step()


def conventional(loader: DataLoader[Any], state: TrainState, execution: Execution) -> None:
    """An epoch as it is usually written."""
    state.model.train()
    for images, labels in loader:
        images, labels = images.to(execution.device), labels.to(execution.device)
        state.optimizer.zero_grad()
        F.cross_entropy(state.model(images), labels).backward()
        state.optimizer.step()


def seconds(work: Callable[[], object], execution: Execution) -> float:
    """Wall time until the device is done."""
    execution.synchronize()
    start = time.perf_counter()
    work()
    execution.synchronize()
    return time.perf_counter() - start


def measure(model: str, steps: int, repeats: int) -> dict[str, Any]:
    """Images a second of the three loops, all repeats, and what follows from the medians."""
    splits = noise(steps * BATCH)
    fast = TrainConfig(model=model, batch_size=BATCH, val_fraction=0.0)
    plain = TrainConfig(model=model, batch_size=BATCH, precision="fp32", channels_last=False)
    execution, slow = choose_execution(fast), choose_execution(plain)
    state = TrainState.start(fast, 0, splits, execution)
    usual = TrainState.start(plain, 0, splits, slow)
    usual.model = build_model(plain, 10).to(slow.device)
    loader: DataLoader[Any] = DataLoader(
        Images(splits.train.images, transforms.Compose([*CROP_FLIP, *TENSOR])),
        batch_size=BATCH,
        shuffle=True,
        num_workers=2,
        persistent_workers=True,
    )
    loops: dict[str, Callable[[], object]] = {
        "bare": lambda: bare(state, execution),
        "ours": lambda: train_epoch(state, execution),
        "conventional": lambda: conventional(loader, usual, slow),
    }
    rates: dict[str, list[float]] = {name: [] for name in loops}
    for repeat in range(repeats + 1):
        for name, loop in loops.items():
            rate = len(splits.train) / seconds(loop, slow if name == "conventional" else execution)
            if repeat:  # the first round warms up
                rates[name].append(rate)
    median = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "model": model,
        "images_per_second": rates,
        "loop_overhead": median["bare"] / median["ours"] - 1,
        "speedup": median["ours"] / median["conventional"],
        "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def main() -> None:
    """Measures every model, prints a table and writes what was measured."""
    parser = argparse.ArgumentParser(description="Times the training loop.")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--models", nargs="+", default=["small_cnn", "resnet18"])
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds")
    parser.add_argument("--steps", type=int, default=8, help="steps a round")
    options = parser.parse_args()
    print(f"{'images/s, median (min to max)':32}{'bare':>27}{'ours':>27}{'conventional':>27}")
    results = []
    for model in options.models:
        result = measure(model, options.steps, options.repeats)
        results.append(result)
        cells = [
            f"{statistics.median(r):,.0f} ({min(r):,.0f} to {max(r):,.0f})"
            for r in result["images_per_second"].values()
        ]
        print(f"{model:32}" + "".join(f"{cell:>27}" for cell in cells), flush=True)
        print(
            f"{'':32}loop overhead {result['loop_overhead']:.1%}, {result['speedup']:.1f} times "
            f"the conventional loop, peak memory {result['peak_memory_gib']:.1f} GiB"
        )
    if options.out:
        execution = choose_execution(TrainConfig())
        facts = {"hardware": describe_hardware(execution), "environment": describe_environment()}
        record = {**facts, "batch_size": BATCH, "results": results}
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
