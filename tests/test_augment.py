"""The chain of augmentations, and each of those that torchvision's operations do not cover."""

from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as reference
from conftest import many
from hypothesis import strategies as st
from scipy.stats import beta
from torch import Tensor
from torchvision.transforms import RandomErasing
from torchvision.transforms.v2 import CutMix, MixUp

from cifar_lib import augment, augment_mix
from cifar_lib.config import TrainConfig

NOTHING: dict[str, Any] = {"flip": "none", "translate": 0}
# Every augmentation alone, strong enough to be seen.
ALONE: dict[str, dict[str, Any]] = {
    "flip": {"flip": "random"},
    "alternating flip": {"flip": "alternating"},
    "translate": {"translate": 4},
    "reflect": {"translate": 4, "padding": "reflect"},
    "rotate": {"rotate": 30.0},
    "affine": {"affine": 0.3},
    "color_jitter": {"color_jitter": 0.5},
    "randaugment": {"randaugment_ops": 1},
    "cutout": {"cutout": 8},
    "random_erasing": {"random_erasing": 0.7},
    "mixup": {"mixup": 1.0},
    "cutmix": {"cutmix": 1.0},
}
MEAN, STD = torch.tensor([0.49, 0.48, 0.45]), torch.tensor([0.247, 0.243, 0.261])
configs = st.builds(
    TrainConfig,
    flip=st.sampled_from(["none", "random", "alternating"]),
    translate=st.integers(0, 16),
    padding=st.sampled_from(["zeros", "reflect"]),
    rotate=st.sampled_from([0.0, 15.0, 180.0]),
    affine=st.sampled_from([0.0, 0.2, 0.9]),
    color_jitter=st.sampled_from([0.0, 0.4, 1.0]),
    randaugment_ops=st.integers(0, 2),
    randaugment_magnitude=st.integers(0, 30),
    cutout=st.integers(0, 32),
    random_erasing=st.sampled_from([0.0, 0.5, 1.0]),
    mixup=st.sampled_from([0.0, 0.2, 10.0]),
    cutmix=st.sampled_from([0.0, 1.0]),
    channels_last=st.booleans(),
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_images(n: int, h: int = 32, w: int = 32, seed: int = 1) -> Tensor:
    return torch.randint(0, 256, (n, 3, h, w), generator=generator(seed), dtype=torch.uint8)


def augmented(config: TrainConfig, images: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    n = len(images)
    given: dict[str, Any] = {"epoch": 0, "generator": generator(), **options}
    labels, indices = torch.arange(n) % 10, torch.arange(n)
    return augment.augment_batch(
        images, labels, indices, config=config, num_classes=10, mean=MEAN, std=STD, **given
    )


# --- the whole chain ------------------------------------------------------------------------


@many(
    30,
    1000,
    config=configs,
    n=st.integers(1, 20),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_shapes_types_and_ranges(config: TrainConfig, n: int, dtype: torch.dtype) -> None:
    images = random_images(n)
    before = images.clone()
    batch, targets = augmented(config, images, dtype=dtype)
    assert torch.equal(images, before)
    assert batch.shape == (n, 3, 32, 32) and batch.dtype == dtype
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    assert batch.is_contiguous(memory_format=layout)
    low, high = (((v - MEAN) / STD).view(3, 1, 1) for v in (0, 1))
    assert ((batch >= low - 0.02) & (batch <= high + 0.02)).all()
    if config.mixup or config.cutmix:
        assert targets.shape == (n, 10) and targets.dtype == torch.float32
        assert torch.allclose(targets.sum(1), torch.ones(n)) and (targets >= 0).all()
    else:
        assert torch.equal(targets, torch.arange(n) % 10)


@many(30, 1000, config=configs, seed=st.integers(0, 2**32))
def test_a_generator_decides_everything(config: TrainConfig, seed: int) -> None:
    first, second = (
        augmented(config, random_images(5), generator=generator(seed)) for _ in range(2)
    )
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@many(30, 1000, config=configs.map(lambda c: c.model_copy(update={"mixup": 0.0, "cutmix": 0.0})))
def test_an_image_depends_on_no_other_unless_they_are_mixed(config: TrainConfig) -> None:
    images, others = random_images(6), random_images(6, seed=2)
    others[2] = images[2]
    assert torch.equal(augmented(config, images)[0][2], augmented(config, others)[0][2])


@pytest.mark.parametrize("padding", ["zeros", "reflect"])
def test_nothing_is_done_or_drawn_at_zero_strength(padding: str) -> None:
    images, source = random_images(5), generator()
    state = source.get_state()
    config = TrainConfig(**NOTHING, padding=padding)
    batch, targets = augmented(config, images, generator=source)
    assert torch.equal(batch, augment.normalize(images, MEAN, STD, torch.float32, True))
    assert targets.dtype == torch.int64
    assert torch.equal(source.get_state(), state)


@pytest.mark.parametrize("name", ALONE)
def test_each_image_has_its_own_draw(name: str) -> None:
    config = TrainConfig(**{**NOTHING, **ALONE[name]})
    images = random_images(1).repeat(64, 1, 1, 1)
    batch, targets = augmented(config, images)
    if name == "mixup" or name == "cutmix":  # of equal images only the targets tell
        assert len(targets.unique(dim=0)) > 50
        return
    kinds = len(batch.flatten(1).unique(dim=0))
    assert kinds == 2 if "flip" in name else kinds > 10
    again = augmented(config, images, generator=generator(1), epoch=1)[0]
    assert not torch.equal(batch, again)


def test_the_order_is_grey_levels_then_normalised_then_mixed() -> None:
    # What a translation moves in is black; what Cutout takes away is the mean, exactly 0, and
    # would not be were images mixed, or normalised, after it.
    images = random_images(50)
    black = (-MEAN / STD).view(3, 1, 1)
    moved = augmented(TrainConfig(flip="none", translate=16), images)[0]
    assert torch.isclose(moved, black).all(1).sum() > 50 * 200
    cut = augmented(TrainConfig(**NOTHING, cutout=16), images)[0]
    assert (cut == 0).all(1).sum() > 50 * 100
    mixed = augmented(TrainConfig(**NOTHING, cutout=16, mixup=1.0), images)[0]
    assert (mixed == 0).all(1).sum() < 50 * 60  # only where both squares lie


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [True, False])
def test_normalize_is_torchvisions(dtype: torch.dtype, channels_last: bool) -> None:
    images = random_images(7)
    ours = augment.normalize(images, MEAN, STD, dtype, channels_last)
    theirs = reference.normalize(images / 255, MEAN.tolist(), STD.tolist())
    torch.testing.assert_close(
        ours, theirs.to(dtype), atol=2e-2 if dtype != theirs.dtype else 1e-5, rtol=0
    )
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert ours.is_contiguous(memory_format=layout)


# --- flip and translation -------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["zeros", "reflect"])
def test_flip_and_translate_is_torchvisions(padding: str) -> None:
    images, t = random_images(40, 32, 36), 4
    flips = augment.draw_flips(40, generator())
    dx, dy = augment.draw_shifts(40, t, generator())
    ours = augment.flip_and_translate(images, flips, dx, dy, padding)
    for i, image in enumerate(images):
        expected = reference.horizontal_flip(image) if flips[i] else image
        mode = "constant" if padding == "zeros" else "reflect"
        padded = reference.pad(expected, [t], padding_mode=mode)
        expected = reference.crop(padded, t - int(dy[i]), t - int(dx[i]), 32, 36)
        assert torch.equal(ours[i], expected)


def test_flips_and_shifts_are_uniform_and_independent() -> None:
    flips = augment.draw_flips(10_000, generator())
    dx, dy = augment.draw_shifts(9_000, 4, generator())
    assert flips.float().mean() == pytest.approx(0.5, abs=0.02)
    counts = ((dx + 4) * 9 + dy + 4).bincount(minlength=81)  # all 81 shifts, about 111 times
    assert len(counts) == 81 and counts.min() > 60 and counts.max() < 170


def test_alternating_flip_turns_every_image_every_epoch() -> None:
    indices = torch.arange(50_000)
    even, odd = (augment.alternate_flips(indices, epoch) for epoch in (0, 1))
    assert torch.equal(even, ~odd)
    assert torch.equal(even, augment.alternate_flips(indices, 2))
    assert even.float().mean() == pytest.approx(0.5, abs=0.01)
    for lag in (1, 2, 10, 5000):  # neighbours, in particular, are unrelated
        assert (even[lag:] == even[:-lag]).float().mean() == pytest.approx(0.5, abs=0.015)
    order = torch.randperm(50_000, generator=generator())
    assert torch.equal(augment.alternate_flips(order, 0), even[order])  # whatever the batch


# --- what is taken away ---------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 8, 15, 32])
def test_cutout_takes_a_square_whose_centre_is_uniform(size: int) -> None:
    kept = augment.cutout(torch.ones(4000, 3, 16, 20), size, generator())
    assert torch.equal(kept[:, 0], kept[:, 2])
    gone = 1 - kept[:, 0]
    chance = torch.zeros(16, 20)
    for y in range(16):
        for x in range(20):
            top, left = y - size // 2, x - size // 2
            chance[max(top, 0) : top + size, max(left, 0) : left + size] += 1 / 320
    assert gone.sum((1, 2)).max() <= size * size
    assert (gone.mean(0) - chance).abs().max() < 0.045


def test_random_erasing_is_distributed_as_torchvisions() -> None:
    n, h, w = 6000, 32, 12  # so narrow that many candidates do not fit
    gone = 1 - augment.random_erasing(torch.ones(n, 3, h, w), 0.7, generator())[:, 1]
    erased = gone[gone.any(2).any(1)]
    assert len(erased) / n == pytest.approx(0.7, abs=0.02)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        image = torch.zeros(3, h, w)
        draws = [RandomErasing.get_params(image, (0.02, 0.33), (0.3, 3.3)) for _ in range(n)]
    theirs = np.array([draw[:4] for draw in draws])
    rows, columns = erased.any(2).float(), erased.any(1).float()
    sides = rows.argmax(1), columns.argmax(1), rows.sum(1), columns.sum(1)
    ours = torch.stack(sides, 1).double().numpy()
    for box, lost in zip(ours[:50].astype(int).tolist(), erased, strict=False):
        assert torch.equal(
            1 - lost, reference.erase(torch.ones(1, h, w), *box, torch.tensor(0.0))[0]
        )
    assert np.array_equal(ours[:, 2] * ours[:, 3], erased.sum((1, 2)).numpy())  # whole, in place
    assert (ours[:, :2] + ours[:, 2:]).max(0).tolist() == [h, w]
    assert ours[:, 2:].max(0).tolist() == theirs[:, 2:].max(0).tolist()
    assert np.abs(ours.mean(0) - theirs.mean(0)).max() < 0.3, "pixels"
    assert np.abs(np.cov(ours.T) / np.cov(theirs.T) - 1)[range(4), range(4)].max() < 0.1
    assert np.abs(np.corrcoef(ours.T) - np.corrcoef(theirs.T)).max() < 0.06


# --- what is mixed --------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.01, 0.2, 1.0, 4.0])
def test_the_beta_draw_has_its_distribution(alpha: float) -> None:
    draws = augment_mix.draw_beta(100_000, alpha, generator()).double().numpy()
    assert draws.min() >= 0 and draws.max() <= 1
    assert draws.mean() == pytest.approx(0.5, abs=0.006)
    assert draws.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.02)
    points = np.linspace(0.001, 0.999, 50)
    shares = np.searchsorted(np.sort(draws), points) / len(draws)
    assert np.abs(shares - beta(alpha, alpha).cdf(points)).max() < 0.006


@pytest.mark.parametrize(("mixup", "cutmix"), [(1.0, 0.0), (0.0, 1.0), (0.5, 1.0)])
def test_targets_are_mixed_as_the_pixels_are(mixup: float, cutmix: float) -> None:
    n = 200
    images = torch.arange(float(n)).view(n, 1, 1, 1).expand(n, 3, 16, 20).contiguous()
    weights = augment.draw_mix_weights(n, 16, 20, mixup, cutmix, generator())
    mixed, targets = augment.mix(images, torch.eye(n), weights, generator())
    torch.testing.assert_close(mixed.mean((1, 2, 3)), targets @ torch.arange(float(n)))
    partners = targets.clone().fill_diagonal_(0)
    assert ((partners > 0).sum(1) <= 1).all()
    assert ((partners > 0).sum(0) <= 1).all()  # a permutation: nobody is used twice
    assert (partners > 0).any(1).float().mean() > 0.8


def test_a_weight_is_the_share_that_stays() -> None:
    images = random_images(4).float()
    targets = torch.eye(4)
    stays, all_gone = torch.ones(4, 1, 1, 1), torch.zeros(4, 1, 1, 1)
    assert torch.equal(augment.mix(images, targets, stays, generator())[0], images)
    mixed, labels = augment.mix(images, targets, all_gone, generator())
    assert torch.equal(mixed, images[labels.argmax(1)])
    quarter = augment.mix(images, targets, torch.full((4, 1, 1, 1), 0.25), generator())[0]
    torch.testing.assert_close(quarter, 0.25 * images + 0.75 * mixed)


@pytest.mark.parametrize(("mixup", "cutmix"), [(1.0, 0.0), (0.0, 1.0)])
def test_mixing_is_torchvisions_for_the_same_draws(monkeypatch, mixup, cutmix) -> None:
    n, images, targets = 16, random_images(16).float(), torch.eye(16)
    weights = augment.draw_mix_weights(n, *images.shape[2:], mixup, cutmix, generator())
    # Theirs takes the neighbour in the batch for a partner, and one draw for the whole batch.
    monkeypatch.setattr("torch.randperm", lambda n, **_: torch.arange(n).roll(1))
    mixed, labels = augment.mix(images, targets, weights, generator())
    for i, weight in enumerate(weights[:, 0]):
        rows, columns = ((weight == 0).any(side).nonzero()[:, 0] for side in (1, 0))
        draw: dict[str, Any] = {"labels": targets, "batch_size": n, "lam": weight.mean().item()}
        draw["lam_adjusted"] = draw["lam"]
        draw["box"] = [0] * 4
        if len(rows):
            draw["box"] = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        theirs = MixUp(num_classes=n) if mixup else CutMix(num_classes=n)
        torch.testing.assert_close(mixed[i], theirs.transform(images, draw)[i])
        torch.testing.assert_close(labels[i], theirs.transform(targets, draw)[i])


def test_cutmix_takes_one_box_of_the_drawn_area() -> None:
    kept = augment.draw_mix_weights(5000, 32, 48, 0, 1.0, generator())
    gone = 1 - kept[:, 0]
    heights, widths = gone.any(2).sum(1), gone.any(1).sum(1)
    assert torch.equal(heights * widths, gone.sum((1, 2)).long())
    assert heights.max() >= 30 and widths.max() >= 45
    whole = (heights > 0) & ((heights * 1.5 - widths).abs() <= 2)  # the image's shape, not cut
    assert whole.float().mean() > 0.2
    # The areas are uniform. A box of area a covers the middle for a share a of the centres, and
    # a corner for a / 4: means 1/2 and 1/8, a little less as sides are whole pixels.
    assert gone[:, 16, 24].mean() == pytest.approx(0.47, abs=0.03)
    assert gone[:, 0, 0].mean() == pytest.approx(0.12, abs=0.02)


def test_with_both_a_coin_decides_for_each_image() -> None:
    weights = augment.draw_mix_weights(2000, 8, 8, 1.0, 1.0, generator()).flatten(1)
    boxes = ((weights == 0) | (weights == 1)).all(1)
    assert boxes.float().mean() == pytest.approx(0.5, abs=0.04)
    assert (weights[~boxes] == weights[~boxes][:, :1]).all()


# --- on a GPU -------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_every_augmentation_runs_without_a_wait() -> None:
    config = TrainConfig(**{k: v for one in ALONE.values() for k, v in one.items()})
    n, device = 64, torch.device("cuda")
    tensors = [random_images(n), torch.arange(n) % 10, torch.arange(n), MEAN, STD]
    images, labels, indices, mean, std = (t.to(device) for t in tensors)
    results = []
    torch.cuda.set_sync_debug_mode("error")
    try:
        for seed in (0, 0, 1):
            source = torch.Generator(device).manual_seed(seed)
            results.append(
                augment.augment_batch(
                    images, labels, indices, config=config, epoch=0, num_classes=10,
                    mean=mean, std=std, generator=source,
                )[0]
            )  # fmt: skip
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    ("fields", "directly"),
    [
        (
            {"translate": 4, "padding": "reflect"},
            lambda x, g: augment.flip_and_translate(
                x, torch.zeros(20, dtype=torch.bool), *augment.draw_shifts(20, 4, g), "reflect"
            ),
        ),
        ({"rotate": 30.0}, lambda x, g: augment.random_affine(x, 30.0, 0.0, g)),
        ({"affine": 0.3}, lambda x, g: augment.random_affine(x, 0.0, 0.3, g)),
        (
            {"randaugment_ops": 2, "randaugment_magnitude": 9},
            lambda x, g: augment.rand_augment(x, 2, 9, g),
        ),
    ],
)
def test_each_field_reaches_its_augmentation(fields, directly) -> None:
    batch, _ = augmented(TrainConfig(**NOTHING | fields), random_images(20))
    grey = directly(random_images(20), generator())
    assert torch.equal(batch, augment.normalize(grey, MEAN, STD, torch.float32, True))
