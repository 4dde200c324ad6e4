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

from cifar_lib import fast_gradients, fast_winograd

# Pixels of the output map up to which one product makes the weight gradient faster than oneDNN, in
# float32; in bfloat16 it does up to 9 pixels, and at 16 the two are within the noise.
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


def _convolve(layer: nn.Conv2d, x: Tensor) -> Tensor:
    dtype = _dtype(x)
    x, weight = (t.to(dtype, memory_format=torch.channels_last) for t in (x, layer.weight))
    bias = None if layer.bias is None else layer.bias.to(dtype)
    return _Convolution.apply(x, weight, bias, layer.stride, layer.padding)


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

    On small maps oneDNN's weight gradient is slower than one matrix product, and unfolding such
    maps costs next to nothing. In float32 a convolution of 3×3 taps and many channels takes fewer
    multiplications by minimal filtering (`benchmarks/fast_paths.py`).
    """

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, c_in, H, W) to (N, c_out, H', W'), as `nn.Conv2d` does."""
        return _convolve(self, x) if self.pays(x) else super().forward(x)

    def pays(self, x: Tensor) -> bool:
        """Whether a way of this file is taken for maps (N, c_in, H, W)."""
        if _takes_plain_way(self, x):
            return False
        filtered = _filtering_pays(_dtype(x), x, self.weight, self.stride, self.padding)
        return filtered or self._output_area(x) <= LARGEST_AREA

    def _output_area(self, x: Tensor) -> int:
        assert not isinstance(self.padding, str)
        area = 1
        for i, size in enumerate(x.shape[2:]):
            room = size + 2 * self.padding[i] - self.kernel_size[i]
            area *= room // self.stride[i] + 1
        return area


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
        easy = self.stride == (1, 1) and self.kernel_size[1] <= fast_gradients.COLUMNS
        plain = (
            easy
            or self.bias is not None
            or _takes_plain_way(self, x)
            or not self._padding_within_kernel()
        )
        return super().forward(x) if plain else _convolve(self, x)

    def _padding_within_kernel(self) -> bool:
        assert not isinstance(self.padding, str)
        return all(p < k for p, k in zip(self.padding, self.kernel_size, strict=True))


class _Convolution(torch.autograd.Function):
    """`F.conv2d` with the gradients of these files: of a dense convolution or a depthwise one."""

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
        return F.conv2d(x, weight, bias, stride, padding, groups=x.shape[1] // weight.shape[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        depthwise = weight.shape[1] < x.shape[1]
        of_x = None
        if ctx.needs_input_grad[0]:
            if depthwise:
                of_x = fast_gradients.depthwise_input_gradient(
                    gradient, weight, x.shape[2:], *ctx.place
                )
            elif ctx.filtered:
                of_x = fast_winograd.input_gradient(gradient, weight)
            else:
                of_x = torch.ops.aten.convolution_backward(
                    gradient, x, weight, None, *ctx.place, (1, 1), False, (0, 0), 1,
                    (True, False, False),
                )[0]  # fmt: skip
        if ctx.filtered:
            of_weight = fast_winograd.weight_gradient(x, gradient)
        else:
            way = "depthwise_weight_gradient" if depthwise else "weight_gradient"
            compute = getattr(fast_gradients, way)
            of_weight = compute(x, gradient, weight.shape[2:], *ctx.place)
        of_bias = gradient.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None
        return of_x, of_weight, of_bias, None, None
