"""Published runs: what a report tells of each seed, and how its seeds come together."""

import io
import json
import shutil
from dataclasses import replace

import pandas as pd
import pytest

from cifar_lib import (
    files,
    reports,
    reports_runs,
    results,
    study,
    study_execute,
    study_experiments,
    study_runs,
)
from cifar_lib.predict_stage import calibration_table, prediction_table
from cifar_lib.reports import Report
from cifar_lib.reports_runs import keep_other_seeds, published_runs
from cifar_lib.study_execute import check_keeps_seeds, without_told_seeds
from cifar_lib.study_experiments import Experiment
from cifar_lib.study_runs import runs

FOUND = {"answer": ["as found"]}


@pytest.fixture
def publish(tmp_path, monkeypatch, digits, tiny):
    """Executes a report with some seeds, as a stage's notebook does; returns its summary."""
    for room in (study_runs, study_execute, study_experiments, reports, reports_runs):
        monkeypatch.setattr(room, "ROOT", tmp_path)

    def publish(folder: str, seeds: list[int], said: dict = FOUND, **changes) -> dict:
        config = tiny(epochs=1, **changes)
        finished = runs(config, seeds, experiment="e", splits=digits)
        report = Report(folder, "03_x", "e", "full", "Q?")
        report.table("predictions", prediction_table(finished, digits.test))
        report.table("calibration", calibration_table(finished, digits))
        report.table("per_class", pd.DataFrame({"class_name": ["a"], "recall": [0.5]}))
        reported = {"accuracy": 0.9, "by": "D", "on": "test"}
        return report.finish(config, finished, reported=reported, **said)

    return publish


def told(summary: dict) -> dict:
    """What a summary says but for the moment and the answer."""
    return {k: v for k, v in summary.items() if k not in ("finished_at", "answer", "experiment")}


def test_seeds_of_two_executions_make_one_report(tmp_path, publish):
    whole = publish("whole", [0, 1, 2])
    publish("old", [2, 1, 0])  # seed 1 stands in both: the new one counts
    publish("new", [1])
    keep_other_seeds(tmp_path / "new", tmp_path / "old")
    (summary,) = reports.read_summaries("new")
    del summary["path"]
    assert told(summary) == told(whole) and summary["test_accuracy"]["n"] == 3
    note, found = summary["answer"]
    assert note.startswith("seeds 0, 2 are kept") and found == "as found"
    for name in ("metrics", "predictions", "calibration", "per_class"):
        joined, at_once = (pd.read_csv(tmp_path / d / f"{name}.csv") for d in ("new", "whole"))
        pd.testing.assert_frame_equal(joined, at_once)


def test_what_a_notebook_adds_of_its_own_stays_and_an_answer_it_may_lack(tmp_path, publish):
    publish("old", [0])
    publish("new", [1], {"mine": 1})
    keep_other_seeds(tmp_path / "new", tmp_path / "old")
    (summary,) = reports.read_summaries("new")
    assert summary["mine"] == 1 and summary["test_accuracy"]["n"] == 2
    assert [line[:8] for line in summary["answer"]] == ["seeds 0 "]


@pytest.mark.parametrize("changes", [{"learning_rate": 0.003}, None])
def test_a_report_of_another_recipe_or_the_same_seeds_adds_nothing(tmp_path, publish, changes):
    publish("old", [0] if changes is None else [0, 1], **(changes or {}))
    publish("new", [0])
    before = (tmp_path / "new/summary.json").read_bytes()
    keep_other_seeds(tmp_path / "new", tmp_path / "old")
    keep_other_seeds(tmp_path / "new", tmp_path / "nowhere")
    assert (tmp_path / "new/summary.json").read_bytes() == before


