"""Every reported system has a row that says what was measured here, or why it was not."""

import pandas as pd
import pytest

from cifar_lib import plots_compare
from cifar_lib.config import ROOT
from cifar_lib.config_yaml import read_yaml
from cifar_lib.reports_compare import COLUMNS, like_for_like, systems_frame, training_flops

SYSTEMS = pd.read_csv(ROOT / "params/05_compare/systems.csv")


def measured(*labels: str) -> pd.DataFrame:
    rows = [
        {
            "notebook": label.partition("/")[0],
            "experiment": label.partition("/")[2],
            "model": "resnet18",
            "parameters": 1000,
            "data": "CIFAR-10, JPEG copy",
            "n_train": 45000,
            "n": 3,
            "test_accuracy": 0.9,
            "low": 0.89,
            "high": 0.91,
            "test_accuracy_tta": 0.915,
            "weights": None,
            "train_seconds": 7200.0,
            "shared_machine": label.endswith("mine"),
            "reported_accuracy": 0.5,
            "reported_by": "study X",
            "reported_on": "elsewhere",
        }
        for label in labels
    ]
    return pd.DataFrame(rows)


def test_systems_come_first_measured_or_not_then_what_has_no_source():
    table = systems_frame(SYSTEMS, measured("09_other/mine", "02_speed/smallcnn"))
    assert list(table.columns) == COLUMNS
    assert list(table.index) == [*SYSTEMS["experiment"], "09_other/mine"]
    row = table.loc["02_speed/smallcnn"]
    assert (row["study"], row["reported"], row["reported_on"]) == ("D2", 83.59, "test")
    assert (row["measured"], row["low"], row["high"], row["n"]) == (90.0, 89.0, 91.0, 3)
    assert row["with_tta"] == 91.5 and str(row["parameters"]) == "1000"
    assert (row["hours_a_seed"], row["status"]) == (2.0, "measured")
    for name in ("study-c", "study-d1"):
        missing = table.loc[f"01_baseline/{name}"]
        assert missing["status"] == "not measured: needs the real weights"
        assert missing["reported"] > 84 and pd.isna(missing["measured"])
    assert table.loc["03_improved/resnet18", "status"] == "not measured yet"
    mine = table.loc["09_other/mine"]
    assert (mine["study"], mine["system"], mine["status"]) == ("ours", "resnet18", "measured")
    assert pd.isna(mine["reported"])
    assert table.loc[["02_speed/smallcnn", "09_other/mine"], "at_most"].tolist() == [False, True]


def test_a_quick_run_stands_for_its_experiment_and_real_weights_once_there_count():
    table = systems_frame(SYSTEMS, measured("02_speed/smallcnn-quick", "01_baseline/study-c"))
    assert list(table.index) == list(SYSTEMS["experiment"])
    assert table.loc[["02_speed/smallcnn", "01_baseline/study-c"], "status"].eq("measured").all()


def test_systems_say_what_the_parameter_files_say():
    """One reported figure in two places: they may not differ."""
    compared = 0
    for system in SYSTEMS.itertuples():
        path = ROOT / f"params/{system.experiment}.yaml"
        values = read_yaml(path) if path.exists() else {}
        if "reported_accuracy" in values:
            assert values["reported_accuracy"] == system.reported_accuracy, path.name
            compared += 1
        if curve := values.get("reported_curve"):
            last = pd.read_csv(ROOT / curve).iloc[-1]
            assert last["val_accuracy"] == system.reported_accuracy
            assert last["epoch"] == values["epochs"]
    assert compared >= 7


def test_a_reported_accuracy_stands_beside_the_same_measure_of_ours():
    measures = {"val_accuracy_last": 0.81, "test_accuracy": 0.82, "test_accuracy_tta": 0.83}
    runs = [
        {name: mean + off for name, mean in measures.items()} | {"val_accuracy": 0.9}
        for off in (-0.01, 0.0, 0.01)
    ]
    names = ("01_baseline/study-b", "02_speed/smallcnn-quick", "02_speed/speed-94", "09/mine")
    summaries = [
        {"runs": runs} | dict(zip(("notebook", "experiment"), name.split("/"), strict=True))
        for name in names
    ]
    told = like_for_like(SYSTEMS, summaries).set_index("study")
    expected = {"B": 0.81, "D2": 0.82, "airbench": 0.83}
    assert told["measured"].to_dict() == pytest.approx(expected)
    half = 4.302653 * 0.01 / 3**0.5  # Student's, two degrees of freedom
    beside = told.loc["B", ["reported", "low", "high", "n"]].tolist()
    assert beside == pytest.approx([0.7846, 0.81 - half, 0.81 + half, 3], abs=1e-7)
    assert told.loc["B", "values"] == pytest.approx([0.8, 0.81, 0.82])
    assert like_for_like(SYSTEMS, []).empty


@pytest.mark.parametrize("study", ["a", "b"])
def test_reported_curves_are_whole(study):
    curve = pd.read_csv(ROOT / f"params/01_baseline/reported/study-{study}.csv")
    assert curve["epoch"].is_monotonic_increasing and curve["epoch"].iloc[0] == 1
    assert curve[["train_accuracy", "val_accuracy"]].stack().between(0.4, 0.9).all()
    assert len(curve) == {"a": 20, "b": 4}[study]


def test_accuracy_against_depth_marks_the_depths():
    frame = measured("01_baseline/a", "01_baseline/b", "01_baseline/c").assign(depth=[20, 32, 56])
    (ax,) = plots_compare.accuracy_vs_cost(frame, "depth").axes
    assert [ax.xaxis.get_major_formatter()(x) for x in ax.get_xticks()] == ["20", "32", "56"]
    assert "weighted layers" in ax.get_xlabel()


@pytest.mark.parametrize(
    ("fields", "epochs", "passes"),
    [
        ({}, [4], 4),
        ({}, [4, 2], 3),  # the mean over seeds, one of them stopped early
        ({"low_resolution": 16, "low_resolution_epochs": 2}, [4], 2 * 0.25 + 2),
        ({"low_resolution": 16, "low_resolution_epochs": 2, "image_size": 64}, [4], 4),
        ({"low_resolution": 0, "low_resolution_epochs": 3}, [4], 4),
        ({"low_resolution": 16}, [4], 4),
        ({"keep_hardest": 0.5, "keep_hardest_from": 3}, [4], 3.5),
        ({"backbone_rate": 0.0}, [3], 1),  # nothing but the last layer goes backward
    ],
)
def test_the_cost_of_training_is_three_forward_passes_an_image_of_each_epoch(
    fields, epochs, passes
):
    summary = {
        "config": {"model": "small_cnn", **fields},
        "model": {"flops_per_image": 1000},
        "dataset": {"n_train": 10},
        "runs": [{"epochs": n} for n in epochs],
    }
    assert training_flops(summary) == pytest.approx(3 * 1000 * 10 * passes)
