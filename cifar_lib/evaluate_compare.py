"""Two models on the same test images: what differs beyond the choice of the images."""

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats


def compare_paired(
    first: npt.ArrayLike, second: npt.ArrayLike, *, level: float = 0.95, draws: int = 10_000
) -> dict[str, Any]:
    """Compares two models image by image.

    Images that both get right, or both wrong, say nothing about the difference. Like every test
    over images, this one takes the two trained models as they are: another seed of either recipe
    may differ too.

    Args:
        first: bool (N,), whether the first model is right.
        second: bool (N,), likewise, in the same order.
        level: confidence level of the interval, 0..1.
        draws: bootstrap samples, drawn from a fixed seed.

    Returns:
        n; accuracy_first and accuracy_second, 0..1; difference (first minus second) with low and
        high of its bootstrap interval (percentiles); only_first and only_second, the images that
        one alone gets right; p_exact, McNemar's test as an exact binomial one, two-sided.

    Raises:
        ValueError: the two do not have the same length, or there is nothing in them.

    Source: McNemar, Psychometrika 12 (1947).
    """
    a, b = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    if a.ndim != 1 or a.shape != b.shape or not len(a):
        raise ValueError(f"first, second: got shapes {a.shape}, {b.shape}; allowed is (N,) twice")
    n, only = len(a), np.array([(a & ~b).sum(), (b & ~a).sum()])
    discordant = int(only.sum())
    # Images drawn with replacement fall into three kinds; only how many of each is needed.
    kinds = [*only / n, 1 - discordant / n]
    sample = np.random.default_rng(0).multinomial(n, kinds, size=draws)
    tail = (1 - level) / 2
    low, high = np.quantile((sample[:, 0] - sample[:, 1]) / n, (tail, 1 - tail))
    return {
        "n": n,
        "accuracy_first": float(a.mean()),
        "accuracy_second": float(b.mean()),
        "difference": float(only[0] - only[1]) / n,
        "low": float(low),
        "high": float(high),
        "only_first": int(only[0]),
        "only_second": int(only[1]),
        "p_exact": float(stats.binomtest(int(only[0]), discordant).pvalue) if discordant else 1.0,
    }
