"""Every network: shapes, published parameter counts, gradients, memory formats, refusals."""

import pytest
import torch
import torchvision
from torch import nn

from cifar_lib.config import TrainConfig
from cifar_lib.models import (
    MODELS,
    build_model,
    count_parameters,
    evaluation_mode,
    flops_per_image,
)
from cifar_lib.models.cifar_resnet import CifarResNet, ZeroPadShortcut
from cifar_lib.models.parts import BasicBlock
from cifar_lib.models.vgg import VGG

# Ten classes at width 1. ResNet-18 and VGG: as in kuangliu/pytorch-cifar; cifar_resnet (depth 20):
# 0.27 M in He et al., table 6; FLOPs: twice the multiply-adds, summed by hand for small_cnn.
PARAMETERS_AND_FLOPS = {
    "small_cnn": (
        964_170,
        2 * (27 * 64 * 32**2 + 576 * 128 * 16**2 + 1152 * 256 * 8**2 + 2304 * 256 * 4**2 + 2560),
    ),
    "resnet18": (11_173_962, 1_110_845_440),
    "cifar_resnet": (269_722, 81_102_080),
    "vgg11": (9_231_114, 305_539_072),
    "vgg16": (14_728_266, 626_403_328),
    "vgg19": (20_040_522, 796_272_640),
    "speed_net": (1_971_328, 236_294_720),  # whitening and the norms' scales are not trained
    # torchvision's and timm's counts for 1,000 classes, 11.69 M and 4.65 M, less 990 outputs.
    "imagenet_resnet18": (11_689_512 - 990 * 513, 74_033_152),
    "efficientnet_lite0": (4_652_008 - 990 * 1281, 15_695_296),
}
OF_ONE_WIDTH = {"imagenet_resnet18", "efficientnet_lite0"}
every_model = pytest.mark.parametrize("name", MODELS)


def build(name: str, **fields: object) -> nn.Module:
    torch.manual_seed(0)
    if name in OF_ONE_WIDTH:
        fields.pop("width", None)
    return build_model(TrainConfig(model=name, **fields), num_classes=10)


def images(n: int) -> torch.Tensor:
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_every_model_has_its_counts_pinned() -> None:
    assert set(PARAMETERS_AND_FLOPS) == set(MODELS)


@every_model
def test_parameters_and_flops(name: str) -> None:
    model = build(name)
    assert (count_parameters(model), flops_per_image(model)) == PARAMETERS_AND_FLOPS[name]
    assert all(module.training for module in model.modules())
    batches_seen = [b for n, b in model.named_buffers() if n.endswith("num_batches_tracked")]
    assert not any(batches_seen)  # counting leaves the running statistics alone


@every_model
@pytest.mark.parametrize("classes", [10, 7])
def test_shape_of_the_logits(name: str, classes: int) -> None:
    width = None if name in OF_ONE_WIDTH else 0.25
    model = build_model(TrainConfig(model=name, width=width), num_classes=classes)
    logits = model(images(2))
    assert logits.shape == (2, classes)
    assert logits.isfinite().all()


@every_model
def test_gradients_reach_every_parameter(name: str) -> None:
    # In evaluation mode: in training, batch norm cancels the bias of the convolution before it.
    model = build(name, width=0.5).eval()
    nn.functional.cross_entropy(model(images(8)), torch.arange(8)).backward()
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    silent = [n for n, p in trained if p.grad is None or not p.grad.any()]
    assert silent == []


@every_model
def test_evaluation_is_deterministic_and_survives_the_state_dict(name: str) -> None:
    model, x = build(name, width=0.25), images(4)
    model(x)  # moves the running statistics off their start
    other = build(name, width=0.25)
    other.load_state_dict(model.state_dict())
    with evaluation_mode(model), evaluation_mode(other):
        logits = model(x)
        assert torch.equal(model(x), logits)
        assert torch.equal(model(x[:1])[0].argmax(), logits[0].argmax())
        assert torch.equal(other(x), logits)


@every_model
def test_channels_last_computes_the_same(name: str) -> None:
    model, x = build(name, width=0.5), images(16)
    expected = model(x)
    actual = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", sorted(MODELS.keys() - OF_ONE_WIDTH))
def test_width_scales_the_channels(name: str) -> None:
    ratio = PARAMETERS_AND_FLOPS[name][0] / count_parameters(build(name, width=0.5))
    assert 2 < ratio <= 4  # the first and the last layer scale with it once


