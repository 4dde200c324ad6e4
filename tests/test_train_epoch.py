"""One epoch of the loop, and what a training keeps of several: each part held by itself."""

import copy
import dataclasses
import math
import sys

import pytest
import torch
from test_train import StopError, stop_after
from torch import nn

from cifar_lib import distributed, execution, results, train_evaluate
from cifar_lib import train as train_module
from cifar_lib.augment import normalize
from cifar_lib.data import load_splits
from cifar_lib.evaluate import predict_logits
from cifar_lib.execution import Execution, OtherLoad, choose_execution
from cifar_lib.models import build_model
from cifar_lib.predict_stage import evaluate_run
from cifar_lib.train import train, train_epoch
from cifar_lib.train_state import TrainState


def start(config, digits) -> tuple[TrainState, Execution]:
    here = choose_execution(config)
    return TrainState.start(config, 0, digits, here), here


def test_an_epoch_is_that_of_a_plain_loop(digits, tiny):
    """Smoothed loss, the schedule's rate at each step and averaged weights, all written out."""
    config = tiny(
        epochs=4, batch_size=200, translate=0, dropout=0.0, label_smoothing=0.2, momentum=0.8,
        weight_decay=0.01, schedule="warmup_cosine", warmup_epochs=2.0, ema_decay=0.7,
    )  # fmt: skip
    assert len(digits.train) == config.batch_size  # so each epoch is one step, in any order
    state, here = start(config, digits)
    model = build_model(config, 10)
    model.load_state_dict(state.model.state_dict())
    model.train()
    settings = {"momentum": 0.8, "nesterov": True, "weight_decay": 0.01}
    optimizer = torch.optim.SGD(model.parameters(), **settings)
    images = normalize(
        digits.train.images, *digits.train.statistics, torch.float32, channels_last=True
    )
    averages: dict[str, torch.Tensor] = {}
    for epoch, factor in enumerate((0.5, 1.0, 1.0, 0.5)):  # the cosine is half-way at the last
        train_epoch(state, here)
        state.epoch = epoch + 1
        optimizer.param_groups[0]["lr"] = factor * config.learning_rate
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), digits.train.labels, label_smoothing=0.2)
        loss.backward()
        optimizer.step()
        for name, value in model.named_parameters():
            before = averages.get(name, value.detach())
            averages[name] = 0.7 * before + 0.3 * value.detach()
    after = dict(state.model.named_parameters())
    averaged = dict(state.evaluated_model.named_parameters())
    for name, value in model.named_parameters():
        torch.testing.assert_close(after[name], value, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(averaged[name], averages[name], rtol=1e-3, atol=1e-5)


def test_averaged_weights_follow_every_step_by_their_decay(digits, tiny):
    state, here = start(tiny(ema_decay=0.9), digits)
    seen, names = [], ("fc.weight", "features.2.running_mean")
    state.optimizer.register_step_post_hook(
        lambda *_: seen.append({n: state.model.state_dict()[n].clone() for n in names})
    )
    train_epoch(state, here)
    assert len(seen) == 4
    for name in names:
        expected = seen[0][name]
        for step in seen[1:]:
            expected = 0.9 * expected + 0.1 * step[name]
        torch.testing.assert_close(state.evaluated_model.state_dict()[name], expected)


def test_the_schedule_runs_over_the_whole_training(tmp_path, digits, tiny):
    config = tiny(epochs=2, schedule="linear", learning_rate=0.08, backbone_rate=0.5, head_rate=3.0)
    run = train(config, 0, digits, tmp_path)  # on record is the rate itself, no group's own
    assert run.metrics.learning_rate.tolist() == pytest.approx([0.05, 0.01])


def test_the_test_set_is_read_with_the_best_weights(tmp_path, digits, tiny, monkeypatch):
    real = train_module.validate

    def validate(state, *rest):
        return real(state, *rest) | {"val_accuracy": (0.9, 0.1, 0.2)[state.epoch]}

    monkeypatch.setattr(train_module, "validate", validate)
    run = train(tiny(), 0, digits, tmp_path)
    result = run.summary["result"]
    assert (result["best_epoch"], result["val_accuracy"]) == (1, 0.9)
    assert result["val_accuracy_last"] == 0.2
    assert result["test_loss"] == pytest.approx(evaluate_run(run, digits)["test_loss"])


def test_no_two_epochs_of_any_seeds_draw_alike():
    assert len({train_module._epoch_seed(s, e) for s in range(5) for e in range(200)}) == 1000


def test_every_epoch_and_rank_drops_other_features(digits, tiny, monkeypatch):
    state, here = start(tiny(dropout=0.5), digits)
    seeds = []
    state.model.register_forward_pre_hook(lambda *_: seeds.append(torch.initial_seed()))
    monkeypatch.setattr(distributed, "shard", lambda batch: batch)
    for rank, state.epoch in ((0, 0), (0, 1), (1, 0)):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        train_epoch(state, here)
    assert len(set(seeds)) == 3


def test_alternating_flip_goes_by_the_place_in_the_data(digits, tiny, monkeypatch):
    state, here = start(tiny(flip="alternating"), digits)
    real, right = train_module.augment_batch, []

    def keep(images, labels, index, **rest):
        right.append(torch.equal(digits.train.images[index], images))
        return real(images, labels, index, **rest)

    monkeypatch.setattr(train_module, "augment_batch", keep)
    train_epoch(state, here)
    assert right == 4 * [True]


def test_train_accuracy_is_of_the_images_seen(digits, tiny):
    same = dataclasses.replace(digits.train, labels=torch.zeros_like(digits.train.labels))
    config = tiny(batch_size=60, learning_rate=1e-9)  # three steps leave 20 of 200 out
    state, here = start(config, dataclasses.replace(digits, train=same))
    state.model.fc.bias.data[0] = 100
    assert train_epoch(state, here)["train_accuracy"] == 1


def test_a_validation_loss_that_is_not_finite_is_not_recorded(tmp_path, digits, tiny, monkeypatch):
    monkeypatch.setattr(train_evaluate, "cross_entropy", lambda *_: math.inf)
    with pytest.raises(FloatingPointError, match="validation loss .* not finite after epoch 1"):
        train(tiny(), 0, digits, tmp_path)


def test_a_test_loss_that_is_not_finite_is_no_result(tmp_path, digits, tiny, monkeypatch):
    """Without validation nothing else tells of finite weights that went astray."""
    monkeypatch.setattr(train_evaluate, "cross_entropy", lambda *_: math.inf)
    none = dataclasses.replace(digits, val=digits.val.subset(torch.arange(0)))
    with pytest.raises(FloatingPointError, match="test loss are not finite after epoch 2.*lower"):
        train(tiny(epochs=2, val_fraction=0.0), 0, none, tmp_path)
    assert not results.is_finished(tmp_path)


def test_compiling_leaves_the_model_as_it_was(digits, tiny, monkeypatch):
    state, here = start(tiny(compile=True), digits)
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    before = copy.deepcopy(state.model.state_dict())
    train_module._compile(state, here)
    assert all(torch.equal(t, before[n]) for n, t in state.model.state_dict().items())


def test_the_load_of_others_leaves_out_ones_own(monkeypatch):
    moments = iter([(10.0, 4.0, 100.0), (16.0, 6.0, 102.0)])  # busy, of it our own, the clock
    monkeypatch.setattr(OtherLoad, "_now", staticmethod(lambda: next(moments)))
    monkeypatch.setattr(execution.psutil, "cpu_count", lambda: 4)
    assert OtherLoad().share(processes=2) == (6 - 2 * 2) / (2 * 4)


def test_the_worst_load_is_kept_over_a_resume(tmp_path, digits, tiny, monkeypatch):
    loads = iter([0.5, 0.1, 0.2])
    monkeypatch.setattr(OtherLoad, "share", lambda *_: next(loads))
    with monkeypatch.context() as there:
        stop_after(there, 2)
        with pytest.raises(StopError):
            train(tiny(), 0, digits, tmp_path)
    assert train(tiny(), 0, digits, tmp_path).summary["result"]["other_load"] == 0.5


def test_another_split_seed_holds_out_others(digits, tiny):
    assert not torch.equal(load_splits(tiny(split_seed=1)).val.images, digits.val.images)


def test_deterministic_algorithms_are_switched_on_and_off():
    for asked in (True, False):
        execution.prepare_device(Execution(torch.device("cpu"), torch.float32), asked)
        assert torch.are_deterministic_algorithms_enabled() == asked


@pytest.mark.skipif(sys.platform != "linux", reason="threads at work are told on Linux alone")
def test_subnormal_numbers_count_as_zero_only_while_a_model_computes(digits, tiny, request):
    """For every thread of PyTorch's, in training and in evaluation."""
    request.addfinalizer(lambda: torch.set_num_threads(1))
    torch.set_num_threads(2)
    dead, seen = torch.full((10**6,), 1e-39), []
    dead.mul(0.5)  # the threads are at work before
    state, here = start(tiny(), digits)
    state.model.register_forward_hook(lambda *_: seen.append(dead.mul(0.5).count_nonzero().item()))
    train_epoch(state, here)
    steps = len(seen)
    predict_logits(state.model, digits.test.images[:9], mean=state.mean, std=state.std)
    assert len(seen) > steps and set(seen) == {0}
    assert bool(dead.mul(0.5).all()), "left switched on for the rest of the process"
