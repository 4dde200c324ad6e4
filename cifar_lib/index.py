"""The generated texts: the results table, the index of reports and the notebooks' answers.

Everything here is made from committed summaries alone; `python -m cifar_lib report` writes it
and a test fails when a file has drifted from it.
"""

import re
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd

from cifar_lib.config import ROOT
from cifar_lib.execution import duration
from cifar_lib.files import notebook_named, write_atomic
from cifar_lib.reports import read_summaries, row_of

MISSING = "–"
ANSWER = "<!-- answer:begin -->"
FULL = "reports/full"
SYSTEMS = "params/05_compare/systems.csv"
CORRECTIONS = " Where an executed notebook is wrong or superseded: [corrections](CORRECTIONS.md)."


def percent(value: float | None) -> str:
    """An accuracy 0..1 in percent with two decimals, or a dash."""
    return MISSING if value is None or pd.isna(value) else f"{100 * value:.2f} %"


def accuracy_text(row: dict[str, Any]) -> str:
    """Mean test accuracy with its 95 % interval over seeds and their number."""
    if row["low"] is None or pd.isna(row["low"]):
        return f"{percent(row['test_accuracy'])} (n = {row['n']})"
    return (
        f"{percent(row['test_accuracy'])} "
        f"[{100 * row['low']:.2f}, {100 * row['high']:.2f}] (n = {row['n']})"
    )


def results_table(summaries: list[dict[str, Any]], link: str) -> str:
    """The Markdown table of all measured experiments.

    Args:
        summaries: as `read_summaries` gives them.
        link: path from the page that holds the table to the reports folder.
    """
    lines = [
        "| experiment | model | data | test accuracy | with TTA | val accuracy | reported "
        "| hours a seed | machine |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for summary in summaries:
        row = row_of(summary)
        if not row["n"]:
            continue
        reported = MISSING
        if row["reported_accuracy"] is not None:
            said = f"{row['reported_by']} ({row['reported_on']})"
            reported = f"{percent(row['reported_accuracy'])}, {said}"
        name = f"{row['notebook']} / {row['experiment']}"
        cells = [
            f"[{name}]({link}{summary['path']}/executed.ipynb)",
            f"{row['model']}, {row['parameters'] / 1e6:.2f} M",
            f"{row['data']}, {row['n_train']:,} images",
            accuracy_text(row),
            percent(row["test_accuracy_tta"]),
            percent(row["val_accuracy"]),
            reported,
            f"{row['train_seconds'] / 3600:.2f}" + " ‡" * row["shared_machine"],
            row["machine"],
        ]
        lines.append("| " + " | ".join(cells) + " |")
    if len(lines) == 2:
        return "Nothing measured yet."
    lines += [
        "",
        "Test accuracy: mean over n seeds with the 95 % Student interval; the test set is read "
        "once, after training, with the weights that validation chose or, without validation "
        "images, those of the last epoch. TTA: test-time augmentation. Val accuracy: of the epoch "
        "that it chose; 05 compares last epochs. Reported: what the source study states, on the "
        "data it states. Hours: of training, the mean of the seeds that had one machine to "
        "themselves; where none had, the longest, which is a bound (‡). The code that ran: "
        "`git_commit` in each summary, for every seed; `-dirty`: with changes not committed.",
    ]
    return "\n".join(lines)


def answer(summaries: list[dict[str, Any]], notebook: str) -> str:
    """The measured answer at the top of a notebook, a line an experiment.

    Args:
        summaries: of reports; those that `read_summaries` gave get a link from `notebooks/`.
        notebook: whose reports count.
    """
    lines = []
    for summary in summaries:
        row = row_of(summary)
        if summary["notebook"] != notebook:
            continue
        link = ""
        if "path" in summary:
            link = f" ([executed](../reports/full/{summary['path']}/executed.ipynb))"
        said = summary["question"]
        if row["n"]:
            time = "at most " * row["shared_machine"] + duration(row["train_seconds"])
            said = f"test accuracy {accuracy_text(row)}, {row['data']}, {time} a seed"
        lines.append(f"- **{row['experiment']}**: {said}{link}")
        lines += [
            f"  - {_as_of_now(line, summary, summaries)}" for line in summary.get("answer", [])
        ]
    return "\n".join(lines) or "Not measured yet."


def _as_of_now(line: str, summary: dict[str, Any], summaries: list[dict[str, Any]]) -> str:
    """A line of an answer, with a word if it compares with ImageNet's weights or former runs."""
    compared = re.match(r"against (\S+): ([+-][\d.]+) points(?: \(means of n = (\d+))?", line)
    if compared is None or compared[3] not in (None, str(len(summary["runs"]))):
        return line  # of no comparison, or of the seeds there were before others were added
    for other in summaries:
        if other.get("path") == compared[1] and other["runs"]:
            now = summary["test_accuracy"]["mean"] - other["test_accuracy"]["mean"]
            if abs(100 * now - float(compared[2])) > 0.011:
                return (
                    f"against {compared[1]}: measured anew since; this report, in its charts too, "
                    "shows the former one; that one's own report compares the two"
                )
            if row_of(other)["weights"] and not row_of(summary)["weights"]:
                return f"{line}; that one started from ImageNet's weights"
    return line


def replace_block(text: str, name: str, content: str, where: str) -> str:
    """Replaces what stands between `<!-- name:begin -->` and `<!-- name:end -->`.

    Raises:
        ValueError: the markers are not there; names the file.
    """
    pattern = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"{where}: the markers <!-- {name}:begin --> and :end are missing")
    return pattern.sub(lambda match: f"{match[1]}{content}\n{match[2]}", text)


