"""A sweep file: read whole and checked whole; what is shared or published is trained once."""

import dataclasses
import json
import shutil

import nbformat
import pandas as pd
import pytest

from cifar_lib import reports, reports_runs, study_runs, study_sweep
from cifar_lib import train as train_module
from cifar_lib.config import ROOT
from cifar_lib.reports import Report, read_summaries
from cifar_lib.reports_runs import published_runs
from cifar_lib.results import metrics_frame, results_frame
from cifar_lib.study_choices import choices_of, roles
from cifar_lib.study_sweep import read_sweep, search_of, sweep_runs

SMOKE = "tests/fixtures/sweeps/smoke.yaml"


def test_variants_and_grid_become_configurations():
    sweep = read_sweep(SMOKE)
    assert (sweep.name, sweep.question[:5]) == ("smoke", "Smoke")
    assert list(sweep.variants) == [
        "default",
        "twins",
        "optimizer=adam,learning_rate=0.002",
        "optimizer=adam,learning_rate=5e-4",
        "optimizer=sgd,learning_rate=0.002",
        "optimizer=sgd,learning_rate=5e-4",
    ]
    assert sweep.variants["optimizer=sgd,learning_rate=5e-4"].learning_rate == 0.0005
    assert sweep.seeds["twins"] == [0, 1] and sweep.seeds["default"] == [0]
    assert len(list(sweep.pairs)) == 7
    assert set(map(tuple, read_sweep(SMOKE, seeds=[5]).seeds.values())) == {(5,)}


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("seeds: [0]\n", "seed: [0]\n", "s.yaml: unknown key 'seed'"),
        ("seeds: [0]\n", "seeds: [0, 0]\n", r"s.yaml: seeds: got \[0, 0\]"),
        ("seeds: [0, 1]", "seeds: [x]", r"variant 'twins': seeds: got \['x'\]"),
        ("question:", "variants: {}\nquestion:", "duplicate key 'variants'"),
        ("question: ", "question:  # ", "s.yaml: question: got None"),
        ("  width: 0.25", "  widht: 0.25", "s.yaml, variant 'default': unknown field 'widht'"),
        ("twins: {", "twins: {epochs: 0, ", "variant 'twins': epochs: got 0"),
        ("  twins:", "  a/b:", "variant 'a/b'"),
        ("  twins:", "  ../x:", "variant '../x'"),
        ("  twins:", "  optimizer=adam,learning_rate=0.002:", "different names"),
        ("twins: {seeds: [0, 1]}", "twins: 3", "variant 'twins': got 3"),
        ("[adam, sgd]", "[adam, sdg]", "variant 'optimizer=sdg,learning_rate=0.002': optimizer"),
        ("[adam, sgd]", "adam", "grid: optimizer: got 'adam'"),
        ("[adam, sgd]", "[]", r"grid: optimizer: got \[\]"),
        ("base:\n", "base: nowhere.yaml\nx:\n", "unknown key 'x'"),
    ],
)
def test_a_mistake_is_one_line_with_file_and_field(tmp_path, old, new, said):
    text = (ROOT / SMOKE).read_text()
    assert old in text
    (tmp_path / "s.yaml").write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError, match=said) as caught:
        read_sweep(tmp_path / "s.yaml")
    assert "\n" not in str(caught.value)


def test_the_sweep_that_contributing_shows_is_one(tmp_path):
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("```yaml\n")[1]
    folder = tmp_path / "07_choices"
    shutil.copytree(ROOT / "params/01_baseline", tmp_path / "01_baseline")
    folder.mkdir()
    (folder / "mine.yaml").write_text(text.split("```")[0])
    assert len(list(read_sweep(folder / "mine.yaml").pairs)) == 12


