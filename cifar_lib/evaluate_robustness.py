"""Accuracy on corrupted test images, at five severities.

| corruption     | what changes by severity               | 1    | 2   | 3    | 4   | 5    |
|----------------|----------------------------------------|------|-----|------|-----|------|
| gaussian_noise | standard deviation, of 0..1            | 0.04 | 0.06| 0.08 | 0.09| 0.1  |
| gaussian_blur  | standard deviation, pixels             | 0.4  | 0.6 | 0.7  | 0.8 | 1    |
| contrast       | factor on the distance from mean grey  | 0.75 | 0.5 | 0.4  | 0.3 | 0.15 |
| brightness     | factor on the values                   | 1.1  | 1.2 | 1.3  | 1.4 | 1.6  |
| jpeg           | quality, 1..100                        | 80   | 65  | 58   | 50  | 40   |

Source: Hendrycks and Dietterich, Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations, arXiv 1903.12261; the first three and JPEG have the severities of their CIFAR-10-C.
Its brightness adds 0.05 to 0.3 to the HSV value; the factors here do about that to the mean value.
CIFAR-10-C itself is other files made by other code: figures are comparable here, not to the digit.
"""

import io
from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from cifar_lib.data import evenly_spread
from cifar_lib.evaluate import accuracy, proportion_interval

SEVERITIES = {
    "gaussian_noise": (0.04, 0.06, 0.08, 0.09, 0.1),
    "gaussian_blur": (0.4, 0.6, 0.7, 0.8, 1.0),
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),
    "brightness": (1.1, 1.2, 1.3, 1.4, 1.6),
    "jpeg": (80, 65, 58, 50, 40),
}


def corrupt(images: Tensor, corruption: str, severity: int) -> Tensor:
    """Corrupts images, always in the same way.

    Args:
        images: uint8 (N, 3, H, W), 0..255; left as they are.
        corruption: a key of `SEVERITIES`.
        severity: 1..5.

    Returns:
        uint8 (N, 3, H, W) on the CPU.

    Raises:
        ValueError: an unknown corruption or severity.
    """
    if corruption not in SEVERITIES:
        raise ValueError(f"corruption: got {corruption!r}; allowed are {', '.join(SEVERITIES)}")
    if severity not in range(1, 6):
        raise ValueError(f"severity: got {severity!r}; allowed is 1..5")
    value, images = SEVERITIES[corruption][severity - 1], images.cpu()
    if corruption == "gaussian_noise":
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(severity))
        return noise.mul_(255 * value).add_(images).round_().clamp_(0, 255).to(torch.uint8)
    if corruption == "gaussian_blur":  # four standard deviations to each side
        return transforms.gaussian_blur(images, [2 * round(4 * value) + 1] * 2, [value])
    if corruption == "jpeg":
        return torch.stack([_compress(image, int(value)) for image in images])
    adjust = {"contrast": transforms.adjust_contrast, "brightness": transforms.adjust_brightness}
    return adjust[corruption](images, value)


def _compress(image: Tensor, quality: int) -> Tensor:
    # With Pillow, as for CIFAR-10-C; torchvision 0.29 has announced the end of its own JPEG.
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=quality)
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)


def corruption_frame(
    predict: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    limit: int | None = None,
) -> pd.DataFrame:
    """Measures the accuracy on clean images and under every corruption.

    Args:
        predict: maps uint8 images (N, 3, H, W) to logits (N, K).
        images: uint8 (N, 3, H, W), of the test part.
        labels: int64 (N,).
        limit: at most so many images, as `evenly_spread` takes them.

    Returns:
        26 rows: corruption ("none" for the clean images), severity (0 for them), n, accuracy, and
        low and high of its 95 % interval for the images (Wilson), 0..1.
    """
    chosen = evenly_spread(len(labels), limit)
    images, labels = images[chosen], labels[chosen]
    rows = []
    for corruption, severity in [("none", 0), *((c, s + 1) for c in SEVERITIES for s in range(5))]:
        changed = corrupt(images, corruption, severity) if severity else images
        share = proportion_interval(accuracy(predict(changed), labels), len(labels))
        rows.append((corruption, severity, share.n, share.mean, share.low, share.high))
    columns = ["corruption", "severity", "n", "accuracy", "low", "high"]
    return pd.DataFrame(rows, columns=columns)
