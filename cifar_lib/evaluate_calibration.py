"""Whether probabilities can be believed, and temperature scaling, which corrects them.

Source: Guo et al., On Calibration of Modern Neural Networks, arXiv 1706.04599, sections 2 and 4.
"""

from dataclasses import asdict

import numpy as np
import pandas as pd
from scipy.optimize import minimize_scalar
from torch import Tensor

from cifar_lib.evaluate import (
    bin_by_confidence,
    brier_score,
    calibration_error,
    cross_entropy,
    proportion_interval,
)

TEMPERATURES = (0.05, 20.0)
"""Where the temperature is searched; validation without a mistake would drive it to zero."""


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Finds the temperature whose division of the logits gives the least cross-entropy.

    Args:
        logits: float (N, K) of the validation images; never of the test images.
        labels: int64 (N,).

    Returns:
        The temperature, within `TEMPERATURES`: above 1 the model was too sure of itself.
    """
    fit = minimize_scalar(
        lambda log: cross_entropy(logits / np.exp(log), labels),
        bounds=np.log(TEMPERATURES),
        method="bounded",
        options={"xatol": 1e-4},
    )
    return float(np.exp(fit.x))


def calibration_frame(logits: Tensor, labels: Tensor, temperature: float | None) -> pd.DataFrame:
    """Calibration of the test logits as they are and divided by a temperature.

    Args:
        logits: float (N, K) of the test images.
        labels: int64 (N,).
        temperature: from `fit_temperature` on validation; None leaves the second row out.

    Returns:
        A row each: temperature, nll (mean negative log-likelihood, nats), ece (0..1), brier (0..2).
    """
    rows = [
        {
            "temperature": t,
            "nll": cross_entropy(logits / t, labels),
            "ece": calibration_error(logits / t, labels),
            "brier": brier_score(logits / t, labels),
        }
        for t in (1.0, temperature)
        if t is not None
    ]
    return pd.DataFrame(rows)


def reliability_frame(logits: Tensor, labels: Tensor, bins: int = 15) -> pd.DataFrame:
    """Accuracy by confidence: the data of a reliability diagram.

    Args:
        logits: float (N, K).
        labels: int64 (N,).
        bins: of equal width, closed above, as in `evaluate.calibration_error`.

    Returns:
        A row for each bin that holds images: n, confidence (the mean top probability), accuracy,
        and low and high of its 95 % interval (Wilson), all 0..1.
    """
    confidence, correct, index = bin_by_confidence(logits, labels, bins)
    images = pd.DataFrame(
        {
            "confidence": confidence.cpu().numpy(),
            "accuracy": correct.cpu().numpy(),
        }
    )
    groups = images.groupby(index.cpu().numpy())
    table = groups.mean().assign(n=groups.size()).reset_index(drop=True)
    pairs = zip(table.accuracy, table.n, strict=True)
    intervals = pd.DataFrame([asdict(proportion_interval(a, n)) for a, n in pairs])
    return table.join(intervals[["low", "high"]])
