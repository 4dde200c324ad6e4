"""VGG-11, -16 and -19 with batch norm for 32-pixel images.

Paper: Simonyan and Zisserman, Very Deep Convolutional Networks for Large-Scale Image Recognition,
arXiv 1409.1556, table 1 (configurations A, D and E).
Origin: five max-pools bring 32×32 down to 1×1×512, so one linear layer replaces the paper's three,
as in kuangliu/pytorch-cifar. Convolutions keep a bias although batch norm cancels it in training:
the parameter counts then are the published ones.
"""

from torch import Tensor, nn

from cifar_lib.models.parts import initialize, scaled

CHANNELS = (64, 128, 256, 512, 512)
"""Output channels of the five stages at width 1."""


class VGG(nn.Module):
    """Five stages of 3×3 convolutions with batch norm and ReLU, each ended by a max-pool.

    Args:
        convolutions: how many convolutions each of the five stages has.
        num_classes: K.
        width: factor on the channels 64, 128, 256, 512, 512.
        dropout: probability of dropping a feature before the linear layer, 0..1.
    """

    def __init__(
        self,
        convolutions: tuple[int, int, int, int, int],
        num_classes: int = 10,
        width: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        c_in = 3
        for count, channels in zip(convolutions, CHANNELS, strict=True):
            c_out = scaled(channels, width)
            for _ in range(count):
                conv = nn.Conv2d(c_in, c_out, 3, padding=1)
                layers += [conv, nn.BatchNorm2d(c_out), nn.ReLU(inplace=True)]
                c_in = c_out
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(c_in, num_classes)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (N, 3, H, W), float, H and W at least 32, to logits (N, K)."""
        x = self.features(x).mean((2, 3))  # (N, 512) at width 1; of a single position at 32 pixels
        return self.classifier(self.dropout(x))


def vgg11(num_classes: int = 10, width: float = 1.0, dropout: float = 0.0) -> VGG:
    """VGG-11, configuration A of the paper."""
    return VGG((1, 1, 2, 2, 2), num_classes, width, dropout)


def vgg16(num_classes: int = 10, width: float = 1.0, dropout: float = 0.0) -> VGG:
    """VGG-16, configuration D of the paper."""
    return VGG((2, 2, 3, 3, 3), num_classes, width, dropout)


def vgg19(num_classes: int = 10, width: float = 1.0, dropout: float = 0.0) -> VGG:
    """VGG-19, configuration E of the paper."""
    return VGG((2, 2, 4, 4, 4), num_classes, width, dropout)
