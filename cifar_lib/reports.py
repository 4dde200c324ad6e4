"""Reports: what a notebook leaves behind, and how it is read back."""

import copy
import json
from collections import Counter
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from cifar_lib.config import ROOT, TrainConfig
from cifar_lib.data import DataInfo
from cifar_lib.evaluate import mean_interval
from cifar_lib.execution import describe_environment, git_commit
from cifar_lib.files import inside, write_atomic, write_json
from cifar_lib.results import Run, alone, metrics_frame

SCHEMA = 1
_NUMBERS = {
    "val_accuracy",
    "test_accuracy",
    "low",
    "high",
    "test_accuracy_tta",
    "train_seconds",
    "other_load",
    "reported_accuracy",
}


OF_A_RUN = ("git_commit", "code_sha256", "hardware")


class Report:
    """The report of one executed notebook; draws nothing, only keeps what it is given.

    With an empty folder name nothing is written: that is a notebook explored by hand.
    """

    def __init__(self, folder: str, notebook: str, experiment: str, preset: str, question: str):
        """Opens a report.

        Args:
            folder: where to, from the root of the checkout or absolute; empty writes nothing.
            notebook: the notebook's name without suffix.
            experiment: the name of its parameter file without suffix.
            preset: `quick`, `full`, or another name for a reader's own.
            question: what the experiment asks, one sentence.

        Raises:
            ValueError: `folder` leads out of the checkout and is not absolute.
        """
        self.folder = inside(ROOT, folder, "report_dir") if folder else None
        self.head = {
            "schema": SCHEMA,
            "experiment": experiment,
            "notebook": notebook,
            "preset": preset,
            "question": question,
        }

    def figure(self, name: str, figure: Figure) -> Figure:
        """Saves a figure as `figures/<name>.png` and hands it back for display."""
        if self.folder:
            from cifar_lib.plots import png  # here alone: who only reads reports draws nothing

            write_atomic(self.folder / "figures" / f"{name}.png", png(figure))
        return figure

    def table(self, name: str, frame: pd.DataFrame) -> pd.DataFrame:
        """Saves a table as `<name>.csv` and hands it back for display."""
        if self.folder:
            write_atomic(self.folder / f"{name}.csv", frame.to_csv(index=False).encode())
        return frame

    def finish(
        self,
        config: TrainConfig | None,
        runs: list[Run],
        dataset: DataInfo | None = None,
        reported: dict[str, Any] | None = None,
        **more: Any,
    ) -> dict[str, Any]:
        """Writes `metrics.csv` and, last, `summary.json`.

        Args:
            config: the configuration of the runs; None for a notebook that trains nothing.
            runs: the finished runs, one a seed; may be empty.
            dataset: the data's record where there are no runs.
            reported: `accuracy` (0..1), `by` and `on` of the source study, if it has one.
            more: further entries of the summary.

        Returns:
            The summary as written.
        """
        # The machine is that of the times: `row_of` takes them from the same seeds.
        first = min(runs, key=lambda run: not alone(run.summary["result"])).summary if runs else {}
        summary = self.head | {
            "config": config.model_dump(mode="json") if config else None,
            "config_fingerprint": first.get("config_fingerprint"),
            "dataset": first.get("dataset") or (asdict(dataset) if dataset else None),
            "model": first.get("model"),
            # Each with its code and machine: the seeds of a report may be of several.
            "runs": [run.summary["result"] | {k: run.summary[k] for k in OF_A_RUN} for run in runs],
            "test_accuracy": _interval([r.summary["result"]["test_accuracy"] for r in runs]),
            "test_accuracy_tta": _interval(
                [r.summary["result"]["test_accuracy_tta"] for r in runs]
            ),
            "val_accuracy": _interval([r.summary["result"]["val_accuracy"] for r in runs]),
            "reported": reported,
            "hardware": first.get("hardware"),
            "environment": first.get("environment") or describe_environment(),
            "git_commit": first.get("git_commit") or git_commit(),
            "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
            **more,
        }
        if self.folder:
            if runs:
                self.table("metrics", metrics_frame(runs))
            write_json(self.folder / "summary.json", summary)
        return summary

    def finish_sweep(
        self, runs: dict[str, list[Run]], dataset: DataInfo | None = None, **more: Any
    ) -> pd.DataFrame:
        """Writes a sub-folder for each variant, then the sweep's own `summary.json`.

        Args:
            runs: by variant its finished runs, as `sweep_runs` gives them.
            dataset: the data's record.
            more: further entries of the sweep's summary; `answer`, lines of text, stands at the
                top of its notebook.

        Returns:
            A row a variant, in the order given, the columns of `row_of`; accuracies in 0..1.
        """
        rows = {}
        for name, finished in runs.items():
            part = copy.copy(self)
            part.folder = self.folder and self.folder / name
            rows[name] = row_of(part.finish(finished[0].config, finished, variant=name))
        columns = ("n", "val_accuracy", "test_accuracy", "low", "high", "train_seconds")
        results = {name: {key: row[key] for key in columns} for name, row in rows.items()}
        several = machines_line([run for finished in runs.values() for run in finished])
        more["answer"] = [*more.get("answer", []), *several]
        self.finish(None, [], dataset, variants=results, **more)
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("variant")


