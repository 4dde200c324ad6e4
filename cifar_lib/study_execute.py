"""One experiment executed with papermill, its report moved into place whole."""

import hashlib
import json
import os
import re
import shutil
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import nbformat
import papermill
from filelock import FileLock, Timeout
from traitlets.config import Config

from cifar_lib.config import ROOT
from cifar_lib.data import load_dataset
from cifar_lib.files import beside, hash_files, replace_folder, shown, write_json
from cifar_lib.index import ANSWER, answer, replace_block
from cifar_lib.reports import summary_paths
from cifar_lib.reports_runs import keep_other_seeds, published_runs
from cifar_lib.results import is_finished
from cifar_lib.study_engine import tasks_of
from cifar_lib.study_experiments import Experiment, papermill_path
from cifar_lib.study_runs import FRESH, RUNS

FILES = ("sweep", "stages", "systems", "reported_curve")
"""Parameters that name a file, from the root of the checkout."""


def input_key(experiment: Experiment) -> str:
    """Hash of what a report depends on; an equal key means up to date.

    Parameters, seeds and data always count, with every file that a parameter names; for a
    notebook that only reads reports (`reports_dir`) those reports do, and under `quick` the
    library and the notebook's code. What other notebooks read beside (measured speeds, the
    other stages' tables) does not: they show it as it was when they were executed.
    """
    config = experiment.config
    named = filter(None, map(experiment.parameters.get, FILES))
    parts: list[Any] = [experiment.parameters, experiment.seeds]
    parts += [hash_files([ROOT / name]) for name in named]
    if "reports_dir" in experiment.parameters:
        root = ROOT / experiment.parameters["reports_dir"]
        parts += [
            hashlib.sha256(path.read_bytes()).hexdigest()
            for path in summary_paths(root)
            if experiment.destination not in path.parents
        ]
    elif "sweep" in experiment.parameters:
        parts += [(task.label, task.folder.name) for task in tasks_of([experiment])]
    else:
        train_set, _ = load_dataset(config.dataset, config.data_dir)
        parts.append(train_set.info.sha256)
        if config.weights:  # by content: another file may lie at the same path
            parts.append(config.fingerprint())
    if experiment.preset == "quick":
        parts.append(hash_files((ROOT / "cifar_lib").glob("**/*.py")))
        notebook = nbformat.read(experiment.source, as_version=4)
        parts.append([cell.source for cell in notebook.cells if cell.cell_type == "code"])
    text = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def is_up_to_date(experiment: Experiment, key: str) -> bool:
    """Whether the report in place was made from just these inputs."""
    try:
        text = (experiment.destination / "summary.json").read_text(encoding="utf-8")
        return bool(json.loads(text).get("input_key") == key)
    except (OSError, ValueError, AttributeError):
        return False


def without_told_seeds(experiment: Experiment) -> Experiment:
    """The experiment with those seeds alone that its report does not tell, or whose run is here.

    What is told of the others stays in the report: see `reports_runs.keep_other_seeds`. With no
    seed left, of a sweep, and where today's code has to be shown, the experiment as it is.
    """
    if "sweep" in experiment.parameters or experiment.preset in FRESH:
        return experiment
    told = published_runs(experiment.destination)
    tasks = tasks_of([experiment])
    left = [t.seed for t in tasks if t.folder.name not in told or is_finished(t.folder)]
    return replace(experiment, seeds=left or experiment.seeds)


def replaced_runs(experiment: Experiment) -> int:
    """How many runs its report tells of that are of other data or another recipe.

    Their figures go when the new report is moved into place; 0 where reports are not published.
    """
    if experiment.preset in FRESH:
        return 0
    asked = {task.folder.name.partition("-")[2] for task in tasks_of([experiment])}
    told = published_runs(experiment.destination)
    return sum(name.partition("-")[2] not in asked for name in told)


def check_keeps_seeds(experiment: Experiment) -> None:
    """Refuses what would lose seeds that a report tells of.

    A stage's report keeps them, if it can be read; a sweep's is replaced whole.

    Raises:
        ValueError: names the broken file, or the report and the seeds.
    """
    if experiment.preset in FRESH:  # it shows today's code
        return
    found = published_runs(experiment.destination, whole=True).values()
    if "sweep" not in experiment.parameters:
        return
    asked = {(label.rpartition("/")[2], seed) for label, _, seed in experiment.runs}
    variants = {variant for variant, _ in asked}  # of one that is gone `replaced_runs` tells
    told = {(run.path.name, run.seed) for run in found if run.path.name in variants}
    if lost := sorted({seed for _, seed in told - asked}):
        raise ValueError(
            f"{shown(experiment.destination)} tells of seeds {lost} too, which would be lost: ask "
            f"for them (--seeds {max(s for _, s in told) + 1}, or seeds in "
            f"{experiment.parameters['sweep']}), or delete it to begin anew"
        )


