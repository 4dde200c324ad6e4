"""Every operation against torchvision's function on single images, and what is drawn for them."""

import math

import pytest
import torch
import torchvision.transforms.v2.functional as reference
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.autoaugment import RandAugment, _apply_op

from cifar_lib import augment_ops as ops
from cifar_lib import augment_policy as policy


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_pictures(h: int = 32, w: int = 32) -> Tensor:
    """Noise, a flat picture, one with two grey levels, a pale and tinted one, smooth ones."""
    coarse = torch.randint(0, 256, (6, 3, 8, 8), generator=generator(1)).float()
    pictures = torch.nn.functional.interpolate(coarse, size=(h, w), mode="bicubic")
    pictures = pictures.clamp(0, 255).to(torch.uint8)
    pictures[0] = torch.randint(0, 256, (3, h, w), generator=generator(2))
    pictures[1] = 77
    pictures[2] = torch.randint(0, 2, (3, h, w), generator=generator(3)) * 200
    pictures[3] = pictures[3] // 4 + torch.tensor([20, 60, 90]).view(3, 1, 1)
    return pictures


PICTURES = make_pictures()
BLENDS = {"Brightness", "Color", "Contrast", "Sharpness"}  # rounded elsewhere by torchvision
SPACE = RandAugment()._augmentation_space(31, (32, 32))


def levels_apart(ours: Tensor, theirs: Tensor) -> int:
    assert ours.dtype == torch.uint8
    return int((ours.int() - theirs.int()).abs().max())


def off_ties(pictures: Tensor, name: str, slope: float) -> Tensor:
    """Leaves out what a shear takes from midway between two pixels: there rounding decides."""
    shift = slope * (torch.arange(32) + 0.5)
    clear = ((shift % 1) - 0.5).abs() > 1e-4
    if name == "ShearX":
        return pictures[:, :, clear]
    return pictures[:, :, :, clear] if name == "ShearY" else pictures


@pytest.mark.parametrize("name", policy.OPERATIONS)
def test_an_operation_is_torchvisions_at_every_magnitude(name: str) -> None:
    magnitudes, signed = SPACE[name]
    for magnitude in magnitudes.tolist() if magnitudes.ndim else [0.0]:
        for strength in {magnitude, -magnitude if signed else magnitude}:
            ours = policy.OPERATIONS[name](PICTURES, torch.full((6,), float(strength)))
            theirs = torch.stack(
                [_apply_op(p, name, strength, InterpolationMode.NEAREST, None) for p in PICTURES]
            )
            ours, theirs = off_ties(ours, name, strength), off_ties(theirs, name, strength)
            assert levels_apart(ours, theirs) <= (name in BLENDS), strength


@pytest.mark.parametrize("name", policy.OPERATIONS)
def test_an_operation_takes_images_in_any_layout(name: str) -> None:
    strengths = torch.full((6,), 0.5)
    for layout in (torch.channels_last, torch.contiguous_format):
        assert torch.equal(
            policy.OPERATIONS[name](PICTURES.contiguous(memory_format=layout), strengths),
            policy.OPERATIONS[name](PICTURES, strengths),
        )


@pytest.mark.parametrize("name", policy.OPERATIONS)
def test_each_image_has_its_own_strength(name: str) -> None:
    highest = policy.strengths(30, 32, 32)[name][0]
    strength = highest * torch.tensor([0, 0.2, 0.4, 0.6, 0.8, 1])
    one_by_one = [
        policy.OPERATIONS[name](PICTURES[i : i + 1], strength[i : i + 1]) for i in range(6)
    ]
    assert torch.equal(policy.OPERATIONS[name](PICTURES, strength), torch.cat(one_by_one))


@pytest.mark.parametrize("size", [(32, 32), (32, 48)])
def test_the_table_of_strengths_is_torchvisions(size: tuple[int, int]) -> None:
    space = RandAugment()._augmentation_space(31, size)
    assert list(space) == list(policy.OPERATIONS)
    for magnitude in range(31):
        for name, (strength, signed) in policy.strengths(magnitude, *size).items():
            theirs, they_sign = space[name]
            expected = float(theirs[magnitude]) if theirs.ndim else 0.0
            assert (strength, signed) == (pytest.approx(expected, abs=1e-4), they_sign), name


@pytest.mark.parametrize("magnitude", [-1, 31])
def test_a_magnitude_outside_the_bins_is_refused(magnitude: int) -> None:
    with pytest.raises(ValueError, match=rf"magnitude {magnitude} .* 0 to 30"):
        policy.strengths(magnitude, 32, 32)


@pytest.mark.parametrize("size", [(32, 32), (32, 40)])
def test_affine_and_rotate_are_torchvisions(size: tuple[int, int]) -> None:
    pictures = make_pictures(*size).repeat(5, 1, 1, 1)
    draw = torch.rand(3, len(pictures), generator=generator())
    angle, scale, shear = draw[0] * 360 - 180, draw[1] + 0.5, draw[2] * 1.6 - 0.8
    warped = ops.affine(pictures, angle, scale, shear)
    rotated = ops.rotate(pictures, angle)
    differing = 0
    for i, picture in enumerate(pictures):
        degrees = [math.degrees(shear[i]), 0.0]
        theirs = reference.affine(picture, float(angle[i]), [0, 0], float(scale[i]), degrees)
        differing += int((warped[i] != theirs).sum())
        differing += int((rotated[i] != reference.rotate(picture, float(angle[i]))).sum())
    assert differing <= 1e-4 * 2 * pictures.numel()  # a source midway between two pixels


