"""Training: one visible loop from a configuration, a seed and data to a finished run.

All randomness of an epoch (order, augmentation, dropout) is seeded from (seed, epoch), so a
resumed run continues bit-identically on a CPU from the last finished epoch and no generator
state has to be stored.
"""

import copy
import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from cifar_lib import distributed, results, train_stop
from cifar_lib.augment import augment_batch
from cifar_lib.checkpoint import hold
from cifar_lib.config import TrainConfig
from cifar_lib.data import Splits
from cifar_lib.execution import (
    Execution,
    OtherLoad,
    choose_execution,
    git_commit,
    prepare_device,
)
from cifar_lib.fast_subnormals import subnormals_as_zero
from cifar_lib.models import STORED_SIZE, build_model
from cifar_lib.models.transfer import check_transfer, set_training_mode
from cifar_lib.optim import build_schedule, set_learning_rate
from cifar_lib.train_evaluate import Metrics, finish, validate
from cifar_lib.train_state import TrainState

logger = logging.getLogger(__name__)


def train(
    config: TrainConfig, seed: int, splits: Splits, run_dir: Path, *, progress: bool = False
) -> results.Run:
    """Trains one model, or goes on with it, then reads the test set once.

    Args:
        config: the recipe.
        seed: of the weights, the data order and the augmentation.
        splits: train, val (may be empty) and test; test is read after the last epoch alone.
        run_dir: the run's folder; a training state found there is continued.
        progress: whether to show a bar over the steps of an epoch.

    Returns:
        The finished run, also saved in `run_dir`.

    Raises:
        ValueError: the configuration cannot run here (device, precision, model options).
        FloatingPointError: a loss was not finite; names epoch and step. The last good
            training state stays in `run_dir`.
    """
    distributed.check_divisible(config, len(splits.train))
    with ExitStack() as stack:
        distributed.on_main(lambda: stack.enter_context(hold(run_dir)))
        return _train(config, seed, splits, run_dir, progress)


def _train(
    config: TrainConfig, seed: int, splits: Splits, run_dir: Path, progress: bool
) -> results.Run:
    git_commit()  # kept from here on: what was checked out when the run began
    execution = choose_execution(config)
    state = TrainState.start(config, seed, splits, execution)
    state.resume(run_dir)
    distributed.on_main(lambda: results.save_config(run_dir, config))
    prepare_device(execution, config.deterministic)
    compile_seconds = _compile(state, execution) if config.compile else 0.0
    state.forward = distributed.wrap(state.forward, execution.device)
    load = OtherLoad()
    began = time.perf_counter()

    while state.epoch < config.epochs and not state.stopped_early:
        train_stop.epoch_begins()
        metrics = train_epoch(state, execution, progress)
        metrics |= validate(state, splits.val, execution)
        metrics["seconds"] = time.perf_counter() - began
        began = time.perf_counter()
        state.record(metrics)
        state.other_load = max(state.other_load, load.share(distributed.size_here()))
        distributed.on_main(lambda: state.save(run_dir))
        logger.info(_epoch_line(metrics, config.epochs))
        train_stop.epoch_ended(distributed.gather)

    summary = finish(state, splits, execution, run_dir)
    summary["result"]["compile_seconds"] = round(compile_seconds, 2)
    summary["result"]["other_load"] = round(state.other_load, 3)
    distributed.on_main(lambda: results.save_summary(run_dir, summary))
    logger.info(_result_line(summary["result"]))
    return distributed.on_main(lambda: results.load_run(run_dir))


