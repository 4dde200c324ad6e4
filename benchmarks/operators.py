"""Says where a training step's time goes, and times what was tried to merge its small passes.

Shares: every operator of a training epoch, forward, backward and optimiser, by kind, each waited
for; without a profiler, whose own memory makes the later steps slower. Merging: batch norm and
ReLU, forward and backward, as the networks have them beside one autograd function and beside
`torch.compile`, taking turns; the library has what wins.

    python benchmarks/operators.py [--out FILE.json] [--repeats 5]
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from loop import noise
from timing import ceilings, flops_of_step, seconds, take_turns, write
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cifar_lib.config import TrainConfig
from cifar_lib.execution import Execution, choose_execution
from cifar_lib.launch import restart_with_allocator
from cifar_lib.train import train_epoch
from cifar_lib.train_state import TrainState

CASES = [  # model, side of its images, images a step
    ("small_cnn", 32, 128), ("resnet18", 32, 128), ("vgg16", 32, 128), ("speed_net", 32, 250),
    ("efficientnet_lite0", 128, 64),
]  # fmt: skip
KINDS = {  # the first whose word stands in an operator's name
    "convolutions": ("convolution", "aten::mm", "aten::bmm"),
    "batch norm": ("batch_norm",),
    "activations": ("relu", "gelu", "hardtanh", "threshold", "clamp"),
    "pooling": ("pool",),
    "copies and fills": ("copy", "clone", "fill", "zero", "pad", "cat"),
    "optimiser": ("_fused",),
}
MAPS = [(64, 32), (128, 16), (256, 8)]  # channels and side, of 64 images each


class Clock(TorchDispatchMode):
    """Adds up the seconds of every operator that is called under it, by kind."""

    def __init__(self, execution: Execution) -> None:
        super().__init__()
        self.execution = execution
        self.seconds = dict.fromkeys([*KINDS, "all else"], 0.0)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result: list[Any] = []
        spent = seconds(lambda: result.append(func(*args, **(kwargs or {}))), self.execution)
        named = (k for k, words in KINDS.items() if any(word in func.name() for word in words))
        self.seconds[next(named, "all else")] += spent
        return result[0]


def shares(model: str, size: int, batch: int, repeats: int) -> dict[str, Any]:
    """Seconds a step by kind of operator, a value a repeat.

    The convolutions' operations are those of their definition, also where minimal filtering makes
    do with fewer.
    """
    config = TrainConfig(model=model, image_size=size, batch_size=batch, val_fraction=0.0)
    execution = choose_execution(config)
    state = TrainState.start(config, 0, noise(batch), execution)
    clocks = [Clock(execution) for _ in range(2 + repeats)]
    for clock in clocks:
        with clock:
            train_epoch(state, execution)
    kinds = clocks[0].seconds
    times = {kind: [clock.seconds[kind] for clock in clocks[2:]] for kind in kinds}  # two warm up
    tflops = flops_of_step(config) / statistics.median(times["convolutions"]) / 1e12
    case = {"model": model, "image_size": size, "batch_size": batch}
    return case | {"seconds": times, "tflops_of_convolutions": tflops}


class NormReLU(torch.autograd.Function):
    """Batch norm and ReLU as one function, its backward pass made of products and two sums."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y, mean, scale = torch.native_batch_norm(x, weight, bias, None, None, True, 0.1, 1e-5)
        ctx.save_for_backward(x, y.clamp_min_(0), weight, mean, scale)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, y, weight, mean, scale = ctx.saved_tensors
        gradient = torch.ops.aten.threshold_backward(gradient, y, 0)
        rows = gradient.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
        pixels = x.permute(0, 2, 3, 1).reshape(rows.shape)
        of_bias = (rows.new_ones(1, len(rows)) @ rows).float()[0]
        of_weight = ((rows.T @ pixels).diagonal().float() - mean * of_bias) * scale
        slope = -weight * scale**2 * of_weight / len(rows)
        shift = -weight * scale * of_bias / len(rows) - slope * mean
        of_x = torch.addcmul(shift.to(x.dtype), pixels, slope.to(x.dtype))
        of_x.addcmul_(rows, (weight * scale).to(x.dtype))
        return of_x.view(x.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2), of_weight, of_bias


def merging(channels: int, side: int, repeats: int) -> dict[str, Any]:
    """Seconds of batch norm with ReLU, forward and backward, as they are and merged."""
    execution = choose_execution(TrainConfig())
    norm = nn.BatchNorm2d(channels, track_running_stats=False).to(execution.device)
    x = torch.randn(64, channels, side, side, device=execution.device, dtype=execution.dtype)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    gradient = torch.randn_like(x)

    def plain(x: Tensor) -> Tensor:
        return F.relu_(norm(x))

    def one_function(x: Tensor) -> Tensor:
        return NormReLU.apply(x, norm.weight, norm.bias)

    def work(function: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        return lambda: function(x).backward(gradient)

    ways = {"plain": plain, "one function": one_function, "compiled": torch.compile(plain)}
    times = take_turns({name: work(way) for name, way in ways.items()}, execution, repeats)
    return {"maps": f"{channels} channels, {side} pixels, 64 images", "seconds": times}


def main() -> None:
    """Measures every network and every merge, prints a line each and writes what was measured."""
    parser = argparse.ArgumentParser(description="Says where a training step's time goes.")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps")
    options = parser.parse_args()
    limits, precision = ceilings(), choose_execution(TrainConfig()).precision
    results = [shares(*case, options.repeats) for case in CASES]
    for result in results:
        median = {k: statistics.median(v) for k, v in result["seconds"].items()}
        total = sum(median.values())
        told = ", ".join(f"{kind} {value / total:.0%}" for kind, value in median.items())
        reached = result["tflops_of_convolutions"] / limits[f"{precision}_tflops"]
        print(f"{result['model']:20}{total:7.3f} s a step: {told}; the convolutions")
        print(f"{'':20}at {reached:.0%} of the {precision} ceiling", flush=True)
    merged = [merging(channels, side, 3 * options.repeats) for channels, side in MAPS]
    for result in merged:
        median = {k: statistics.median(v) for k, v in result["seconds"].items()}
        told = ", ".join(f"{k} {1000 * v:.1f} ms" for k, v in median.items())
        print(f"batch norm and ReLU, {result['maps']}: {told}", flush=True)
    write(options.out, ceilings=limits, results=results, merging=merged)


if __name__ == "__main__":
    restart_with_allocator()
    main()
