"""Optimisers do what their names say; schedules keep their bounds and end points."""

import copy
import itertools
import math

import pytest
import torch
from conftest import many
from hypothesis import strategies as st
from torch import nn

from cifar_lib.config import TrainConfig
from cifar_lib.optim import build_optimizer, build_schedule, set_learning_rate

SCHEDULES = [
    "constant",
    "step",
    "exponential",
    "cosine",
    "warmup_cosine",
    "linear",
]


@many(
    100,
    3000,
    name=st.sampled_from(SCHEDULES),
    epochs=st.integers(1, 30),
    steps=st.integers(1, 40),
    warmup=st.floats(0.01, 1),
)
def test_every_factor_lies_in_0_to_1_and_moves_without_a_jump(name, epochs, steps, warmup):
    config = TrainConfig(schedule=name, epochs=epochs, warmup_epochs=warmup * epochs, step_epochs=3)
    factor = build_schedule(config, steps)
    values = [factor(step) for step in range(epochs * steps)]
    assert all(0 <= value <= 1 for value in values)
    moves = [b - a for a, b in itertools.pairwise(values)]
    if name in ("constant", "step", "exponential"):  # falls between epochs alone
        assert values[0] == 1 and all(move <= 0 for move in moves)
        assert not any(move for i, move in enumerate(moves, 1) if i % steps)
        assert name != "constant" or set(values) == {1.0}
        return
    total = epochs * steps
    rise = round(warmup * epochs * steps) if name != "cosine" else 0
    steepest = math.pi / 2 / min(max(1, rise) if rise else total, max(1, total - rise))
    assert all(abs(move) <= steepest + 1e-9 for move in moves)
    assert all(move >= 0 for move in moves[: max(0, rise - 1)])
    assert all(move <= 1e-12 for move in moves[rise:])
    if total - rise > 1:  # the last step's factor is a step above the end point
        assert -1e-9 <= values[-1] <= math.pi / 2 / (total - rise) + 1e-4


@pytest.mark.parametrize("name", ["cosine", "warmup_cosine", "linear"])
def test_smooth_schedules_have_no_jump_and_end_low(name):
    config = TrainConfig(schedule=name, epochs=10, warmup_epochs=2.0)
    factor = build_schedule(config, 100)
    values = [factor(step) for step in range(1000)]
    assert max(abs(b - a) for a, b in zip(values, values[1:], strict=False)) < 0.01
    assert values[-1] < 0.005
    assert max(values) == pytest.approx(1.0)


def test_warmup_rises_to_one_at_its_end():
    factor = build_schedule(TrainConfig(schedule="warmup_cosine", epochs=10, warmup_epochs=2.0), 50)
    assert factor(0) == pytest.approx(0.01)
    assert factor(99) == 1.0
    assert factor(100) == 1.0
    assert factor(101) < 1.0


@pytest.mark.parametrize(
    ("config", "reference"),
    [
        (
            TrainConfig(schedule="step", step_epochs=3, gamma=0.5),
            lambda o: torch.optim.lr_scheduler.StepLR(o, 3, 0.5),
        ),
        (
            TrainConfig(schedule="exponential", gamma=0.9),
            lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
        ),
        (
            TrainConfig(schedule="cosine"),
            lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
        ),
    ],
)
def test_schedules_equal_torchs_when_stepped_once_an_epoch(config, reference):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = reference(optimizer)
    factor = build_schedule(config, 1)
    for epoch in range(config.epochs):
        assert factor(epoch) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "rmsprop"])
def test_an_optimizer_lowers_a_loss(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = build_optimizer(model, TrainConfig(optimizer=name, learning_rate=0.01))
    x, y = torch.randn(64, 4), torch.randint(0, 2, (64,))
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


SETTINGS = {"lr": 0.1, "weight_decay": 0.02}


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("sgd", lambda p: torch.optim.SGD(p, momentum=0.8, nesterov=True, **SETTINGS)),
        ("heavy ball", lambda p: torch.optim.SGD(p, momentum=0.8, **SETTINGS)),
        ("adam", lambda p: torch.optim.Adam(p, **SETTINGS)),
        ("adamw", lambda p: torch.optim.AdamW(p, **SETTINGS)),
        ("rmsprop", lambda p: torch.optim.RMSprop(p, momentum=0.8, **SETTINGS)),
    ],
)
def test_each_optimizer_steps_as_torchs_own_of_that_name(name, reference):
    config = TrainConfig(
        optimizer="sgd" if name == "heavy ball" else name,
        learning_rate=SETTINGS["lr"],
        weight_decay=SETTINGS["weight_decay"],
        momentum=0.8,
        nesterov=name == "sgd",
    )
    torch.manual_seed(0)
    ours = nn.Linear(4, 3)
    theirs = copy.deepcopy(ours)
    for model, optimizer in (
        (ours, build_optimizer(ours, config)),
        (theirs, reference(theirs.parameters())),
    ):
        for step in range(4):
            optimizer.zero_grad()
            model(torch.full((2, 4), 1.0 + step)).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(ours.weight, theirs.weight)
    torch.testing.assert_close(ours.bias, theirs.bias)


def test_weight_decay_keeps_off_norms_and_biases_if_asked():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    config = TrainConfig(weight_decay=0.1, decay_norm_and_bias=False)
    decayed, spared = build_optimizer(model, config).param_groups
    assert [p.ndim for p in decayed["params"]] == [4, 2] and decayed["weight_decay"] == 0.1
    assert [p.ndim for p in spared["params"]] == [1, 1, 1, 1] and spared["weight_decay"] == 0
    assert len(build_optimizer(model, TrainConfig(weight_decay=0.1)).param_groups) == 1
    muon = config.model_copy(update={"optimizer": "muon"})
    filters, spared, head = build_optimizer(model, muon).param_groups
    assert [filters["filters"], spared["filters"], head["filters"]] == [True, False, False]
    assert spared["weight_decay"] == 0 and head["weight_decay"] == 0.1


@pytest.mark.parametrize("name", ["sgd", "muon"])
def test_norms_and_biases_and_the_last_layer_may_have_rates_of_their_own(name):
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 4), nn.Linear(4, 2)
    )
    config = TrainConfig(
        optimizer=name, backbone_rate=0.5, head_rate=8.0, norm_and_bias_rate=3.0, nesterov=True
    )
    optimizer = build_optimizer(model, config)
    set_learning_rate(optimizer, 0.1)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    found = {key: round(rates[id(p)], 6) for key, p in model.named_parameters()}
    assert found == {
        "0.weight": 0.05, "0.bias": 0.15, "1.weight": 0.15, "1.bias": 0.15,
        "3.weight": 0.05, "3.bias": 0.15, "4.weight": 0.8, "4.bias": 2.4,
    }  # fmt: skip


def test_frozen_parameters_are_left_out():
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    groups = build_optimizer(model, TrainConfig()).param_groups
    assert [len(group["params"]) for group in groups] == [1]