def _interval(values: list[float | None]) -> dict[str, Any] | None:
    numbers = [value for value in values if value is not None]
    return asdict(mean_interval(numbers)) if numbers else None


def interval_frame(summary: dict[str, Any]) -> pd.DataFrame:
    """What a report reached: rows by measure; n, sd, mean and 95 % interval, percent."""
    rows = {}
    for name in ("val_accuracy", "test_accuracy", "test_accuracy_tta", "test_top5"):
        percent = [100 * run[name] for run in summary["runs"] if run.get(name) is not None]
        if percent:
            rows[name] = {
                "n": len(percent),
                "sd": pd.Series(percent).std(),
                **asdict(mean_interval(percent)),
            }
    if summary["reported"]:
        name = f"reported by {summary['reported']['by']} on {summary['reported']['on']}"
        rows[name] = {"n": None, "mean": 100 * summary["reported"]["accuracy"]}
    return pd.DataFrame.from_dict(rows, orient="index").round(2)


def summary_paths(root: Path) -> list[Path]:
    """Every `summary.json` below a folder, in path order, but for reports on their way into place.

    Args:
        root: absolute; may be missing.
    """
    found = sorted(root.glob("**/summary.json"))
    return [path for path in found if "/." not in f"/{path.relative_to(root).as_posix()}"]


def read_summaries(reports_dir: str | Path) -> list[dict[str, Any]]:
    """Reads every `summary.json` below a folder, in path order, but for a sweep's variants'.

    Args:
        reports_dir: the folder, from the root of the checkout.

    Returns:
        The summaries, each with `path`, its folder relative to `reports_dir`.

    Raises:
        ValueError: a summary is not JSON or lacks a key; names the file.
    """
    root, summaries = ROOT / reports_dir, []
    for path in summary_paths(root):
        try:
            summary = json.loads(path.read_text(encoding="utf-8"))
            _check(summary)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: broken summary: {error!r}; run its notebook again") from None
        if "variant" not in summary:
            summaries.append(summary | {"path": path.parent.relative_to(root).as_posix()})
    return summaries


def _check(summary: dict[str, Any]) -> None:
    """Refuses a summary without what tables and texts are made of."""
    row = row_of(summary)
    texts = [summary["question"], summary["finished_at"], *summary.get("answer", [])]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("question, finished_at and answer are texts")
    if bool(summary["runs"]) != bool(row["n"]):
        raise ValueError("runs and test_accuracy go together")
    needed = ("model", "parameters", "data", "n_train", "train_seconds", "machine")
    if row["n"] and (missing := [name for name in needed if row[name] is None]):
        raise ValueError(f"without {', '.join(missing)}")