def check_runnable(config: TrainConfig) -> None:
    """Refuses, before any data is read, what this machine or the named model cannot do.

    Raises:
        ValueError: names the field (model, width, depth, dropout, whitening_epsilon, weights,
            normalization, low_resolution, batch_size, device, precision, deterministic).
    """
    device = choose_execution(config).device
    if config.deterministic and config.model == "speed_net" and device.type == "cuda":
        raise ValueError("deterministic true: speed_net's last pool has no such gradient on CUDA")
    check_transfer(config)
    distributed.check_divisible(config)
    with torch.device("meta"):  # shapes without memory
        model, small = build_model(config, 10), config.small_side
        one = config.backbone_rate > 0 and (config.micro_batch_size or config.batch_size) == 1
        if small or one:
            x = torch.empty(1 if one else 2, 3, small or STORED_SIZE, small or STORED_SIZE)
            try:
                model.train(one)(x)
            except RuntimeError:
                raise ValueError(f"low_resolution {small}: too small for {config.model}") from None
            except ValueError:
                said = f"batch_size: {config.model}'s batch norm needs two images"
                raise ValueError(said) from None


@subnormals_as_zero()
def train_epoch(state: TrainState, execution: Execution, progress: bool = False) -> Metrics:
    """Makes one pass over the training images; waits for the device at its end alone, but in fp16.

    Args:
        state: its model, optimiser and averaged weights move on; its `epoch` does not.
        execution: where and in which precision.
        progress: whether to show a bar over the steps.

    Returns:
        seed, epoch (from 1), learning_rate of the last step, train_loss and train_accuracy.

    Raises:
        FloatingPointError: a loss was not finite; names epoch and step.
    """
    config, seed, epoch, device = state.config, state.seed, state.epoch, execution.device
    factor_at = build_schedule(config, state.steps_per_epoch)
    generator = torch.Generator(device).manual_seed(_epoch_seed(seed, epoch))
    # Dropout draws from the global generator, each rank for its own slice of the batch.
    torch.manual_seed(_epoch_seed(seed, epoch) + (distributed.rank() << 40))
    order = _order(state, generator)
    steps, size = state.batches(epoch)
    losses = torch.zeros(steps, device=device)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    share = size // distributed.size()  # images of a step that are this rank's
    micro = config.micro_batch_size or share
    parts = -(-share // micro)
    set_training_mode(state.model)

    for step in tqdm(
        range(steps), f"epoch {epoch + 1}", leave=False, unit="step", disable=not progress
    ):
        done = (epoch + step / steps) * state.steps_per_epoch
        rate = config.learning_rate * factor_at(round(done))
        set_learning_rate(state.optimizer, rate)
        index = order[step * size : (step + 1) * size]
        images, targets = augment_batch(
            state.data.images.index_select(0, index),
            state.data.labels[index],
            index,
            config=config,
            epoch=epoch,
            num_classes=len(state.data.class_names),
            mean=state.mean,
            std=state.std,
            generator=generator,
            dtype=execution.dtype,
        )
        images, targets, index = map(distributed.shard, (images, targets, index))
        state.optimizer.zero_grad(set_to_none=True)
        for part, (x, y, which) in enumerate(
            zip(images.split(micro), targets.split(micro), index.split(micro), strict=True), 1
        ):
            with distributed.gradients_stay(state.forward, part < parts):
                with execution.autocast():
                    logits = state.forward(x).float()
                each = F.cross_entropy(
                    logits, y, label_smoothing=config.label_smoothing, reduction="none"
                )
                loss = each.sum() / share
                state.scaler.scale(loss).backward()
            if config.keep_hardest < 1:
                state.last_losses[which] = each.detach()
            losses[step] += loss.detach()
            hard = y if y.ndim == 1 else y.argmax(1)
            correct += (logits.detach().argmax(1) == hard).sum()
        state.scaler.step(state.optimizer)
        state.scaler.update()
        if state.average is not None:
            state.average.update_parameters(state.model)

    distributed.take_buffers(state.model, state.average)
    if distributed.size() > 1 and config.keep_hardest < 1:
        _exchange_losses(state, order.split(size)[:steps])
    by_step = torch.stack(distributed.gather(losses.cpu())).mean(0)
    if not bool(torch.isfinite(by_step).all()):
        step = int((~torch.isfinite(by_step)).nonzero()[0])
        raise FloatingPointError(
            f"the training loss is not finite at epoch {epoch + 1}, step {step + 1} of {steps}; "
            f"lower learning_rate (now {config.learning_rate:g}) or use precision fp32"
        )
    return {
        "seed": seed,
        "epoch": epoch + 1,
        "learning_rate": rate,
        "train_loss": float(by_step.mean()),
        "train_accuracy": sum(distributed.gather(int(correct))) / (steps * size),
    }


def _order(state: TrainState, generator: torch.Generator) -> Tensor:
    """The training images of an epoch, in its order: all, or those that were hardest last."""
    n = len(state.data)
    order = torch.randperm(n, generator=generator, device=state.data.images.device)
    if (kept := state.kept(state.epoch)) == n:
        return order
    hardest = state.last_losses.topk(kept).indices
    chosen = torch.zeros(n, dtype=torch.bool, device=order.device).index_fill(0, hardest, True)
    return order[chosen[order]]


def _exchange_losses(state: TrainState, batches: Sequence[Tensor]) -> None:
    """Brings every rank the losses of the images that the others had, batch after batch."""
    last = state.last_losses
    by_rank = [losses.to(last.device) for losses in distributed.gather(last.cpu())]
    for index in batches:
        for part, losses in zip(index.tensor_split(len(by_rank)), by_rank, strict=True):
            last[part] = losses[part]


def _epoch_seed(seed: int, epoch: int) -> int:
    return seed * 1_000_003 + epoch


def _compile(state: TrainState, execution: Execution) -> float:
    """Compiles the model and runs it once, untimed by the loop; leaves the weights as they were."""
    began = time.perf_counter()
    torch.compiler.reset()  # a process compiles a model's code a few times, then it runs as it is
    config, side = state.config, state.data.images.shape[-1]
    share = state.batches(0)[1] // distributed.size()
    size = config.micro_batch_size or share
    mode = None
    if execution.device.type == "cuda" and not config.deterministic:
        # Tuned by the clock, so another run may choose other kernels. With CUDA graphs a step is
        # one launch, not hundreds; but a graph's gradients are overwritten when it runs again, so
        # they cannot add up over micro-batches.
        mode = "max-autotune" if size == share else "max-autotune-no-cudagraphs"
    state.forward = torch.compile(state.model, mode=mode, dynamic=False)  # type: ignore[assignment]
    before = copy.deepcopy(state.model.state_dict())
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    set_training_mode(state.model)  # as in an epoch: another mode would be compiled anew there
    for pixels in {side, config.small_side or side}:
        x = torch.zeros(size, 3, pixels, pixels, dtype=execution.dtype)
        x = x.to(execution.device, memory_format=layout)
        try:
            with execution.autocast():
                state.forward(x).float().sum().backward()
        except torch._dynamo.exc.TorchDynamoException as error:
            if isinstance(full := getattr(error, "inner_exception", None), torch.OutOfMemoryError):
                raise full from None
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"compile true: {reason}; set it to false, or mend that") from None
        state.optimizer.zero_grad(set_to_none=True)  # a graph's gradients do not outlive the next
    state.model.load_state_dict(before)
    execution.synchronize()
    return time.perf_counter() - began


def _result_line(result: Metrics) -> str:
    val = "no validation"
    if result["val_accuracy"] is not None:
        val = (
            f"best val accuracy {100 * result['val_accuracy']:.2f} % (epoch "
            f"{result['best_epoch']}), last {100 * result['val_accuracy_last']:.2f} %"
        )
    return (
        f"seed {result['seed']} done after epoch {result['epochs']}: {val}; "
        f"test accuracy {100 * result['test_accuracy']:.2f} %, loss {result['test_loss']:.4f}"
    )


def _epoch_line(metrics: Metrics, epochs: int) -> str:
    val = "no validation"
    if metrics["val_accuracy"] is not None:
        val = f"val loss {metrics['val_loss']:.4f}, accuracy {100 * metrics['val_accuracy']:.2f} %"
    return (
        f"seed {metrics['seed']} epoch {metrics['epoch']}/{epochs}: "
        f"train loss {metrics['train_loss']:.4f}, accuracy {100 * metrics['train_accuracy']:.2f} %"
        f"; {val}; {metrics['seconds']:.1f} s"
    )