def test_a_stage_trains_the_seeds_that_no_report_tells(tmp_path, publish, tiny):
    summary = publish("reports/full/03_x/e", [0, 1])
    fields = tiny(epochs=1).model_dump(exclude_defaults=True)
    asked = Experiment("full", "03_x", "e", fields, seeds=[0, 1, 2])
    assert without_told_seeds(asked) == asked  # their runs are here
    shutil.rmtree(tmp_path / "runs")
    assert without_told_seeds(asked).seeds == [2]
    again = Experiment("full", "03_x", "e", fields, seeds=[0, 1])
    assert without_told_seeds(again) == again  # else nothing would be left to execute
    quick = Experiment("quick", "03_x", "e", fields, seeds=[0, 1, 2])
    shutil.copytree(tmp_path / "reports/full", tmp_path / "reports/quick")
    assert without_told_seeds(quick) == quick
    assert list(published_runs()) == [f"{s}-{summary['config_fingerprint']}" for s in (0, 1)]
    assert not any(results.is_finished(run.path) for run in published_runs().values())


@pytest.mark.parametrize("name", ["summary.json", "metrics.csv", "predictions.csv"])
def test_what_would_lose_seeds_because_a_file_is_broken_is_refused(
    tmp_path, publish, monkeypatch, tiny, name
):
    monkeypatch.setattr(files, "ROOT", tmp_path)
    publish("reports/full/03_x/e", [0, 1])
    fields = tiny(epochs=1).model_dump(exclude_defaults=True)
    asked = Experiment("full", "03_x", "e", fields, seeds=[0])
    check_keeps_seeds(asked)
    (tmp_path / "reports/full/03_x/e" / name).write_text("")
    with pytest.raises(ValueError, match=rf"^reports/full/03_x/e/{name}: broken .*or delete repo"):
        check_keeps_seeds(asked)
    check_keeps_seeds(replace(asked, preset="quick"))


@pytest.mark.parametrize("broken", ["[]", '{"runs": [{}], "config": null}', "{", "{}"])
def test_a_broken_report_tells_of_no_run_and_is_named(tmp_path, publish, caplog, broken):
    publish("reports/full/03_x/e", [0])
    whole = published_runs()
    beside = tmp_path / "reports/full/03_x/torn/summary.json"
    beside.parent.mkdir()
    beside.write_text(broken)
    assert published_runs().keys() == whole.keys()
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(warnings) == 1 and str(beside) in warnings[0]


def test_of_a_seed_that_both_tell_the_new_figures_count(tmp_path, publish):
    publish("old", [0, 1])
    path = tmp_path / "old/summary.json"
    old = json.loads(path.read_text())
    old["runs"][1]["test_accuracy"] = 0.0
    path.write_text(json.dumps(old))
    new = publish("new", [1])["runs"]
    keep_other_seeds(tmp_path / "new", tmp_path / "old")
    assert json.loads((tmp_path / "new/summary.json").read_text())["runs"][1:] == new


@pytest.mark.parametrize(
    ("options", "to_train", "to_execute"),
    [({}, [], [1]), ({"jobs": 2}, [1], [1]), ({"force": True}, [0, 1], [0, 1])],
)
def test_told_seeds_are_neither_trained_nor_executed_unless_forced(
    tmp_path, publish, tiny, monkeypatch, options, to_train, to_execute
):
    publish("reports/full/03_x/e", [0])
    shutil.rmtree(tmp_path / "runs")
    fields = tiny(epochs=1).model_dump(exclude_defaults=True)
    asked, trained, executed = Experiment("full", "03_x", "e", fields, seeds=[0, 1]), [], []
    monkeypatch.setattr(study, "ROOT", tmp_path)
    monkeypatch.setattr(study, "load_preset", lambda *_: [asked])
    monkeypatch.setattr(study, "LocalEngine", lambda jobs: None)
    monkeypatch.setattr(
        study, "train_tasks", lambda tasks, *_: trained.extend(t.seed for t in tasks) or {}
    )
    monkeypatch.setattr(study, "execute", lambda e, *_: executed.extend(e.seeds))
    study.study("full", console=io.StringIO(), **options)
    assert (trained, executed) == (to_train, to_execute)
