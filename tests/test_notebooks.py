"""The notebooks' saved outputs are a test that can fail; generated text has not drifted."""

import json
import re
import shutil
import subprocess
import sys

import nbformat
import pytest

from cifar_lib import index, reports
from cifar_lib.config import ROOT
from cifar_lib.reports import read_summaries

READMES = ("README.md", "README.ko.md")


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


@pytest.mark.parametrize("text", ["<<<<<<< HEAD", "[]", '{"cells": [], "nbformat": 4}'])
def test_a_file_that_is_no_notebook_is_named(copies, text):
    (copies / "notebooks/02_speed.ipynb").write_text(text)
    with pytest.raises(ValueError, match=r"notebooks/02_speed.ipynb: no notebook \(.*; restore it"):
        index.generated_files()


@pytest.mark.parametrize("text", ["", "study,system\nA,x\n"])
def test_a_broken_table_of_systems_is_named(copies, text):
    (copies / index.SYSTEMS).write_text(text)
    with pytest.raises(ValueError, match=r"systems.csv: no table of systems \(.*; restore it"):
        index.generated_files()


@pytest.fixture
def copies(tmp_path, monkeypatch):
    """A checkout's texts that are generated, and what they are generated from."""
    texts = [*index.generated_files(), *ROOT.glob(f"{index.FULL}/**/summary.json")]
    for path in [*texts, ROOT / index.SYSTEMS]:
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    monkeypatch.setattr(index, "ROOT", tmp_path)
    monkeypatch.setattr(reports, "ROOT", tmp_path)
    return tmp_path


def test_report_mends_what_drifted_and_check_only_names_it(copies, call):
    assert call("report", "--check") == (0, "", "")
    readme = copies / "README.md"
    whole = readme.read_text()
    readme.write_text(whole.replace("| experiment |", "| altered |"))
    status, out, _ = call("report", "--check")
    assert status == 1 and out.startswith("drifted: ") and out.endswith("README.md\n")
    assert readme.read_text() != whole
    status, out, _ = call("report")
    assert status == 0 and out.startswith("updated: ") and out.count("\n") == 1
    assert readme.read_text() == whole and call("report", "--check")[0] == 0


def test_the_readmes_python_runs_as_it_stands(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    blocks = [
        re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), flags=re.S)
        for name in READMES
    ]
    assert blocks[0] == blocks[1] and len(blocks[0]) == 1
    exec(blocks[0][0], {})  # noqa: S102
    assert capsys.readouterr().out == "cat 0.87\n"


@pytest.mark.parametrize("name", [*READMES, "docs/findings.md", "docs/findings.ko.md"])
def test_an_interval_in_prose_is_one_of_the_report_that_it_links(name):
    """What prose says of a report ("6.8 points [3.9, 9.6]"), rounded, and up to its sign."""
    compared = 0
    text = re.sub(r"<!-- results:begin.*results:end -->", "", (ROOT / name).read_text(), flags=re.S)
    for item in re.split(r"\n(?=- |\n)", text):
        linked = re.findall(r"\((?:\.\./)?(reports/full/\S+?)/executed\.ipynb\)", item)
        measured = []
        for path in linked:
            summary = json.loads((ROOT / path / "summary.json").read_text())
            answers = " ".join(summary.get("answer", []))
            rows = re.findall(r"([+-]?[\d.]+)(?: \w+)? \[([+-]?[\d.]+), ([+-]?[\d.]+)\]", answers)
            measured += [[float(x) for x in row] for row in rows]
            for reached in filter(None, map(summary.get, ("test_accuracy", "test_accuracy_tta"))):
                measured.append([100 * (reached[key] or 0) for key in ("mean", "low", "high")])
        number = r"([+-]?\d+\.\d+)"
        for row in re.findall(rf"{number}[^\d\[\]]*\[{number}, {number}\]", item):
            off = 0.501 * 10 ** -len(row[0].partition(".")[2])
            told = [float(x) for x in row]
            turned = [-told[0], -told[2], -told[1]]  # "costs 6.8 points", where a report says -6.8
            ways = (told,) if row[0][0] in "+-" else (told, turned)
            near = [m for m in measured for t in ways if t == pytest.approx(m, abs=off)]
            assert near, f"{row} is in no report of {linked}"
            compared += 1
    assert compared >= 7


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
    first["runs"] *= 2  # a seed was added since: the line is still of the one there was
    assert line in index.answer([first, second], first["notebook"])


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


def test_a_correction_is_of_what_the_reports_still_say():
    text = (ROOT / "reports/CORRECTIONS.md").read_text()
    for item in text.split("\n- ")[1:]:
        (said,) = re.findall('"(.+?)"', item, flags=re.S)
        named = re.findall(r"\((full/[^)]+)\)", item.split(": ")[0])  # reports, or folders of them
        places = [ROOT / "reports" / name for name in named]
        of_it = [
            p
            for place in places
            for p in (place.glob("*/executed.ipynb") if place.is_dir() else [place])
        ]
        assert of_it
        for path in of_it:
            assert " ".join(said.split()) in path.read_text(), f"{path}: remove its correction"
