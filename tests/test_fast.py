"""Every fast path equals plain PyTorch, in values and in gradients."""

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from cifar_lib import fast
from cifar_lib.config import TrainConfig
from cifar_lib.models import build_model

BF16 = torch.bfloat16


def run(layer: nn.Conv2d, x: Tensor, gradient: Tensor | None, dtype=BF16) -> tuple[Tensor, ...]:
    """Output and gradients of input, weight and bias, under autocast in bfloat16."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    layer.zero_grad()
    with torch.autocast("cpu", BF16, enabled=dtype == BF16):
        y = layer(x)
    y.backward(torch.ones_like(y) if gradient is None else gradient.to(y.dtype))
    assert x.grad is not None and layer.weight.grad is not None
    bias = () if layer.bias is None else (layer.bias.grad,)
    return y, x.grad, layer.weight.grad, *bias


def hold_alike(plain: nn.Conv2d, quick: nn.Conv2d, x: Tensor) -> None:
    """Holds a fast layer in bfloat16 to the plain one, in values and all gradients."""
    x = x.contiguous(memory_format=torch.channels_last)
    gradient = torch.randn_like(run(plain, x, None)[0])
    # In float32: oneDNN's bfloat16 weight gradient of a one-pixel map holds unset memory where
    # the kernel meets nothing but padding (torch 2.14.1, stride 2).
    expected = run(plain, x, gradient, torch.float32)
    for ours, theirs in zip(run(quick, x, gradient), expected, strict=True):
        assert ours.shape == theirs.shape
        largest = float(theirs.detach().abs().max())
        torch.testing.assert_close(ours.float(), theirs, rtol=0.02, atol=0.02 * largest)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("side", [1, 2, 4, 7])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("kernel", "padding"), [(3, 1), (3, 0), (2, 0), (5, 2)])
def test_a_convolution_of_small_maps(
    side: int, stride: int, kernel: int, padding: int, bias: bool
) -> None:
    if side + 2 * padding < kernel:
        pytest.skip("the kernel does not fit")
    torch.manual_seed(0)
    plain = nn.Conv2d(16, 24, kernel, stride, padding, bias=bias).to(
        memory_format=torch.channels_last
    )
    quick = nn.Conv2d(16, 24, kernel, stride, padding, bias=bias)
    quick.load_state_dict(plain.state_dict())
    fast.use_fast_paths(quick, torch.device("cpu"), BF16)
    assert type(quick) is fast.SmallMapConv2d
    hold_alike(plain, quick, torch.randn(8, 16, side, side))


def test_the_weight_gradient_is_exact_in_double() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4, 5, 6, dtype=torch.double).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(7, 4, 3, 2, dtype=torch.double, requires_grad=True)
    y = torch.nn.functional.conv2d(x, weight, stride=(2, 1), padding=(1, 0))
    gradient = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, weight, gradient)
    ours = fast.weight_gradient(x, gradient, (3, 2), (2, 1), (1, 0))
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("side", [1, 3, 8])
@pytest.mark.parametrize("stride", [1, 2, (2, 1)])
@pytest.mark.parametrize(("kernel", "padding"), [(3, 1), (3, 0), (5, 2), (4, (1, 2))])
def test_a_depthwise_convolution(
    side: int, stride: int | tuple[int, int], kernel: int, padding: int | tuple[int, int]
) -> None:
    if side + 2 * min(padding if isinstance(padding, tuple) else (padding,)) < kernel:
        pytest.skip("the kernel does not fit")
    torch.manual_seed(0)
    plain = nn.Conv2d(12, 12, kernel, stride, padding, groups=12, bias=False).to(
        memory_format=torch.channels_last
    )
    quick = copy.deepcopy(plain)
    fast.use_fast_paths(quick, torch.device("cpu"), BF16)
    assert type(quick) is fast.DepthwiseConv2d
    hold_alike(plain, quick, torch.randn(8, 12, side, side))


def test_the_depthwise_gradients_are_exact_in_double() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4, 9, 8, dtype=torch.double).contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    weight = torch.randn(4, 1, 5, 4, dtype=torch.double, requires_grad=True)
    y = torch.nn.functional.conv2d(x, weight, stride=(2, 1), padding=(2, 1), groups=4)
    gradient = torch.randn_like(y)
    expected = torch.autograd.grad(y, (x, weight), gradient)
    place = ((2, 1), (2, 1))
    ours = fast.depthwise_input_gradient(gradient, weight, (9, 8), *place)
    torch.testing.assert_close(ours, expected[0])
    torch.testing.assert_close(
        fast.depthwise_weight_gradient(x, gradient, (5, 4), *place), expected[1]
    )


def test_what_a_depthwise_kernel_does_not_cover_goes_the_plain_way() -> None:
    for layer in (
        nn.Conv2d(4, 4, 3, padding=3, stride=2, groups=4, bias=False),  # padding beyond the kernel
        nn.Conv2d(4, 4, 3, dilation=2, stride=2, groups=4, bias=False),
        nn.Conv2d(4, 4, 3, stride=2, groups=4),
    ):
        quick = copy.deepcopy(layer)
        fast.use_fast_paths(quick, torch.device("cpu"), BF16)
        x = torch.randn(2, 4, 9, 9)
        for ours, theirs in zip(run(quick, x, None), run(layer, x, None), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "name", ["vgg11", "resnet18", "cifar_resnet", "speed_net", "efficientnet_lite0"]
)
def test_a_model_keeps_its_state_and_its_function(name: str) -> None:
    width = None if name == "efficientnet_lite0" else 0.125
    torch.manual_seed(0)
    model = build_model(TrainConfig(model=name, width=width), 10)
    x = torch.randn(4, 3, 32, 32)
    names = list(model.state_dict())
    model.eval()
    with torch.no_grad():
        before = model(x)
        fast.use_fast_paths(model, torch.device("cpu"), BF16)
        assert torch.equal(model(x), before)
    assert list(model.state_dict()) == names


def test_only_a_cpu_in_bfloat16_takes_them() -> None:
    for device, dtype in [("cpu", torch.float32), ("cuda", BF16)]:
        model = nn.Sequential(nn.Conv2d(3, 3, 3))
        fast.use_fast_paths(model, torch.device(device), dtype)
        assert type(model[0]) is nn.Conv2d


def test_large_maps_take_the_plain_way(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[tuple[int, ...]] = []
    plain = fast.weight_gradient
    monkeypatch.setattr(
        fast, "weight_gradient", lambda x, *rest: taken.append(tuple(x.shape)) or plain(x, *rest)
    )
    layer = nn.Conv2d(4, 4, 3, padding=1, bias=False)
    fast.use_fast_paths(layer, torch.device("cpu"), BF16)
    for side in (4, 5):
        run(layer, torch.randn(2, 4, side, side), None)
    assert taken == [(2, 4, 4, 4)]


@pytest.mark.parametrize(
    "kind",
    [torch.optim.Adam, torch.optim.AdamW, partial(torch.optim.SGD, momentum=0.9, nesterov=True)],
)
def test_a_step_in_the_order_of_memory_is_the_same_step(kind) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, (3, 2)), nn.Conv2d(4, 4, 3))
    plain.to(memory_format=torch.channels_last)
    plain[2].requires_grad_(False)
    quick = copy.deepcopy(plain)
    ours, theirs = (
        kind(model.parameters(), lr=0.01, weight_decay=0.1, fused=True) for model in (quick, plain)
    )
    fast.use_fast_steps(ours, torch.device("cpu"))
    x = torch.randn(4, 3, 8, 8)
    for _ in range(3):
        for model, optimizer in ((quick, ours), (plain, theirs)):
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        for p, q in zip(quick.parameters(), plain.parameters(), strict=True):
            assert p.shape == q.shape and p.stride() == q.stride()
            assert torch.equal(p, q)
    for p, q in zip(quick.parameters(), plain.parameters(), strict=True):
        for name, value in theirs.state[q].items():
            assert torch.equal(ours.state[p][name], value)
    other = kind(plain.parameters(), lr=0.01, fused=True)
    other.load_state_dict(ours.state_dict())  # a state is the same with and without


def test_a_fused_step_copies_no_filter() -> None:
    model = nn.Conv2d(8, 8, 3).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    fast.use_fast_steps(optimizer, torch.device("cpu"))
    for _ in range(2):
        model(torch.randn(2, 8, 4, 4)).sum().backward()
        with torch.profiler.profile(record_shapes=True) as profile:
            optimizer.step()
    copied = [e.input_shapes for e in profile.events() if e.name == "aten::copy_"]
    assert not [shapes for shapes in copied if len(shapes[0]) == 4]
