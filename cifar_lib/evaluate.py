"""Logits in, numbers out; and how a model's logits are computed, with or without views.

Every function that takes logits takes them as float (N, K), any device, with labels int64 (N,).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from scipy import stats
from sklearn.metrics import confusion_matrix
from torch import Tensor, nn

from cifar_lib.augment import normalize
from cifar_lib.fast_subnormals import subnormals_as_zero
from cifar_lib.models import evaluation_mode

TTA = ("none", "mirror", "mirror_translate")


@subnormals_as_zero()
def predict_logits(
    model: nn.Module,
    images: Tensor,
    *,
    mean: Tensor,
    std: Tensor,
    batch_size: int = 500,
    dtype: torch.dtype | None = None,
    channels_last: bool = False,
    tta: Literal["none", "mirror", "mirror_translate"] = "none",
) -> Tensor:
    """Computes a model's logits in evaluation mode, on the device of its parameters.

    Args:
        model: maps (N, 3, H, W) to (N, K); its mode is as before afterwards.
        images: uint8 (N, 3, H, W), 0..255, N at least 1, any device.
        mean: float (3,), of the training images, over 0..1.
        std: float (3,), likewise.
        batch_size: images a forward pass; bounds the memory.
        dtype: autocast type (bfloat16, float16), or None for fp32.
        channels_last: memory format of the images handed to the model.
        tta: test-time augmentation: "none"; "mirror" averages the logits of an image and its
            mirror image; "mirror_translate" gives half the weight to that average and a quarter
            each to that of the image moved one pixel up and left, and down and right, the border
            reflected (six forward passes).

    Returns:
        float32 (N, K), on the CPU.

    Raises:
        ValueError: no images, images that are not uint8, or an unknown `tta`.

    Source: "mirror_translate" is the multi-crop evaluation of Jordan, arXiv 2404.00498.
    """
    if images.dtype != torch.uint8 or not len(images):
        raise ValueError(
            f"images: got {images.dtype} of shape {tuple(images.shape)}; "
            "allowed is uint8 (N, 3, H, W) with N at least 1"
        )
    if tta not in TTA:
        raise ValueError(f"tta: got {tta!r}; allowed are {', '.join(TTA)}")
    device = next(model.parameters()).device
    mean, std = mean.to(device), std.to(device)
    autocast = torch.autocast(device.type, dtype, enabled=dtype is not None)
    parts = []
    with evaluation_mode(model), torch.inference_mode(), autocast:
        for batch in images.split(batch_size):
            x = normalize(batch.to(device), mean, std, torch.float32, channels_last)
            parts.append(sum(weight * model(view).float() for weight, view in _views(x, tta)))
    # Joined outside inference mode, so that a caller may go on computing with gradients.
    return torch.cat(parts).cpu()


def _views(x: Tensor, tta: str) -> Iterator[tuple[float, Tensor]]:
    """Yields the views of normalised images (N, 3, H, W) with weights that add up to 1."""
    shifts = [(1.0, x)]
    if tta == "mirror_translate":
        padded = F.pad(x, (1, 1, 1, 1), mode="reflect")
        shifts = [(0.5, x), (0.25, padded[..., 2:, 2:]), (0.25, padded[..., :-2, :-2])]
    for weight, view in shifts:
        sides = (view,) if tta == "none" else (view, view.flip(-1))
        yield from ((weight / len(sides), side) for side in sides)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of images whose largest logit is that of their label, 0..1."""
    labels = _checked(logits, labels)
    return (logits.argmax(dim=1) == labels).double().mean().item()


def top_k_accuracy(logits: Tensor, labels: Tensor, k: int) -> float:
    """Share of images whose label is among the k largest logits, 0..1.

    Raises:
        ValueError: `k` is not in 1..K, or the shapes do not fit together.
    """
    labels = _checked(logits, labels)
    if not 1 <= k <= logits.shape[1]:
        raise ValueError(f"k: got {k}; allowed is 1..{logits.shape[1]}, the number of classes")
    hits = logits.topk(k, dim=1).indices == labels[:, None]
    return hits.any(dim=1).double().mean().item()


def cross_entropy(logits: Tensor, labels: Tensor) -> float:
    """Mean negative log-likelihood of the labels, natural logarithm, without label smoothing."""
    labels = _checked(logits, labels)
    return F.cross_entropy(logits.double(), labels).item()