def test_a_base_may_be_a_parameter_file(tmp_path):
    text = "question: Q?\nbase: {}\nvariants: {{more: {{epochs: 3}}}}\n"
    params = ROOT / "params/01_baseline/study-b.yaml"
    (tmp_path / "s.yaml").write_text(text.format(params))
    config = read_sweep(tmp_path / "s.yaml").variants["more"]
    assert (config.epochs, config.optimizer) == (3, "adam")
    (tmp_path / "s.yaml").write_text(text.format("nowhere.yaml"))
    with pytest.raises(ValueError, match=r"s\.yaml: base: \S+nowhere.yaml: No such file"):
        read_sweep(tmp_path / "s.yaml")


@pytest.fixture
def counted(tmp_path, monkeypatch):
    """Runs lie in a folder of the test's; every epoch that is trained is counted."""
    for room in (study_runs, reports, reports_runs):
        monkeypatch.setattr(room, "ROOT", tmp_path)
    epochs, real = [], train_module.train_epoch

    def train_epoch(state, *rest):
        epochs.append((state.config.learning_rate, state.config.optimizer, state.seed))
        if state.config.optimizer == "sgd":
            raise FloatingPointError("astray")
        return real(state, *rest)

    monkeypatch.setattr(train_module, "train_epoch", train_epoch)
    return epochs


TEXT = """\
question: Q?
base: {dataset: digits, n_train: 100, width: 0.125, batch_size: 50, epochs: 1, optimizer: adam,
  learning_rate: 0.002, precision: fp32}
variants: {default: , same: {device: cpu}, slow: {learning_rate: 0.001}}
"""


def test_what_variants_and_sweeps_share_is_trained_once(tmp_path, counted, capsys):
    for name in ("one", "two"):
        (tmp_path / f"{name}.yaml").write_text(TEXT)
    one, two = (read_sweep(tmp_path / f"{name}.yaml") for name in ("one", "two"))
    first = sweep_runs(one)
    assert sorted(counted) == [(0.001, "adam", 0), (0.002, "adam", 0)]
    assert first["default"][0].path == first["same"][0].path != first["slow"][0].path
    assert "slow: seed 0 epoch 1/1" in capsys.readouterr().out
    assert sweep_runs(two)["slow"][0].path == first["slow"][0].path and len(counted) == 2


def test_what_is_trained_on_other_data_is_not_shared(tmp_path, counted, monkeypatch, digits):
    (tmp_path / "s.yaml").write_text(TEXT.replace("{device: cpu}", "{data_dir: elsewhere}"))
    other = dataclasses.replace(digits, info=dataclasses.replace(digits.info, sha256="0" * 64))
    monkeypatch.setattr(study_sweep, "load_splits", lambda c: other if c.data_dir else digits)
    found = sweep_runs(read_sweep(tmp_path / "s.yaml"))
    assert found["default"][0].path != found["same"][0].path and len(counted) == 3


def test_a_failing_run_does_not_stop_the_others(tmp_path, counted):
    text = TEXT.replace("{default: ,", "{bad: {optimizer: sgd},")
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(RuntimeError, match="1 runs failed\nbad, seed 0: astray"):
        sweep_runs(read_sweep(tmp_path / "s.yaml"))
    assert {epoch[1:] for epoch in counted} == {("adam", 0), ("sgd", 0)}
    assert len(list(tmp_path.glob("runs/s/*/summary.json"))) == 2


def test_a_sweeps_report_has_a_folder_for_each_variant(tmp_path, counted):
    (tmp_path / "s.yaml").write_text(TEXT)
    runs = sweep_runs(read_sweep(tmp_path / "s.yaml"))
    table = Report("out/s", "06_x", "s", "full", "Q?").finish_sweep(runs)
    assert list(table.index) == list(runs) and table["n"].tolist() == [1, 1, 1]
    (sweep,) = read_summaries("out")
    assert sweep["path"] == "s" and sweep["runs"] == [] and list(sweep["variants"]) == list(runs)
    assert (tmp_path / "out/s/slow/metrics.csv").is_file()
    parts = sorted(tmp_path.glob("out/s/*/summary.json"))
    told = [json.loads(path.read_text())["variant"] for path in parts]
    assert told == ["default", "same", "slow"]
    assert sweep["answer"] == []


