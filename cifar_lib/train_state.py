"""The state of a training: what changes while a run goes on, saved and taken up again."""

import logging
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cifar_lib import checkpoint, distributed, results
from cifar_lib.augment import normalize
from cifar_lib.config import TrainConfig
from cifar_lib.data import ImageSet, Splits, evenly_spread
from cifar_lib.execution import Execution, describe_hardware, training_code_sha256
from cifar_lib.fast import use_fast_paths, use_fast_steps
from cifar_lib.files import shown
from cifar_lib.models import build_model
from cifar_lib.models.speed_net import SpeedNet
from cifar_lib.models.transfer import expected_statistics, load_pretrained
from cifar_lib.optim import build_optimizer

logger = logging.getLogger(__name__)

WHITENING_IMAGES = 5000


def _as_best(metrics: dict[str, Any]) -> dict[str, Any]:
    return {k: metrics[k] for k in ("epoch", "val_accuracy", "val_loss")}


@dataclass
class TrainState:
    """What changes while a run goes on, and what it changes on."""

    config: TrainConfig
    seed: int
    data: ImageSet
    mean: Tensor
    std: Tensor
    model: nn.Module
    forward: nn.Module  # the model, or its compiled form
    optimizer: torch.optim.Optimizer
    average: AveragedModel | None
    scaler: torch.amp.GradScaler
    key: str
    epoch: int
    history: list[dict[str, Any]]
    best: dict[str, Any]
    # Of each training image when last seen, where keep_hardest asks; infinite before that.
    last_losses: Tensor
    pretrained: dict[str, str] | None = None  # the file that the weights began as
    other_load: float = 0.0  # of other processes on the machine, the worst over all resumes
    machines: list[dict[str, Any]] = field(default_factory=list)  # it ran on, the last one here

    @classmethod
    def start(
        cls, config: TrainConfig, seed: int, splits: Splits, execution: Execution
    ) -> "TrainState":
        """Makes the state before the first epoch; the seed decides the initial weights."""
        if config.early_stopping and not len(splits.val):
            raise ValueError("early_stopping: val_fraction leaves no validation image")
        torch.manual_seed(seed)
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        mean, std = expected_statistics(config) or splits.train.statistics
        if not bool((std > 0).all()):
            raise ValueError(
                f"the training images ({splits.info.source}) have a channel that is the same "
                f"everywhere (standard deviations {[round(float(s), 4) for s in std]}): use others"
            )
        model = build_model(config, len(splits.train.class_names))
        pretrained = load_pretrained(model, config)
        if pretrained is None and isinstance(model, SpeedNet):
            some = splits.train.images[evenly_spread(len(splits.train), WHITENING_IMAGES)]
            model.fit_input(normalize(some, mean, std, torch.float32, channels_last=False))
        model = model.to(execution.device, memory_format=layout)  # type: ignore[call-overload]
        optimizer = build_optimizer(model, config)
        if config.channels_last:  # the layout that they are made for
            use_fast_paths(model, execution.device, execution.dtype)
            use_fast_steps(optimizer, execution.device)
        average = None
        if config.ema_decay:
            average = AveragedModel(
                model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay), use_buffers=True
            )
        scaler = torch.amp.GradScaler(
            execution.device.type, enabled=execution.dtype == torch.float16
        )
        return cls(
            config,
            seed,
            splits.train.to(execution.device),
            mean.to(execution.device),
            std.to(execution.device),
            model,
            model,
            optimizer,
            average,
            scaler,
            f"{seed}-{config.fingerprint(splits.info.sha256)}-{training_code_sha256()}",
            epoch=0,
            history=[],
            best={"epoch": 0, "val_accuracy": None, "val_loss": None},
            last_losses=torch.full((len(splits.train),), math.inf, device=execution.device),
            pretrained=pretrained,
            machines=[describe_hardware(execution)],
        )

    @property
    def evaluated_model(self) -> nn.Module:
        """The averaged model where there is one, else the model itself."""
        return self.model if self.average is None else self.average.module

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in an epoch, at least 1."""
        # The incomplete last batch is left out: shapes stay fixed, and each epoch leaves out
        # other images, since each has its own order.
        return max(1, len(self.data) // self.config.batch_size)

    def kept(self, epoch: int) -> int:
        """How many training images an epoch (from 0) draws its batches from."""
        config, n = self.config, len(self.data)
        if config.keep_hardest == 1 or epoch < config.keep_hardest_from:
            return n
        return max(distributed.size(), round(n * config.keep_hardest))

    def batches(self, epoch: int) -> tuple[int, int]:
        """Optimiser steps that an epoch (from 0) makes, and images of each on all ranks."""
        kept = self.kept(epoch)
        size = min(self.config.batch_size, kept - kept % distributed.size())
        return max(1, kept // size), size

    @property
    def stopped_early(self) -> bool:
        """Whether val_accuracy has not improved for as long as `early_stopping` allows."""
        patience = self.config.early_stopping
        return patience > 0 and self.epoch - self.best["epoch"] >= patience

    def record(self, metrics: dict[str, Any]) -> None:
        """Adds an epoch to the history and notes whether validation improved."""
        self.epoch = metrics["epoch"]
        self.history.append(metrics)
        value, best = metrics["val_accuracy"], self.best["val_accuracy"]
        if value is None or best is None or value > best:
            self.best = _as_best(metrics)

    def save(self, run_dir: Path) -> None:
        """Saves the state, then the weights where validation improved, and the history."""
        # The state first: weights of an epoch that no state knows could never be told from
        # those of the best one. What a stop in between leaves out, `resume` makes up for.
        checkpoint.save_checkpoint(run_dir, self.to_dict())
        self._save_results(run_dir)

    def _save_results(self, run_dir: Path) -> None:
        if self.best["epoch"] == self.epoch:
            results.save_weights(run_dir, self.evaluated_model.state_dict(), self.epoch)
        results.save_metrics(run_dir, self.history)

    def to_dict(self) -> dict[str, Any]:
        """Everything that `resume` needs, in tensors and plain values."""
        return {
            "key": self.key,
            "epoch": self.epoch,
            "history": self.history,
            "best": self.best,
            "other_load": self.other_load,
            "machines": self.machines,
            "last_losses": self.last_losses,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.state_dict() if self.average else None,
            "scaler": self.scaler.state_dict(),
        }

    def resume(self, run_dir: Path) -> None:
        """Takes up the state saved in a run's folder, if it is this run's.

        Raises:
            ValueError: a file there is no training state, or not of this model; or the ranks
                of a distributed run differ.
        """
        if len(set(distributed.gather(self.key))) > 1:
            raise ValueError("the ranks differ in code, configuration or data; they must be alike")
        saved = distributed.on_main(lambda: self._load(run_dir))
        if saved is None:
            return
        try:
            self.epoch, self.history, self.best = saved["epoch"], saved["history"], saved["best"]
            # Weights of an epoch after a state that was torn are not those of its best one.
            kept = distributed.on_main(lambda: results.epoch_of_weights(run_dir))
            if (best := self.best["epoch"]) not in (self.epoch, kept):
                logger.warning(
                    "the weights of epoch %d, the best, are lost: those of epoch %d stand for them",
                    *(best, self.epoch),
                )
                self.best = _as_best(self.history[-1])
            self.other_load = saved["other_load"]
            before = saved["machines"]
            self.machines = before + [here for here in self.machines if here != before[-1]]
            if len(self.machines) > len(before):
                logger.warning("begun on %s: times are of both machines", before[-1])
            self.last_losses = saved["last_losses"].to(self.last_losses.device)
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            if self.average is not None:
                self.average.load_state_dict(saved["average"])
            self.scaler.load_state_dict(saved["scaler"])
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"{shown(run_dir)}: its training state does not fit this run ({reason}); "
                f"remove {checkpoint.LAST} and {checkpoint.PREVIOUS} to start again"
            ) from None
        distributed.on_main(lambda: self._save_results(run_dir))
        logger.info("resuming after epoch %d of %d", self.epoch, self.config.epochs)

    def _load(self, run_dir: Path) -> dict[str, Any] | None:
        for stray in run_dir.glob(".*.tmp"):  # of a process killed in the middle of a write
            stray.unlink()
        saved = checkpoint.load_checkpoint(run_dir)
        if saved is not None and (key := saved.get("key")) != self.key:
            aside = checkpoint.set_aside(run_dir, str(key))
            logger.warning(
                "the training state here is of other code or data; it is kept: %s", shown(aside)
            )
            # Its own may wait there, from before the other code was tried.
            own = checkpoint.take_back(run_dir, self.key)
            return checkpoint.load_checkpoint(run_dir) if own else None
        return saved
