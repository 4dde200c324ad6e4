"""Faster ways to compute what plain PyTorch computes, chosen by device, number type and shape.

Each equals the plain way by test, in values and in gradients. Measured gains stand in
`benchmarks/fast_paths.py`'s record; what does not win there is not here.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LARGEST_AREA = 16  # pixels of the output map; above it the library's own weight gradient wins


def use_fast_paths(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Turns a model's layers, in place, into those that are faster on this device.

    Parameters, their names and the layers' meaning stay; only CPUs in bfloat16 gain anything.

    Args:
        model: any module.
        device: where it will be trained.
        dtype: of autocast, float32 if there is none.
    """
    if device.type != "cpu" or dtype != torch.bfloat16:
        return
    for module in model.modules():
        if type(module) is nn.Conv2d and module.kernel_size != (1, 1) and module.groups == 1:
            module.__class__ = SmallMapConv2d


class SmallMapConv2d(nn.Conv2d):
    """A convolution whose weight gradient on small maps is one matrix product.

    On maps of 4 × 4 pixels and less oneDNN's bfloat16 weight gradient is slower than a matrix
    product, and unfolding such maps costs next to nothing (`benchmarks/fast_paths.py`).
    """

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, c_in, H, W) to (N, c_out, H', W'), as `nn.Conv2d` does."""
        plain = (
            self.padding_mode != "zeros"
            or isinstance(self.padding, str)
            or self.bias is not None
            or self.dilation != (1, 1)
            or not (torch.is_grad_enabled() and self.weight.requires_grad)
            or not torch.is_autocast_enabled("cpu")
        )
        if plain or self._output_area(x) > LARGEST_AREA:
            return super().forward(x)
        dtype = torch.get_autocast_dtype("cpu")
        weight = self.weight.to(dtype, memory_format=torch.channels_last)
        x = x.to(dtype, memory_format=torch.channels_last)
        return _Convolution.apply(x, weight, self.stride, self.padding)

    def _output_area(self, x: Tensor) -> int:
        assert not isinstance(self.padding, str)
        area = 1
        for i, size in enumerate(x.shape[2:]):
            room = size + 2 * self.padding[i] - self.kernel_size[i]
            area *= room // self.stride[i] + 1
        return area


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: Any, padding: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(x, weight, None, stride, padding)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        x, weight = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        input_gradient = None
        if ctx.needs_input_grad[0]:
            input_gradient = torch.ops.aten.convolution_backward(
                gradient, x, weight, None, ctx.stride, ctx.padding, (1, 1), False, (0, 0), 1,
                (True, False, False),
            )[0]  # fmt: skip
        product = weight_gradient(x, gradient, weight.shape[2:], ctx.stride, ctx.padding)
        return input_gradient, product, None, None


def weight_gradient(
    x: Tensor,
    gradient: Tensor,
    kernel: tuple[int, ...],
    stride: tuple[int, int],
    padding: tuple[int, int],
) -> Tensor:
    """Computes a convolution's weight gradient as one product of unfolded maps.

    Args:
        x: the input (N, c_in, H, W), channels_last.
        gradient: of the output (N, c_out, H', W'), channels_last.
        kernel: height and width.
        stride: in pixels, vertical and horizontal.
        padding: zeros on each side, pixels, vertical and horizontal.

    Returns:
        (c_out, c_in, *kernel), channels_last, of the dtype of `x`.
    """
    (n, c_out, h_out, w_out), (kh, kw) = gradient.shape, kernel
    borders = (0, 0, padding[1], padding[1], padding[0], padding[0])
    padded = F.pad(x.permute(0, 2, 3, 1), borders).contiguous()  # as maps of one pixel are not
    _, height, width, c = padded.shape
    row = width * c
    patches = padded.as_strided(
        (n, h_out, w_out, kh, kw, c),
        (height * row, stride[0] * row, stride[1] * c, row, c, 1),
    )
    rows = gradient.permute(0, 2, 3, 1).reshape(-1, c_out)
    product = rows.T @ patches.reshape(len(rows), -1)  # (c_out, kh · kw · c_in)
    return product.view(c_out, kh, kw, c).permute(0, 3, 1, 2)
