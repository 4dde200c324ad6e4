"""Augmentations of normalised images: a part set to the mean colour, or mixed with another image.

Cutout and random erasing; MixUp and CutMix, which are one blend with different weights.
"""

import math

import torch
from torch import Tensor


def cutout(images: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Sets one square of each normalised image to 0, the mean colour.

    The centre is uniform over the pixels, so the square may hang over the edge.

    Args:
        images: float (N, C, H, W), normalised.
        size: side of the square, pixels.
        generator: on the images' device.

    Returns:
        (N, C, H, W).

    Source: DeVries and Taylor 2017, arXiv 1708.04552, section 3.2.
    """
    n, _, h, w = images.shape
    y = torch.randint(h, (n,), generator=generator, device=images.device) - size // 2
    x = torch.randint(w, (n,), generator=generator, device=images.device) - size // 2
    return images * ~_boxes(y, y + size, x, x + size, h, w)


def random_erasing(images: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Sets one rectangle inside each normalised image, or none, to 0, the mean colour.

    It covers 2 to 33 % of the image at an aspect ratio of 0.3 to 3.3.

    Args:
        images: float (N, C, H, W), normalised.
        probability: that an image loses a rectangle, 0..1.
        generator: on the images' device.

    Returns:
        (N, C, H, W), distributed as torchvision's `RandomErasing(probability)`.

    Source: Zhong et al. 2020, arXiv 1708.04896, algorithm 1.
    """
    n, _, h, w = images.shape
    draw = torch.rand(4, n, 10, generator=generator, device=images.device)
    area = h * w * (0.02 + 0.31 * draw[0])
    ratio = torch.exp(math.log(0.3) + math.log(3.3 / 0.3) * draw[1])
    height, width = (area * ratio).sqrt_().round_(), (area / ratio).sqrt_().round_()
    # Ten candidates an image, of which the first that fits counts; torchvision tries as often.
    fits = (height < h) & (width < w)
    first = fits.byte().argmax(1, keepdim=True)
    top, left = (draw[2] * (h - height + 1)).floor_(), (draw[3] * (w - width + 1)).floor_()
    y, x, height, width = (t.gather(1, first)[:, 0] for t in (top, left, height, width))
    coin = torch.rand(n, generator=generator, device=images.device) < probability
    erased = (coin & fits.any(1)).view(-1, 1, 1, 1)
    return images * ~(_boxes(y, y + height, x, x + width, h, w) & erased)


def _boxes(top: Tensor, bottom: Tensor, left: Tensor, right: Tensor, h: int, w: int) -> Tensor:
    rows, columns = (torch.arange(size, device=top.device) for size in (h, w))
    in_rows = (rows >= top[:, None]) & (rows < bottom[:, None])
    in_columns = (columns >= left[:, None]) & (columns < right[:, None])
    return (in_rows[:, :, None] & in_columns[:, None, :])[:, None]  # (N, 1, H, W)


def draw_mix_weights(
    n: int, h: int, w: int, mixup: float, cutmix: float, generator: torch.Generator
) -> Tensor:
    """Draws how much of each image is kept, the rest being its partner's.

    MixUp keeps a share of every pixel, drawn from Beta(mixup, mixup). CutMix keeps all but a
    box whose share of the area, before the edge cuts it, is drawn from Beta(cutmix, cutmix).
    With both, a fair coin decides for each image.

    Args:
        n: images.
        h: their height, pixels.
        w: their width, pixels.
        mixup: alpha of MixUp; 0 is off.
        cutmix: alpha of CutMix; 0 is off.
        generator: on the images' device.

    Returns:
        float32 (N, 1, H, W), or (N, 1, 1, 1) for MixUp alone; 0..1.

    Source: Zhang et al. 2018, arXiv 1710.09412, section 2; Yun et al. 2019, arXiv 1905.04899,
    section 3.1.
    """
    device = generator.device
    if mixup:
        shares = draw_beta(n, mixup, generator).view(-1, 1, 1, 1)
        if not cutmix:
            return shares
    side = (1 - draw_beta(n, cutmix, generator)).sqrt_()
    half_h, half_w = (side * (h / 2)).floor_(), (side * (w / 2)).floor_()
    y = torch.randint(h, (n,), generator=generator, device=device)
    x = torch.randint(w, (n,), generator=generator, device=device)
    outside = (~_boxes(y - half_h, y + half_h, x - half_w, x + half_w, h, w)).float()
    if not mixup:
        return outside
    coin = torch.rand(n, generator=generator, device=device) < 0.5
    return torch.where(coin.view(-1, 1, 1, 1), shares, outside)


def draw_beta(n: int, alpha: float, generator: torch.Generator) -> Tensor:
    """Draws n numbers from Beta(alpha, alpha): float32 (N,), 0..1.

    Source: Bailey 1994, Mathematics of Computation 62, 779-781: a polar form of Student's t,
    of which the symmetric Beta is a function. It holds for every alpha, where a ratio of
    gammas underflows for small ones, and needs uniform numbers only.
    """
    u, v = torch.rand(2, n, generator=generator, device=generator.device)
    t = torch.expm1(-u.log() / alpha).sqrt() * torch.cos(2 * math.pi * v)
    return (1 + t.atan().sin()) / 2  # t / sqrt(1 + t**2), also where t is infinite


def mix(
    images: Tensor, targets: Tensor, weights: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Blends each image, and its target, with another of the batch.

    Args:
        images: float (N, C, H, W), normalised.
        targets: float32 (N, K), rows that sum to one.
        weights: float32 (N, 1, H, W) or (N, 1, 1, 1), what each keeps of its pixels; its
            target keeps their mean.
        generator: on the images' device; it draws the partners, a permutation of the batch.

    Returns:
        Mixed images (N, C, H, W) and targets float32 (N, K).
    """
    partner = torch.randperm(len(images), generator=generator, device=images.device)
    mixed = images.index_select(0, partner).lerp_(images, weights.to(images.dtype))
    kept = weights.mean((1, 2, 3)).view(-1, 1)
    return mixed, targets.index_select(0, partner).lerp_(targets, kept)
