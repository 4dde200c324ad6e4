"""The study: a preset's experiments one after the other, with what is up to date left alone."""

import os
import re
import sys
import time
from contextlib import suppress
from typing import TextIO

from papermill.exceptions import PapermillExecutionError

from cifar_lib.config import ROOT
from cifar_lib.execution import duration
from cifar_lib.files import with_remedy
from cifar_lib.study_engine import Engine, LocalEngine, Task, missing, tasks_of, train_tasks
from cifar_lib.study_execute import (
    check_keeps_seeds,
    execute,
    input_key,
    is_up_to_date,
    log_path,
    replaced_runs,
    scratch_folder,
    take_back_report,
    without_told_seeds,
)
from cifar_lib.study_experiments import Experiment, load_preset
from cifar_lib.study_ray import RayEngine
from cifar_lib.study_runs import forget, runs

__all__ = ["runs", "study"]


def study(
    preset: str,
    only: str = "*",
    n_seeds: int | None = None,
    force: bool = False,
    console: TextIO = sys.stdout,
    *,
    engine: str = "local",
    jobs: int | None = None,
    address: str | None = None,
) -> list[Experiment]:
    """Runs a preset: every experiment that is not up to date, one after the other.

    With Ray, more than one job or force all that is missing is trained first, a sweep's search
    among it, and the notebooks find it finished; else each notebook trains its own. A failing
    experiment does not stop the others; a failing run does those after it in its stage alone.

    Args:
        preset: a name in `params/study.yaml`.
        only: a glob over `notebook/experiment`.
        n_seeds: seeds 0 .. n_seeds - 1 instead of those in the file.
        force: run again what is up to date.
        console: gets the progress.
        engine: who trains, `local` or `ray`.
        jobs: runs at a time on one machine; None is one (local), or one a core or GPU (Ray).
        address: `auto` or `host:port` of a Ray cluster; None starts Ray on this machine.

    Returns:
        The experiments that failed.

    Raises:
        ValueError: a mistake in the files or the arguments; nothing has run.
    """

    def say(text: str) -> None:
        print(text, file=console, flush=True)

    if engine not in ("local", "ray"):
        raise ValueError(f"--engine: got {engine!r}; allowed are local, ray")
    if address and engine != "ray":
        raise ValueError(f"--address: got {address!r}; it goes with --engine ray")
    if address not in (None, "auto") and not re.fullmatch(r"\S+:\d+", str(address)):
        raise ValueError(f"--address: got {address!r}; allowed are auto and HOST:PORT")
    experiments = load_preset(preset, only, n_seeds)
    for experiment in experiments:
        take_back_report(experiment)
        check_keeps_seeds(experiment)
    minutes = {e.label: e.minutes for e in experiments}
    left = sum(minutes.values())
    say(
        f"preset {preset}: {len(experiments)} experiments, about {duration(60 * left)} on two "
        "cores if none is up to date"
    )
    beforehand = engine == "ray" or (jobs or 1) > 1 or force
    lost: dict[str, str] = {}
    if beforehand and (tasks := _tasks_to_train(experiments, force)):
        workers: Engine = (
            RayEngine(jobs, address) if engine == "ray" else LocalEngine(min(jobs or 1, len(tasks)))
        )
        for task in tasks if force else ():
            forget(task.folder)
        lost = train_tasks(tasks, workers, say)
    if beforehand:  # what is left is a minute or so for each notebook
        minutes = dict.fromkeys(minutes, 1.0)
        left = sum(minutes.values())
    spent, expected = 0.0, 0.0
    failed: list[tuple[str, Experiment]] = []
    for i, experiment in enumerate(experiments, 1):
        head = f"[{i}/{len(experiments)}] {experiment.label}"
        left -= minutes[experiment.label]
        try:
            key = input_key(experiment)
        except (ValueError, OSError) as error:  # its data or weights are not to be had
            failed.append((f"{experiment.label}: {_last_line(error)}", experiment))
            say(f"{head}: FAILED: {_last_line(error)}")
            continue
        if is_up_to_date(experiment, key) and not force:
            say(f"{head}: up to date")
            continue
        _ask_no_more(experiment)
        names = [task.folder.name for task in tasks_of([experiment])] if lost else []
        if errors := [lost[name] for name in names if name in lost]:
            say(f"{head}: FAILED: {len(errors)} of {len(names)} runs")
            failed += [(error, experiment) for error in errors]
            continue
        # The file's minutes, corrected by the pace so far; five minutes stand for the guess.
        guess = (minutes[experiment.label] + left) * (spent + 5) / (expected + 5)
        say(f"{head}: running, about {duration(60 * guess)} left for all")
        where = experiment.destination.relative_to(ROOT)
        if n := replaced_runs(experiment):
            say(f"{head}: {where} tells of {n} runs of other data or another recipe: replaced")
        began = time.perf_counter()
        try:
            execute(experiment if force else without_told_seeds(experiment), key, console)
        except Exception as error:  # whatever it was, the others still run
            notebook = (scratch_folder(experiment) / "executed.ipynb").relative_to(ROOT)
            log = log_path(experiment).relative_to(ROOT)
            failed.append((f"{experiment.label}; see {notebook} and {log}", experiment))
            say(f"{head}: FAILED: {_last_line(error)}")
        else:
            seconds = time.perf_counter() - began
            spent, expected = spent + seconds / 60, expected + minutes[experiment.label]
            say(f"{head}: done in {duration(seconds)}, {where}/executed.ipynb")
    for reason in dict.fromkeys(reason for reason, _ in failed):  # one run may fail for two
        say(f"failed: {reason}")
    return list({experiment.label: experiment for _, experiment in failed}.values())


def _tasks_to_train(experiments: list[Experiment], force: bool) -> list[Task]:
    """What an engine trains: the missing runs of what is not up to date, or all if forced."""
    found: dict[str, Task] = {}
    for experiment in experiments:
        with suppress(ValueError, OSError):  # without its data or weights it fails at its turn
            if not experiment.runs:
                continue
            if force or not is_up_to_date(experiment, input_key(experiment)):
                asked = experiment if force else without_told_seeds(experiment)
                tasks = tasks_of([asked]) if force else missing(tasks_of([asked]))
                found = {task.folder.name: task for task in tasks} | found
            _ask_no_more(experiment)
    return list(found.values())


def _ask_no_more(experiment: Experiment) -> None:
    """Keeps all others from asking the network again, once one has asked and was answered."""
    if experiment.datasets - {"digits"}:
        os.environ["CIFAR10_DOWNLOAD"] = "0"


def _last_line(error: Exception) -> str:
    if isinstance(error, PapermillExecutionError):
        return f"{error.ename}: {error.evalue}"
    return str(with_remedy(error))