def test_resnet18_computes_what_torchvision_does() -> None:
    theirs = torchvision.models.resnet18(num_classes=10)
    theirs.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    theirs.maxpool = nn.Identity()
    ours = build("resnet18")
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(images(2)), theirs(images(2)))


@pytest.mark.parametrize(("name", "letter"), [("vgg11", "A"), ("vgg16", "D"), ("vgg19", "E")])
def test_vgg_has_the_layers_of_torchvision(name: str, letter: str) -> None:
    theirs = torchvision.models.vgg.make_layers(
        torchvision.models.vgg.cfgs[letter], batch_norm=True
    )
    assert str(build(name).features) == str(theirs)


@pytest.mark.parametrize(
    ("depth", "option_a", "millions"),
    [(20, 269_722, 0.27), (32, 464_154, 0.46), (44, 658_586, 0.66), (56, 853_018, 0.85)]
    + [(110, 1_727_962, 1.7)],
)
def test_cifar_resnet_depths(depth: int, option_a: int, millions: float) -> None:
    """The last column is table 6 of He et al."""
    model = CifarResNet(depth=depth)
    assert count_parameters(model) == option_a
    assert option_a / 1e6 == pytest.approx(millions, abs=0.03)
    assert 1 + sum(isinstance(m, nn.Conv2d) for m in model.modules()) == depth


def test_zero_pad_shortcut_keeps_every_second_pixel() -> None:
    x = torch.arange(32.0).reshape(1, 2, 4, 4)
    y = ZeroPadShortcut(new_channels=2, stride=2)(x)
    assert y[0, :2].tolist() == [[[0, 2], [8, 10]], [[16, 18], [24, 26]]]
    assert not y[0, 2:].any()


def test_block_adds_its_shortcut() -> None:
    block, x = BasicBlock(4, 8, 2, ZeroPadShortcut(4, 2)), torch.randn(2, 4, 6, 6)
    nn.init.zeros_(block.bn2.weight)  # silences the convolutions
    assert torch.equal(block(x), ZeroPadShortcut(4, 2)(x).relu())


@pytest.mark.parametrize("name", ["small_cnn", "vgg11", "vgg16", "vgg19", "speed_net"])
def test_dropout_acts_in_training_only(name: str) -> None:
    model, x = build(name, dropout=0.5, width=0.25), images(4)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_convolutions_start_with_he_variance() -> None:
    weight = build("resnet18").layer4[0].conv1.weight  # 256 → 512: fan-out is not fan-in
    std = (2 / (9 * 512)) ** 0.5
    assert weight.std().item() == pytest.approx(std, rel=0.01)
    assert weight.abs().max() > 3 * std  # normal, not uniform


def test_evaluation_mode_leaves_frozen_modules_frozen_even_after_an_error() -> None:
    model = build("small_cnn", width=0.25)
    model.features.eval()
    with pytest.raises(RuntimeError), evaluation_mode(model):
        assert not model.fc.training
        raise RuntimeError
    assert model.training and model.fc.training and not model.features.training


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model": "resnet19"}, ["model", "'resnet19'", "resnet18", "vgg19"]),
        ({"model": "resnet18", "depth": 20}, ["depth", "20", "resnet18", "width"]),
        ({"model": "imagenet_resnet18", "width": 2}, ["width", "2.0", "takes only null"]),
        ({"model": "cifar_resnet", "dropout": 0.5}, ["dropout", "0.5", "width, depth"]),
        ({"model": "vgg11", "whitening_epsilon": 0.1}, ["whitening_epsilon", "0.1", "dropout"]),
        ({"model": "cifar_resnet", "depth": 21}, ["depth", "21", "6n + 2"]),
        ({"model": "cifar_resnet", "depth": 2}, ["depth", "2", "6n + 2"]),
    ],
)
def test_refusals_are_one_line_with_field_value_and_what_is_allowed(
    fields: dict[str, object], words: list[str]
) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$") as refusal:
        build_model(TrainConfig(**fields), num_classes=10)
    assert all(word in str(refusal.value) for word in words)


def test_vgg_is_made_for_32_pixels() -> None:
    assert VGG((1, 1, 1, 1, 1), width=0.1).features(images(1)).shape == (1, 51, 1, 1)


@pytest.mark.parametrize("name", sorted(set(MODELS) - {"efficientnet_lite0"}))
def test_every_model_takes_enlarged_images(name: str) -> None:
    options = {} if name == "imagenet_resnet18" else {"width": 0.125}
    config = TrainConfig(model=name, image_size=64, **options)
    assert build_model(config, num_classes=10).eval()(images(1)).shape == (1, 10)
