"""SpeedNet: a whitening layer and three wide blocks, for the most accuracy a second of training.

Written from the description of airbench94 in Jordan, arXiv 2404.00498, section 3 (itself in the
line of davidcpage/cifar10-fast and tysam-code/hlb-CIFAR10). Ours differ: the last pool takes the
maximum over whatever map is left, so that one network trains at several resolutions, and the
whitening layer has no trainable bias, so that no gradient is computed below the first block.
"""

import torch
from torch import Tensor, nn

from cifar_lib.models.parts import scaled

WHITENING_KERNEL = 2


class SpeedNet(nn.Module):
    """Whitening, three blocks of `depth` convolutions and one pool each, a global max, one layer.

    Args:
        num_classes: K.
        width: factor on the channels 64, 256, 256 of the blocks.
        depth: convolutions a block, at least 2; from 3 on with a skip over all after the first.
        dropout: probability of dropping a feature before the linear layer, 0..1.
        whitening_epsilon: variance added to that of every direction of a patch, above 0. What is
            far below it (on JPEG files most of the fine colour) stays faint instead of being
            stretched, and so does noise there; the default is airbench94's, for lossless files.
    """

    def __init__(
        self,
        num_classes: int = 10,
        width: float = 1.0,
        depth: int = 2,
        dropout: float = 0.0,
        whitening_epsilon: float = 5e-4,
    ) -> None:
        super().__init__()
        if depth < 2:
            raise ValueError(f"depth: got {depth}; speed_net takes 2 or more")
        c0 = 2 * 3 * WHITENING_KERNEL**2
        c1, c2, c3 = (scaled(c, width) for c in (64, 256, 256))
        self.whitening = nn.Conv2d(3, c0, WHITENING_KERNEL, bias=False)
        self.whitening.weight.requires_grad_(False)
        self.whitening_epsilon = whitening_epsilon
        self.gelu = nn.GELU()
        self.blocks = nn.Sequential(
            Block(c0, c1, depth), Block(c1, c2, depth), Block(c2, c3, depth)
        )
        self.maxpool = nn.AdaptiveMaxPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(c3, num_classes, bias=False)
        self.scale = 1 / 9  # of the logits, as airbench has it

    @torch.no_grad()
    def fit_input(self, images: Tensor) -> None:
        """Sets the whitening filters from training images: patches come out uncorrelated.

        Args:
            images: normalised float (N, 3, H, W), a few thousand.

        Source: Page, How to Train Your ResNet 8, "patch whitening"; arXiv 2404.00498, section 3.2.
        """
        k = WHITENING_KERNEL
        patches = images.float().unfold(2, k, 1).unfold(3, k, 1)  # (N, 3, H - 1, W - 1, k, k)
        patches = patches.permute(0, 2, 3, 1, 4, 5).reshape(-1, 3 * k * k)
        covariance = patches.double().T.cov()
        values, vectors = torch.linalg.eigh(covariance)
        filters = (vectors / (values + self.whitening_epsilon).sqrt()).T.view(-1, 3, k, k)
        # Each filter and its negative: the GELU behind them loses nothing.
        self.whitening.weight.copy_(torch.cat([filters, -filters]))

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (N, 3, H, W), float, H and W at least 9, to logits (N, K)."""
        x = self.blocks(self.gelu(self.whitening(x)))  # 31 → 15 → 7 → 3 pixels
        return self.fc(self.dropout(self.maxpool(x).flatten(1))) * self.scale


class Block(nn.Module):
    """Convolution, pool, norm, GELU; then convolution, norm, GELU once or more."""

    def __init__(self, c_in: int, c_out: int, depth: int) -> None:
        super().__init__()
        self.first = nn.Sequential(_conv(c_in, c_out), nn.MaxPool2d(2), _norm(c_out))
        self.rest = nn.ModuleList(
            nn.Sequential(_conv(c_out, c_out), _norm(c_out)) for _ in range(depth - 1)
        )
        self.gelu = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, c_in, H, W) to (N, c_out, H // 2, W // 2)."""
        x = skip = self.gelu(self.first(x))
        for i, layer in enumerate(self.rest, 1):
            x = layer(x)
            x = self.gelu(x + skip if i == len(self.rest) > 1 else x)
        return x


def _conv(c_in: int, c_out: int) -> nn.Conv2d:
    """A 3×3 convolution whose first filters pass their input through unchanged.

    Source: the identity start of arXiv 2404.00498, section 3.3 (Zagoruyko and Komodakis's Dirac).
    """
    conv = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
    with torch.no_grad():
        nn.init.dirac_(conv.weight[:c_in])
    return conv


def _norm(channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels, momentum=0.4, eps=1e-5)
    norm.weight.requires_grad_(False)  # scale stays 1; only the shift is trained
    return norm
