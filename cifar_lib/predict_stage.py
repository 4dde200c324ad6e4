"""What every stage's notebook measures of its finished runs, and the checks it ends with."""

import numpy as np
import pandas as pd

from cifar_lib.data import ImageSet, Splits, evenly_spread
from cifar_lib.evaluate import accuracy
from cifar_lib.evaluate_calibration import calibration_frame, fit_temperature
from cifar_lib.evaluate_robustness import SEVERITIES, corruption_frame
from cifar_lib.predict import predictor
from cifar_lib.results import Run, metrics_frame, results_frame


def calibration_table(runs: list[Run], splits: Splits) -> pd.DataFrame:
    """Calibration on test, as trained and divided by a temperature fitted on validation.

    Returns:
        The rows of `evaluate_calibration.calibration_frame` for each run, and its seed; without
        validation images only the row as trained, temperature 1.
    """
    tables = []
    for run in runs:
        fitted = None
        if len(splits.val):
            fitted = fit_temperature(predictor(run)(splits.val.images), splits.val.labels)
        table = calibration_frame(run.test_logits, splits.test.labels, fitted)
        tables.append(table.assign(seed=run.seed))
    return pd.concat(tables, ignore_index=True)


def calibration_verdict(table: pd.DataFrame) -> str:
    """What a `calibration_table` shows, in one sentence; means over seeds."""
    as_trained = table.groupby("seed").first().mean()
    fitted = table.groupby("seed").last().mean()
    if len(table) == table.seed.nunique():
        return f"ECE {as_trained.ece:.3f}; no temperature: there are no validation images."
    surer = "more" if fitted.temperature > 1 else "less"
    return (
        f"As trained {surer} sure than right: temperature {fitted.temperature:.2f}, fitted on "
        f"validation, takes the ECE on test from {as_trained.ece:.3f} to {fitted.ece:.3f}."
    )


def corruption_table(runs: list[Run], test: ImageSet, limit: int | None) -> pd.DataFrame:
    """Accuracy of each run under every corruption.

    Args:
        runs: finished runs.
        test: the test part.
        limit: at most so many test images, evenly spread; None is all.

    Returns:
        The rows of `evaluate_robustness.corruption_frame` for each run, and its seed.
    """
    tables = [
        corruption_frame(predictor(run), test.images, test.labels, limit).assign(seed=run.seed)
        for run in runs
    ]
    return pd.concat(tables, ignore_index=True)


def prediction_table(runs: list[Run], test: ImageSet) -> pd.DataFrame:
    """The answer of each run to each test image: columns label and `seed_<n>`, class numbers."""
    answers = {f"seed_{run.seed}": run.test_logits.argmax(1).numpy() for run in runs}
    return pd.DataFrame({"label": test.labels.numpy()} | answers)


def right_answers(predictions: pd.DataFrame) -> pd.DataFrame:
    """Which answers of a `prediction_table` are right: bool, a column a seed."""
    return predictions.drop(columns="label").eq(predictions["label"], axis="index")


def stage_checks(
    runs: list[Run],
    seeds: list[int],
    splits: Splits,
    calibration: pd.DataFrame,
    corruptions: pd.DataFrame,
) -> dict[str, bool]:
    """What must hold of a stage's runs on any data: the check in words → whether it holds."""
    metrics, reached = metrics_frame(runs), results_frame(runs)
    classes = len(splits.test.class_names)
    losses = metrics.groupby("seed").train_loss
    train, val = (part.labels.bincount(minlength=classes) for part in (splits.train, splits.val))
    ratio = len(splits.val) / len(splits.train)
    clean = corruptions[corruptions.corruption == "none"].accuracy
    chosen = evenly_spread(len(splits.test), int(corruptions.n.iloc[0]))
    kept = [accuracy(run.test_logits[chosen], splits.test.labels[chosen]) for run in runs]
    shape = (len(splits.test), classes)
    return {
        "one finished run a seed": [run.seed for run in runs] == list(seeds),
        "every loss is finite": bool(
            np.isfinite(metrics.train_loss).all() and np.isfinite(metrics.val_loss.dropna()).all()
        ),
        "training loss falls in every run": bool(
            ((losses.last() < losses.first()) | (losses.size() == 1)).all()
        ),
        "validation has train's proportions": bool(
            ((val - train * ratio).abs() <= 2 + ratio).all()
        ),
        "test logits cover the test set": all(tuple(r.test_logits.shape) == shape for r in runs),
        "better than chance": reached.test_accuracy.mean() > 1.2 / classes,
        "calibration is finite": bool(np.isfinite(calibration).all(axis=None)),
        "every corruption of every run": len(corruptions) == (1 + 5 * len(SEVERITIES)) * len(runs),
        "the saved weights answer as the run did": bool(np.allclose(clean, kept, atol=0.005)),
    }
