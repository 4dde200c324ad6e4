"""Colour jitter and RandAugment: what is drawn for the operations of `augment_ops`."""

import hashlib
import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from cifar_lib import augment_ops as ops

Operation = Callable[[Tensor, Tensor], Tensor]

# RandAugment's operations in torchvision's order: images and strengths (N,) to images.
OPERATIONS: dict[str, Operation] = {
    "Identity": lambda images, _: images,
    "ShearX": ops.shear_x,
    "ShearY": ops.shear_y,
    "TranslateX": ops.translate_x,
    "TranslateY": ops.translate_y,
    "Rotate": ops.rotate,
    "Brightness": lambda images, strength: ops.adjust_brightness(images, 1 + strength),
    "Color": lambda images, strength: ops.adjust_saturation(images, 1 + strength),
    "Contrast": lambda images, strength: ops.adjust_contrast(images, 1 + strength),
    "Sharpness": lambda images, strength: ops.adjust_sharpness(images, 1 + strength),
    "Posterize": ops.posterize,
    "Solarize": ops.solarize,
    "AutoContrast": lambda images, _: ops.autocontrast(images),
    "Equalize": lambda images, _: ops.equalize(images),
}
BINS = 31  # magnitudes 0..30


def strengths(magnitude: int, height: int, width: int) -> dict[str, tuple[float, bool]]:
    """Says what a magnitude means for each of RandAugment's operations.

    Args:
        magnitude: bin, 0..30.
        height: of the images, pixels.
        width: of the images, pixels.

    Returns:
        For each name in `OPERATIONS` the strength (slope, pixels, degrees, change of factor,
        bits or grey level) and whether its sign is drawn.

    Source: Cubuk et al. 2020, arXiv 1909.13719; the table of torchvision's `RandAugment`.
    """
    if not 0 <= magnitude < BINS:
        raise ValueError(f"magnitude {magnitude} must be a bin from 0 to {BINS - 1}")
    share = magnitude / (BINS - 1)
    most = {
        "ShearX": 0.3,
        "ShearY": 0.3,
        "TranslateX": 150 / 331 * width,
        "TranslateY": 150 / 331 * height,
        "Rotate": 30.0,
        "Brightness": 0.9,
        "Color": 0.9,
        "Contrast": 0.9,
        "Sharpness": 0.9,
    }
    table = {name: (most.get(name, 0.0) * share, name in most) for name in OPERATIONS}
    table["Posterize"] = (8.0 - round(4 * share), False)
    table["Solarize"] = (255 * (1 - share), False)
    return table


def rand_augment(
    images: Tensor, operations: int, magnitude: int, generator: torch.Generator
) -> Tensor:
    """Applies to each image so many operations of its own, one after the other.

    Args:
        images: uint8 (N, 3, H, W).
        operations: how many, each drawn uniformly from the 14, with replacement.
        magnitude: bin, 0..30, the same for all; its sign is a coin where the table says so.
        generator: on the images' device.

    Returns:
        uint8 (N, 3, H, W).

    Source: Cubuk et al. 2020, arXiv 1909.13719, with torchvision's table (31 bins).
    """
    n, _, h, w = images.shape
    table = strengths(magnitude, h, w)
    level = torch.tensor([strength for strength, _ in table.values()])
    signed = torch.tensor([has_sign for _, has_sign in table.values()])
    host = _host_generator(generator)
    for _ in range(operations):
        drawn = torch.randint(len(OPERATIONS), (n,), generator=host)
        negative = torch.rand(n, generator=host) < 0.5
        order = drawn.argsort()
        strength = torch.where(negative & signed[drawn], -level[drawn], level[drawn])[order]
        ends = drawn.bincount(minlength=len(OPERATIONS)).cumsum(0).tolist()
        images = images.index_select(0, _to_device(order, images))
        strength = _to_device(strength, images)
        done = [
            operate(images[start:end], strength[start:end])
            for operate, (start, end) in zip(
                OPERATIONS.values(), itertools.pairwise([0, *ends]), strict=True
            )
            if end > start
        ]
        images = torch.cat(done).index_select(0, _to_device(order.argsort(), images))
    return images


def _host_generator(generator: torch.Generator) -> torch.Generator:
    """Returns a CPU generator that follows from the state of one on any device.

    How many images an operation gets decides shapes, which the host must know: drawn on an
    accelerator, each of these counts would stop it until its queue is empty.
    """
    if generator.device.type == "cpu":
        return generator
    state = generator.get_state().numpy().tobytes()  # kept on the host, nothing waits
    torch.rand(1, generator=generator, device=generator.device)  # so the next state differs
    seed = int.from_bytes(hashlib.sha256(state).digest()[:7], "big")
    return torch.Generator().manual_seed(seed)


def _to_device(values: Tensor, images: Tensor) -> Tensor:
    # CUDA stages pageable memory at once, so that it may be dropped; others may read it later.
    return values.to(images.device, non_blocking=images.device.type == "cuda")


def color_jitter(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Changes brightness, contrast and saturation of each image, in this order.

    torchvision's `ColorJitter` draws the order too; here it is fixed.

    Args:
        images: uint8 (N, 3, H, W).
        strength: s, 0..1; the three factors are uniform in 1 - s..1 + s.
        generator: on the images' device.

    Returns:
        uint8 (N, 3, H, W).
    """
    draw = torch.rand(3, len(images), generator=generator, device=images.device)
    brightness, contrast, saturation = 1 + strength * (2 * draw - 1)
    images = ops.adjust_brightness(images, brightness)
    images = ops.adjust_contrast(images, contrast)
    return ops.adjust_saturation(images, saturation)


def random_affine(
    images: Tensor, degrees: float, strength: float, generator: torch.Generator
) -> Tensor:
    """Rotates, scales and shears each image about its centre.

    Args:
        images: uint8 (N, 3, H, W).
        degrees: largest rotation, either way.
        strength: a, 0 up to but not including 1; scale is uniform in 1 - a..1 + a, shear
            along x uniform in -a..a radians.
        generator: on the images' device.

    Returns:
        uint8 (N, 3, H, W), black where the image does not reach; distributed as torchvision's
        `RandomAffine(degrees, scale=(1 - a, 1 + a), shear=math.degrees(a))`.
    """
    draw = torch.rand(3, len(images), generator=generator, device=images.device)
    angle, scale, shear = 2 * draw - 1
    return ops.affine(images, degrees * angle, 1 + strength * scale, strength * shear)
