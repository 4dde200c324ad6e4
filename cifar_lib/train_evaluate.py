"""What a training's model reaches: on validation every epoch, on test once, at the end."""

import math
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cifar_lib import distributed, results
from cifar_lib.data import ImageSet, Splits, split_train
from cifar_lib.evaluate import accuracy, cross_entropy, predict_logits, top_k_accuracy
from cifar_lib.execution import (
    Execution,
    describe_environment,
    describe_hardware,
    git_commit,
    training_code_sha256,
)
from cifar_lib.models import count_parameters, flops_per_image
from cifar_lib.train_state import TrainState

Metrics = dict[str, Any]


def validate(state: TrainState, val: ImageSet, execution: Execution) -> Metrics:
    """Measures a training's state, unaugmented and in evaluation mode.

    Args:
        state: of the training, after an epoch; its averaged weights where it has them.
        val: the validation part; may be empty.
        execution: device and precision.

    Returns:
        `val_loss` (nats) and `val_accuracy` (0..1), both None where `val` is empty. With
        `measure_train` also `clean_train_loss` and `clean_train_accuracy`: the same on so many
        training images, so that the two differ by the images alone and not by augmentation,
        dropout or weights that still move.

    Raises:
        FloatingPointError: the last step, or validation, went astray.
    """
    metrics = _measure(state, val, execution, "val")
    _check_finite(state, state.epoch + 1, "validation", metrics["val_loss"])
    if n := state.config.measure_train:
        share = min(1.0, n / len(state.data))
        _, clean = split_train(state.data, share, None, state.config.split_seed)
        metrics |= _measure(state, clean, execution, "clean_train")
        _check_finite(state, state.epoch + 1, "clean training", metrics["clean_train_loss"])
    return metrics


def _measure(state: TrainState, images: ImageSet, execution: Execution, name: str) -> Metrics:
    if len(images) == 0:
        return {f"{name}_loss": None, f"{name}_accuracy": None}
    logits, labels = _logits(state, images, execution), images.labels
    return {
        f"{name}_loss": cross_entropy(logits, labels),
        f"{name}_accuracy": accuracy(logits, labels),
    }


def _check_finite(state: TrainState, epoch: int, name: str, loss: float | None) -> None:
    weights = torch.stack([p.detach().isfinite().all() for p in state.model.parameters()])
    if not bool(weights.all()) or (loss is not None and not math.isfinite(loss)):
        raise FloatingPointError(
            f"the weights or the {name} loss are not finite after epoch {epoch}; "
            f"lower learning_rate (now {state.config.learning_rate:g}) or use precision fp32"
        )


def finish(state: TrainState, splits: Splits, execution: Execution, run_dir: Path) -> Metrics:
    """Reads the test set, once, with the weights that validation chose.

    Args:
        state: of the training, ended.
        splits: its data.
        execution: device and precision.
        run_dir: holds the chosen weights; the test logits are saved there.

    Returns:
        The run's summary: `seed`, `result` (a row of a report's `runs`; accuracies 0..1, seconds),
        and what data, model, machine and code it is of.

    Raises:
        FloatingPointError: the test loss is not finite, where no validation had told before.
    """
    config, test = state.config, splits.test
    weights = distributed.on_main(lambda: results.load_weights(run_dir))
    state.evaluated_model.load_state_dict(weights)
    began = time.perf_counter()
    logits = {"test": _logits(state, test, execution)}
    if config.tta != "none":
        logits["test_tta"] = _logits(state, test, execution, tta=True)
    evaluation_seconds = time.perf_counter() - began
    test_loss = cross_entropy(logits["test"], test.labels)
    _check_finite(state, state.best["epoch"], "test", test_loss)
    distributed.on_main(lambda: results.save_logits(run_dir, logits))
    train_seconds = math.fsum(row["seconds"] for row in state.history)
    seen = sum(math.prod(state.batches(epoch)) for epoch in range(state.epoch))
    return {
        "seed": state.seed,
        "result": {
            "seed": state.seed,
            "val_accuracy": state.best["val_accuracy"],
            "test_accuracy": accuracy(logits["test"], test.labels),
            "val_accuracy_last": state.history[-1]["val_accuracy"],
            "test_accuracy_tta": (
                accuracy(logits["test_tta"], test.labels) if "test_tta" in logits else None
            ),
            "test_loss": test_loss,
            "test_top5": top_k_accuracy(logits["test"], test.labels, min(5, len(test.class_names))),
            "best_epoch": state.best["epoch"],
            "epochs": state.epoch,
            "train_seconds": round(train_seconds, 2),
            "evaluation_seconds": round(evaluation_seconds, 2),
            "images_per_second": round(seen / train_seconds, 1),
            "machines": len(state.machines),
        },
        "config_fingerprint": config.fingerprint(splits.info.sha256),
        "dataset": asdict(splits.info),
        "class_names": list(test.class_names),
        "model": {
            "name": config.model,
            "parameters": count_parameters(state.model),
            "flops_per_image": flops_per_image(state.model),
            "weights": state.pretrained,
        },
        "normalization": {"mean": state.mean.tolist(), "std": state.std.tolist()},
        "hardware": describe_hardware(execution) | {"processes": distributed.size()},
        "environment": describe_environment(),
        "git_commit": git_commit(),
        "code_sha256": training_code_sha256(),
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _logits(state: TrainState, images: ImageSet, execution: Execution, tta: bool = False) -> Tensor:
    logits = predict_logits(
        state.evaluated_model,
        distributed.shard(images.images),
        mean=state.mean,
        std=state.std,
        batch_size=state.config.eval_batch_size,
        dtype=execution.autocast_dtype,
        channels_last=state.config.channels_last,
        tta=state.config.tta if tta else "none",
    )
    return torch.cat(distributed.gather(logits))[: len(images)]
