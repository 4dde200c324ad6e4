"""ResNet-18 with a stem for 32-pixel images.

Paper: He et al., Deep Residual Learning for Image Recognition, arXiv 1512.03385, table 1.
Origin: the layout and the names of the sub-modules are torchvision's `resnet18`, so that its
state dict fits but for `conv1` and `fc`. The stem is a 3×3 convolution of stride 1 without
max-pool where ImageNet's has 7×7 of stride 2 and a pool: that one would leave 8×8 pixels of 32×32
before the first block (kuangliu/pytorch-cifar has the same stem).
"""

from torch import Tensor, nn

from cifar_lib.models.parts import initialize, scaled


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with batch norm, and a shortcut around them.

    Args:
        c_in: channels of the input.
        c_out: channels of the output.
        stride: of the first convolution.
    """

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.downsample: nn.Module | None = None
        if stride != 1 or c_in != c_out:
            self.downsample = nn.Sequential(
                nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, c_in, H, W) to (N, c_out, H / stride, W / stride)."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        return self.relu(x + shortcut)


class ResNet18(nn.Module):
    """Eighteen weighted layers: the stem, four stages of two blocks, one linear layer.

    Args:
        num_classes: K.
        width: factor on the channels 64, 128, 256, 512.
    """

    def __init__(self, num_classes: int = 10, width: float = 1.0) -> None:
        super().__init__()
        c1, c2, c3, c4 = (scaled(c, width) for c in (64, 128, 256, 512))
        self.conv1 = nn.Conv2d(3, c1, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c1)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(BasicBlock(c1, c1, 1), BasicBlock(c1, c1, 1))
        self.layer2 = nn.Sequential(BasicBlock(c1, c2, 2), BasicBlock(c2, c2, 1))
        self.layer3 = nn.Sequential(BasicBlock(c2, c3, 2), BasicBlock(c3, c3, 1))
        self.layer4 = nn.Sequential(BasicBlock(c3, c4, 2), BasicBlock(c4, c4, 1))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(c4, num_classes)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (N, 3, H, W), float, to logits (N, K)."""
        x = self.relu(self.bn1(self.conv1(x)))  # (N, 64, 32, 32) at width 1
        x = self.layer2(self.layer1(x))  # (N, 128, 16, 16)
        x = self.layer4(self.layer3(x))  # (N, 512, 4, 4)
        return self.fc(self.avgpool(x).flatten(1))
