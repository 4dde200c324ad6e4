"""Faster ways to compute what plain PyTorch computes, chosen by device, number type and shape.

Each equals the plain way by test, in values and in gradients. Measured gains stand in
`benchmarks/fast_paths.py`'s records; what wins in none of them is not here. `SubsampledConv2d`
alone is no faster: the plain way writes out of bounds there.
"""

import platform
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifar_lib import fast_depthwise, fast_products, fast_winograd
from cifar_lib.execution import cpu_flags

# Asked once: Dynamo cannot trace the question.
HAS_AMX = "amx_bf16" in cpu_flags()
# Pixels of the output map up to which one product makes the weight gradient faster than oneDNN;
# in bfloat16 without AMX it does up to 9 pixels, and at 16 the two are within the noise.
# With AMX it makes the output and the input gradient faster, too: of a narrow map oneDNN fills a
# part of a tile's 16 rows only.
LARGEST_AREA = 16
# By minimal filtering: the fewest channels, and how many times fewer multiplications, that pay.
FEWEST_CHANNELS, LEAST_FACTOR = 128, 3.0
# Input channels below which a strided 1×1 convolution is not left to oneDNN: its vectors' length.
FEWEST_STRIDED = 16


def use_fast_paths(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Turns a model's layers, in place, into those that are faster on this device.

    Parameters, their names and the layers' meaning stay; only CPUs gain anything, in float32 only
    those of x86, where it was measured.

    Args:
        model: any module.
        device: where it will be trained.
        dtype: of autocast, float32 if there is none.
    """
    in_fp32 = dtype == torch.float32 and platform.machine() in ("x86_64", "AMD64")
    if device.type != "cpu" or not (in_fp32 or dtype == torch.bfloat16):
        return
    for module in model.modules():
        if type(module) is not nn.Conv2d:
            continue
        if module.kernel_size == (1, 1):
            few = module.in_channels < FEWEST_STRIDED and module.groups == 1
            if few and module.stride != (1, 1) and module.padding == (0, 0):
                module.__class__ = SubsampledConv2d
        elif module.groups == 1:
            module.__class__ = DenseConv2d
        elif module.groups == module.in_channels == module.out_channels and not in_fp32:
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


def _dtype(x: Tensor) -> torch.dtype:
    """What a convolution of `x` computes in."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


def _takes_plain_way(layer: nn.Conv2d, x: Tensor) -> bool:
    """Whether it is none of these files' cases, or one that PyTorch has to refuse."""
    return (
        (x.dtype != layer.weight.dtype and not torch.is_autocast_enabled("cpu"))
        or x.ndim != 4
        or not len(x)
        or x.shape[1] != layer.in_channels
        or layer.padding_mode != "zeros"
        or isinstance(layer.padding, str)
        or layer.dilation != (1, 1)
        or not (torch.is_grad_enabled() and layer.weight.requires_grad)
        or _dtype(x) not in (torch.float32, torch.bfloat16)
    )


def _lowered(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the dtype that a convolution of `x` computes in, channels_last."""
    dtype = _dtype(x)
    x, weight = (t.to(dtype, memory_format=torch.channels_last) for t in (x, weight))
    return x, weight


def _computes_with_amx(dtype: torch.dtype) -> bool:
    return HAS_AMX and dtype == torch.bfloat16


def _output_area(x: Tensor, weight: Tensor, stride: tuple[int, ...], padding: Any) -> int:
    """Pixels of the output map, 0 where the kernel does not fit."""
    area = 1
    for i, (step, pad) in enumerate(zip(stride, padding, strict=True), 2):
        area *= max(0, (x.shape[i] + 2 * pad - weight.shape[i]) // step + 1)
    return area


def _turns(weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]) -> bool:
    """Whether the input gradient is a convolution with the filters turned by half."""
    return stride == (1, 1) and padding[0] < weight.shape[2] and padding[1] < weight.shape[3]


def _filtering_pays(dtype: torch.dtype, x: Tensor, weight: Tensor, *place: Any) -> bool:
    tiles = -(-x.shape[2] // fast_winograd.TILE) * -(-x.shape[3] // fast_winograd.TILE)
    return (
        dtype == torch.float32
        and (weight.shape[2:], *place) == ((3, 3), (1, 1), (1, 1))
        and min(weight.shape[:2]) >= FEWEST_CHANNELS
        and x.shape[2] * x.shape[3] * 9 >= LEAST_FACTOR * tiles * fast_winograd.SEEN**2
    )


class DenseConv2d(nn.Conv2d):
    """A convolution of all channels, with the ways of this file where they pay.

    On small maps oneDNN's weight gradient is slower than one matrix product, with AMX the rest of a
    convolution, too. In float32 a convolution of 3×3 taps and many channels takes fewer
    multiplications by minimal filtering (`benchmarks/fast_paths.py`).
    """

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, c_in, H, W) to (N, c_out, H', W'), as `nn.Conv2d` does."""
        if not self.pays(x):
            return super().forward(x)
        bias = None if self.bias is None else self.bias.to(_dtype(x))
        x, weight = _lowered(x, self.weight)
        return _DenseConvolution.apply(x, weight, bias, self.stride, self.padding)

    def pays(self, x: Tensor) -> bool:
        """Whether a way of this file is taken for maps (N, c_in, H, W)."""
        if _takes_plain_way(self, x):
            return False
        small = 0 < _output_area(x, self.weight, self.stride, self.padding) <= LARGEST_AREA
        return small or _filtering_pays(_dtype(x), x, self.weight, self.stride, self.padding)


class SubsampledConv2d(nn.Conv2d):
    """A strided 1×1 convolution of few channels, as one without stride of the pixels it sees.

    For channels_last maps in float32 oneDNN's weight gradient of the strided one writes beyond its
    memory: wrong gradients, a crash or a hang (its issue 6035, below 8 channels with AVX2, below
    16 with AVX-512).
    """

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, c_in, H, W) to (N, c_out, H', W'), as `nn.Conv2d` does."""
        rows, columns = self.stride
        x = x[..., ::rows, ::columns].contiguous(memory_format=torch.channels_last)
        return F.conv2d(x, self.weight, self.bias)


class DepthwiseConv2d(nn.Conv2d):
    """A depthwise convolution whose gradients are made of what oneDNN has fast kernels for.

    In bfloat16 it has none for the input gradient of stride 2 and the weight gradient of kernels
    wider than 3: both passes together take 5 to 25 times as long (`benchmarks/fast_paths.py`).
    """

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, c, H, W) to (N, c, H', W'), as `nn.Conv2d` does."""
        easy = self.stride == (1, 1) and self.kernel_size[1] <= fast_depthwise.COLUMNS
        plain = (
            easy
            or self.bias is not None
            or _takes_plain_way(self, x)
            or not self._padding_within_kernel()
        )
        if plain:
            return super().forward(x)
        return _DepthwiseConvolution.apply(*_lowered(x, self.weight), self.stride, self.padding)

    def _padding_within_kernel(self) -> bool:
        assert not isinstance(self.padding, str)
        return all(p < k for p, k in zip(self.padding, self.kernel_size, strict=True))


class _DenseConvolution(torch.autograd.Function):
    """`F.conv2d` by filtering or, as far as they pay, by products."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.place = stride, padding
        ctx.filtered = _filtering_pays(x.dtype, x, weight, stride, padding)
        if ctx.filtered:
            y = fast_winograd.convolve(x, weight)
            return y if bias is None else y.add_(bias[:, None, None])
        if _computes_with_amx(x.dtype):
            return fast_products.convolve(x, weight, bias, stride, padding)
        return F.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        stride, padding = ctx.place
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        of_x = None
        if ctx.needs_input_grad[0]:
            if ctx.filtered:
                of_x = fast_winograd.input_gradient(gradient, weight)
            elif _computes_with_amx(x.dtype) and _turns(weight, stride, padding):
                of_x = fast_products.input_gradient(gradient, weight, padding)
            else:
                of_x = torch.ops.aten.convolution_backward(
                    gradient, x, weight, None, stride, padding, (1, 1), False, (0, 0), 1,
                    (True, False, False),
                )[0]  # fmt: skip
        if ctx.filtered:
            of_weight = fast_winograd.weight_gradient(x, gradient)
        else:
            of_weight = fast_products.weight_gradient(
                x, gradient, weight.shape[2:], stride, padding
            )
        of_bias = gradient.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None
        return of_x, of_weight, of_bias, None, None


class _DepthwiseConvolution(torch.autograd.Function):
    """`F.conv2d` of one channel a group, without bias, with the gradients of `fast_depthwise`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: Any, padding: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.place = stride, padding
        return F.conv2d(x, weight, None, stride, padding, groups=x.shape[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = fast_depthwise.input_gradient(gradient, weight, x.shape[2:], *ctx.place)
        of_weight = fast_depthwise.weight_gradient(x, gradient, weight.shape[2:], *ctx.place)
        return of_x, of_weight, None, None
