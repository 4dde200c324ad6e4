"""Gradients of depthwise convolutions, made of what the library has fast kernels for.

Each equals PyTorch's by test; `fast.py` says where which of them is taken.
"""

from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

COLUMNS = 3  # taps: the width of the widest kernel whose weight gradient is fast


def input_gradient(
    gradient: Tensor,
    weight: Tensor,
    size: tuple[int, ...],
    stride: tuple[int, int],
    padding: tuple[int, int],
) -> Tensor:
    """Computes a depthwise convolution's input gradient by forward passes of stride 1.

    Of the kernel, turned by half, every stride-th tap reaches every stride-th input pixel: one
    small pass for each place a pixel can have between two steps.

    Args:
        gradient: of the output (N, c, H', W'), channels_last.
        weight: (c, 1, kh, kw).
        size: height and width of the input.
        stride: in pixels, vertical and horizontal.
        padding: zeros on each side, less than the kernel, pixels, vertical and horizontal.

    Returns:
        (N, c, *size), channels_last, of the dtype of `gradient`.
    """
    n, c = gradient.shape[:2]
    result = gradient.new_zeros(n, *size, c).permute(0, 3, 1, 2)
    for place in product(*map(range, stride)):
        taps = weight[:, :, place[0] :: stride[0], place[1] :: stride[1]].flip(2, 3)
        if not taps.numel():
            continue
        full = (taps.shape[2] - 1, taps.shape[3] - 1)
        part = F.conv2d(gradient, taps, padding=full, groups=c)
        # part[i] belongs to input pixel i * stride + place - padding
        skip = [max(0, -(-(p - at) // s)) for p, at, s in zip(padding, place, stride, strict=True)]
        top, left = (
            i * s + at - p for i, s, at, p in zip(skip, stride, place, padding, strict=True)
        )
        target = result[:, :, top :: stride[0], left :: stride[1]]
        part = part[:, :, skip[0] :, skip[1] :][:, :, : target.shape[2], : target.shape[3]]
        target[:, :, : part.shape[2], : part.shape[3]] = part
    return result


def weight_gradient(
    x: Tensor,
    gradient: Tensor,
    kernel: tuple[int, ...],
    stride: tuple[int, int],
    padding: tuple[int, int],
) -> Tensor:
    """Computes a depthwise convolution's weight gradient in strips of at most 3 columns of taps.

    Args:
        x: the input (N, c, H, W), channels_last.
        gradient: of the output (N, c, H', W'), channels_last.
        kernel: height and width.
        stride: in pixels, vertical and horizontal.
        padding: zeros on each side, pixels, vertical and horizontal.

    Returns:
        (c, 1, *kernel), of the dtype of `x`.
    """
    (n, c, h, w), (kh, kw), w_out = x.shape, kernel, gradient.shape[3]

    def strip(seen: Tensor, width: int) -> Tensor:
        return torch.ops.aten.convolution_backward(
            gradient, seen, x.new_empty(c, 1, kh, width), None, stride, (0, 0), (1, 1), False,
            (0, 0), c, (False, True, False),
        )[1]  # fmt: skip

    if kw <= COLUMNS and padding == (0, 0):
        return strip(x, kw)
    strips = []
    for left in range(0, kw, COLUMNS):
        width = min(COLUMNS, kw - left)
        start = left - padding[1]
        end = start + (w_out - 1) * stride[1] + width
        low = min(max(start, 0), w)  # a strip may lie wholly beside a narrow map
        high = max(low, min(end, w))
        # Padded here: oneDNN leaves a tap that meets nothing but its own padding unset (2.14.1).
        seen = x.new_zeros(n, h + 2 * padding[0], end - start, c).permute(0, 3, 1, 2)
        seen[:, :, padding[0] : padding[0] + h, low - start : high - start] = x[:, :, :, low:high]
        strips.append(strip(seen, width))
    return torch.cat(strips, 3)
