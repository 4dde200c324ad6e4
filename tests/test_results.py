"""A run is loaded as it was saved, and a report is read back as it was written."""

import dataclasses
import json
import math

import pandas as pd
import pytest
import torch

from cifar_lib import reports, reports_compare, results
from cifar_lib.data import DataInfo
from cifar_lib.reports import Report, comparison_frame, read_summaries, row_of
from cifar_lib.reports_compare import stage_tables
from cifar_lib.train import train

INFO = DataInfo("cifar10", "parquet", True, "0" * 64, 45_000, 5_000, 10_000)


@pytest.fixture(scope="module")
def run(tmp_path_factory, digits, tiny):
    return train(tiny(epochs=1), 3, digits, tmp_path_factory.mktemp("run"))


def test_a_run_is_loaded_as_it_was_saved(run):
    again = results.load_run(run.path)
    assert again.config == run.config and again.seed == 3
    pd.testing.assert_frame_equal(again.metrics, run.metrics)
    assert again.summary == run.summary
    assert results.is_finished(run.path)


@pytest.mark.parametrize("name", ["config.yaml", "metrics.csv", "best.safetensors", "summary.json"])
def test_an_unfinished_run_names_what_is_missing(run, tmp_path, name):
    for path in run.path.iterdir():
        if path.name != name:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    assert not results.is_finished(tmp_path)
    with pytest.raises(ValueError, match=f"not a finished run, {name} missing"):
        results.load_run(tmp_path)


def test_a_broken_record_is_named(run, tmp_path):
    for path in run.path.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    result = {key: value for key, value in run.summary["result"].items() if key != "test_loss"}
    lost = ({}, {"test_loss": None}, {"test_loss": math.inf})
    records = [json.dumps(run.summary | {"result": result | value}) for value in lost]
    for text in ("{", *records):
        (tmp_path / "summary.json").write_text(text)
        with pytest.raises(ValueError, match="broken run record"):
            results.load_run(tmp_path)


def test_weights_of_another_model_are_refused():
    with pytest.raises(ValueError, match=r"here: these weights do not fit the model: .*\S"):
        results.load_state(torch.nn.Linear(2, 2), {"weight": torch.zeros(3, 2)}, "here")


def test_frames_are_tidy(run):
    assert list(results.metrics_frame([run, run])) == results.METRIC_COLUMNS
    assert list(results.results_frame([run])["seed"]) == [3]


def test_a_report_has_the_keys_of_its_contract(run, tmp_path, monkeypatch):
    monkeypatch.setattr(reports, "ROOT", tmp_path)
    report = Report("out", "01_baseline", "name", "full", "What?")
    report.finish(run.config, [run], reported={"accuracy": 0.8, "by": "study A", "on": "original"})
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert list(summary)[:5] == ["schema", "experiment", "notebook", "preset", "question"]
    assert summary.keys() >= {
        "config", "config_fingerprint", "dataset", "model", "runs", "test_accuracy", "reported",
        "hardware", "environment", "git_commit", "finished_at",
    }  # fmt: skip
    assert summary["dataset"].keys() == {f.name for f in dataclasses.fields(DataInfo)}
    assert summary["runs"][0].keys() >= {
        "seed", "val_accuracy", "test_accuracy", "val_accuracy_last", "test_accuracy_tta",
        "test_loss", "best_epoch", "epochs", "train_seconds", "evaluation_seconds",
        "images_per_second",
    }  # fmt: skip
    accuracy = run.summary["result"]["test_accuracy"]
    assert summary["test_accuracy"] == {"mean": accuracy, "low": None, "high": None, "n": 1}
    assert (tmp_path / "out/metrics.csv").read_text().startswith("seed,epoch,learning_rate,")
    (row,) = comparison_frame(read_summaries("out")).to_dict("records")
    assert row["reported_accuracy"] == 0.8 and row["test_accuracy"] == accuracy


