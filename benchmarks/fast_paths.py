"""Times each fast path beside plain PyTorch, forward and backward, in one run, taking turns.

python benchmarks/fast_paths.py [--out FILE.json] [--repeats 9]
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timing import take_turns, write
from torch import nn

from cifar_lib import fast
from cifar_lib.config import TrainConfig
from cifar_lib.execution import choose_execution
from cifar_lib.launch import restart_with_allocator
from cifar_lib.models.vgg import vgg16

# Images, side of the input, channels in and out, kernel, stride, groups: as in VGG16, ResNet-18 and
# SpeedNet; the two at 7 and 8 pixels lie above `fast.LARGEST_AREA`: what would be lost there. Then
# the depthwise ones of EfficientNet-Lite0 at 96 pixels.
SHAPES = [
    (128, 2, 512, 512, 3, 1, 1),
    (128, 8, 256, 512, 3, 2, 1),
    (128, 4, 512, 512, 3, 1, 1),
    (128, 3, 256, 256, 3, 1, 1),
    (128, 4, 256, 256, 3, 1, 1),
    (128, 7, 256, 256, 3, 1, 1),
    (128, 8, 256, 256, 3, 1, 1),
    (64, 48, 96, 96, 3, 2, 96),
    (64, 24, 144, 144, 5, 2, 144),
    (64, 12, 240, 240, 5, 1, 240),
    (64, 6, 672, 672, 5, 1, 672),
    (64, 6, 672, 672, 5, 2, 672),
    (64, 3, 1152, 1152, 5, 1, 1152),
]


def step(layer: nn.Conv2d, x: torch.Tensor) -> Callable[[], None]:
    """One forward and backward pass under autocast."""
    gradient: list[torch.Tensor] = []

    def work() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        gradient[:] = gradient or [torch.randn_like(y)]
        y.backward(gradient[0])

    return work


def adam_step(fast_steps: bool) -> Callable[[], None]:
    """One fused Adam step over VGG16's parameters, channels_last as in training."""
    model = vgg16().to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    if fast_steps:
        fast.use_fast_steps(optimizer, torch.device("cpu"))
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    return optimizer.step


def main() -> None:
    """Measures every fast path, prints a table and writes what was measured."""
    parser = argparse.ArgumentParser(description="Times the fast paths.")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--repeats", type=int, default=9, help="timed passes")
    options = parser.parse_args()
    execution = choose_execution(TrainConfig(device="cpu"))
    limit, results = fast.LARGEST_AREA, list[dict[str, Any]]()

    def measure(name: str, taken: bool, **works: Callable[[], None]) -> None:
        times = take_turns(works, execution, options.repeats)
        gain = statistics.median(times["plain"]) / statistics.median(times["fast"])
        print(f"{name:56}{gain:6.2f} times  {'taken' if taken else 'not taken'}", flush=True)
        results.append({"path": name, "seconds": times, "gain": gain, "taken": taken})

    fast.LARGEST_AREA = 2**30  # measure beyond it too
    for n, side, c_in, c_out, kernel, stride, groups in SHAPES:
        x = torch.randn(n, c_in, side, side).bfloat16()
        x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
        layers = [
            nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
            for _ in range(2)
        ]
        for layer in layers:
            layer.to(memory_format=torch.channels_last)
        fast.use_fast_paths(layers[1], torch.device("cpu"), torch.bfloat16)
        taken = groups > 1 or (side // stride) ** 2 <= limit
        channels = f"{c_in} channels, depthwise" if groups > 1 else f"{c_in} to {c_out}"
        name = f"{channels}, {kernel}×{kernel}, {side} pixels, stride {stride}, {n} images"
        measure(name, taken, plain=step(layers[0], x), fast=step(layers[1], x))
    measure("Adam step of VGG16", True, plain=adam_step(False), fast=adam_step(True))
    write(options.out, largest_area=limit, results=results)


if __name__ == "__main__":
    restart_with_allocator()
    main()
