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
            decay_norm_and_bias are read, backbone_rate, head_rate and norm_and_bias_rate.

    Returns:
        One optimiser, with a group for all parameters that share their rate, their weight decay
        and, under Muon, what moves them.
    """
    groups, rate = _groups(model, config), config.learning_rate
    if config.optimizer == "muon":
        return Muon(groups, rate, config.momentum)
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
        group["lr"] = rate * group["rate_factor"]


def _groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """The trainable parameters by factor on the rate, weight decay and whether Muon moves them."""
    head = set(last_layer(model)[1].parameters())
    by_muon = config.optimizer == "muon"
    found: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for p in filter(lambda p: p.requires_grad, model.parameters()):
        factor = config.head_rate if p in head else config.backbone_rate
        factor *= config.norm_and_bias_rate if p.ndim < 2 else 1.0
        decay = config.weight_decay if p.ndim > 1 or config.decay_norm_and_bias else 0.0
        found.setdefault((factor, decay, by_muon and p.ndim == 4), []).append(p)
    return [
        {"params": group, "rate_factor": factor, "weight_decay": decay, "filters": filters}
        for (factor, decay, filters), group in found.items()
    ]


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
