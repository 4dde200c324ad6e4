"""Augmentation made visible: pictures as the network sees them, back in grey levels."""

import torch
from torch import Tensor

from cifar_lib.augment import augment_batch
from cifar_lib.config import TrainConfig
from cifar_lib.data import ImageSet


def augmented_views(
    examples: ImageSet, config: TrainConfig, mean: Tensor, std: Tensor, *, views: int = 2
) -> list[Tensor]:
    """Augments the same pictures several times, as training does.

    Args:
        examples: N pictures.
        config: its augmentation fields count.
        mean: float32 (3,), of the training images, over [0, 1].
        std: float32 (3,), likewise.
        views: how many; each is drawn as for another epoch.

    Returns:
        `views` tensors, uint8 (N, 3, H, W), as large as their epoch has them; what Cutout fills
        shows as the mean colour.
    """
    shown = []
    for view in range(views):
        images, _ = augment_batch(
            examples.images,
            examples.labels,
            torch.arange(len(examples)),
            config=config,
            epoch=view,
            num_classes=len(examples.class_names),
            mean=mean,
            std=std,
            generator=torch.Generator().manual_seed(view),
        )
        grey = (images * std.view(3, 1, 1) + mean.view(3, 1, 1)).clamp(0, 1)
        shown.append((grey * 255).round().to(torch.uint8).contiguous())
    return shown
