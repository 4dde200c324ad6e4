"""Times the training loop: against bare forward and backward, and against the conventional loop.

Bare: the same network and precision, one batch that is ready on the device, over and over.
Ours: `train`'s epoch, with gathering, augmentation, schedule and bookkeeping. Conventional:
torchvision's transforms of PIL images, a `DataLoader` with two workers, fp32, contiguous. Each
measurement is a process of its own, the first two with the allocator settings of our commands, the
third without, as it is usually started; all take turns, beside the machine's own ceilings. Peak
memory is that of the process (on CUDA: of the device). The images are noise.

    python benchmarks/loop.py [--out FILE.json] [--models small_cnn resnet18] [--repeats 5]
"""

import argparse
import resource
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from augment import CROP_FLIP, TENSOR, Images
from timing import ceilings, flops_of_step, in_a_process, rate, spread, write
from torch.utils.data import DataLoader
from torchvision import transforms

from cifar_lib.config import TrainConfig
from cifar_lib.data import DataInfo, ImageSet, Splits
from cifar_lib.execution import Execution, choose_execution
from cifar_lib.launch import allocator_settings
from cifar_lib.models import build_model
from cifar_lib.train import train_epoch
from cifar_lib.train_state import TrainState

BATCH = 128
EPOCH = 50_000  # images


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


def conventional(
    loader: DataLoader[Any],
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
) -> None:
    """An epoch as it is usually written."""
    model.train()
    for images, labels in loader:
        images, labels = images.to(device), labels.to(device)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()


def pil_loader(splits: Splits, batch_size: int, *then: Any) -> DataLoader[Any]:
    """The conventional loader: crop and flip of PIL images, one at a time, in two workers."""
    return DataLoader(
        Images(splits.train.images, transforms.Compose([*CROP_FLIP, *then, *TENSOR])),
        batch_size=batch_size,
        shuffle=True,
        num_workers=2,
        persistent_workers=True,
    )


def measure(model: str, loop: str, steps: int) -> tuple[float, int]:
    """Images a second of one loop's epoch, after one that warms up, and peak memory in bytes."""
    splits = noise(steps * BATCH)
    config = TrainConfig(model=model, batch_size=BATCH, val_fraction=0.0)
    execution = choose_execution(config)
    work: Callable[[], object]
    if loop == "conventional":
        usual = build_model(config, 10).to(execution.device)
        optimizer = torch.optim.SGD([p for p in usual.parameters() if p.requires_grad], 0.1, 0.9)
        loader = pil_loader(splits, BATCH)
        work = partial(conventional, loader, usual, optimizer, execution.device)
    else:
        state = TrainState.start(config, 0, splits, execution)
        epoch: Callable[..., object] = bare if loop == "bare" else train_epoch
        work = partial(epoch, state, execution)
    reached = rate(work, len(splits.train), execution)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if execution.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    return reached, peak


def compare(model: str, steps: int, repeats: int, ceiling: float) -> dict[str, Any]:
    """Images a second of the three loops, all repeats, and what follows from the medians."""
    settings = allocator_settings({})
    loops = {"bare": settings, "ours": settings, "conventional": {}}
    rates: dict[str, list[float]] = {loop: [] for loop in loops}
    peaks = dict.fromkeys(loops, 0.0)
    for _ in range(repeats):
        for loop, variables in loops.items():
            words = (__file__, "--steps", str(steps), "--measure", model, loop)
            reached, peak = in_a_process(*words, variables=variables)
            rates[loop].append(reached)
            peaks[loop] = max(peaks[loop], peak / 2**30)
    median = {name: statistics.median(values) for name, values in rates.items()}
    flops = flops_of_step(TrainConfig(model=model, batch_size=BATCH)) / BATCH
    tflops = {name: flops * value / 1e12 for name, value in median.items()}
    return {
        "model": model,
        "images_per_second": rates,
        "seconds_per_epoch": {name: EPOCH / value for name, value in median.items()},
        "tflops": tflops,
        "share_of_ceiling": {name: value / ceiling for name, value in tflops.items()},
        "loop_overhead": median["bare"] / median["ours"] - 1,
        "speedup": median["ours"] / median["conventional"],
        "peak_memory_gib": peaks,
    }


def main() -> None:
    """Measures every model, prints a table and writes what was measured."""
    parser = argparse.ArgumentParser(description="Times the training loop.")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    models = ["small_cnn", "resnet18", "vgg16", "speed_net"]
    parser.add_argument("--models", nargs="+", choices=models, default=models)
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds")
    parser.add_argument("--steps", type=int, default=8, help="steps a round")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        model, loop = options.measure
        print(*measure(model, loop, options.steps))
        return
    limits, precision = ceilings(), choose_execution(TrainConfig()).precision
    print("ceilings: " + ", ".join(f"{name} {value:.2f}" for name, value in limits.items()))
    print(f"{'images/s, median (min to max)':32}{'bare':>27}{'ours':>27}{'conventional':>27}")
    results = []
    for model in options.models:
        result = compare(model, options.steps, options.repeats, limits[f"{precision}_tflops"])
        results.append(result)
        cells = [spread(r) for r in result["images_per_second"].values()]
        print(f"{model:32}" + "".join(f"{cell:>27}" for cell in cells), flush=True)
        print(
            f"{'':32}loop overhead {result['loop_overhead']:.1%}, {result['speedup']:.1f} times "
            f"the conventional loop, {result['share_of_ceiling']['ours']:.0%} of the {precision} "
            f"ceiling, {result['seconds_per_epoch']['ours']:.0f} s an epoch of 50,000, "
            f"peak memory {result['peak_memory_gib']['ours']:.1f} GiB"
        )
    write(options.out, ceilings=limits, batch_size=BATCH, results=results)


if __name__ == "__main__":
    main()
