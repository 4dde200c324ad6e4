"""Faster ways to compute what plain PyTorch computes, chosen by device, number type and shape.

Each equals the plain way by test, in values and in gradients. Measured gains stand in
`benchmarks/fast_paths.py`'s record; what does not win there is not here.
"""

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LARGEST_AREA = 16  # pixels of the output map; above it the library's own weight gradient wins
COLUMNS = 3  # taps: the width of the widest depthwise kernel whose weight gradient is fast


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
        if type(module) is not nn.Conv2d or module.kernel_size == (1, 1):
            continue
        if module.groups == 1:
            module.__class__ = SmallMapConv2d
        elif module.groups == module.in_channels == module.out_channels:
            module.__class__ = DepthwiseConv2d


def use_fast_steps(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Lets fused optimisers see channels_last filters in the order of their memory.

    On a CPU their kernels take contiguous tensors, and would copy all others there and back, nearly
    half of a step's time (`benchmarks/fast_paths.py`). What is stored between steps keeps its
    shape and layout.

    Args:
        optimizer: any; changed in place.
        device: where its parameters are.
    """

    def turn(*order: int) -> Callable[..., None]:
        def hook(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            for p in (p for group in optimizer.param_groups for p in group["params"]):
                if p.grad is None or p.ndim != 4:
                    continue
                p.data = p.data.permute(order)
                p.grad = p.grad.permute(order)
                state = optimizer.state[p]
                for name, value in state.items():
                    if isinstance(value, Tensor) and value.ndim == 4:
                        state[name] = value.permute(order)

        return hook

    if device.type == "cpu" and optimizer.defaults.get("fused"):
        optimizer.register_step_pre_hook(turn(0, 2, 3, 1))
        optimizer.register_step_post_hook(turn(0, 3, 1, 2))


def _takes_plain_way(layer: nn.Conv2d) -> bool:
    return (
        layer.padding_mode != "zeros"
        or isinstance(layer.padding, str)
        or layer.dilation != (1, 1)
        or not (torch.is_grad_enabled() and layer.weight.requires_grad)
        or not torch.is_autocast_enabled("cpu")
    )


def _cast(x: Tensor) -> Tensor:
    return x.to(torch.get_autocast_dtype("cpu"), memory_format=torch.channels_last)


class SmallMapConv2d(nn.Conv2d):
    """A convolution whose weight gradient on small maps is one matrix product.

    On maps of 4 × 4 pixels and less oneDNN's bfloat16 weight gradient is slower than a matrix
    product, and unfolding such maps costs next to nothing (`benchmarks/fast_paths.py`).
    """

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, c_in, H, W) to (N, c_out, H', W'), as `nn.Conv2d` does."""
        if _takes_plain_way(self) or self._output_area(x) > LARGEST_AREA:
            return super().forward(x)
        bias = None if self.bias is None else self.bias.to(torch.get_autocast_dtype("cpu"))
        return _Convolution.apply(_cast(x), _cast(self.weight), bias, self.stride, self.padding)

    def _output_area(self, x: Tensor) -> int:
        assert not isinstance(self.padding, str)
        area = 1
        for i, size in enumerate(x.shape[2:]):
            room = size + 2 * self.padding[i] - self.kernel_size[i]
            area *= room // self.stride[i] + 1
        return area


class DepthwiseConv2d(nn.Conv2d):
    """A depthwise convolution whose gradients are made of what oneDNN has fast kernels for.

    In bfloat16 it has none for the input gradient of stride 2 and the weight gradient of kernels
    wider than 3: both passes together take 3 to 32 times as long (`benchmarks/fast_paths.py`).
    """

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, c, H, W) to (N, c, H', W'), as `nn.Conv2d` does."""
        easy = self.stride == (1, 1) and self.kernel_size[1] <= COLUMNS
        plain = self.bias is not None or not self._padding_within_kernel()
        if easy or plain or _takes_plain_way(self):
            return super().forward(x)
        return _Convolution.apply(_cast(x), _cast(self.weight), None, self.stride, self.padding)

    def _padding_within_kernel(self) -> bool:
        assert not isinstance(self.padding, str)
        return all(p < k for p, k in zip(self.padding, self.kernel_size, strict=True))


class _Convolution(torch.autograd.Function):
    """`F.conv2d` with the gradients of this file: of a plain convolution or a depthwise one."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.place = stride, padding
        return F.conv2d(x, weight, bias, stride, padding, groups=x.shape[1] // weight.shape[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        depthwise = weight.shape[1] < x.shape[1]
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        of_x = None
        if ctx.needs_input_grad[0]:
            if depthwise:
                of_x = depthwise_input_gradient(gradient, weight, x.shape[2:], *ctx.place)
            else:
                of_x = torch.ops.aten.convolution_backward(
                    gradient, x, weight, None, *ctx.place, (1, 1), False, (0, 0), 1,
                    (True, False, False),
                )[0]  # fmt: skip
        computed = depthwise_weight_gradient if depthwise else weight_gradient
        of_weight = computed(x, gradient, weight.shape[2:], *ctx.place)
        of_bias = gradient.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None
        return of_x, of_weight, of_bias, None, None


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


def depthwise_input_gradient(
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


def depthwise_weight_gradient(
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
        low, high = max(start, 0), min(end, w)
        # Padded here: oneDNN leaves a tap that meets nothing but its own padding unset (2.14.1).
        seen = x.new_zeros(n, h + 2 * padding[0], end - start, c).permute(0, 3, 1, 2)
        seen[:, :, padding[0] : padding[0] + h, low - start : high - start] = x[:, :, :, low:high]
        strips.append(strip(seen, width))
    return torch.cat(strips, 3)
