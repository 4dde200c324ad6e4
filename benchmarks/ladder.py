"""The ladder of stage two: what each step brings, from 224 pixels to the speed network.

Every rung is a process of its own (an allocator is chosen before it starts), makes some warm-up
steps and then times some more; the rungs take turns, round after round. The images are noise.

    python benchmarks/ladder.py [--out FILE.json] [--repeats 5] [--only RUNG …]
"""

import argparse
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchvision
from loop import conventional, noise, pil_loader
from timing import ceilings, in_a_process, rate, spread, write
from torchvision import transforms

from cifar_lib import train_state
from cifar_lib.config import TrainConfig
from cifar_lib.execution import choose_execution, prepare_device
from cifar_lib.launch import allocator_settings
from cifar_lib.models import build_model
from cifar_lib.train import train_epoch
from cifar_lib.train_state import TrainState

PLAIN = {"precision": "fp32", "channels_last": False}
MUON = {"model": "speed_net", "optimizer": "muon", "momentum": 0.6}
MICRO = {"micro_batch_size": 125}
# Name: why, the configuration or the usual loop's resize (0: none, and another network), how many
# images are timed, and whether allocator and fast paths are on.
RUNGS: dict[str, dict[str, Any]] = {
    "224 pixels": {
        "why": "ResNet-18, the usual loop",
        "side": 224,
        "images": 192,
    },
    "32 pixels": {"why": "the same network and loop, 49 times fewer pixels", "side": 32},
    "SmallCNN": {"why": "a network whose first layer keeps all 32 pixels", "side": 0},
    "resident, batched": {"why": "data on the device, batches of 250", "config": PLAIN},
    "channels_last": {"why": "the layout that convolutions want", "config": {"precision": "fp32"}},
    "bf16": {"why": "half the bytes, wider products", "config": {}},
    "allocator": {"why": "freed memory is kept", "config": {}, "allocator": True},
    "micro-batches": {"why": "a pass fits the cache", "config": MICRO, "allocator": True},
    "speed network": {"why": "whitening, wide blocks", "config": MUON | MICRO, "allocator": True},
    "fast paths": {
        "why": "convolutions as matrix products where those are faster",
        "config": MUON | MICRO,
        "allocator": True,
        "fast": True,
    },
    "24 pixels": {
        "why": "the resolution of its first epochs",
        "config": MUON | MICRO | {"low_resolution": 24, "low_resolution_epochs": 1},
        "allocator": True,
        "fast": True,
    },
}
BATCH, USUAL_BATCH = 250, 32  # more images of 224 pixels do not fit everywhere


def climb(rung: dict[str, Any]) -> float:
    """Images a second of one rung, in this process."""
    execution = choose_execution(TrainConfig())
    prepare_device(execution, deterministic=False)
    if not rung.get("fast"):
        train_state.use_fast_paths = lambda *_: None
        train_state.use_fast_steps = lambda *_: None
    splits = noise(rung.get("images", 1500))
    if "config" in rung:
        config = TrainConfig(batch_size=BATCH, flip="alternating", translate=2, **rung["config"])
        execution = choose_execution(config)
        state = TrainState.start(config, 0, splits, execution)
        return rate(lambda: train_epoch(state, execution), len(splits.train), execution)
    then = [transforms.Resize(rung["side"])] if rung["side"] == 224 else []
    if rung["side"]:
        model = torchvision.models.resnet18(num_classes=10)
    else:
        model = build_model(TrainConfig(model="small_cnn"), 10)
    model = model.to(execution.device)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9)
    loader = pil_loader(splits, USUAL_BATCH, *then)
    work = partial(conventional, loader, model, optimizer, execution.device)
    return rate(work, len(splits.train), execution)


def main() -> None:
    """Climbs the ladder some times, prints a table and writes what was measured."""
    parser = argparse.ArgumentParser(description="Times each step of stage two.")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--only", nargs="+", choices=RUNGS, default=list(RUNGS), help="rungs")
    parser.add_argument("--climb", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.climb:
        print(climb(RUNGS[options.climb]))
        return
    rates: dict[str, list[float]] = {name: [] for name in options.only}
    for _ in range(options.repeats):
        for name in rates:
            settings = allocator_settings({}) if RUNGS[name].get("allocator") else {}
            rates[name] += in_a_process(__file__, "--climb", name, variables=settings)
    results: list[dict[str, Any]] = []
    before = 0.0
    for name, values in rates.items():
        median = statistics.median(values)
        gain = median / before if before else None
        before = median
        shown = f"{gain:6.2f} times" if gain else ""
        print(f"{name:20}{spread(values):>28} images/s {shown:14}{RUNGS[name]['why']}", flush=True)
        results.append(
            {"rung": name, "why": RUNGS[name]["why"], "images_per_second": values, "gain": gain}
        )
    write(options.out, ceilings=ceilings(), batch_sizes=[USUAL_BATCH, BATCH], results=results)


if __name__ == "__main__":
    main()