def test_runs_of_several_machines_are_told_and_a_time_is_of_one(tmp_path, counted):
    (tmp_path / "s.yaml").write_text(TEXT)
    runs = sweep_runs(read_sweep(tmp_path / "s.yaml", seeds=[0, 1]))
    here, other = runs["slow"]
    other.summary["hardware"] = other.summary["hardware"] | {"name": "Other", "precision": "bf16"}
    for run, seconds in ((here, 10.0), (other, 30.0)):
        run.summary["result"] |= {"train_seconds": seconds, "other_load": 0.0}
    table = Report("out/s", "06_x", "s", "full", "Q?").finish_sweep(runs, answer=["found"])
    (sweep,) = read_summaries("out")
    found, told = sweep["answer"]
    assert found == "found" and told.startswith(
        "runs on different machines, threads or precisions: 5 on "
    )
    assert "; 1 on Other, " in told and told.endswith(", bf16")
    assert table.loc["slow", "train_seconds"] == 10
    # Read back, each run still has the machine of its own.
    published = reports_runs.published_runs("out")
    assert published[other.path.name].summary["hardware"] == other.summary["hardware"]
    assert published[here.path.name].summary["hardware"] == here.summary["hardware"]


@pytest.fixture
def published(tmp_path, counted):
    """A sweep whose report is published and whose runs are gone, as in a fresh clone."""
    (tmp_path / "s.yaml").write_text(TEXT.replace("{learning_rate: 0.001}", "{translate: 1}"))
    runs = sweep_runs(read_sweep(tmp_path / "s.yaml", seeds=[0, 1]))
    Report("reports/full/06_x/s", "06_x", "s", "full", "Q?").finish_sweep(runs)
    shutil.rmtree(tmp_path / "runs")
    counted.clear()
    return runs


def test_what_a_published_report_tells_is_not_trained_again(tmp_path, published, counted, capsys):
    sweep = read_sweep(tmp_path / "s.yaml", seeds=[0, 1])
    again = sweep_runs(sweep)
    assert not counted and "06_x/s/slow\n" in capsys.readouterr().out
    for name, runs in published.items():
        for frame in (metrics_frame, results_frame):
            pd.testing.assert_frame_equal(frame(again[name]), frame(runs), check_dtype=False)
    told = Report("out", "06_x", "s", "full", "Q?").finish_sweep(again)
    pd.testing.assert_frame_equal(
        told, Report("", "06_x", "s", "full", "Q?").finish_sweep(published)
    )
    sweep_runs(read_sweep(tmp_path / "s.yaml", seeds=[0, 1, 2]))
    assert [seed for *_, seed in counted] == [2, 2]  # the third variant is the first's twin


@pytest.mark.parametrize("preset", ["quick", "smoke"])
def test_where_the_code_counts_published_figures_do_not(tmp_path, published, counted, preset):
    sweep_runs(read_sweep(tmp_path / "s.yaml"), preset=preset)
    assert len(counted) == 2


def test_a_run_that_is_here_comes_before_its_published_figures(tmp_path, published, counted):
    sweep = read_sweep(tmp_path / "s.yaml")
    sweep_runs(sweep, preset="quick")
    assert sweep_runs(sweep)["default"][0].path.is_relative_to(tmp_path / "runs")


def test_figures_of_other_code_say_so(tmp_path, published, counted, capsys, monkeypatch):
    monkeypatch.setattr(study_runs, "training_code_sha256", lambda: "changed")
    sweep_runs(read_sweep(tmp_path / "s.yaml"))
    assert not counted and "s/slow, by other training code\n" in capsys.readouterr().out


