"""The parts of the speed recipe: whitening, Muon, resolution, keeping the hardest images."""

import pytest
import torch
from torch import nn

from cifar_lib.augment import resize
from cifar_lib.config import ROOT, TrainConfig
from cifar_lib.execution import choose_execution
from cifar_lib.fast import DenseConv2d
from cifar_lib.models import build_model, flops_per_image
from cifar_lib.models.speed_net import Block, SpeedNet
from cifar_lib.optim_muon import Muon, orthogonalize
from cifar_lib.train import _order, train_epoch
from cifar_lib.train_state import TrainState


def state_of(config, digits) -> TrainState:
    return TrainState.start(config, 0, digits, choose_execution(config))


def test_whitened_patches_are_uncorrelated() -> None:
    torch.manual_seed(0)
    images = nn.functional.avg_pool2d(torch.randn(200, 3, 34, 34), 3, 1)  # neighbours agree
    model = SpeedNet(width=0.1)
    model.fit_input(images)
    with torch.no_grad():
        patches = model.whitening(images)  # (N, 24, H - 1, W - 1)
    values = patches.transpose(0, 1).flatten(1)[:12]
    torch.testing.assert_close(values.cov(), torch.eye(12), atol=0.1, rtol=0)
    torch.testing.assert_close(patches[:, 12:], -patches[:, :12])


def test_whitening_stretches_no_direction_beyond_its_epsilon(tiny, digits) -> None:
    lengths = {}
    for epsilon in (None, 5e-4, 0.25):
        config = tiny(model="speed_net", whitening_epsilon=epsilon)
        filters = state_of(config, digits).model.whitening.weight.flatten(1)
        lengths[epsilon] = float(filters.norm(dim=1).max())
    assert lengths[None] == lengths[5e-4] > 2.01 > lengths[0.25]  # 0.25 ** -0.5 at most


def test_a_training_sets_the_whitening_and_never_moves_it(tiny, digits) -> None:
    config = tiny(model="speed_net", optimizer="muon", momentum=0.6, learning_rate=0.1)
    state = state_of(config, digits)
    before = state.model.whitening.weight.clone()
    assert torch.equal(before[12:], -before[:12])
    train_epoch(state, choose_execution(config))
    assert torch.equal(state.model.whitening.weight, before)


@pytest.mark.parametrize(("channels_last", "fast"), [(True, True), (False, False)])
def test_fast_paths_are_for_the_layout_that_they_are_made_for(channels_last, fast, tiny, digits):
    config = tiny(model="speed_net", channels_last=channels_last, optimizer="sgd")
    state = state_of(config, digits)
    assert any(isinstance(m, DenseConv2d) for m in state.model.modules()) == fast
    assert bool(state.optimizer._optimizer_step_pre_hooks) == fast


@pytest.mark.parametrize("side", [17, 24, 32])
def test_one_network_takes_several_resolutions(side: int) -> None:
    assert SpeedNet(width=0.1, depth=3)(torch.randn(2, 3, side, side)).shape == (2, 10)


@pytest.mark.parametrize(
    ("model", "times"),  # its forward pass: 3, less what nothing needs
    [("speed_net", 2.883), ("small_cnn", 2.964), ("efficientnet_lite0", 2.97)],
)
def test_a_step_counts_the_gradients_that_are_computed(model, times, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from timing import flops_of_step

    config = TrainConfig(model=model, batch_size=8, image_size=128 if "eff" in model else 32)
    forward = 8 * flops_per_image(build_model(config, 10))
    assert flops_of_step(config) / forward == pytest.approx(times, abs=0.003)


@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (16, 16)])
def test_orthogonalize_brings_every_singular_value_near_one(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalize(torch.randn(*shape), steps=6))
    assert values.min() > 0.4 and values.max() < 1.6


def test_orthogonalize_keeps_the_directions() -> None:
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(6, 9), full_matrices=False)
    matrix = u @ torch.linspace(1, 2, 6).diag() @ v
    ours = orthogonalize(matrix, steps=5)
    assert torch.nn.functional.cosine_similarity(ours.flatten(), (u @ v).flatten(), dim=0) > 0.97