def execute(experiment: Experiment, key: str, console: TextIO = sys.stdout) -> None:
    """Executes one experiment's notebook and moves its report into place, whole.

    Args:
        experiment: what to execute.
        key: its `input_key`, kept in the summary.
        console: gets the lines that a notebook prints an epoch; all output goes to the log.

    Raises:
        PapermillExecutionError: a cell failed; the notebook as far as it came stays in
            `scratch_folder(experiment)`.
        ValueError: another process executes this experiment.
    """
    try:
        with _lock(experiment):
            _execute(experiment, key, console, scratch_folder(experiment))
    except Timeout:
        raise ValueError("another process executes this experiment") from None


def _lock(experiment: Experiment) -> FileLock:
    """Held by who executes an experiment; raises Timeout at once where another holds it."""
    scratch = scratch_folder(experiment)
    scratch.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(scratch.with_name(f".{scratch.name}.lock"), timeout=0)


def _execute(experiment: Experiment, key: str, console: TextIO, scratch: Path) -> None:
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    with open(log_path(experiment), "w", encoding="utf-8") as log:
        papermill.execute_notebook(
            papermill_path(experiment.source),
            papermill_path(scratch / "executed.ipynb"),
            experiment.parameters
            | {
                "experiment": experiment.name,
                "preset": experiment.preset,
                "report_dir": scratch.relative_to(ROOT).as_posix(),
                "seeds": experiment.seeds,
            },
            kernel_name="python3",
            progress_bar=False,
            stdout_file=_Tee(log, console),
            stderr_file=log,
            cwd=str(ROOT),
            config=Config(
                {
                    # On loopback; without this a kernel warns about it at every start.
                    "KernelManager": {"transport_encryption": "auto"},
                    # At the end all is on disk; at Ctrl-C nothing waits for a cell's end.
                    "PapermillNotebookClient": {"shutdown_kernel": "immediate"},
                }
            ),
        )
    _complete(scratch, experiment, key)
    _move_into_place(scratch, experiment.destination)


def scratch_folder(experiment: Experiment) -> Path:
    """Where a notebook is executed before its report is moved into place."""
    return ROOT / RUNS / ".scratch" / experiment.preset / experiment.notebook / experiment.name


def log_path(experiment: Experiment) -> Path:
    """The log of an experiment's last execution."""
    folder = ROOT / RUNS / "logs" / experiment.preset
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{experiment.notebook}-{experiment.name}.log"


class _Tee:
    """Everything to the log; of it, the lines an epoch prints to the console too."""

    def __init__(self, log: TextIO, console: TextIO) -> None:
        self.log, self.console = log, console

    def write(self, text: str) -> None:
        self.log.write(text)
        self.log.flush()
        for line in text.splitlines():
            if re.match(r"(\S+: )?seed \d", line):
                print(f"      {line}", file=self.console, flush=True)

    def flush(self) -> None:
        self.log.flush()


def _complete(scratch: Path, experiment: Experiment, key: str) -> None:
    """Adds the key to the summary and the answer to the notebook; takes times out of it."""
    path = scratch / "summary.json"
    if not path.is_file():
        raise RuntimeError(f"{scratch.relative_to(ROOT)}: the notebook wrote no summary.json")
    if experiment.preset not in FRESH:
        keep_other_seeds(scratch, experiment.destination)
    summary = json.loads(path.read_text(encoding="utf-8")) | {"input_key": key}
    write_json(path, summary)
    executed = scratch / "executed.ipynb"
    notebook = nbformat.read(executed, as_version=4)
    notebook.metadata.pop("papermill", None)
    for cell in notebook.cells:
        if ANSWER in cell.source:  # its own, not what was published when it began
            said = answer([summary], experiment.notebook)
            cell.source = replace_block(cell.source, "answer", said, experiment.label)
        cell.metadata.pop("papermill", None)
        cell.metadata.pop("execution", None)
    nbformat.write(notebook, executed)


def take_back_report(experiment: Experiment) -> None:
    """Puts the old report back if its replacement was killed between the two renames.

    If it was killed after them, what was left of the old one goes.
    """
    old = beside(experiment.destination, "old")
    if old.exists():
        with suppress(Timeout), _lock(experiment):  # another process may be between them just now
            if experiment.destination.exists():
                shutil.rmtree(old)
            else:
                os.replace(old, experiment.destination)


def _move_into_place(scratch: Path, destination: Path) -> None:
    """Puts a report where the old one was; the old one is gone only when the new one is there."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    new = beside(destination, "new")
    shutil.rmtree(new, ignore_errors=True)
    try:
        shutil.copytree(scratch, new)  # beside the destination, even from another disk
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    replace_folder(new, destination)
    shutil.rmtree(scratch, ignore_errors=True)
