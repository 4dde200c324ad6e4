"""ResNet-18 with a stem for 32-pixel images.

Paper: He et al., Deep Residual Learning for Image Recognition, arXiv 1512.03385, table 1.
Origin: the layout and the names of the sub-modules are torchvision's `resnet18`, so that its
state dict fits but for `conv1` and `fc`. The stem is a 3×3 convolution of stride 1 without
max-pool where ImageNet's has 7×7 of stride 2 and a pool: that one would leave 8×8 pixels of 32×32
before the first block (kuangliu/pytorch-cifar has the same stem).
"""

from torch import Tensor, nn

from cifar_lib.models.parts import BasicBlock, initialize, scaled


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
        self.layer1 = _stage(c1, c1, 1)
        self.layer2 = _stage(c1, c2, 2)
        self.layer3 = _stage(c2, c3, 2)
        self.layer4 = _stage(c3, c4, 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(c4, num_classes)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (N, 3, H, W), float, to logits (N, K)."""
        x = self.relu(self.bn1(self.conv1(x)))  # (N, 64, 32, 32) at width 1
        x = self.layer2(self.layer1(x))  # (N, 128, 16, 16)
        x = self.layer4(self.layer3(x))  # (N, 512, 4, 4)
        return self.fc(self.avgpool(x).flatten(1))


def _stage(c_in: int, c_out: int, stride: int) -> nn.Sequential:
    shortcut = (
        nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))
        if stride > 1
        else None
    )
    return nn.Sequential(BasicBlock(c_in, c_out, stride, shortcut), BasicBlock(c_out, c_out, 1))
