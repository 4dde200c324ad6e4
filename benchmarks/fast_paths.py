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


def main() -> None:
    """Measures every shape, prints a table and writes what was measured."""
    parser = argparse.ArgumentParser(description="Times the fast paths.")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--repeats", type=int, default=9, help="timed passes")
    options = parser.parse_args()
    execution = choose_execution(TrainConfig(device="cpu"))
    limit, results = fast.LARGEST_AREA, list[dict[str, Any]]()
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
        works = {"plain": step(layers[0], x), "fast": step(layers[1], x)}
        times = take_turns(works, execution, options.repeats)
        gain = statistics.median(times["plain"]) / statistics.median(times["fast"])
        taken = groups > 1 or (side // stride) ** 2 <= limit
        channels = f"{c_in} channels, depthwise" if groups > 1 else f"{c_in} to {c_out}"
        name = f"{channels}, {kernel}×{kernel}, {side} pixels, stride {stride}"
        print(f"{name:52}{gain:5.2f} times  {'taken' if taken else 'not taken'}", flush=True)
        results.append({"shape": name, "images": n, "seconds": times, "gain": gain, "taken": taken})
    write(options.out, largest_area=limit, results=results)


if __name__ == "__main__":
    main()
