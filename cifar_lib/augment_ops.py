"""Operations on uint8 images, batched, each image with its own strength; nothing is drawn here.

Geometry samples the nearest pixel and is black outside the image; colour operations compute
in float32 and cut off the fraction, as torchvision's tensor functions do. No matrix product
or convolution is used: autocast or TF32 would round coordinates and grey levels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def sample(images: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Takes for each output pixel the source pixel at (y, x), black where that is outside.

    Args:
        images: uint8 (N, C, H, W).
        y: rows, whole numbers, that broadcast with `x` to (N, H, W).
        x: columns, likewise.

    Returns:
        uint8 (N, C, H, W).
    """
    n, c, h, w = images.shape
    # One black pixel all round, and everything outside clamped onto it: cheaper than a mask.
    framed = F.pad(images, (1, 1, 1, 1)).flatten(2)
    source = torch.add(x.clamp(-1, w) + (w + 3), y.clamp(-1, h), alpha=w + 2)
    source = source.long().view(n, 1, h * w).expand(-1, c, -1)
    return framed.gather(2, source).view(n, c, h, w)


def warp(images: Tensor, matrix: Tensor) -> Tensor:
    """Warps each image by its own affine matrix.

    Args:
        images: uint8 (N, C, H, W).
        matrix: float32 (N, 2, 3), from output to source coordinates (x, y), pixels from the
            centre of the image.

    Returns:
        uint8 (N, C, H, W).
    """
    h, w = images.shape[-2:]
    x = torch.arange(w, device=images.device) - (w - 1) / 2
    y = torch.arange(h, device=images.device) - (h - 1) / 2
    (xx, xy, x0), (yx, yy, y0) = (row.unbind(1) for row in matrix[:, :, :, None].unbind(1))
    # Adding h/2 is the way back to pixel numbers, (h-1)/2, and the half that makes floor round.
    source_x = ((xx * x)[:, None, :] + (xy * y + x0 + w / 2)[:, :, None]).floor_()
    source_y = ((yx * x)[:, None, :] + (yy * y + y0 + h / 2)[:, :, None]).floor_()
    return sample(images, source_y, source_x)


def affine(images: Tensor, angle: Tensor, scale: Tensor, shear: Tensor) -> Tensor:
    """Shears, rotates and scales each image about its centre.

    Args:
        images: uint8 (N, C, H, W).
        angle: float32 (N,), degrees clockwise.
        scale: float32 (N,), above 0; 2 shows everything twice as large.
        shear: float32 (N,), radians along x.

    Returns:
        uint8 (N, C, H, W), as torchvision's `affine(angle, (0, 0), scale, (shear, 0))`.
    """
    angle = torch.deg2rad(angle)
    cos, sin, tan = angle.cos(), angle.sin(), shear.tan()
    zero = torch.zeros_like(cos)
    # The inverse of rotation times shear, whose determinant is 1.
    to_source = torch.stack(
        [cos - sin * tan, sin + cos * tan, zero, -sin, cos, zero], dim=1
    ) / scale.view(-1, 1)
    return warp(images, to_source.view(-1, 2, 3))


def rotate(images: Tensor, angle: Tensor) -> Tensor:
    """Rotates each image counter-clockwise by its angle (N,), degrees, about its centre."""
    return affine(images, -angle, torch.ones_like(angle), torch.zeros_like(angle))


def shear_x(images: Tensor, slope: Tensor) -> Tensor:
    """Moves row i of each image left by slope * (i + 1/2) pixels; slope float32 (N,)."""
    h = images.shape[-2]
    return _warp_from_identity(images, {(0, 1): slope, (0, 2): slope * (h / 2)})


def shear_y(images: Tensor, slope: Tensor) -> Tensor:
    """Moves column j of each image up by slope * (j + 1/2) pixels; slope float32 (N,)."""
    w = images.shape[-1]
    return _warp_from_identity(images, {(1, 0): slope, (1, 2): slope * (w / 2)})


def translate_x(images: Tensor, pixels: Tensor) -> Tensor:
    """Moves each image right by the whole part of `pixels`, float32 (N,)."""
    return _warp_from_identity(images, {(0, 2): -pixels.trunc()})


