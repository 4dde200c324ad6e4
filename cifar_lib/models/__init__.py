"""The networks by name, each for images (N, 3, 32, 32) and with logits (N, K).

A new one is a file here and a line in `MODELS`; the arguments of its constructor that are called
`width`, `depth`, `dropout` or `whitening_epsilon` can then be set in a configuration.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cifar_lib.augment import resize
from cifar_lib.config import TrainConfig
from cifar_lib.models.cifar_resnet import CifarResNet
from cifar_lib.models.imagenet import efficientnet_lite0, imagenet_resnet18
from cifar_lib.models.resnet import ResNet18
from cifar_lib.models.small_cnn import SmallCNN
from cifar_lib.models.speed_net import SpeedNet
from cifar_lib.models.vgg import vgg11, vgg16, vgg19

MODELS: dict[str, Callable[..., nn.Module]] = {
    "small_cnn": SmallCNN,
    "speed_net": SpeedNet,
    "resnet18": ResNet18,
    "cifar_resnet": CifarResNet,
    "vgg11": vgg11,
    "vgg16": vgg16,
    "vgg19": vgg19,
    "imagenet_resnet18": imagenet_resnet18,
    "efficientnet_lite0": efficientnet_lite0,
}
OPTIONS = ("width", "depth", "dropout", "whitening_epsilon")
"""Fields that go to the constructors that take them."""
STORED_SIZE = 32
"""Side of the images as they are stored and augmented, pixels."""


def build_model(config: TrainConfig, num_classes: int) -> nn.Module:
    """Builds the network that a configuration names, with fresh random weights.

    With `image_size` the network enlarges its images itself, micro-batch by micro-batch on their
    device: training, evaluation, its views and prediction all hand it images as they are stored.

    Args:
        config: its fields `model`, `image_size` and `OPTIONS` count; of the latter those that are
            null are left to the constructor's defaults.
        num_classes: K.

    Returns:
        The network on the CPU, in fp32 and training mode.

    Raises:
        ValueError: there is no such model, or it does not take an option that is set.
    """
    if config.model not in MODELS:
        raise ValueError(f"model: got {config.model!r}; allowed are {', '.join(MODELS)}")
    constructor = MODELS[config.model]
    taken = inspect.signature(constructor).parameters
    options = {name: getattr(config, name) for name in OPTIONS}
    for name, value in options.items():
        if value is not None and name not in taken:
            allowed = ", ".join(option for option in options if option in taken) or "null"
            raise ValueError(f"{name}: got {value!r}; model {config.model} takes only {allowed}")
    given = {name: value for name, value in options.items() if value is not None}
    model = constructor(num_classes=num_classes, **given)
    if config.image_size != STORED_SIZE:
        size = config.image_size
        model.register_forward_pre_hook(lambda _, inputs: (resize(inputs[0], size),))
    return model


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Puts a model into evaluation mode and every module of it back into its own afterwards.

    `model.train()` afterwards would also wake modules that a caller had frozen.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def count_parameters(model: nn.Module) -> int:
    """Counts the numbers that training adjusts (batch norm's running statistics are not)."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def flops_per_image(model: nn.Module) -> int:
    """Counts the floating-point operations of one forward pass of one image.

    Convolutions and matrix products count, a multiply-add as two; elementwise work (batch norm,
    ReLU, pooling) does not. A training step costs about three times as much an image.

    Args:
        model: takes (1, 3, 32, 32); not compiled.

    Returns:
        Operations of the forward pass, in evaluation mode.

    Source: torch.utils.flop_counter.
    """
    parameter = next(model.parameters())
    image = torch.zeros(1, 3, 32, 32, device=parameter.device, dtype=parameter.dtype)
    counter = FlopCounterMode(display=False)
    with evaluation_mode(model), torch.no_grad(), counter:
        model(image)
    return counter.get_total_flops()
