"""What a stage measures of its finished runs, and the checks that its notebook ends with."""

import dataclasses
import json
import math
import shutil

import pandas as pd
import pytest

from cifar_lib.evaluate_calibration import fit_temperature
from cifar_lib.predict import predictor
from cifar_lib.predict_stage import (
    calibration_table,
    calibration_verdict,
    compare_with_report,
    corruption_table,
    prediction_table,
    right_answers,
    stage_checks,
)
from cifar_lib.train import train


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny, digits):
    folder = tmp_path_factory.mktemp("runs")
    return [train(tiny(), seed, digits, folder / str(seed)) for seed in (0, 1)]


def test_every_run_stands_in_every_table(runs, digits):
    calibration = calibration_table(runs, digits)
    assert calibration.seed.tolist() == [0, 0, 1, 1]
    assert (calibration.temperature == 1).tolist() == [True, False] * 2
    predictions = prediction_table(runs, digits.test)
    assert list(predictions.columns) == ["label", "seed_0", "seed_1"]
    for run in runs:
        right = predictions.label == predictions[f"seed_{run.seed}"]
        assert right.mean() == pytest.approx(run.summary["result"]["test_accuracy"])
        assert right_answers(predictions)[f"seed_{run.seed}"].equals(right)
    assert list(right_answers(predictions)) == ["seed_0", "seed_1"]
    corruptions = corruption_table(runs, digits.test, 50)
    assert len(corruptions) == 2 * 26 and set(corruptions.n) == {50}
    assert all(stage_checks(runs, [0, 1], digits, calibration, corruptions).values())


@pytest.fixture
def published(runs, digits, tmp_path):
    """A folder of reports with one stage, whose seeds are the two runs."""
    folder = tmp_path / "02_x/stage"
    folder.mkdir(parents=True)
    prediction_table(runs, digits.test).to_csv(folder / "predictions.csv", index=False)
    (folder / "summary.json").write_text(json.dumps({"dataset": runs[0].summary["dataset"]}))
    return tmp_path


def test_a_run_is_held_against_every_seed_of_a_report(runs, published):
    table = compare_with_report(runs[0], "02_x/stage", published)
    accuracies = [100 * run.summary["result"]["test_accuracy"] for run in runs]
    assert table["theirs"].tolist() == pytest.approx(accuracies)
    assert table["ours"].tolist() == pytest.approx([accuracies[0]] * 2)
    assert table["difference"].tolist() == pytest.approx([0, accuracies[0] - accuracies[1]])
    assert table.loc[0, ["low", "high", "p"]].tolist() == [0, 0, 1] and list(table.seed) == [
        "0",
        "1",
    ]
    assert table.loc[1, "low"] < table.loc[1, "difference"] < table.loc[1, "high"]


def test_what_cannot_be_compared_is_one_line(runs, published, tmp_path):
    with pytest.raises(ValueError, match="02_x/other: no report with predictions; .*02_x/stage"):
        compare_with_report(runs[0], "02_x/other", published)
    bare = dataclasses.replace(runs[0], path=tmp_path)
    with pytest.raises(ValueError, match="has no logits.safetensors"):
        compare_with_report(bare, "02_x/stage", published)
    data = runs[0].summary["dataset"] | {"sha256": "0" * 64, "name": "cifar10"}
    (published / "02_x/stage/summary.json").write_text(json.dumps({"dataset": data}))
    said = r"\(digits, SHA-256 \w{8}…\) are not .* \(cifar10, SHA-256 0{8}…\)"
    with pytest.raises(ValueError, match=said):
        compare_with_report(runs[0], "02_x/stage", published)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("summary.json", "", "stage: broken report .*restore its summary.json and"),
        ("summary.json", "[]", "stage: broken report"),
        ("summary.json", '{"dataset": null}', "stage: broken report"),
        ("predictions.csv", "", "stage: broken report"),
        ("predictions.csv", "seed_0\n1\n", "stage: broken report .*label"),
        ("predictions.csv", "label,seed_0\n1,1\n", r"predictions.csv has 1 rows, .* 360: one of"),
    ],
)
def test_a_damaged_report_is_named(runs, published, name, text, said):
    (published / "02_x/stage" / name).write_text(text)
    with pytest.raises(ValueError, match=said) as caught:
        compare_with_report(runs[0], "02_x/stage", published)
    assert "\n" not in str(caught.value)


def test_logits_without_those_of_the_test_images_are_named(runs, published, tmp_path):
    shutil.copy(runs[0].path / "best.safetensors", tmp_path / "logits.safetensors")
    with pytest.raises(ValueError, match=r"logits.safetensors: holds no test logits; train the"):
        compare_with_report(dataclasses.replace(runs[0], path=tmp_path), "02_x/stage", published)


def test_without_validation_nothing_is_fitted(runs, digits):
    nothing = dataclasses.replace(digits, val=digits.val.subset(digits.val.labels[:0]))
    table = calibration_table(runs, nothing)
    assert table.temperature.tolist() == [1, 1]
    assert "no temperature" in calibration_verdict(table)


@pytest.mark.parametrize(("temperature", "said"), [(1.5, "overconfident"), (0.7, "underconfident")])
def test_the_verdict_has_the_direction_and_both_errors(temperature, said):
    rows = [{"temperature": t, "ece": e, "seed": 0} for t, e in ((1.0, 0.08), (temperature, 0.02))]
    verdict = calibration_verdict(pd.DataFrame(rows))
    assert said in verdict and f"{temperature:.2f}" in verdict and "0.080 to 0.020" in verdict


def test_weights_that_answer_otherwise_are_seen(runs, digits):
    calibration = calibration_table(runs, digits)
    corruptions = corruption_table(runs, digits.test, 50)
    corruptions.loc[corruptions.corruption == "none", "accuracy"] -= 0.02
    checks = stage_checks(runs, [0, 1], digits, calibration, corruptions)
    assert [name for name, holds in checks.items() if not holds] == [
        "the saved weights answer as the run did"
    ]
    once = [
        dataclasses.replace(run, metrics=run.metrics.head(1)) for run in runs
    ]  # nothing to fall from
    assert stage_checks(once, [0, 1], digits, calibration, corruptions)[
        "training loss falls in every run"
    ]
    checks = stage_checks(runs, [0, 1, 2], digits, calibration, corruptions[:-1])
    assert not checks["one finished run a seed"] and not checks["every corruption of every run"]


def test_the_temperature_is_fitted_on_validation(runs, digits):
    fitted = [fit_temperature(predictor(r)(digits.val.images), digits.val.labels) for r in runs]
    table = calibration_table(runs, digits)
    assert table.temperature[1::2].tolist() == pytest.approx(fitted)


def test_runs_that_learnt_nothing_are_seen(runs, digits):
    bad = []
    for run in runs:
        result = run.summary["result"] | {"test_accuracy": 0.11}
        metrics = run.metrics.assign(train_loss=[1.0, math.inf, 2.0])
        summary = run.summary | {"result": result}
        bad.append(dataclasses.replace(run, metrics=metrics, summary=summary))
    corruptions = corruption_table(runs, digits.test, 50)
    checks = stage_checks(bad, [0, 1], digits, calibration_table(runs, digits), corruptions)
    assert [name for name, holds in checks.items() if not holds] == [
        "every loss is finite", "training loss falls in every run", "better than chance",
    ]  # fmt: skip
