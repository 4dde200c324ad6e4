"""Residual networks of any depth 6n + 2 made for CIFAR-10: ResNet-20, -32, -44, -56, -110.

Paper: He et al., Deep Residual Learning for Image Recognition, arXiv 1512.03385, section 4.2.
Origin: written from the paper. Blocks are post-activation, as there: convolution, batch norm,
ReLU, convolution, batch norm, plus the shortcut, then ReLU.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from cifar_lib.models.parts import BasicBlock, initialize, scaled


class ZeroPadShortcut(nn.Module):
    """Option A: every `stride`-th pixel, the new channels zero; it has no parameters.

    Args:
        new_channels: how many channels of zeros are appended.
        stride: step between the pixels kept.

    Source: He et al., arXiv 1512.03385, sections 3.3 (option A) and 4.2.
    """

    def __init__(self, new_channels: int, stride: int) -> None:
        super().__init__()
        self.new_channels, self.stride = new_channels, stride

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) to (N, C + new_channels, H / stride, W / stride)."""
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, 0, self.new_channels))


class CifarResNet(nn.Module):
    """A 3×3 convolution, three stages of n blocks, global average pool, one linear layer.

    Args:
        num_classes: K.
        depth: weighted layers, 6n + 2 with n of at least 1.
        width: factor on the channels 16, 32, 64.

    Raises:
        ValueError: `depth` is not 6n + 2.
    """

    def __init__(self, num_classes: int = 10, depth: int = 20, width: float = 1.0) -> None:
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise ValueError(
                f"depth: got {depth}; cifar_resnet allows 6n + 2: 8, 14, 20, 26, 32, 38, 44, …"
            )
        c1, c2, c3 = (scaled(c, width) for c in (16, 32, 64))
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, c1, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c1)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(c1, c1, 1, blocks)
        self.layer2 = _stage(c1, c2, 2, blocks)
        self.layer3 = _stage(c2, c3, 2, blocks)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(c3, num_classes)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (N, 3, H, W), float, to logits (N, K)."""
        x = self.relu(self.bn1(self.conv1(x)))  # (N, 16, 32, 32) at width 1
        x = self.layer3(self.layer2(self.layer1(x)))  # (N, 64, 8, 8)
        return self.fc(self.avgpool(x).flatten(1))


def _stage(c_in: int, c_out: int, stride: int, blocks: int) -> nn.Sequential:
    shortcut = ZeroPadShortcut(c_out - c_in, stride) if stride > 1 else None
    first = BasicBlock(c_in, c_out, stride, shortcut)
    return nn.Sequential(first, *(BasicBlock(c_out, c_out, 1) for _ in range(blocks - 1)))