def generated_files() -> dict[Path, str]:
    """Every file that holds generated text, with the text it should have now.

    Returns:
        Absolute path → whole content: the README in both languages, `reports/README.md` and
        the notebooks in `notebooks/`.
    """
    summaries = studies_first(read_summaries(FULL))
    # The README has the sources' systems, and our own from stage two on.
    systems = set(_systems())
    listed = [s for s in summaries if s["path"] in systems or s["notebook"] > "02"]
    files: dict[Path, str] = {}
    for name in ("README.md", "README.ko.md"):
        path = ROOT / name
        table = results_table(listed, f"{FULL}/")
        files[path] = replace_block(path.read_text(encoding="utf-8"), "results", table, name)
    page = index_text(summaries, "Published reports", "full/", CORRECTIONS)
    files[ROOT / "reports/README.md"] = page
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        with notebook_named(path):
            notebook = nbformat.read(path, as_version=4)
            first = notebook.cells[0]
        first.source = replace_block(
            first.source, "answer", answer(summaries, path.stem), f"{path.name}, first cell"
        )
        files[path] = nbformat.writes(notebook) + "\n"
    return files


def _systems() -> list[str]:
    """The experiments of the source studies, in their order."""
    try:
        return list(pd.read_csv(ROOT / SYSTEMS)["experiment"])
    except (ValueError, KeyError) as error:
        raise ValueError(f"{SYSTEMS}: no table of systems ({error}); restore it") from None


def studies_first(summaries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The experiments of the source studies in their order, then our own."""
    place = {name: i for i, name in enumerate(_systems())}
    return sorted(summaries, key=lambda s: place.get(s["path"], len(place)))


def index_text(summaries: list[dict[str, Any]], title: str, link: str, note: str = "") -> str:
    """A page that links every report, with a note and the results table first."""
    lines = [
        f"# {title}",
        "",
        f"Generated from the summaries below this folder; do not edit.{note}",
        "",
        results_table(summaries, link),
        "",
        "## Every report",
        "",
    ]
    for summary in summaries:
        where, day = f"{link}{summary['path']}", summary["finished_at"][:10]
        lines.append(
            f"- [{summary['notebook']} / {summary['experiment']}]({where}/executed.ipynb): "
            f"{summary['question']} ([summary]({where}/summary.json), {day})"
        )
    return "\n".join(lines) + "\n"


def write_preset_index(preset: str) -> Path:
    """Writes `reports/<preset>/README.md` for a preset that is not published."""
    path = ROOT / "reports" / preset / "README.md"
    write_atomic(path, index_text(read_summaries(path.parent), f"Preset {preset}", "").encode())
    return path


def drifted_files() -> dict[Path, str]:
    """Files whose generated text differs from what the summaries give now, with that text."""
    return {
        path: text
        for path, text in generated_files().items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    }


def write_generated() -> list[Path]:
    """Writes all generated text; returns the files that changed."""
    changed = drifted_files()
    for path, text in changed.items():
        write_atomic(path, text.encode())
    return list(changed)
