"""Every fast path equals plain PyTorch, in values and in gradients."""

import copy
import subprocess
import sys
from functools import partial
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from cifar_lib import fast, fast_depthwise, fast_products, fast_winograd
from cifar_lib.config import ROOT, TrainConfig
from cifar_lib.models import build_model

CPU, BF16, FP32 = torch.device("cpu"), torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def x86(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 the paths are those of x86; here they are tested wherever the tests run."""
    monkeypatch.setattr(fast.platform, "machine", lambda: "x86_64")


def take_amx(monkeypatch: pytest.MonkeyPatch, amx: bool) -> None:
    """Chooses the ways of a processor with AMX, or of one without; the test's own has any."""
    monkeypatch.setattr(fast, "HAS_AMX", amx)


def run(layer: nn.Conv2d, x: Tensor, gradient: Tensor | None, dtype=BF16) -> tuple[Tensor, ...]:
    """Output and gradients of input, weight and bias, in bfloat16 under autocast."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    layer.zero_grad()
    with torch.autocast("cpu", BF16, enabled=dtype == BF16):
        y = layer(x)
    y.backward(torch.ones_like(y) if gradient is None else gradient.to(y.dtype))
    assert x.grad is not None and layer.weight.grad is not None
    bias = () if layer.bias is None else (layer.bias.grad,)
    return y, x.grad, layer.weight.grad, *bias


def hold_alike(plain: nn.Conv2d, quick: nn.Conv2d, x: Tensor, dtype: torch.dtype = BF16) -> None:
    """Holds a fast layer to the plain one, in values and all gradients."""
    x = x.contiguous(memory_format=torch.channels_last)
    gradient = torch.randn_like(run(plain, x, None)[0])
    # In float32: oneDNN's bfloat16 weight gradient of a one-pixel map holds unset memory where
    # the kernel meets nothing but padding (torch 2.14.1, stride 2).
    expected = run(plain, x, gradient, FP32)
    share = 0.02 if dtype == BF16 else 1e-4
    for ours, theirs in zip(run(quick, x, gradient, dtype), expected, strict=True):
        assert ours.shape == theirs.shape
        largest = float(theirs.detach().abs().max())
        torch.testing.assert_close(ours.float(), theirs, rtol=share, atol=share * largest)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("channels", [1, 3, 8, 15])
@pytest.mark.parametrize("side", [1, 2, 7])
def test_a_strided_convolution_of_one_pixel_and_few_channels(
    side: int, channels: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    quick = nn.Conv2d(channels, 24, 1, 2, bias=bool(channels % 2))
    use = nn.Sequential(quick).to(memory_format=torch.channels_last)
    fast.use_fast_paths(use, CPU, dtype)
    assert type(quick) is fast.SubsampledConv2d
    x, gradient = torch.randn(5, channels, side, side), torch.randn(5, 24, -(-side // 2), 1)
    gradient = gradient.expand(-1, -1, -1, -(-side // 2))
    ours = run(quick, x.contiguous(memory_format=torch.channels_last), gradient, dtype)
    # The plain layer in double: in float32 its weight gradient is what is not to be trusted.
    plain = nn.Conv2d(channels, 24, 1, 2, bias=bool(channels % 2), dtype=torch.float64)
    plain.load_state_dict(quick.state_dict())
    theirs = run(plain, x.double(), gradient, FP32)
    share = 0.02 if dtype == BF16 else 1e-5
    for a, b in zip(ours, theirs, strict=True):
        largest = float(b.detach().abs().max())
        torch.testing.assert_close(a.double(), b, rtol=share, atol=share * largest)


def test_a_narrow_network_trains_without_a_crash() -> None:
    """In a process of its own: the memory that is written beyond ends it with a signal."""
    code = """if True:
        import torch
        from cifar_lib import fast
        from cifar_lib.config import ROOT, TrainConfig
        from cifar_lib.models import build_model
        torch.set_num_threads(1)
        for width in (0.05, 0.1, 0.125, 0.2):
            model = build_model(TrainConfig(model="resnet18", width=width), 10)
            model.to(memory_format=torch.channels_last)
            fast.use_fast_paths(model, torch.device("cpu"), torch.float32)
            for _ in range(3):
                x = torch.randn(8, 3, 32, 32).to(memory_format=torch.channels_last)
                model(x).sum().backward()
    """
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("dtype", "amx"), [(BF16, False), (BF16, True), (FP32, True)], ids=["bf16", "amx", "fp32"]
)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("side", [1, 2, 4, 7])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    ("kernel", "padding"), [(3, 1), (3, 0), (2, 0), (5, 2), (2, 3), ((5, 1), (3, 0))]
)
def test_a_convolution_of_small_maps(
    side: int,
    stride: int,
    kernel: int | tuple[int, int],
    padding: int | tuple[int, int],
    bias: bool,
    dtype: torch.dtype,
    amx: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if isinstance(kernel, int) and isinstance(padding, int) and side + 2 * padding < kernel:
        pytest.skip("the kernel does not fit")
    take_amx(monkeypatch, amx)
    torch.manual_seed(0)
    plain = nn.Conv2d(16, 24, kernel, stride, padding, bias=bias).to(
        memory_format=torch.channels_last
    )
    quick = nn.Conv2d(16, 24, kernel, stride, padding, bias=bias)
    quick.load_state_dict(plain.state_dict())
    fast.use_fast_paths(quick, CPU, dtype)
    assert type(quick) is fast.DenseConv2d
    hold_alike(plain, quick, torch.randn(8, 16, side, side), dtype)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [(16, 16), (7, 8), (4, 4), (32, 15)])
@pytest.mark.parametrize(("c_in", "c_out"), [(128, 128), (130, 128), (128, 144)])
def test_a_convolution_by_minimal_filtering(
    size: tuple[int, int], c_in: int, c_out: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = calls_of(fast_winograd, monkeypatch)
    torch.manual_seed(0)
    plain = nn.Conv2d(c_in, c_out, 3, padding=1, bias=bias)
    quick = copy.deepcopy(plain)
    fast.use_fast_paths(quick, CPU, FP32)
    hold_alike(plain, quick, torch.randn(3, c_in, *size), FP32)
    assert taken == ["convolve", "input_gradient", "convolve", "weight_gradient"]


@pytest.mark.parametrize(
    ("c_in", "c_out", "side", "stride", "kernel"),
    [
        (127, 128, 8, 1, 3),  # too few channels
        (128, 128, 5, 1, 3),  # too much of its tiles hangs over
        (128, 128, 2, 1, 3),
        (128, 128, 8, 2, 3),
        (128, 128, 8, 1, 5),
    ],
)
def test_where_filtering_does_not_pay_it_is_not_taken(
    c_in: int, c_out: int, side: int, stride: int, kernel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = calls_of(fast_winograd, monkeypatch)
    plain = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2)
    quick = copy.deepcopy(plain)
    fast.use_fast_paths(quick, CPU, FP32)
    hold_alike(plain, quick, torch.randn(2, c_in, side, side), FP32)
    assert taken == []


def calls_of(ways: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lists the functions of `fast_winograd` or `fast_products` that are called from now on."""
    taken: list[str] = []

    def count(name: str) -> None:
        plain = getattr(ways, name)
        monkeypatch.setattr(ways, name, lambda *a: taken.append(name) or plain(*a))

    for name in ("convolve", "input_gradient", "weight_gradient"):
        count(name)
    return taken


def test_what_follows_a_product_may_change_it_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    take_amx(monkeypatch, True)
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 8, 3, padding=1)
    fast.use_fast_paths(layer, CPU, BF16)
    with torch.autocast("cpu", BF16):
        y = layer(torch.randn(2, 8, 4, 4))
    y.relu_().sum().backward()
    assert layer.weight.grad is not None and float(y.detach().min()) == 0