def row_of(summary: dict[str, Any]) -> dict[str, Any]:
    """One row of the comparison: accuracies in 0..1, times in seconds a seed.

    The time is the mean of the seeds that had the summary's machine to themselves; if none had
    (`shared_machine`), that of the longest, a bound. The load is the highest of the same seeds.
    """
    hardware, reported = summary["hardware"], summary["reported"] or {}
    runs = [run for run in summary["runs"] if run.get("hardware", hardware) == hardware]
    quiet = list(filter(alone, runs))
    seconds = [run["train_seconds"] for run in quiet or runs]
    dataset = summary["dataset"] or {}
    test = summary["test_accuracy"] or {}
    tta, val = summary["test_accuracy_tta"] or {}, summary["val_accuracy"] or {}
    return {
        "notebook": summary["notebook"],
        "experiment": summary["experiment"],
        "preset": summary["preset"],
        "model": (summary["model"] or {}).get("name"),
        "parameters": (summary["model"] or {}).get("parameters"),
        "weights": (summary["config"] or {}).get("weights"),
        "data": describe_dataset(dataset) if dataset else None,
        "n_train": dataset.get("n_train"),
        "n": test.get("n", 0),
        "val_accuracy": val.get("mean"),
        "test_accuracy": test.get("mean"),
        "low": test.get("low"),
        "high": test.get("high"),
        "test_accuracy_tta": tta.get("mean"),
        "train_seconds": fmean(seconds) if quiet else max(seconds, default=None),
        "other_load": max((run.get("other_load", 0.0) for run in quiet or runs), default=None),
        "shared_machine": not quiet,
        "reported_accuracy": reported.get("accuracy"),
        "reported_by": reported.get("by"),
        "reported_on": reported.get("on"),
        "machine": _machine(hardware),
    }


def comparison_frame(summaries: list[dict[str, Any]]) -> pd.DataFrame:
    """All experiments that trained something, a row each, the columns of `row_of`."""
    if not any(summary["runs"] for summary in summaries):
        raise ValueError("no report here has trained anything; run the stages first: make study")
    frame = pd.DataFrame([row_of(summary) for summary in summaries if summary["runs"]])
    return frame.astype(dict.fromkeys(_NUMBERS, float))  # None, where all are, is NaN here


def describe_dataset(dataset: dict[str, Any]) -> str:
    """The data set in words, for tables."""
    names = {"cifar10": "CIFAR-10", "digits": "digits (a stand-in)"}
    name = names.get(dataset["name"], dataset["name"])
    return f"{name}, JPEG copy" if dataset["lossy"] else name


def caption_of(info: DataInfo) -> str:
    """What stands below every figure: data set, source, counts; a stand-in is called one."""
    text = (
        f"Data: {describe_dataset(asdict(info))} ({info.source}); {info.n_train:,} train, "
        f"{info.n_val:,} validation, {info.n_test:,} test images."
    )
    if info.name == "digits":
        text += " A stand-in's numbers say nothing about CIFAR-10."
    return text


def machines_line(runs: list[Run]) -> list[str]:
    """Says on which machines runs were trained, if on several: that moves numbers, and times."""
    counts = Counter(_machine(run.summary.get("hardware")) or "an unnamed one" for run in runs)
    told = "; ".join(f"{n} on {machine}" for machine, n in counts.items())
    return [f"runs on different machines, threads or precisions: {told}"] if len(counts) > 1 else []


def _machine(hardware: dict[str, Any] | None) -> str | None:
    if not hardware:
        return None
    unit = f", {hardware['vector_unit']}" if hardware.get("vector_unit") else ""
    n = hardware["threads"]
    threads = f", {n} thread{'s' * (n > 1)}" if hardware["device"] == "cpu" else ""
    return f"{hardware['name']}{threads}{unit}, {hardware['precision']}"