def test_a_report_on_its_way_into_place_tells_of_no_run(tmp_path, published):
    every = published_runs().keys()
    (tmp_path / "reports/full/06_x/s").rename(tmp_path / "reports/full/06_x/.s.old")
    assert every and not published_runs()


def test_a_report_without_its_history_is_named_and_tells_nothing(tmp_path, published, caplog):
    every = published_runs().keys()
    (tmp_path / "reports/full/06_x/s/slow/metrics.csv").unlink()
    assert every - published_runs().keys() == {run.path.name for run in published["slow"]}
    assert "s/slow/summary.json: broken (FileNotFoundError" in caplog.text


@pytest.fixture
def choices(tmp_path, monkeypatch):
    """Runs the notebook of choices, cell by cell, on a sweep of one's own; returns its names."""
    monkeypatch.setattr(study_runs, "ROOT", tmp_path)
    notebook = nbformat.read(ROOT / "notebooks/07_choices.ipynb", as_version=4)
    first, *cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]

    def run(text: str) -> dict:
        (tmp_path / "own.yaml").write_text(text)
        scope = {}
        exec(first, scope)  # noqa: S102
        scope |= {"sweep": str(tmp_path / "own.yaml"), "experiment": "own"}
        for source in cells:
            exec(source, scope)  # noqa: S102
        return scope

    return run


BASE = TEXT.partition("variants")[0]
GRID = "grid: {optimizer: [adam, rmsprop], batch_size: [50, 25]}\nseeds: [0, 1]\n"


def test_the_notebook_of_choices_takes_a_grid_of_ones_own(choices, capsys):
    accuracy = choices(BASE.replace("epochs: 1", "epochs: 1, val_fraction: 0.2") + GRID)["accuracy"]
    base, *others = accuracy.index
    assert base == "optimizer=adam,batch_size=50" and len(others) == 3
    assert set(accuracy.against.dropna()) == {base}
    assert "FAILED" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BASE.replace("epochs: 1", "epochs: 1, val_fraction: 0") + GRID, "val_fraction: got 0"),
        (
            BASE + "variants: {default: , 'batch_size=25,epochs=2': {batch_size: 25, epochs: 2}}\n",
            "changes epochs, batch_size; allowed is a name",
        ),
        (
            BASE + "variants: {default: , batch_size=25: {batch_size: 20}}\n",
            "'batch_size=25': changes batch_size; allowed",
        ),
        (
            BASE + "variants: {default: , batch_size=25: {batch_size: 25, epochs: 2}}\n",
            "changes epochs, batch_size; allowed",
        ),
        (BASE + "variants: {default: , fast: }\n", "'fast': changes nothing; allowed"),
    ],
)
def test_a_sweep_of_choices_is_refused_where_names_or_validation_are_not_right(
    tmp_path, text, said
):
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(ValueError, match=f"own, variant.*{said}"):
        choices_of(read_sweep(tmp_path / "own.yaml"))


@pytest.mark.parametrize("values", ["[1e-3, 5e-4]", "[0, 1]"])
def test_a_grid_of_choices_may_spell_its_numbers_in_any_way(tmp_path, values):
    text = BASE.replace("epochs: 1", "epochs: 1, val_fraction: 0.2") + "grid: {%s: %s}\n"
    (tmp_path / "own.yaml").write_text(text % ("mixup", values))
    assert choices_of(read_sweep(tmp_path / "own.yaml")).asked == ["mixup"]


def test_the_role_of_each_hyperparameter_is_told():
    path = "params/02_speed/ablations.yaml"
    table = roles(choices_of(read_sweep(path)), search_of(path)).role
    assert table["optimizer"] == table["batch_size"] == "scientific"
    assert table["learning_rate"] == "nuisance: searched for sgd, given for muon"
    assert table["momentum"] == "fixed, one value for each optimizer"
    assert table["n_train"] == "fixed" and table["seed"].startswith("nuisance")
    assert "dropout" not in table.index  # the same for all, and not named in the file
