"""What the benchmarks share: a clock, processes of their own, medians, ceilings, the record."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from cifar_lib.config import TrainConfig
from cifar_lib.execution import (
    Execution,
    OtherLoad,
    choose_execution,
    describe_environment,
    describe_hardware,
    git_commit,
)
from cifar_lib.models import STORED_SIZE, build_model

LOAD = OtherLoad()  # from the start of a benchmark


def seconds(work: Callable[[], object], execution: Execution) -> float:
    """How long some work takes until the device is done: by CUDA events, else by the clock."""
    if execution.device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000
    start_time = time.perf_counter()
    work()
    execution.synchronize()
    return time.perf_counter() - start_time


def take_turns(
    works: Mapping[str, Callable[[], object]], execution: Execution, repeats: int
) -> dict[str, list[float]]:
    """Times several pieces of work in turns, after an untimed round: seconds of every repeat."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(repeats + 1):
        for name, work in works.items():
            taken = seconds(work, execution)
            if repeat:
                times[name].append(taken)
    return times


def rate(work: Callable[[], object], images: int, execution: Execution) -> float:
    """Images a second of some work on so many, after an untimed round."""
    work()
    return images / seconds(work, execution)


def in_a_process(script: str, *words: str, variables: Mapping[str, str]) -> list[float]:
    """The numbers that a script prints last, in a fresh process with this allocator and no other.

    Args:
        script: its file.
        words: what follows it on the command line.
        variables: of the environment, as `launch.allocator_settings` gives them; empty for none.
    """
    clean = {k: v for k, v in os.environ.items() if "MALLOC" not in k and k != "LD_PRELOAD"}
    command = [sys.executable, script, *words]
    said = subprocess.run(command, env={**clean, **variables}, check=True, stdout=subprocess.PIPE)
    return [float(word) for word in said.stdout.splitlines()[-1].split()]


def flops_of_step(config: TrainConfig) -> int:
    """Floating-point operations of a training step: forward, and the gradients that it needs.

    A layer's three products are as large as one another; the first trained one needs no gradient
    of its input, a frozen one before it none at all. (FlopCounterMode counts the gradients of
    depthwise convolutions as if they were dense ones.)
    """
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = build_model(config, 10).train()
        model(torch.empty(config.batch_size, 3, STORED_SIZE, STORED_SIZE))
    counts, total, trained_before = counter.get_flop_counts(), 0, False
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
            forward = sum(counts[f"{type(model).__name__}.{name}"].values())
            total += forward * (1 + layer.weight.requires_grad + trained_before)
            trained_before |= layer.weight.requires_grad
    return total


def ceilings(repeats: int = 5) -> dict[str, float]:
    """What the machine reaches: matrix products of 4096³ (2048³ on a CPU), a copy of 512 MiB.

    In bfloat16 only where it is chosen: without instructions for it a product takes minutes.
    """
    execution, result = choose_execution(TrainConfig()), {}
    side = 4096 if execution.device.type == "cuda" else 2048
    a = torch.randn(side, side, device=execution.device)
    b, big = a.to(execution.dtype), torch.zeros(2**27, device=execution.device)
    copy = torch.empty_like(big)
    works = {"fp32": lambda: a @ a, execution.precision: lambda: b @ b}
    times = take_turns(works | {"copy": lambda: copy.copy_(big)}, execution, repeats)
    for name in works:
        result[f"{name}_tflops"] = 2 * side**3 / statistics.median(times[name]) / 1e12
    result["copy_gb_per_second"] = 2 * 4 * 2**27 / statistics.median(times["copy"]) / 1e9
    return result


def spread(values: Sequence[float]) -> str:
    """The median of some rates with the least and the most."""
    return f"{statistics.median(values):,.0f} ({min(values):,.0f} to {max(values):,.0f})"


def write(
    out: Path | None,
    *,
    execution: Execution | None = None,
    load: OtherLoad | None = LOAD,
    **record: Any,
) -> None:
    """Writes what a benchmark measured, with the machine and what else it did meanwhile.

    Args:
        out: JSON file; None writes nothing.
        execution: what was measured on; None is the default configuration's.
        load: the clock of other work, of which it warns; None where it can not tell it apart.
        record: what was measured.
    """
    share = load.share() if load else None
    if share is not None and share > OtherLoad.NEGLIGIBLE:
        print(
            f"other work took {share:.0%} of the machine: these times are no measure of it",
            file=sys.stderr,
        )
    if out is None:
        return
    facts = {
        "hardware": describe_hardware(execution or choose_execution(TrainConfig())),
        "environment": describe_environment(),
        "git_commit": git_commit(),
        "other_load": share,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(facts | record, indent=1) + "\n", "utf-8")
