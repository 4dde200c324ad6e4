"""The runner: refuses before it runs, leaves what is up to date, keeps going past a failure."""

import io
import json
import os
import shutil
from dataclasses import replace
from pathlib import PurePath
from types import SimpleNamespace

import nbformat
import pytest
from filelock import FileLock

from cifar_lib import (
    reports,
    study,
    study_engine,
    study_execute,
    study_experiments,
    study_runs,
    study_sweep,
    train_state,
)
from cifar_lib import train as train_module
from cifar_lib.config import ROOT
from cifar_lib.config_yaml import read_yaml
from cifar_lib.data import load_dataset
from cifar_lib.study_experiments import Experiment, load_preset
from cifar_lib.study_sweep import read_sweep

PARAMETERS = """\
from typing import Optional
question: str = "What?"  # what it asks
dataset: str = "digits"  # auto, cifar10 or digits
epochs: int = 1  # passes
broken: bool = False  # whether to fail
reported_accuracy: Optional[float] = None  # what the source reports, 0..1
reported_on: str = ""  # on which data
shown: Optional[int] = None  # images
seeds: list = [0]  # one run each
experiment: str = "smoke"  # its name
preset: str = "smoke"  # its preset
report_dir: str = ""  # where to"""
BODY = """\
import json
from pathlib import Path
print("seed 0 epoch 1/1: shown")
print("not shown")
assert not broken
Path(report_dir, "summary.json").write_text(json.dumps({"epochs": epochs, "seeds": seeds}))"""
STUDY = """\
presets:
  quick:
    - {notebook: toy, params: toy/one.yaml, seeds: [0, 1]}
    - {notebook: toy, params: toy/two.yaml}
  twice:
    - {notebook: toy, params: toy/one.yaml}
    - {notebook: toy, params: toy/one.yaml}
  typo:
    - {notebook: toy, param: toy/one.yaml}
  lost:
    - {notebook: none, params: toy/one.yaml}
  twins:
    - {notebook: toy, params: toy/one.yaml, seeds: [0, 0]}
  idle:
    - {notebook: toy, params: toy/one.yaml, minutes_per_seed: soon}
"""
ONE = "question: One?\ndataset: digits\nepochs: 1\n"


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout with one toy notebook, two experiments and the real library."""
    rooms = (study, study_execute, study_experiments, study_runs, study_sweep)
    for module in (*rooms, reports):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setenv("CIFAR10_DOWNLOAD", "0")
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "params/toy").mkdir(parents=True)
    cells = [nbformat.v4.new_code_cell(text) for text in (PARAMETERS, BODY)]
    cells[0].metadata["tags"] = ["parameters"]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
    nbformat.write(notebook, tmp_path / "notebooks/toy.ipynb")
    (tmp_path / "params/study.yaml").write_text(STUDY)
    (tmp_path / "params/toy/one.yaml").write_text(ONE)
    (tmp_path / "params/toy/two.yaml").write_text(ONE.replace("One", "Two"))
    return tmp_path


@pytest.mark.parametrize(
    ("preset", "only", "text", "said"),
    [
        ("fast", "*", ONE, "unknown preset 'fast'.*quick"),
        ("quick", "nothing*", ONE, "--only 'nothing\\*' matches none of: toy/one, toy/two"),
        ("quick", "*", ONE + "lr: 0.1\n", "one.yaml: unknown parameter 'lr'; toy.ipynb accepts"),
        ("quick", "*", ONE + "seeds: [1]\n", "unknown parameter 'seeds'"),
        ("quick", "*", "question: One?\ndataset: digits\n", "missing parameter 'epochs'"),
        ("quick", "*", ONE + "epochs: 2\n", "line 4: duplicate key 'epochs'"),
        ("quick", "*", ONE.replace("1", "-1"), "one.yaml: epochs: got -1"),
        (
            "quick",
            "*",
            ONE + "reported_accuracy: 83.92\n",
            "one.yaml: reported_accuracy: got 83.92",
        ),
        ("quick", "*", ONE + "reported_accuracy: 83.92 %\n", "reported_accuracy: got '83.92 %'"),
        ("quick", "*", ONE + "reported_on: 2016-05-01\n", "reported_on: got .*valid string"),
        ("quick", "*", ONE + "shown: -5\n", "shown: got -5"),
        ("quick", "*", ONE + "shown: 2.5\n", "shown: got 2.5"),
        ("twice", "*", ONE, "names an experiment twice"),
        ("typo", "*", ONE, "'param'"),
        ("lost", "*", ONE, "no notebook notebooks/none.ipynb"),
        ("twins", "*", ONE, "seeds: got \\[0, 0\\]"),
        ("idle", "*", ONE, "minutes_per_seed: got 'soon'"),
    ],
)
def test_a_mistake_is_refused_before_anything_runs(checkout, preset, only, text, said):
    (checkout / "params/toy/one.yaml").write_text(text)
    with pytest.raises(ValueError, match=said) as caught:
        study.study(preset, only)
    assert "\n" not in str(caught.value)
    assert not (checkout / "runs").exists() and not (checkout / "reports").exists()


def test_a_file_may_set_a_field_that_the_notebook_does_not_list(checkout):
    (checkout / "params/toy/one.yaml").write_text(ONE + "eval_batch_size: 64\n")
    (one,) = study_experiments.load_preset("quick", "toy/one", None)
    assert one.config.eval_batch_size == 64


def test_what_a_report_takes_beside_may_be_left_open(checkout):
    text = ONE + "reported_accuracy: null\nshown: null\nbroken: true\nreported_on: test\n"
    (checkout / "params/toy/one.yaml").write_text(text)
    (one,) = study_experiments.load_preset("quick", "toy/one", None)
    assert one.parameters["reported_on"] == "test"


def run_study(only="*", **options) -> tuple[list[str], str]:
    console = io.StringIO()
    failed = study.study("quick", only, console=console, **options)
    return [experiment.label for experiment in failed], console.getvalue()


def test_what_is_up_to_date_is_left_and_what_changed_is_run(checkout):
    failed, said = run_study("toy/one")
    assert failed == [] and "toy/one: done in" in said
    assert "seed 0 epoch 1/1: shown" in said and "not shown" not in said
    place = checkout / "reports/quick/toy/one"
    first = json.loads((place / "summary.json").read_text())
    assert first["epochs"] == 1 and first["seeds"] == [0, 1]
    executed = nbformat.read(place / "executed.ipynb", as_version=4)
    assert "papermill" not in executed.metadata and str(checkout) not in json.dumps(executed)
    assert "not shown" in (checkout / "runs/logs/quick/toy-one.log").read_text()

    assert "toy/one: up to date" in run_study("toy/one")[1]
    (checkout / "params/toy/one.yaml").write_text(ONE.replace("1", "2"))
    assert "toy/one: done in" in run_study("toy/one")[1]
    assert json.loads((place / "summary.json").read_text())["epochs"] == 2
    assert not list(place.parent.glob(".*"))
    (place / "summary.json").write_text("null")
    assert "toy/one: done in" in run_study("toy/one")[1]


def test_a_report_whose_replacement_was_killed_half_way_is_taken_back(checkout):
    run_study("toy/one")
    place = checkout / "reports/quick/toy/one"
    place.rename(place.with_name(".one.old"))
    assert "toy/one: up to date" in run_study("toy/one")[1]
    assert (place / "summary.json").is_file() and not list(place.parent.glob(".*"))
    shutil.copytree(place, place.with_name(".one.old"))  # of a kill after it was replaced
    run_study("toy/one")
    assert (place / "summary.json").is_file() and not list(place.parent.glob(".*"))


def test_seeds_that_would_leave_some_out_of_a_sweeps_report_are_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"tells of seeds \[1, 2\] too.*--seeds 3") as caught:
        study.study("full", "07_choices/vgg16", n_seeds=1)
    assert "\n" not in str(caught.value)
    (swept,) = load_preset("full", "07_choices/vgg16")
    study_execute.check_keeps_seeds(swept)  # those of its own file are no fewer
    label, _, seed = swept.runs[0]
    variant, runs = PurePath(label), {}
    monkeypatch.setattr(study_execute, "published_runs", lambda *_, **__: runs)
    runs |= {"0": SimpleNamespace(path=variant, seed=seed)}
    runs |= {"7": SimpleNamespace(path=variant.with_name("no longer asked for"), seed=7)}
    study_execute.check_keeps_seeds(swept)
    runs |= {"8": SimpleNamespace(path=variant, seed=7)}  # another variant may well have a seed 7
    with pytest.raises(ValueError, match=r"seeds \[7\] too.*--seeds 8.*params/07_choices/vgg16"):
        study.study("full", "07_choices/vgg16")


def test_a_run_begun_for_one_experiment_goes_on_for_another(tmp_path, monkeypatch):
    monkeypatch.setattr(study_runs, "ROOT", tmp_path)
    own, begun, done = (tmp_path / "runs" / name / "0-abc" for name in ("a", "b", "c"))
    assert study_runs.find_folder("a", 0, "abc") == own
    begun.mkdir(parents=True)
    (begun / "previous.pt").touch()
    assert study_runs.find_folder("a", 0, "abc") == begun
    done.mkdir(parents=True)
    for name in ("config.yaml", "metrics.csv", "best.safetensors", "logits.safetensors"):
        (done / name).touch()
    assert study_runs.find_folder("a", 0, "abc") == begun
    (done / "summary.json").touch()
    assert study_runs.find_folder("a", 0, "abc") == done


def test_a_path_with_braces_is_a_path(tmp_path):
    place = tmp_path / "한글 {x} [y]"
    place.mkdir()
    shutil.copy(ROOT / "notebooks/01_baseline.ipynb", place)
    assert "epochs" in study_experiments.notebook_parameters(place / "01_baseline.ipynb")


def test_a_failure_does_not_stop_the_others_nor_lose_the_last_report(checkout):
    run_study("toy/one")
    (checkout / "params/toy/one.yaml").write_text(ONE + "broken: true\n")
    failed, said = run_study()
    assert failed == ["toy/one"]
    assert "toy/one: FAILED: AssertionError" in said and "toy/two: done in" in said
    assert "see runs/.scratch/quick/toy/one/executed.ipynb" in said
    assert (checkout / "runs/.scratch/quick/toy/one/executed.ipynb").is_file()
    assert (checkout / "reports/quick/toy/one/summary.json").is_file()


@pytest.mark.parametrize("jobs", [None, 2])
def test_data_that_can_not_be_had_does_not_stop_the_others(checkout, monkeypatch, jobs):
    # As of experiments that train, so that an engine asks for their keys beforehand.
    trains = property(lambda self: [("toy", self.config, 0)])
    monkeypatch.setattr(study_experiments.Experiment, "runs", trains)
    monkeypatch.setattr(study, "tasks_of", lambda experiments: [])
    real = study.input_key

    def input_key(experiment):
        if experiment.name == "one":
            raise ValueError("CIFAR-10 was not found in /nowhere")
        return real(experiment)

    monkeypatch.setattr(study, "input_key", input_key)
    failed, said = run_study(jobs=jobs)
    assert failed == ["toy/one"] and "toy/two: done in" in said
    assert "failed: toy/one: CIFAR-10 was not found in /nowhere" in said


def test_a_run_that_fails_two_experiments_is_told_once_and_fails_both(checkout, monkeypatch):
    shared = SimpleNamespace(folder=checkout / "runs/e/0-shared")
    trains = property(lambda self: [("e", self.config, 0)])
    monkeypatch.setattr(study_experiments.Experiment, "runs", trains)
    monkeypatch.setattr(study, "tasks_of", lambda experiments: [shared])
    monkeypatch.setattr(study, "missing", lambda tasks: tasks)
    monkeypatch.setattr(study, "without_told_seeds", lambda experiment: experiment)
    monkeypatch.setattr(study, "train_tasks", lambda *_: {shared.folder.name: "e, seed 0: broke"})
    failed, said = run_study(jobs=2)
    assert failed == ["toy/one", "toy/two"] and said.count("failed: e, seed 0: broke") == 1


@pytest.mark.parametrize("jobs", [None, 2])
@pytest.mark.parametrize(
    ("dataset", "found", "asks_again"),
    [("digits", True, True), ("auto", True, False), ("cifar10", False, True)],
)
def test_the_network_is_asked_until_it_has_answered(
    checkout, monkeypatch, jobs, dataset, found, asks_again
):
    monkeypatch.delenv("CIFAR10_DOWNLOAD")
    one = checkout / "params/toy/one.yaml"
    one.write_text(ONE.replace("digits", dataset))
    trains = property(lambda self: [("toy", self.config, 0)])
    monkeypatch.setattr(study_experiments.Experiment, "runs", trains)
    monkeypatch.setattr(study, "tasks_of", lambda experiments: [])
    monkeypatch.setattr(study, "execute", lambda *_: None)

    def input_key(experiment):
        if not found:
            raise ValueError("no answer within 10 s")
        return "key"

    monkeypatch.setattr(study, "input_key", input_key)
    _, said = run_study("toy/one", jobs=jobs)
    assert ("CIFAR10_DOWNLOAD" not in os.environ) == asks_again
    assert ("no answer within 10 s" in said) == (not found)


def test_one_process_executes_an_experiment(checkout):
    place = checkout / "runs/.scratch/quick/toy/.one.lock"
    place.parent.mkdir(parents=True)
    with FileLock(place):
        failed, said = run_study()
    assert failed == ["toy/one"] and "toy/two: done in" in said
    assert "toy/one: FAILED: another process executes this experiment" in said


def test_an_executed_notebook_begins_with_its_own_answer(tmp_path):
    (summary,) = reports.read_summaries("tests/fixtures/reports/02_speed")
    del summary["path"]
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    shutil.copy(ROOT / "notebooks/02_speed.ipynb", tmp_path / "executed.ipynb")
    experiment = study_experiments.Experiment("full", "02_speed", "smoke", {})
    study_execute._complete(tmp_path, experiment, "key")
    first = nbformat.read(tmp_path / "executed.ipynb", as_version=4).cells[0].source
    assert first.count("test accuracy") == 1 and "- **smoke**: test accuracy" in first
    assert "](" not in first


def test_the_key_follows_everything_a_report_depends_on(checkout, monkeypatch):
    def key(**changes):
        (experiment,) = load_preset("quick", "toy/one", **changes)
        return study_execute.input_key(experiment)

    first = key()
    assert key() == first
    assert key(n_seeds=1) != first
    (experiment,) = load_preset("quick", "toy/one")
    names = replace(experiment, parameters=experiment.parameters | {"systems": "systems.csv"})
    (checkout / "systems.csv").write_text("a file that a parameter names\n")
    named = study_execute.input_key(names)
    assert study_execute.input_key(names) == named != first
    (checkout / "systems.csv").write_text("altered\n")
    assert study_execute.input_key(names) not in (first, named)
    notebook = checkout / "notebooks/toy.ipynb"
    text = notebook.read_text()
    notebook.write_text(text.replace("not shown", "hidden"))
    assert key() != first
    notebook.write_text(text)
    (checkout / "cifar_lib").mkdir()
    (checkout / "cifar_lib/new.py").write_text("x = 1\n")
    assert key() != first


def test_an_engine_gets_a_sweeps_search_too():
    (experiment,) = load_preset("full", "07_choices/vgg16")
    search = read_sweep("params/07_choices/vgg16-search.yaml")
    sweep = read_sweep("params/07_choices/vgg16.yaml")
    asked = [(config, seed) for s in (search, sweep) for _, config, seed in s.pairs]
    assert [(config, seed) for _, config, seed in experiment.runs] == asked


@pytest.mark.parametrize("preset", ["quick", "full"])
def test_every_committed_preset_is_sound(preset):
    experiments = load_preset(preset)
    assert len(experiments) >= 4
    for experiment in experiments:
        assert set(study_experiments.notebook_parameters(experiment.source)) >= {
            *study_experiments.RUNNER_PARAMETERS
        }
        sweep = experiment.parameters.get("sweep")
        assert read_sweep(sweep).question if sweep else experiment.parameters["question"].strip()


def test_every_parameter_file_is_in_a_preset():
    presets = read_yaml(ROOT / "params/study.yaml")["presets"]
    listed = {e["params"] for entries in presets.values() for e in entries}
    files = {f"{p.parent.name}/{p.name}" for p in (ROOT / "params").glob("*/*.yaml")}
    # A smoke sweep is a notebook's default, a search is read by the notebook of its comparison.
    files -= {name for name in files if name.endswith(("-smoke.yaml", "-search.yaml"))}
    assert files == listed


def test_every_notebook_parameter_means_something():
    from cifar_lib.config import TrainConfig

    known = {*TrainConfig.model_fields, *study_experiments.RUNNER_PARAMETERS, "question"}
    known |= {
        "corruption_images",
        "reported_accuracy",
        "reported_by",
        "reported_on",
        "reported_curve",
        "reports_dir",
        "stages",
        "systems",
        "sweep",
    }
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        assert set(study_experiments.notebook_parameters(path)) <= known, path.name


def test_a_run_logs_to_the_console_and_to_its_folder(tmp_path, digits, tiny, monkeypatch, capsys):
    monkeypatch.setattr(study_runs, "ROOT", tmp_path)
    (run,) = study.runs(tiny(epochs=2), [0], experiment="e", splits=digits, progress=False)
    console, log = capsys.readouterr().out, (run.path / "train.log").read_text()
    for text in (console, log):
        assert text.count("seed 0 epoch ") == 2 and "val loss" in text


def test_finished_runs_are_returned_and_only_quick_follows_the_code(
    tmp_path, digits, tiny, monkeypatch
):
    monkeypatch.setattr(study_runs, "ROOT", tmp_path)
    epochs, real = [], train_module.train_epoch

    def counted(state, *rest):
        epochs.append((state.seed, state.epoch))
        return real(state, *rest)

    monkeypatch.setattr(train_module, "train_epoch", counted)

    def runs(preset, **options):
        epochs.clear()
        finished = study.runs(
            tiny(epochs=2), [0, 1], experiment="e", preset=preset, splits=digits, **options
        )
        return [run.summary for run in finished], list(epochs)

    every = [(0, 0), (0, 1), (1, 0), (1, 1)]
    first, trained = runs("full")
    assert [summary["seed"] for summary in first] == [0, 1] and trained == every
    assert runs("full") == (first, [])
    monkeypatch.setattr(study_runs, "training_code_sha256", lambda: "other")
    monkeypatch.setattr(train_state, "training_code_sha256", lambda: "other")
    assert runs("full") == (first, [])
    assert runs("quick")[1] == every
    assert runs("full", force=True)[1] == every


def test_forcing_a_study_forgets_its_own_runs_alone(checkout, monkeypatch):
    monkeypatch.setattr(study, "execute", lambda *_: None)
    monkeypatch.setattr(study, "train_tasks", lambda *_: {})
    (experiment,) = load_preset("quick", "toy/one")
    sha256 = load_dataset("digits")[0].info.sha256
    mine = experiment.config.fingerprint(sha256)
    kept = ["2-" + mine, "0-ffffffffffff"]
    for name in ["0-" + mine, *kept]:
        folder = checkout / "runs/one" / name
        folder.mkdir(parents=True)
        (folder / "summary.json").write_text("{}")
        (folder / "last.pt").write_text("state")
    assert study.study("quick", "toy/one", force=True, console=io.StringIO()) == []
    left = sorted(path.parent.name for path in (checkout / "runs/one").glob("*/summary.json"))
    assert left == sorted(kept)
    assert not (checkout / "runs/one" / ("0-" + mine) / "last.pt").exists()


def test_the_key_follows_the_data(checkout, monkeypatch):
    (experiment,) = load_preset("quick", "toy/one")
    first = study_execute.input_key(experiment)
    other = SimpleNamespace(info=SimpleNamespace(sha256="other"))
    monkeypatch.setattr(study_execute, "load_dataset", lambda *_: (other, None))
    assert study_execute.input_key(experiment) != first


def test_figures_of_other_data_or_another_recipe_are_not_replaced_without_a_word(
    checkout, monkeypatch
):
    (checkout / "params/study.yaml").write_text(STUDY.replace("quick:", "full:"))
    (experiment,) = load_preset("full", "toy/one")
    same = [task.folder.name for task in study_engine.tasks_of([experiment])]
    told = dict.fromkeys(same)
    monkeypatch.setattr(study_execute, "published_runs", lambda *_, **__: told)
    monkeypatch.setattr(study, "execute", lambda *_: None)
    console = io.StringIO()
    study.study("full", "toy/one", console=console)
    assert "replaced" not in console.getvalue()
    told |= {"0-0123456789ab": None, "4-0123456789ab": None}
    study.study("full", "toy/one", console=console)
    assert "reports/full/toy/one tells of 2 runs of other data or another" in console.getvalue()
    assert study_execute.replaced_runs(replace(experiment, preset="quick")) == 0


def test_the_key_of_a_sweep_follows_its_base(checkout):
    base, text = checkout / "params/toy/base.yaml", "dataset: digits\nwidth: 0.125\n"
    base.write_text(text)
    sweep = "question: Q?\nbase: base.yaml\nvariants: {a: }\n"
    (checkout / "params/toy/s.yaml").write_text(sweep)
    swept = Experiment("full", "toy", "s", {"sweep": "params/toy/s.yaml"}, [])
    first = study_execute.input_key(swept)
    base.write_text(text + "epochs: 3\n")
    assert study_execute.input_key(swept) != first


def test_the_key_of_a_comparison_follows_all_reports_but_its_own(checkout):
    reads = Experiment("full", "toy", "reads", {"reports_dir": "reports/full"})
    keys = []
    for name in ("reads", "one", "two"):
        (checkout / "reports/full/toy" / name).mkdir(parents=True)
        (checkout / "reports/full/toy" / name / "summary.json").write_text("{}")
        keys.append(study_execute.input_key(reads))
    (checkout / "reports/full/toy/reads/summary.json").write_text("made from the others")
    assert len(set(keys)) == 3 and study_execute.input_key(reads) == keys[-1]


def test_other_seeds_are_kept_but_where_todays_code_counts(tmp_path, monkeypatch):
    (tmp_path / "summary.json").write_text("{}")
    asked = []
    monkeypatch.setattr(study_execute, "keep_other_seeds", lambda *both: asked.append(both))
    empty = '{"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}'
    for preset in ("full", "quick", "smoke"):
        (tmp_path / "executed.ipynb").write_text(empty)
        study_execute._complete(tmp_path, Experiment(preset, "toy", "one", {}), "key")
    assert asked == [(tmp_path, Experiment("full", "toy", "one", {}).destination)]
