"""One run trained by several processes (ranks) that torchrun started: DistributedDataParallel.

Every rank draws the same order and the same augmentation of the whole batch, from (seed, epoch)
as one process does, and keeps its own slice: however many the ranks, the images of a step are the
same, MixUp's partners too, at the price that each rank augments them all. What differs from one
process is dropout, drawn by each rank for itself, and batch norm, whose statistics are those of
the slice, as with `micro_batch_size`; its running averages are rank 0's. The rest differs by
rounding alone. A run of one process passes through everything here untouched.

Source: Li et al. 2020, PyTorch Distributed, arXiv 2006.15704 (DistributedDataParallel).
"""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from functools import cache
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cifar_lib.config import TrainConfig
from cifar_lib.execution import choose_execution

T = TypeVar("T")
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SILENCE = timedelta(seconds=45)  # between ranks in step, before a silent one is given up
PATIENCE = timedelta(hours=2)  # for what rank 0 does alone: a download, a slow disk


def rank() -> int:
    """This process's number, 0 for the one that writes and speaks."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """How many processes train together, 1 outside torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def size_here() -> int:
    """How many of them are on this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if dist.is_initialized() else 1


@contextmanager
def joined() -> Iterator[None]:
    """Joins the ranks that torchrun started, until the block ends; without torchrun does nothing.

    An error that all ranks meet alike is left to rank 0 to tell: the others end in silence, with
    the same exit status.

    Raises:
        ValueError: torchrun's variables are there in part, or the ranks do not find each other.
        ConnectionError: another rank ended, or is silent.
    """
    there = [name for name in VARIABLES if os.environ.get(name)]
    if there and len(there) < len(VARIABLES):
        raise ValueError(
            f"torchrun's variables are half set: {', '.join(there)} without "
            f"{', '.join(name for name in VARIABLES if name not in there)}; unset them, or start "
            "with `torchrun --nproc_per_node=N -m cifar_lib train …`"
        )
    if not there or os.environ["WORLD_SIZE"] == "1":
        yield
        return
    _join()
    try:
        yield
    except (ValueError, FloatingPointError, OSError, KeyboardInterrupt) as error:
        if rank() == 0:
            raise
        # Until rank 0 has told it and is gone: torchrun ends all with the first that ends.
        with suppress(RuntimeError, ValueError):
            gather(None)
        raise SystemExit(
            2
            if isinstance(error, ValueError)
            else 130
            if isinstance(error, KeyboardInterrupt)
            else 1
        ) from None
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise ConnectionError(
            f"rank {rank()} of {size()}: another rank ended or is silent, so training stops; "
            "the same command continues from the last epoch"
        ) from error
    dist.destroy_process_group()
    _patient_group.cache_clear()


def _join() -> None:
    cuda, here = torch.cuda.is_available(), os.environ["LOCAL_RANK"]
    try:
        if cuda and int(here) < torch.cuda.device_count():
            torch.cuda.set_device(int(here))
        # torchrun says 1 where OMP_NUM_THREADS is not set: then the cores are divided instead.
        if os.environ.get("OMP_NUM_THREADS") == "1":
            torch.set_num_threads(max(1, _cores() // int(os.environ["LOCAL_WORLD_SIZE"])))
        with _quiet():
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=SILENCE)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"the ranks did not find each other at {os.environ['MASTER_ADDR']}:"
            f"{os.environ['MASTER_PORT']}: {str(error).splitlines()[0]}"
        ) from None


@contextmanager
def _quiet() -> Iterator[None]:
    # The reason for a failure comes as an exception; the C++ below also logs it, with its stack.
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # what a container or taskset leaves, on Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@cache
def _patient_group() -> dist.ProcessGroup:
    return dist.new_group(backend="gloo", timeout=PATIENCE)  # type: ignore[return-value]


def check_divisible(config: TrainConfig, n_train: int | None = None) -> None:
    """Refuses more ranks than a batch or the machine can be divided among.

    Args:
        config: its device, batch_size and micro_batch_size count.
        n_train: training images, once they are known: a batch is never larger.

    Raises:
        ValueError: names batch_size, micro_batch_size or device.
    """
    if size() == 1:
        return
    device = choose_execution(config).device.type
    if device == "mps":
        raise ValueError(f"device: got 'mps' with {size()} ranks; use cpu, or one process")
    if device == "cuda" and size_here() > torch.cuda.device_count():
        raise ValueError(
            f"device: got {size_here()} ranks on a machine with {torch.cuda.device_count()} CUDA "
            "devices; start one rank a device (--nproc_per_node), or use device cpu"
        )
    batch = min(config.batch_size, n_train or config.batch_size)
    if batch % size():
        raise ValueError(
            f"batch_size: got {batch} images a step with {size()} ranks; must be a multiple of them"
        )
    share = config.batch_size // size()
    if config.micro_batch_size and share % config.micro_batch_size:
        raise ValueError(
            f"micro_batch_size: got {config.micro_batch_size} with {size()} ranks; must divide "
            f"a rank's share of the batch, {share}"
        )


def on_main(action: Callable[[], T]) -> T:
    """Lets rank 0 alone do something; every rank gets what it returns, or what it raises.

    Args:
        action: its result and its error must be picklable.
    """
    if size() == 1:
        return action()
    outcome: list[tuple[T | None, Exception | None]] = [(None, None)]
    if rank() == 0:
        try:
            outcome = [(action(), None)]
        except Exception as error:
            outcome = [(None, error)]
    dist.broadcast_object_list(outcome, 0, _patient_group())
    result, failure = outcome[0]
    if failure is not None:
        raise failure
    return result  # type: ignore[return-value]


def gather(value: T) -> list[T]:
    """Every rank's value, in the order of the ranks; tensors are to be on the CPU."""
    values = [value] * size()
    if size() > 1:
        dist.all_gather_object(values, value)
    return values


def shard(batch: Tensor) -> Tensor:
    """This rank's part of (N, …): parts do not overlap and make up the whole.

    Fewer images than ranks are not divided: each rank gets them all.
    """
    return batch.tensor_split(size())[rank()] if len(batch) >= size() else batch


def wrap(model: nn.Module, device: torch.device) -> nn.Module:
    """The model as the loop calls it: its gradients are means over the ranks."""
    if size() == 1:
        return model
    dist.barrier(_patient_group())  # each may have compiled for itself, for minutes
    devices = [torch.cuda.current_device()] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, device_ids=devices)


def gradients_stay(forward: nn.Module, here: bool) -> AbstractContextManager[None]:
    """Within it a backward pass only adds up gradients here: what follows exchanges the sum."""
    return forward.no_sync() if here and size() > 1 else nullcontext()  # type: ignore[operator]


def take_buffers(*models: nn.Module | None) -> None:
    """Gives every rank the buffers of rank 0, so that all evaluate the same model."""
    if size() > 1:
        for model in filter(None, models):
            for buffer in model.buffers():
                sent = buffer.contiguous()
                dist.broadcast(sent, 0)
                buffer.copy_(sent)
