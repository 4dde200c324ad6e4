"""SmallCNN: four convolutions from scratch for 32-pixel images, cheap on a CPU.

Origin: this project. The order convolution, max-pool, batch norm, activation is that of
KellerJordan/cifar10-airbench (arXiv 2404.00498, section 3.1); pooling the last map to one pixel
before a linear layer is Lin et al., Network in Network, arXiv 1312.4400, section 3.2.
"""

from torch import Tensor, nn

from cifar_lib.models.parts import initialize, scaled


class SmallCNN(nn.Module):
    """Four 3×3 convolutions, three max-pools, a global average pool and one linear layer.

    A convolution at 32 pixels is quick; reading and writing its output is not. So the pool
    comes before batch norm and ReLU, which then pass over a quarter of the values. For ReLU this
    changes nothing (it is monotone, so it commutes with max); for batch norm it does, since its
    statistics become those of the pooled map and a negative scale would turn the max into a min:
    it is a design of its own, not a rewrite of convolution, norm, ReLU, pool.

    Args:
        num_classes: K.
        width: factor on the channels 64, 128, 256, 256.
        dropout: probability of dropping a feature before the linear layer, 0..1.
    """

    def __init__(self, num_classes: int = 10, width: float = 1.0, dropout: float = 0.0) -> None:
        super().__init__()
        c1, c2, c3, c4 = (scaled(c, width) for c in (64, 128, 256, 256))
        self.features = nn.Sequential(
            *_stage(3, c1, pool=True),  # (N, c1, 16, 16)
            *_stage(c1, c2, pool=True),  # (N, c2, 8, 8)
            *_stage(c2, c3, pool=True),  # (N, c3, 4, 4)
            *_stage(c3, c4, pool=False),  # (N, c4, 4, 4)
        )
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(c4, num_classes)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (N, 3, H, W), float, to logits (N, K)."""
        x = self.avgpool(self.features(x)).flatten(1)
        return self.fc(self.dropout(x))


def _stage(c_in: int, c_out: int, *, pool: bool) -> list[nn.Module]:
    conv = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)  # the norm's shift is its bias
    pools = [nn.MaxPool2d(2)] if pool else []
    return [conv, *pools, nn.BatchNorm2d(c_out), nn.ReLU(inplace=True)]