def test_each_other_stage_hands_over_the_table_of_its_best_report(run, tmp_path, monkeypatch):
    monkeypatch.setattr(reports, "ROOT", tmp_path)
    monkeypatch.setattr(reports_compare, "ROOT", tmp_path)
    data = run.summary["dataset"]["sha256"]
    assert stage_tables("reports/x", "t", data, but="04/own") == {}
    for notebook, name, val in (
        ("01", "weak", 0.5), ("01", "strong", 0.7), ("01", "without", 0.9),
        ("01", "transfer", 0.8),
        ("02", "retrained", None), ("03", "other", 0.6), ("04", "own", 0.8), ("04", "sibling", 0.3),
    ):  # fmt: skip
        result = run.summary["result"] | {"val_accuracy": val}
        weights = "imagenet" if name == "transfer" else None
        dataset = run.summary["dataset"] | ({"sha256": "0"} if name == "other" else {})
        changed = dataclasses.replace(
            run, summary=run.summary | {"result": result, "dataset": dataset}
        )
        report = Report(f"reports/x/{notebook}/{name}", notebook, name, "x", "What?")
        if name != "without":
            report.table("t", pd.DataFrame({"val": [val]}))
        report.finish(run.config.model_copy(update={"weights": weights}), [changed])
    found = stage_tables("reports/x", "t", data, but="04/own")
    # Nothing tells whether one that held no images out is better than another: all stand.
    assert list(found) == ["01/strong", "01/transfer", "02/retrained", "04/sibling"]
    assert found["01/strong"]["val"].tolist() == [0.7]


def test_time_and_machine_are_those_of_undisturbed_seeds(run, tmp_path, monkeypatch):
    monkeypatch.setattr(reports, "ROOT", tmp_path)

    def seed(load: float, seconds: float, name: str) -> results.Run:
        result = run.summary["result"] | {"other_load": load, "train_seconds": seconds}
        hardware = run.summary["hardware"] | {"name": name}
        return dataclasses.replace(
            run, summary=run.summary | {"result": result, "hardware": hardware}
        )

    busy, calm = seed(0.5, 90.0, "busy"), seed(0.01, 30.0, "calm")
    for seeds, time, shared, machine in (
        ([busy, calm], 30.0, False, "calm"), ([busy, seed(0.3, 50.0, "b")], 90.0, True, "busy"),
    ):  # fmt: skip
        row = row_of(Report("", "01", "x", "x", "What?").finish(run.config, seeds))
        assert (row["train_seconds"], row["shared_machine"]) == (time, shared)
        assert row["machine"].startswith(machine) and row["n"] == 2


def test_an_explored_notebook_writes_nothing(run, tmp_path, monkeypatch):
    monkeypatch.setattr(reports, "ROOT", tmp_path)
    report = Report("", "01_baseline", "smoke", "smoke", "What?")
    summary = report.finish(run.config, [run])
    report.table("x", pd.DataFrame({"a": [1]}))
    assert summary["test_accuracy"]["n"] == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "broken",
    [
        {"finished_at": ...},
        {"finished_at": 3},
        {"question": ...},
        {"model": "x"},
        {"model": None},
        {"dataset": None},
        {"dataset": []},
        {"config": "x"},
        {"runs": 1},
        {"runs": []},
        {"hardware": {}},
        {"answer": 3},
        {"answer": [1]},
        {"test_accuracy": None},
    ],
)
def test_a_broken_summary_is_named(run, tmp_path, monkeypatch, broken):
    monkeypatch.setattr(reports, "ROOT", tmp_path)
    summary = Report("", "01_baseline", "smoke", "smoke", "What?").finish(run.config, [run])
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert read_summaries(tmp_path)
    text = json.dumps({k: v for k, v in (summary | broken).items() if v is not ...})
    (tmp_path / "summary.json").write_text(text)
    with pytest.raises(ValueError, match=r"summary\.json: broken summary"):
        read_summaries(tmp_path)


def test_a_stand_in_is_called_one():
    digits_info = dataclasses.replace(INFO, name="digits", source="embedded", lossy=False)
    assert "say nothing about CIFAR-10" in reports.caption_of(digits_info)
    assert reports.caption_of(INFO).startswith("Data: CIFAR-10, JPEG copy (parquet); 45,000 train")


def test_the_interval_table_says_n_mean_interval_and_what_was_reported(run):
    report = Report("", "01_baseline", "smoke", "smoke", "What?")
    reported = {"accuracy": 0.8, "by": "study A", "on": "original"}
    frame = reports.interval_frame(report.finish(run.config, [run, run], reported=reported))
    accuracy = round(100 * run.summary["result"]["test_accuracy"], 2)
    assert list(frame.loc["test_accuracy"]) == [2, 0, accuracy, accuracy, accuracy]
    assert frame.loc["reported by study A on original", "mean"] == 80.0
    assert "test_accuracy_tta" not in frame.index


def test_the_spread_is_that_of_a_sample(run):
    two = [
        dataclasses.replace(
            run, summary=run.summary | {"result": run.summary["result"] | {"test_accuracy": a}}
        )
        for a in (0.5, 0.7)
    ]
    frame = reports.interval_frame(Report("", "01", "x", "x", "?").finish(run.config, two))
    assert frame.loc["test_accuracy", "sd"] == 14.14
