"""The notebooks' saved outputs are a test that can fail; generated text has not drifted."""

import subprocess
import sys

import nbformat
import pytest

from cifar_lib import index
from cifar_lib.config import ROOT
from cifar_lib.reports import read_summaries


def nbval(path):
    return subprocess.run(
        [sys.executable, "-m", "pytest", "--nbval", "--nbval-current-env", "-q", str(path)]
        + ["-p", "no:cacheprovider", "--rootdir", str(path.parent), "--timeout=0"],
        capture_output=True,
        text=True,
        cwd=path.parent,
    )


@pytest.mark.parametrize("altered", [False, True])
def test_one_altered_saved_output_turns_nbval_red(tmp_path, altered):
    notebook = nbformat.read(ROOT / "notebooks/05_compare.ipynb", as_version=4)
    texts = [
        output
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if output.output_type == "stream"
    ]
    if altered:
        texts[0].text = texts[0].text.replace("4 experiments", "5 experiments")
    nbformat.write(notebook, tmp_path / "compare.ipynb")
    result = nbval(tmp_path / "compare.ipynb")
    assert result.returncode == int(altered), result.stdout[-2000:]
    assert ("1 failed" in result.stdout) == altered


def test_generated_text_has_not_drifted():
    drifted = [path.relative_to(ROOT).as_posix() for path in index.drifted_files()]
    assert drifted == [], "run `make report` and commit what it changes"


def test_drift_is_seen(monkeypatch):
    summaries = read_summaries("tests/fixtures/reports")
    monkeypatch.setattr(index, "read_summaries", lambda _: summaries)
    assert {path.name for path in index.drifted_files()} >= {"README.md", "01_baseline.ipynb"}


def test_a_time_from_a_shared_machine_is_only_a_bound():
    summaries = read_summaries("tests/fixtures/reports")[:1]
    for load, bound in ((0.0, False), (0.5, True)):
        summaries[0]["runs"][0]["other_load"] = load
        said = index.answer(summaries, summaries[0]["notebook"])
        assert ("at most" in said) == bound
        assert ("‡ |" in index.results_table(summaries, "")) == bound


def test_a_comparison_with_what_was_measured_anew_is_left_to_the_other_report():
    first, second = read_summaries("tests/fixtures/reports")[:2]
    mean = first["test_accuracy"]["mean"]
    second["test_accuracy"]["mean"] = mean - 0.02
    line = f"against {second['path']}: +2.00 points (means of n = 1 and 1)"
    first["answer"] = [line, "against itself with mirror: +0.10 points", "against x: +0.30 points"]
    assert all(said in index.answer([first, second], first["notebook"]) for said in first["answer"])
    second["test_accuracy"]["mean"] = mean - 0.021
    said = index.answer([first, second], first["notebook"])
    assert line not in said and f"against {second['path']}: measured anew since" in said
    assert all(said_still in said for said_still in first["answer"][1:])


def test_the_studies_come_first_in_their_order():
    paths = ["01_baseline/efficientnet-96", "01_baseline/study-b", "01_baseline/study-a"]
    ordered = [s["path"] for s in index.studies_first([{"path": path} for path in paths])]
    assert ordered == paths[::-1]


def test_at_most_is_the_longest_seed():
    (summary,) = read_summaries("tests/fixtures/reports/02_speed")
    summary["runs"] = [
        summary["runs"][0] | {"train_seconds": s, "other_load": 0.5} for s in (9, 99)
    ]
    assert "at most 1.65 min a seed" in index.answer([summary], "02_speed")
