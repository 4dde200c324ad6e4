"""Convolutions of small maps as one matrix product with the unfolded maps.

On small maps unfolding costs next to nothing, and a product keeps the processor's units full, which
oneDNN's convolutions do not. Each equals PyTorch's by test; `fast.py` says where which of them is
taken.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
) -> Tensor:
    """Computes a dense convolution.

    Args:
        x: (N, c_in, H, W), channels_last.
        weight: (c_out, c_in, kh, kw), channels_last, of the dtype of `x`.
        bias: (c_out,), or None.
        stride: in pixels, vertical and horizontal.
        padding: zeros on each side, pixels, vertical and horizontal.

    Returns:
        (N, c_out, H', W'), channels_last, of the dtype of `x`.
    """
    seen, size = _unfold(x, weight.shape[2:], stride, padding)
    # No view: who calls this may change it in place.
    shape = len(x), len(weight), *size
    y = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)
    rows, filters = y.permute(0, 2, 3, 1).view(len(seen), -1), weight.permute(0, 2, 3, 1).flatten(1)
    if bias is None:
        torch.mm(seen, filters.T, out=rows)
    else:
        torch.addmm(bias, seen, filters.T, out=rows)
    return y


def input_gradient(gradient: Tensor, weight: Tensor, padding: tuple[int, int]) -> Tensor:
    """Computes the input gradient of a convolution of stride 1: one with its filters turned round.

    Args:
        gradient: of the output (N, c_out, H', W'), channels_last.
        weight: (c_out, c_in, kh, kw), channels_last, of the dtype of `gradient`.
        padding: of the convolution, less than its kernel, pixels, vertical and horizontal.

    Returns:
        (N, c_in, H, W), channels_last, of the dtype of `gradient`.
    """
    kernel = weight.shape[2:]
    rest = kernel[0] - 1 - padding[0], kernel[1] - 1 - padding[1]
    seen, size = _unfold(gradient, kernel, (1, 1), rest)
    x = seen @ weight.permute(2, 3, 0, 1).flip(0, 1).flatten(0, 2)  # (kh · kw · c_out, c_in)
    return x.view(len(gradient), *size, -1).permute(0, 3, 1, 2)


def weight_gradient(
    x: Tensor,
    gradient: Tensor,
    kernel: tuple[int, ...],
    stride: tuple[int, int],
    padding: tuple[int, int],
) -> Tensor:
    """Computes the weight gradient of a dense convolution.

    Args:
        x: the input (N, c_in, H, W), channels_last.
        gradient: of the output (N, c_out, H', W'), channels_last.
        kernel: height and width.
        stride: in pixels, vertical and horizontal.
        padding: zeros on each side, pixels, vertical and horizontal.

    Returns:
        (c_out, c_in, *kernel), channels_last, of the dtype of `x`.
    """
    rows = gradient.permute(0, 2, 3, 1).flatten(0, 2)
    product = rows.T @ _unfold(x, kernel, stride, padding)[0]  # (c_out, kh · kw · c_in)
    return product.view(gradient.shape[1], *kernel, x.shape[1]).permute(0, 3, 1, 2)


def _unfold(
    x: Tensor, kernel: tuple[int, ...], stride: tuple[int, int], padding: tuple[int, int]
) -> tuple[Tensor, tuple[int, int]]:
    """What each output pixel sees, (N · H' · W', kh · kw · c), and the output's size (H', W')."""
    borders = (0, 0, padding[1], padding[1], padding[0], padding[0])
    padded = F.pad(x.permute(0, 2, 3, 1), borders).contiguous()  # as maps of one pixel are not
    n, height, width, c = padded.shape
    size = (height - kernel[0]) // stride[0] + 1, (width - kernel[1]) // stride[1] + 1
    row = width * c
    seen = padded.as_strided(
        (n, *size, *kernel, c), (height * row, stride[0] * row, stride[1] * c, row, c, 1)
    )
    return seen.reshape(n * size[0] * size[1], -1), size
