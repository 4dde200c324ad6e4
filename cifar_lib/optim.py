"""Optimisers and learning-rate schedules by name; a schedule is a plain function step → factor."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from cifar_lib.config import TrainConfig
from cifar_lib.models.transfer import last_layer
from cifar_lib.optim_muon import Muon


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Builds the optimiser that a configuration names.

    Args:
        model: its trainable parameters are optimised.
        config: optimizer, learning_rate, momentum, nesterov, weight_decay and
            decay_norm_and_bias are read, and backbone_rate.

    Returns:
        One optimiser; parameters of fewer than two dimensions (norms, biases) form a second
        group without weight decay unless `decay_norm_and_bias`, which Muon takes for granted;
        the backbone forms groups of its own, after the last layer's, if its rate differs.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if config.optimizer == "muon":
        return Muon(
            [p for p in parameters if p.ndim == 4],
            [p for p in parameters if p.ndim != 4],
            config.learning_rate,
            config.momentum,
            config.weight_decay,
        )
    groups: list[dict[str, Any]] = [{"params": parameters, "weight_decay": config.weight_decay}]
    if not config.decay_norm_and_bias:
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
    groups = [group for group in groups if group["params"]]
    if 0 < config.backbone_rate < 1:
        groups = _slow_backbone(model, groups, config.backbone_rate)
    rate = config.learning_rate
    # Fused: one pass over the parameters instead of one an operation.
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            groups, rate, momentum=config.momentum, nesterov=config.nesterov, fused=True
        )
    if config.optimizer == "adam":
        return torch.optim.Adam(groups, rate, fused=True)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, rate, fused=True)
    return torch.optim.RMSprop(groups, rate, momentum=config.momentum)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets one learning rate for all parameter groups, times a group's own factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("rate_factor", 1.0)


def _slow_backbone(
    model: nn.Module, groups: list[dict[str, Any]], factor: float
) -> list[dict[str, Any]]:
    """Parts every group into the last layer's parameters and the others, those at `factor`."""
    head = set(last_layer(model)[1].parameters())
    parts = []
    for rate_factor, in_head in ((1.0, True), (factor, False)):
        for group in groups:
            chosen = [p for p in group["params"] if (p in head) == in_head]
            parts.append(group | {"params": chosen, "rate_factor": rate_factor})
    return [part for part in parts if part["params"]]


def build_schedule(config: TrainConfig, steps_per_epoch: int) -> Callable[[int], float]:
    """Builds the learning-rate schedule that a configuration names.

    Args:
        config: schedule and its parameters, in epochs.
        steps_per_epoch: optimiser steps in an epoch, at least 1.

    Returns:
        A function from the step, 0 .. epochs * steps_per_epoch - 1, to a factor in 0..1 on
        `learning_rate`. step and exponential fall between epochs, as
        torch.optim.lr_scheduler's do when stepped once an epoch; the others move every step.

    Source:
        cosine: Loshchilov and Hutter 2017 (SGDR), equation 5, without restarts; warm-up:
        Goyal et al. 2017, section 2.2.
    """
    total = config.epochs * steps_per_epoch
    warmup = round(config.warmup_epochs * steps_per_epoch)

    def progress(step: int, start: int = 0) -> float:
        return min(1.0, (step - start) / max(1, total - start))

    def cosine(step: int, start: int = 0) -> float:
        return 0.5 * (1 + math.cos(math.pi * progress(step, start)))

    def with_warmup(step: int, then: Callable[[int, int], float]) -> float:
        return (step + 1) / warmup if step < warmup else then(step, warmup)

    schedules: dict[str, Callable[[int], float]] = {
        "constant": lambda step: 1.0,
        "step": lambda step: config.gamma ** (step // steps_per_epoch // config.step_epochs),
        "exponential": lambda step: config.gamma ** (step // steps_per_epoch),
        "cosine": cosine,
        "warmup_cosine": lambda step: with_warmup(step, cosine),
        "linear": lambda step: with_warmup(step, lambda at, start: 1 - progress(at, start)),
    }
    return schedules[config.schedule]
