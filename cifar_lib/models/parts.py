"""What the families share: channels by a width factor, starting weights, the residual block."""

from torch import Tensor, nn


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


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with batch norm, and a shortcut around them.

    Args:
        c_in: channels of the input.
        c_out: channels of the output.
        stride: of the first convolution.
        downsample: maps the input to the output's shape; None where it has that.

    Source: He et al., arXiv 1512.03385, section 3.3; the sub-modules' names are torchvision's.
    """

    def __init__(
        self, c_in: int, c_out: int, stride: int, downsample: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, c_in, H, W) to (N, c_out, H / stride, W / stride)."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        return self.relu(x + shortcut)