def translate_y(images: Tensor, pixels: Tensor) -> Tensor:
    """Moves each image down by the whole part of `pixels`, float32 (N,)."""
    return _warp_from_identity(images, {(1, 2): -pixels.trunc()})


def _warp_from_identity(images: Tensor, entries: dict[tuple[int, int], Tensor]) -> Tensor:
    matrix = torch.eye(2, 3, device=images.device).repeat(len(images), 1, 1)
    for (row, column), value in entries.items():
        matrix[:, row, column] = value
    return warp(images, matrix)


def _blend(images: Tensor, degenerate: Tensor | float, factor: Tensor) -> Tensor:
    factor = factor.view(-1, 1, 1, 1)
    blend = images.float().mul_(factor).add_((1 - factor) * degenerate)
    return blend.clamp_(0, 255).to(torch.uint8)


def _gray(images: Tensor) -> Tensor:
    r, g, b = images.split(1, dim=1)
    return (0.2989 * r).add_(0.587 * g).add_(0.114 * b).to(torch.uint8)


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Multiplies each image by its factor (N,), 0 or more; 1 leaves it as it is."""
    return _blend(images, 0.0, factor)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Moves each image from (factor 0) its mean grey; factor (N,), 1 leaves it as it is."""
    return _blend(images, _gray(images).mean((1, 2, 3), keepdim=True, dtype=torch.float32), factor)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Moves each image from (factor 0) its grey version; factor (N,), 1 leaves it as it is."""
    return _blend(images, _gray(images), factor)


def adjust_sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """Moves each image from (factor 0) a smoothed version; factor (N,), 1 leaves it as it is.

    The smoothing is a 3 x 3 mean whose centre counts five times; border pixels stay.
    """
    x = images.float()
    inner = x[..., 1:-1, 1:-1]
    columns = (x[..., :-2] + x[..., 1:-1]).add_(x[..., 2:])
    box = (columns[..., :-2, :] + columns[..., 1:-1, :]).add_(columns[..., 2:, :])
    smooth = box.add_(inner, alpha=4).div_(13).round_()
    sharper = images.clone()
    sharper[..., 1:-1, 1:-1] = _blend(images[..., 1:-1, 1:-1], smooth, factor)
    return sharper


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Keeps the highest bits (N,), 0..8, of every grey level."""
    mask = 256 - 2 ** (8 - bits.to(torch.int32))
    return images & mask.to(torch.uint8).view(-1, 1, 1, 1)


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Inverts the grey levels that reach the image's threshold (N,), 0..255."""
    reached = images >= threshold.ceil().to(torch.uint8).view(-1, 1, 1, 1)
    return images ^ reached.to(torch.uint8).neg_()  # inverting is XOR with 255


def autocontrast(images: Tensor) -> Tensor:
    """Stretches each channel of each image to 0..255; a flat channel stays."""
    low = images.amin((2, 3), keepdim=True).float()
    high = images.amax((2, 3), keepdim=True).float()
    flat = low == high
    scale = torch.where(flat, 1.0, 255 / (high - low))
    return images.float().sub_(low.masked_fill(flat, 0)).mul_(scale).to(torch.uint8)


def equalize(images: Tensor) -> Tensor:
    """Spreads each channel's grey levels evenly over 0..255, by its histogram."""
    n, c, h, w = images.shape
    pixels = images.reshape(n * c, h * w).long()
    counts = torch.zeros(n * c * 256, dtype=torch.int64, device=images.device)
    # One-dimensional: the form for which CUDA has a deterministic scatter.
    bins = pixels + torch.arange(0, n * c * 256, 256, device=images.device)[:, None]
    counts.scatter_add_(0, bins.view(-1), torch.ones_like(bins).view(-1))
    below = counts.view(n * c, 256).cumsum(1).roll(1, 1)  # pixels darker than each level
    below[:, 0] = 0
    brightest = pixels.amax(1, keepdim=True)
    step = below.gather(1, brightest) // 255
    table = ((below + step // 2) // step.clamp(min=1)).clamp_(max=255)
    equalized = table.gather(1, pixels).to(torch.uint8).view(n, c, h, w)
    return torch.where(step.view(n, c, 1, 1) == 0, images, equalized)
