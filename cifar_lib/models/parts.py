"""What the families share: how a width factor scales channels and how weights start."""

from torch import nn


def scaled(channels: int, width: float) -> int:
    """Scales a channel count by a width factor, keeping at least one channel.

    Args:
        channels: count at width 1.
        width: factor above 0.

    Returns:
        The nearest whole count, at least 1.

    Source: Zagoruyko and Komodakis, Wide Residual Networks, arXiv 1605.07146, section 2.3.
    """
    return max(1, round(channels * width))


def initialize(model: nn.Module) -> None:
    """Draws the starting weights of every convolution, in place.

    Convolutions: normal with variance 2 / fan-out, so that the gradient keeps its size through
    ReLUs; their biases 0. Batch norms start at scale 1 and shift 0 and linear layers uniform in
    ±1/sqrt(fan-in), both PyTorch's own choice and left as it is. Random numbers come from
    torch's global generator.

    Args:
        model: any module.

    Source: He et al., Delving Deep into Rectifiers, arXiv 1502.01852, section 2.2.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
