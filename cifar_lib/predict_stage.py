"""What every stage's notebook measures of its finished runs, and the checks it ends with."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cifar_lib.config import ROOT
from cifar_lib.data import ImageSet, Splits, evenly_spread, load_splits
from cifar_lib.evaluate import accuracy, cross_entropy
from cifar_lib.evaluate_calibration import calibration_frame, fit_temperature
from cifar_lib.evaluate_compare import compare_paired
from cifar_lib.evaluate_robustness import SEVERITIES, corruption_frame
from cifar_lib.files import shown
from cifar_lib.predict import predictor
from cifar_lib.results import LOGITS, Run, metrics_frame, results_frame


def evaluate_run(run: Run, splits: Splits | None = None) -> dict[str, Any]:
    """Evaluates a finished run's saved weights on the test set again.

    Args:
        run: as `results.load_run` gives it.
        splits: the data, if it is loaded already; must be the data of the run.

    Returns:
        seed, test_accuracy, test_accuracy_tta (None without `tta`; both 0..1), test_loss (nats).

    Raises:
        ValueError: the data found is not that of the run, or the weights do not fit.
    """
    splits = splits or load_splits(run.config)
    if splits.info.sha256 != run.summary["dataset"]["sha256"]:
        raise ValueError(
            f"{run.path}: was trained on other data ({run.summary['dataset']['name']}, SHA-256 "
            f"{run.summary['dataset']['sha256'][:12]}…) than is found here ({splits.info.name})"
        )
    images, labels = splits.test.images, splits.test.labels
    logits, tta = predictor(run)(images), run.config.tta != "none"
    return {
        "seed": run.seed,
        "test_accuracy": accuracy(logits, labels),
        "test_accuracy_tta": accuracy(predictor(run, tta=True)(images), labels) if tta else None,
        "test_loss": cross_entropy(logits, labels),
    }


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
    kind = "over" if fitted.temperature > 1 else "under"
    return (
        f"As trained {kind}confident: temperature {fitted.temperature:.2f}, fitted on "
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


def compare_with_report(
    run: Run, report: str, reports_dir: str | Path = "reports/full"
) -> pd.DataFrame:
    """Holds a finished run against every seed of a published stage, on the same test images.

    Args:
        run: has its answers to the test images, which the shipped model lacks.
        report: `notebook/experiment` of a stage; a sweep keeps no answers.
        reports_dir: from the root of the checkout.

    Returns:
        A row a seed of the report: seed, ours and theirs (test accuracy without test-time
        augmentation), difference with low and high (95 % bootstrap over the images), all percent,
        and p (McNemar, exact). It is about these runs: another seed of either recipe may differ.

    Raises:
        ValueError: there is no such report, the data differ, or the run has no answers.
    """
    root = ROOT / reports_dir
    known = sorted(p.parent.relative_to(root).as_posix() for p in root.glob("*/*/predictions.csv"))
    if report not in known:
        raise ValueError(f"{report}: no report with predictions; there are {', '.join(known)}")
    try:
        summary = json.loads((root / report / "summary.json").read_text(encoding="utf-8"))
        its_data = {key: str(summary["dataset"][key]) for key in ("name", "sha256")}
        predictions = pd.read_csv(root / report / "predictions.csv")
        label = predictions["label"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{shown(root / report)}: broken report ({error!r}); restore its summary.json and "
            "predictions.csv, or run its notebook again"
        ) from None
    if its_data["sha256"] != run.summary["dataset"]["sha256"]:
        ours, theirs = (
            f"{data['name']}, SHA-256 {data['sha256'][:8]}…"
            for data in (run.summary["dataset"], its_data)
        )
        raise ValueError(f"{run.path}: its data ({ours}) are not those of {report} ({theirs})")
    if not (run.path / LOGITS).is_file():
        raise ValueError(f"{run.path}: has no {LOGITS}; train a run of this configuration")
    if len(label) != len(run.test_logits):
        raise ValueError(
            f"{shown(root / report)}/predictions.csv has {len(label):,} rows, {run.path}/{LOGITS} "
            f"{len(run.test_logits):,}: one of them is damaged; restore it"
        )
    right = (run.test_logits.argmax(1).numpy() == label).to_numpy()
    table = pd.DataFrame(
        compare_paired(right, answers) | {"seed": str(column).removeprefix("seed_")}
        for column, answers in right_answers(predictions).items()
    )
    names = {"accuracy_first": "ours", "accuracy_second": "theirs", "p_exact": "p"}
    percent = ["ours", "theirs", "difference", "low", "high"]
    table = table.rename(columns=names)[["seed", *percent, "p"]]
    return table.assign(**(100 * table[percent]))


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
