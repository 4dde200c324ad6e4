"""Precision, recall and F1 of each class, with intervals, over one or several seeds."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from torch import Tensor

from cifar_lib.evaluate import confusion, proportion_interval

SCORES = ("precision", "recall", "f1")


def class_scores(
    logits: Sequence[Tensor], labels: Tensor, class_names: Sequence[str], level: float = 0.95
) -> pd.DataFrame:
    """Scores each class, from counts averaged over seeds, with intervals for the test images.

    Each score is a share of images, and its interval is Wilson's for as many images: what another
    test set of this size would do to it. Precision: of those called so. Recall: of those that are
    so. F1 is 2J / (1 + J), and J is the share of right ones among those that are so or called so;
    the ends of J's interval are carried over. Seeds share their test images, so that several make
    the counts steadier but never count as more images; what another seed would do is not in it.

    Args:
        logits: float (N, K) of each seed, at least one.
        labels: int64 (N,).
        class_names: K names.
        level: confidence level, 0..1.

    Returns:
        A row per class: class_name, n (its images), and for precision, recall and f1 the score
        with `_low` and `_high`, all 0..1; NaN where there is nothing to divide by.

    Raises:
        ValueError: as many names as classes are needed.

    Source: the interval of F1 is the "Wilson indirect" one of Lam et al., arXiv 2309.14621.
    """
    if len(class_names) != logits[0].shape[1]:
        raise ValueError(
            f"class_names: got {len(class_names)}; the logits have {logits[0].shape[1]}"
        )
    counts = np.mean([confusion(seed, labels, len(class_names)) for seed in logits], axis=0)
    right, called, true = np.diag(counts), counts.sum(axis=0), counts.sum(axis=1)
    table = pd.DataFrame({"class_name": list(class_names), "n": true.round().astype(int)})
    for name, of in zip(SCORES, (called, true, called + true - right), strict=True):
        ends = np.full((3, len(class_names)), np.nan)
        for k in np.flatnonzero(of):
            interval = proportion_interval(right[k] / of[k], max(1, round(of[k])), level)
            ends[:, k] = interval.mean, interval.low, interval.high
        if name == "f1":
            ends = 2 * ends / (1 + ends)
        table[[name, f"{name}_low", f"{name}_high"]] = ends.T
    return table
