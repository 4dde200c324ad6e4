"""Augmentation on the device: a uint8 batch in, a normalised batch and its targets out.

Every function is pure and batched; what it draws comes from a `torch.Generator` on the
images' device, one draw **per image**, and nothing makes the host wait for the device.
Here are the whole chain, normalisation, flips and translation; the other augmentations are
in `augment_policy` (on grey levels) and `augment_mix` (on normalised images).
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cifar_lib.augment_mix import cutout, draw_mix_weights, mix, random_erasing
from cifar_lib.augment_ops import sample
from cifar_lib.augment_policy import color_jitter, rand_augment, random_affine
from cifar_lib.config import TrainConfig


def augment_batch(
    images: Tensor,
    labels: Tensor,
    indices: Tensor,
    *,
    config: TrainConfig,
    epoch: int,
    num_classes: int,
    mean: Tensor,
    std: Tensor,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Augments and normalises one batch of training images as the configuration says.

    The order is that of the fields of `TrainConfig`: on grey levels flip, translation, affine,
    colour jitter and RandAugment; then normalisation; on its result Cutout, random erasing,
    MixUp and CutMix. What is zero or "none" is skipped and draws nothing.

    Args:
        images: uint8 (N, 3, H, W), 0..255, on any device; left as they are.
        labels: int64 (N,), 0..K-1.
        indices: int64 (N,), positions in the training set, for alternating flip.
        config: its augmentation fields and `channels_last`.
        epoch: from 0, for alternating flip and the resolution.
        num_classes: K.
        mean: float32 (3,), over [0, 1].
        std: float32 (3,), over [0, 1].
        generator: on the images' device.
        dtype: of the images returned.

    Returns:
        Images of `dtype` (N, 3, H, W), of side `low_resolution` in the first
        `low_resolution_epochs`, channels_last if `config.channels_last`; targets
        int64 (N,), or float32 (N, K) with rows that sum to one where images are mixed.
    """
    n, _, h, w = images.shape
    if config.flip != "none" or config.translate:
        flips = torch.zeros(n, dtype=torch.bool, device=images.device)
        if config.flip == "random":
            flips = draw_flips(n, generator)
        elif config.flip == "alternating":
            flips = alternate_flips(indices, epoch)
        dx, dy = draw_shifts(n, config.translate, generator)
        images = flip_and_translate(images, flips, dx, dy, config.padding)
    if config.rotate or config.affine:
        images = random_affine(images, config.rotate, config.affine, generator)
    if config.color_jitter:
        images = color_jitter(images, config.color_jitter, generator)
    if config.randaugment_ops:
        images = rand_augment(
            images, config.randaugment_ops, config.randaugment_magnitude, generator
        )
    # Plane after plane in float32 until the end: on the CPU the passes below cost about half
    # of what they cost in channels_last, and the one conversion is cheap.
    batch = normalize(images, mean, std, torch.float32, channels_last=False)
    if config.cutout:
        batch = cutout(batch, config.cutout, generator)
    if config.random_erasing:
        batch = random_erasing(batch, config.random_erasing, generator)
    targets = labels
    if config.mixup or config.cutmix:
        soft = F.one_hot(labels, num_classes).float()
        weights = draw_mix_weights(n, h, w, config.mixup, config.cutmix, generator)
        batch, targets = mix(batch, soft, weights, generator)
    if config.low_resolution and epoch < config.low_resolution_epochs:
        batch = resize(batch, config.low_resolution)
    return _convert(batch, dtype, config.channels_last), targets


def normalize(
    images: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype, channels_last: bool
) -> Tensor:
    """Turns grey levels into (x / 255 - mean) / std.

    Args:
        images: uint8 (N, 3, H, W), 0..255.
        mean: float32 (3,), over [0, 1].
        std: float32 (3,), over [0, 1].
        dtype: of the result; computed in float32.
        channels_last: memory format of the result.

    Returns:
        (N, 3, H, W) of `dtype`.
    """
    scale = (1 / (255 * std)).view(1, -1, 1, 1)
    offset = (-mean / std).view(1, -1, 1, 1)
    return _convert(images.float().mul_(scale).add_(offset), dtype, channels_last)


def resize(batch: Tensor, side: int) -> Tensor:
    """Resizes images to a square, bilinear, with antialiasing where they shrink.

    Args:
        batch: float (N, C, H, W), on any device.
        side: of the result, pixels, at least 1.

    Returns:
        (N, C, side, side), of the same type and memory format.
    """
    shrinks = side < max(batch.shape[-2:])
    return F.interpolate(batch, size=(side, side), mode="bilinear", antialias=shrinks)


def _convert(batch: Tensor, dtype: torch.dtype, channels_last: bool) -> Tensor:
    # In two steps: on the CPU a change of type and layout in one takes twice as long.
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return batch.to(dtype).contiguous(memory_format=layout)


def draw_flips(n: int, generator: torch.Generator) -> Tensor:
    """Tosses a fair coin for each of n images: bool (N,)."""
    return torch.rand(n, generator=generator, device=generator.device) < 0.5


def alternate_flips(indices: Tensor, epoch: int) -> Tensor:
    """Flips every image every other epoch, about half of them in the even ones.

    Args:
        indices: int64 (N,), positions in the training set; each fixes its image's first coin.
        epoch: from 0.

    Returns:
        bool (N,), the opposite of what it is an epoch earlier or later.

    Source: Jordan 2024, arXiv 2404.00498, section 3.6; the hash is SplitMix64's.
    """
    mixed = indices * -7046029254386353131  # products wrap around in int64
    mixed = (mixed ^ (mixed >> 29)) * -4658895280553007687
    return ((mixed >> 40) + epoch) % 2 == 1


def draw_shifts(n: int, largest: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draws dx and dy of each image uniformly from -largest..largest: two int64 (N,)."""
    if not largest:
        zero = torch.zeros(n, dtype=torch.int64, device=generator.device)
        return zero, zero
    dx, dy = torch.randint(
        -largest, largest + 1, (2, n), generator=generator, device=generator.device
    )
    return dx, dy


def flip_and_translate(
    images: Tensor, flips: Tensor, dx: Tensor, dy: Tensor, padding: Literal["zeros", "reflect"]
) -> Tensor:
    """Mirrors each image left to right, or not, then moves it by whole pixels.

    Args:
        images: uint8 (N, C, H, W).
        flips: bool (N,).
        dx: int64 (N,), pixels to the right, less than W.
        dy: int64 (N,), pixels down, less than H.
        padding: what moves in: "zeros" is black, grey level 0 before normalisation, as in
            torchvision's `RandomCrop(32, padding=4)`; "reflect" mirrors about the edge pixel.

    Returns:
        uint8 (N, C, H, W).
    """
    h, w = images.shape[-2:]
    rows = torch.arange(h, device=images.device) - dy[:, None]
    columns = torch.arange(w, device=images.device) - dx[:, None]
    if padding == "reflect":
        rows = (h - 1) - ((h - 1) - rows.abs()).abs()
        columns = (w - 1) - ((w - 1) - columns.abs()).abs()
    columns = torch.where(flips[:, None], w - 1 - columns, columns)
    return sample(images, rows[:, :, None], columns[:, None, :])