@pytest.mark.parametrize("factor", [0.0, 0.3, 1.0, 1.7])
@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "sharpness"])
def test_an_adjustment_is_torchvisions(name: str, factor: float) -> None:
    ours = getattr(ops, f"adjust_{name}")(PICTURES, torch.full((6,), factor))
    theirs = [getattr(reference, f"adjust_{name}")(p, factor) for p in PICTURES]
    assert levels_apart(ours, torch.stack(theirs)) <= 1
    if factor == 1:
        assert torch.equal(ours, PICTURES)


def test_color_jitter_draws_each_factor_in_its_range() -> None:
    gray = torch.full((2000, 3, 2, 2), 100, dtype=torch.uint8)  # only brightness changes it
    levels = policy.color_jitter(gray, 0.5, generator())[:, 0, 0, 0].float()
    assert 47 <= levels.min() <= 50 and 147 <= levels.max() <= 150  # fractions are cut off
    assert levels.mean() == pytest.approx(99, abs=2)
    assert levels.std() == pytest.approx(100 / math.sqrt(12), abs=1)


def test_color_jitter_moves_contrast_and_saturation_too() -> None:
    pale = PICTURES[3:4].repeat(50, 1, 1, 1)
    jittered = policy.color_jitter(pale, 0.5, generator()).float()
    saturation = jittered.std(1).mean((1, 2)) / jittered.mean(1).std((1, 2))  # of colour alone
    gray = policy.color_jitter(pale[:, :1].repeat(1, 3, 1, 1), 0.5, generator()).float()
    contrast = gray.std((1, 2, 3)) / gray.mean((1, 2, 3))  # not a matter of brightness
    assert saturation.std() / saturation.mean() > 0.2
    assert contrast.std() / contrast.mean() > 0.2


def test_random_affine_draws_angle_scale_and_shear(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Tensor] = []
    monkeypatch.setattr(policy.ops, "affine", lambda images, *draws: drawn.extend(draws))
    policy.random_affine(torch.zeros(4000, 3, 1, 1), 15, 0.1, generator())
    for values, low, high in zip(drawn, (-15, 0.9, -0.1), (15, 1.1, 0.1), strict=True):
        spread = high - low
        assert low <= values.min() < low + spread / 100
        assert high - spread / 100 < values.max() <= high
        assert values.mean() == pytest.approx((low + high) / 2, abs=spread / 50)
    assert (torch.stack(drawn).corrcoef() - torch.eye(3)).abs().max() < 0.06


def test_color_jitter_draws_its_factors_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Tensor] = []
    for name in ("brightness", "contrast", "saturation"):
        monkeypatch.setattr(policy.ops, f"adjust_{name}", lambda x, f: drawn.append(f) or x)
    policy.color_jitter(torch.zeros(4000, 3, 1, 1), 0.5, generator())
    assert (torch.stack(drawn).corrcoef() - torch.eye(3)).abs().max() < 0.06


def test_rand_augment_draws_operations_and_signs_for_each_image(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: dict[int, Tensor] = {}

    def marked(number: int) -> policy.Operation:
        def operate(images: Tensor, strength: Tensor) -> Tensor:
            seen[number] = strength
            images = images.clone()
            images[:, 1] = number
            images[:, 2] += 1
            return images

        return operate

    n = 14_000
    names = list(policy.OPERATIONS)
    for number, name in enumerate(names):
        monkeypatch.setitem(policy.OPERATIONS, name, marked(number))
    images = torch.zeros(n, 3, 2, 2, dtype=torch.uint8)
    images[:, 0] = torch.arange(n).remainder(251).view(-1, 1, 1)
    result = policy.rand_augment(images, 3, 9, generator())
    assert torch.equal(result[:, 0], images[:, 0])  # every image back in its place
    assert (result[:, 2] == 3).all()
    drawn = result[:, 1, 0, 0].long()
    counts = drawn.bincount(minlength=14)
    assert ((counts > 850) & (counts < 1150)).all()
    assert (drawn[1:] == drawn[:-1]).float().mean() == pytest.approx(1 / 14, abs=0.01)
    table = policy.strengths(9, 2, 2)
    for number, name in enumerate(names):
        strength, signed = table[name]
        negative = float((seen[number] < 0).float().mean())
        assert negative == (pytest.approx(0.5, abs=0.08) if signed and strength else 0)
        assert torch.allclose(seen[number].abs(), torch.tensor(strength))


def test_rand_augment_reaches_just_what_torchvision_can_make() -> None:
    picture = PICTURES[0]
    candidates = []
    for name, (magnitudes, signed) in SPACE.items():
        magnitude = float(magnitudes[9]) if magnitudes.ndim else 0.0
        for strength in (magnitude, -magnitude) if signed else (magnitude,):
            candidates.append(_apply_op(picture, name, strength, InterpolationMode.NEAREST, None))
    made = policy.rand_augment(picture.repeat(600, 1, 1, 1), 1, 9, generator())
    apart = torch.stack([(made.int() - c.int()).abs().amax((1, 2, 3)) for c in candidates])
    assert (apart.min(0).values <= 1).all()
    assert (apart.min(1).values <= 1).all()  # and every one of them was made
