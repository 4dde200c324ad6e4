"""Times each fast path beside plain PyTorch, forward and backward, in one run, taking turns.

In float32, and in bfloat16 where the processor computes in it.

    python benchmarks/fast_paths.py [--precision bf16|fp32] [--out FILE.json] [--repeats 9]
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from timing import take_turns, write
from torch import nn

from cifar_lib import fast
from cifar_lib.config import TrainConfig
from cifar_lib.execution import Execution, choose_execution
from cifar_lib.launch import restart_with_allocator
from cifar_lib.models import build_model
from cifar_lib.models.vgg import vgg16

# Images, side of the input, channels in and out, kernel, stride, groups: as in VGG16, ResNet-18 and
# SpeedNet, some beyond the limits of `fast.py`: what would be lost there. In bfloat16 then the
# depthwise ones of EfficientNet-Lite0 at 96 pixels.
SHAPES = {
    "bf16": [
        (128, 2, 512, 512, 3, 1, 1),
        (128, 8, 256, 512, 3, 2, 1),
        (128, 4, 512, 512, 3, 1, 1),
        (128, 3, 256, 256, 3, 1, 1),
        (128, 4, 256, 256, 3, 1, 1),
        (128, 7, 256, 256, 3, 1, 1),
        (128, 8, 256, 256, 3, 1, 1),
        (128, 16, 128, 128, 3, 1, 1),
        (384, 4, 512, 512, 3, 1, 1),
        (64, 48, 96, 96, 3, 2, 96),
        (64, 24, 144, 144, 5, 2, 144),
        (64, 12, 240, 240, 5, 1, 240),
        (64, 6, 672, 672, 5, 1, 672),
        (64, 6, 672, 672, 5, 2, 672),
        (64, 3, 1152, 1152, 5, 1, 1152),
    ],
    "fp32": [
        (128, 2, 512, 512, 3, 1, 1),
        (128, 8, 256, 512, 3, 2, 1),
        (128, 16, 128, 256, 3, 2, 1),
        (128, 32, 64, 128, 3, 2, 1),
        (128, 4, 512, 512, 3, 1, 1),
        (128, 7, 256, 256, 3, 1, 1),
        (128, 8, 256, 256, 3, 1, 1),
        (128, 15, 256, 256, 3, 1, 1),
        (128, 16, 128, 128, 3, 1, 1),
        (128, 16, 64, 64, 3, 1, 1),
        (128, 32, 64, 64, 3, 1, 1),
        (128, 32, 32, 32, 3, 1, 1),
        (128, 6, 128, 128, 3, 1, 1),
        (128, 5, 128, 128, 3, 1, 1),
    ],
}
NETWORKS = {"resnet18": 128, "vgg16": 64, "speed_net": 250}  # and images a step
OPEN = {  # the limits of `fast.py`, as if there were none
    "LARGEST_AREA": 2**30,
    "FEWEST_CHANNELS": 1,
    "LEAST_FACTOR": 0.0,
}


def step(
    layer: nn.Module, x: torch.Tensor, execution: Execution, limits: dict[str, Any]
) -> Callable[[], None]:
    """One forward and backward pass, with these limits of `fast.py`."""
    gradient: list[torch.Tensor] = []

    def work() -> None:
        vars(fast).update(limits)
        with execution.autocast():
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
    parser.add_argument("--precision", nargs="+", choices=SHAPES, help="those alone")
    options = parser.parse_args()
    best = choose_execution(TrainConfig(device="cpu")).precision
    precisions = options.precision or [p for p in SHAPES if p in (best, "fp32")]
    limits, results = {name: getattr(fast, name) for name in OPEN}, list[dict[str, Any]]()

    def measure(name: str, taken: bool, **works: Callable[[], None]) -> None:
        times = take_turns(works, execution, options.repeats)
        gain = statistics.median(times["plain"]) / statistics.median(times["fast"])
        told = "taken" if taken else "not taken"
        print(f"{execution.precision}  {name:56}{gain:6.2f} times  {told}", flush=True)
        facts = {"precision": execution.precision, "path": name}
        results.append(facts | {"seconds": times, "gain": gain, "taken": taken})

    def measure_pair(name: str, pair: Sequence[nn.Module], x: torch.Tensor) -> None:
        """Within the limits; without them, where they leave it to the plain way."""
        plain, quick = (module.to(memory_format=torch.channels_last) for module in pair)
        x = x.to(execution.dtype, memory_format=torch.channels_last).requires_grad_()
        fast.use_fast_paths(quick, execution.device, execution.dtype)
        with execution.autocast():
            taken = not isinstance(quick, fast.DenseConv2d) or quick.pays(x)
        works, chosen = {"plain": plain, "fast": quick}, limits if taken else OPEN
        measure(name, taken, **{k: step(v, x, execution, chosen) for k, v in works.items()})
        vars(fast).update(limits)

    for precision in precisions:
        execution = choose_execution(TrainConfig(device="cpu", precision=precision))
        for n, side, c_in, c_out, kernel, stride, groups in SHAPES[precision]:
            layers = [
                nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
                for _ in range(2)
            ]
            channels = f"{c_in} channels, depthwise" if groups > 1 else f"{c_in} to {c_out}"
            name = f"{channels}, {kernel}×{kernel}, {side} pixels, stride {stride}, {n} images"
            measure_pair(name, layers, torch.randn(n, c_in, side, side))
        for name, n in NETWORKS.items():
            models = [build_model(TrainConfig(model=name), 10).train() for _ in range(2)]
            measure_pair(f"{name}, {n} images", models, torch.randn(n, 3, 32, 32))
    measure("Adam step of VGG16", True, plain=adam_step(False), fast=adam_step(True))
    write(options.out, limits=limits, results=results)


if __name__ == "__main__":
    restart_with_allocator()
    main()