def test_muon_moves_filters_by_orthogonal_steps_and_the_rest_by_sgd() -> None:
    torch.manual_seed(0)
    filters, bias, twin = (nn.Parameter(torch.randn(*s)) for s in [(4, 3, 3, 3), (5,), (5,)])
    twin.data.copy_(bias.data)
    groups = [
        {"params": [filters], "filters": True, "weight_decay": 0.01},
        {"params": [bias], "filters": False, "weight_decay": 0.01},
    ]
    muon = Muon(groups, lr=0.1, momentum=0.6)
    sgd = torch.optim.SGD([twin], lr=0.1, momentum=0.6, nesterov=True, weight_decay=0.01)
    for _ in range(3):
        filters.grad, bias.grad = torch.randn_like(filters), torch.randn_like(bias)
        twin.grad = bias.grad.clone()
        start = filters.detach() * (2 / filters.detach().norm())
        muon.step()
        sgd.step()
        values = torch.linalg.svdvals((filters.detach() - start).flatten(1)) / 0.1
        assert values.min() > 0.3 and values.max() < 1.6
    torch.testing.assert_close(bias, twin)


def test_muon_has_no_weight_decay_for_filters() -> None:
    # Their norm is set anew in each step; a decay in the gradient would turn the direction.
    torch.manual_seed(0)
    plain, twin = nn.Parameter(torch.randn(4, 3, 3, 3)), nn.Parameter(torch.empty(4, 3, 3, 3))
    twin.data.copy_(plain.data)
    for p, decay in [(plain, 0.0), (twin, 10.0)]:
        muon = Muon([{"params": [p], "filters": True, "weight_decay": decay}], 0.1, 0.6)
        p.grad = torch.ones_like(p)
        muon.step()
    torch.testing.assert_close(plain, twin, rtol=0, atol=0)


def test_resize_averages_and_keeps_a_constant() -> None:
    images = torch.rand(2, 3, 32, 32)
    assert resize(images, 24).shape == (2, 3, 24, 24)
    torch.testing.assert_close(resize(torch.ones(1, 3, 32, 32), 24), torch.ones(1, 3, 24, 24))
    torch.testing.assert_close(resize(images, 24).mean(), images.mean(), atol=0.01, rtol=0)


def test_the_first_epochs_are_small(tiny, digits) -> None:
    config = tiny(model="speed_net", low_resolution=24, low_resolution_epochs=1)
    state, sides = state_of(config, digits), []
    state.model.register_forward_pre_hook(lambda module, x: sides.append(x[0].shape[-1]))
    for _ in range(2):
        train_epoch(state, choose_execution(config))
        state.epoch += 1
    assert sides == [24] * 4 + [32] * 4


def test_later_epochs_keep_the_hardest_alone(tiny, digits) -> None:
    config = tiny(keep_hardest=0.5, keep_hardest_from=1, batch_size=20)
    state, generator = state_of(config, digits), torch.Generator().manual_seed(0)
    assert len(_order(state, generator)) == len(state.data)
    train_epoch(state, choose_execution(config))
    assert state.last_losses.isfinite().sum() == len(state.data) // 20 * 20
    state.epoch = 1
    kept = _order(state, generator)
    assert len(kept) == len(set(kept.tolist())) == round(len(state.data) / 2)
    others = torch.ones(len(state.data), dtype=torch.bool).index_fill(0, kept, False)
    assert state.last_losses[kept].min() >= state.last_losses[others].max()
    assert not torch.equal(kept, kept.sort().values)


def test_images_not_yet_seen_are_kept(tiny, digits) -> None:
    state = state_of(tiny(keep_hardest=0.5, batch_size=70), digits)
    assert state.batches(0) == (2, 70) and state.batches(1) == (1, 70)  # of 200 images, then 100
    for _ in range(9):
        train_epoch(state, choose_execution(state.config))
        state.epoch += 1
    assert state.last_losses.isfinite().all()


def test_fewer_kept_images_than_a_batch_are_a_smaller_batch(tiny, digits) -> None:
    config = tiny(keep_hardest=0.1, batch_size=60, learning_rate=1e-9, label_smoothing=0.0)
    state = state_of(config, digits)
    assert state.batches(0) == (3, 60) and state.batches(1) == (1, 20)
    first = train_epoch(state, choose_execution(config))
    state.epoch = 1
    # The weights hardly move: a mean over the images is about what it was, not a third of it.
    loss = train_epoch(state, choose_execution(config))["train_loss"]
    assert loss == pytest.approx(first["train_loss"], rel=0.2)


def test_the_logits_are_scaled() -> None:
    model, before = SpeedNet(width=0.1), []
    model.fc.register_forward_hook(lambda module, x, y: before.append(y))
    torch.testing.assert_close(9 * model(torch.randn(2, 3, 32, 32)), before[0])


def test_a_deep_block_has_its_skip() -> None:
    block, x = Block(4, 6, 3).eval(), torch.randn(2, 4, 8, 8)
    nn.init.zeros_(block.rest[-1][0].weight)  # silences all but the skip
    torch.testing.assert_close(block(x), block.gelu(block.gelu(block.first(x))))