def confusion(logits: Tensor, labels: Tensor, k: int) -> npt.NDArray[np.int64]:
    """Counts how often class i (row, the truth) was taken for class j (column).

    Args:
        logits: float (N, K).
        labels: int64 (N,).
        k: number of classes K.

    Returns:
        int64 (K, K), adding up to N.
    """
    labels = _checked(logits, labels)
    predicted = logits.argmax(dim=1).cpu().numpy()
    return confusion_matrix(labels.cpu().numpy(), predicted, labels=np.arange(k))


def calibration_error(logits: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Expected calibration error of the top probability, 0..1, in bins of equal width.

    Source: Guo et al., On Calibration of Modern Neural Networks, arXiv 1706.04599, section 2.
    """
    confidence, correct, index = bin_by_confidence(logits, labels, bins)
    gap = correct - confidence
    return gap.new_zeros(bins).index_add(0, index, gap).abs().sum().item() / len(labels)


def bin_by_confidence(logits: Tensor, labels: Tensor, bins: int) -> tuple[Tensor, Tensor, Tensor]:
    """Puts images into bins of equal width by their top probability.

    Args:
        logits: float (N, K).
        labels: int64 (N,).
        bins: how many; bin i holds (i / bins, (i + 1) / bins], as in Guo et al., section 2.

    Returns:
        Three (N,): the top probability and whether it is the label's (1.0 or 0.0), float64, and
        the bin, int64, 0..bins-1.
    """
    labels = _checked(logits, labels)
    confidence, predicted = logits.double().softmax(dim=1).max(dim=1)
    index = ((confidence * bins).ceil().long() - 1).clamp(0, bins - 1)
    return confidence, (predicted == labels).double(), index


def brier_score(logits: Tensor, labels: Tensor) -> float:
    """Mean squared distance of the probabilities to the one-hot label, 0..2, lower is better.

    Source: Brier, Verification of Forecasts Expressed in Terms of Probability (1950).
    """
    labels = _checked(logits, labels)
    probabilities = logits.double().softmax(dim=1)
    return (probabilities - F.one_hot(labels, logits.shape[1])).square().sum(1).mean().item()


def _checked(logits: Tensor, labels: Tensor) -> Tensor:
    """Refuses shapes that do not fit; returns the labels on the device of the logits."""
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not len(labels):
        raise ValueError(
            f"logits: got shape {tuple(logits.shape)} with labels {tuple(labels.shape)}; "
            "allowed is (N, K) with (N,), N at least 1"
        )
    return labels.to(logits.device)


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval; low and high are None where there is none."""

    mean: float
    low: float | None
    high: float | None
    n: int


def mean_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Interval for the mean of a few independent runs, by Student's t.

    Args:
        values: one number a run, at least one.
        level: confidence level, 0..1.

    Returns:
        The mean, the interval and n; one run has no interval.

    Raises:
        ValueError: there are no values.
    """
    n = len(values)
    if n == 0:
        raise ValueError("values: got none; allowed is at least one")
    mean = float(np.mean(values))
    if n == 1:
        return Interval(mean, None, None, n)
    half = float(stats.t.ppf((1 + level) / 2, n - 1) * np.std(values, ddof=1) / np.sqrt(n))
    return Interval(mean, mean - half, mean + half, n)


def proportion_interval(accuracy: float, n: int, level: float = 0.95) -> Interval:
    """Interval for one accuracy on n images: what another sample of test images would do to it.

    It says nothing about another seed; `mean_interval` does.

    Args:
        accuracy: share of right answers, 0..1.
        n: number of images, at least 1.
        level: confidence level, 0..1.

    Raises:
        ValueError: `accuracy` or `n` is out of range.

    Source: Wilson (1927), Journal of the American Statistical Association 22, as in scipy.
    """
    if not 0 <= accuracy <= 1:
        raise ValueError(f"accuracy: got {accuracy}; allowed is 0..1")
    if n < 1:
        raise ValueError(f"n: got {n}; allowed is at least 1")
    test = stats.binomtest(round(accuracy * n), n)
    interval = test.proportion_ci(confidence_level=level, method="wilson")
    return Interval(accuracy, float(interval.low), float(interval.high), n)