def test_what_follows_a_filtered_convolution_may_change_it_in_place() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(128, 128, 3, padding=1), nn.ReLU(inplace=True))
    quick = copy.deepcopy(plain)
    fast.use_fast_paths(quick, CPU, FP32)
    x = torch.randn(2, 128, 8, 8)
    ours, theirs = quick(x), plain(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    ours.sum().backward()
    theirs.sum().backward()
    torch.testing.assert_close(quick[0].weight.grad, plain[0].weight.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("channels", "product"), [(16, False), (16, True), (128, False)])
def test_gradients_of_gradients(
    channels: int, product: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if product:  # in float32, where a difference can be told from rounding
        monkeypatch.setattr(fast, "_computes_with_amx", lambda _: True)
    torch.manual_seed(0)
    plain = nn.Conv2d(channels, channels, 3, padding=1)
    quick = copy.deepcopy(plain)
    fast.use_fast_paths(quick, CPU, FP32)
    x, found = torch.randn(2, channels, 4, 4, requires_grad=True), []
    for layer in (quick, plain):
        loss = layer(x).square().sum()
        pair = torch.autograd.grad(loss, (x, layer.weight), create_graph=True)
        penalty = sum(g.square().sum() for g in pair)
        found.append(torch.autograd.grad(penalty, (x, layer.weight)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(
            ours / theirs.abs().max(), theirs / theirs.abs().max(), rtol=0, atol=1e-4
        )


def _smoothed(layer: torch.nn.Module) -> torch.nn.Module:
    """Without kinks and ties, at which a rounding error decides where a gradient goes."""
    if isinstance(layer, torch.nn.ReLU):
        return torch.nn.Softplus()
    if isinstance(layer, torch.nn.MaxPool2d):
        return torch.nn.AvgPool2d(layer.kernel_size)
    for name, inner in layer.named_children():
        setattr(layer, name, _smoothed(inner))
    return layer


def test_a_whole_network_trains_alike() -> None:
    torch.manual_seed(0)
    plain = _smoothed(build_model(TrainConfig(model="vgg11"), 10))
    plain = plain.to(memory_format=torch.channels_last)
    quick = copy.deepcopy(plain)
    fast.use_fast_paths(quick, CPU, FP32)
    x = torch.randn(4, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    for model in (quick, plain):
        model(x).logsumexp(1).sum().backward()
    for ours, theirs in zip(quick.parameters(), plain.parameters(), strict=True):
        if ours.ndim == 4:  # behind a filter comes batch norm, so that its bias has no gradient
            largest = float(theirs.grad.abs().max())
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-3 * largest)


@pytest.mark.parametrize("pieces", [1, 3, 5])
def test_minimal_filtering_is_exact_in_double(pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 6, 9, 4, dtype=torch.double, requires_grad=True)
    weight = torch.randn(7, 6, 3, 3, dtype=torch.double, requires_grad=True)
    a_piece = -(-5 // pieces) * 3 * 1 * 36 * 7 * 8
    monkeypatch.setattr(fast_winograd, "PIECE_BYTES", a_piece)
    y = torch.nn.functional.conv2d(x, weight, padding=1)
    gradient = torch.randn_like(y)
    of_x, of_weight = torch.autograd.grad(y, (x, weight), gradient)
    x, weight = x.detach(), weight.detach()
    torch.testing.assert_close(fast_winograd.convolve(x, weight), y)
    torch.testing.assert_close(fast_winograd.input_gradient(gradient, weight), of_x)
    torch.testing.assert_close(fast_winograd.weight_gradient(x, gradient), of_weight)


@pytest.mark.parametrize("stride", [(1, 1), (2, 1)])
def test_products_are_exact_in_double(stride: tuple[int, int]) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4, 5, 6, dtype=torch.double).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(7, 4, 3, 2, dtype=torch.double), torch.randn(7, dtype=torch.double)
    x.requires_grad_()
    weight.requires_grad_()
    y = torch.nn.functional.conv2d(x, weight, bias, stride, padding=(1, 0))
    gradient = torch.randn_like(y)
    of_x, of_weight = torch.autograd.grad(y, (x, weight), gradient)
    x, weight, place = x.detach(), weight.detach(), (stride, (1, 0))
    torch.testing.assert_close(fast_products.convolve(x, weight, bias, *place), y)
    ours = fast_products.weight_gradient(x, gradient, (3, 2), *place)
    torch.testing.assert_close(ours, of_weight)
    if stride == (1, 1):
        torch.testing.assert_close(fast_products.input_gradient(gradient, weight, (1, 0)), of_x)


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
    fast.use_fast_paths(quick, CPU, BF16)
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
    ours = fast_depthwise.input_gradient(gradient, weight, (9, 8), *place)
    torch.testing.assert_close(ours, expected[0])
    torch.testing.assert_close(
        fast_depthwise.weight_gradient(x, gradient, (5, 4), *place), expected[1]
    )


@pytest.mark.parametrize(("kernel", "side"), [(7, 2), (9, 3), (9, 1)])
def test_a_depthwise_kernel_far_wider_than_its_map(kernel: int, side: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, side, side, dtype=torch.double)
    weight = torch.randn(4, 1, kernel, kernel, dtype=torch.double, requires_grad=True)
    place = (1, 1), (kernel // 2, kernel // 2)
    y = torch.nn.functional.conv2d(x, weight, None, *place, groups=4)
    gradient = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, weight, gradient)
    ours = fast_depthwise.weight_gradient(x, gradient, (kernel, kernel), *place)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize(
    ("dtype", "amx"), [(BF16, False), (BF16, True), (FP32, True)], ids=["bf16", "amx", "fp32"]
)
def test_fast_paths_are_compiled_as_one_graph(
    dtype: torch.dtype, amx: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each break is a graph more, and beyond Dynamo's limit the rest runs uncompiled."""
    take_amx(monkeypatch, amx)
    torch.compiler.reset()
    layers = [nn.Conv2d(128, 128, 3, padding=1) for _ in range(2)]
    net = nn.Sequential(*layers, nn.ReLU(inplace=True))
    fast.use_fast_paths(net, CPU, dtype)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    for side in (4, 8):
        x = torch.randn(2, 128, side, side).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", BF16, enabled=dtype == BF16):
            assert torch.equal(compiled(x), net(x))


@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize("groups", [1, 8])
def test_what_plain_pytorch_accepts_or_refuses_is_accepted_or_refused(
    groups: int, amx: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_amx(monkeypatch, amx)
    layer = nn.Conv2d(8, 8, 5, padding=2, stride=2, groups=groups, bias=False)
    fast.use_fast_paths(layer, CPU, BF16)
    assert type(layer) is not nn.Conv2d
    assert layer(torch.randn(8, 4, 4)).shape == (8, 2, 2)
    assert layer(torch.randn(0, 8, 4, 4)).shape == (0, 8, 2, 2)
    for wrong in (torch.randn(2, 16, 4, 4), torch.randn(2, 8, 4, 4).bfloat16()):
        with pytest.raises(RuntimeError, match="channels|type"):
            layer(wrong)
    unfit = nn.Conv2d(8, 8, 5, groups=groups, bias=False)
    fast.use_fast_paths(unfit, CPU, BF16)
    with torch.autocast("cpu", BF16), pytest.raises(RuntimeError, match="greater than actual"):
        unfit(torch.randn(2, 8, 2, 2))


def test_what_a_depthwise_kernel_does_not_cover_goes_the_plain_way() -> None:
    for layer in (
        nn.Conv2d(4, 4, 5, padding="same", groups=4, bias=False),
        nn.Conv2d(4, 4, 3, padding=3, stride=2, groups=4, bias=False),  # padding beyond the kernel
        nn.Conv2d(4, 4, 3, dilation=2, stride=2, groups=4, bias=False),
        nn.Conv2d(4, 4, 3, stride=2, groups=4),
    ):
        quick = copy.deepcopy(layer)
        fast.use_fast_paths(quick, CPU, BF16)
        x = torch.randn(2, 4, 9, 9)
        for ours, theirs in zip(run(quick, x, None), run(layer, x, None), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize(
    "name", ["vgg11", "resnet18", "cifar_resnet", "speed_net", "efficientnet_lite0"]
)
def test_a_model_keeps_its_state_and_its_function(name: str, dtype: torch.dtype) -> None:
    width = None if name == "efficientnet_lite0" else 0.125
    torch.manual_seed(0)
    model = build_model(TrainConfig(model=name, width=width), 10)
    x = torch.randn(4, 3, 32, 32)
    names = list(model.state_dict())
    model.eval()
    with torch.no_grad():
        before = model(x)
        fast.use_fast_paths(model, CPU, dtype)
        assert torch.equal(model(x), before)
    assert list(model.state_dict()) == names


@pytest.mark.parametrize(
    ("device", "machine", "dtype"),
    [("cuda", "x86_64", BF16), ("cpu", "aarch64", FP32), ("cpu", "x86_64", torch.float16)],
)
def test_who_takes_none_of_them(device, machine, dtype, monkeypatch) -> None:
    monkeypatch.setattr(fast.platform, "machine", lambda: machine)
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3, groups=3))
    fast.use_fast_paths(model, torch.device(device), dtype)
    assert [type(layer) for layer in model] == 2 * [nn.Conv2d]


def test_a_depthwise_convolution_in_float32_stays_plain() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3, groups=3))
    fast.use_fast_paths(model, CPU, FP32)
    assert type(model[0]) is nn.Conv2d


@pytest.mark.parametrize(
    ("amx", "ways"),
    [
        (False, ["weight_gradient"]),
        (True, ["convolve", "input_gradient", "weight_gradient"]),
    ],
)
def test_large_maps_take_the_plain_way(
    amx: bool, ways: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    take_amx(monkeypatch, amx)
    taken = calls_of(fast_products, monkeypatch)
    layer = nn.Conv2d(4, 4, 3, padding=1, bias=False)
    fast.use_fast_paths(layer, CPU, BF16)
    run(layer, torch.randn(2, 4, 4, 4), None)
    assert taken == ways
    taken.clear()
    run(layer, torch.randn(2, 4, 5, 5), None)
    assert taken == []


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
    fast.use_fast_steps(ours, CPU)
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
    fast.use_fast_steps(optimizer, CPU)
    for _ in range(2):
        model(torch.randn(2, 8, 4, 4)).sum().backward()
        with torch.profiler.profile(record_shapes=True) as profile:
            optimizer.step()
    copied = [e.input_shapes for e in profile.events() if e.name == "aten::copy_"]
    assert not [shapes for shapes in copied if len(shapes[0]) == 4]
