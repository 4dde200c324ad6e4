"""The study: a preset's experiments one after the other, with what is up to date left alone."""

import os
import sys
import time
from typing import TextIO

from papermill.exceptions import PapermillExecutionError

from cifar_lib.config import ROOT
from cifar_lib.files import with_remedy
from cifar_lib.study_execute import (
    execute,
    forget_runs,
    input_key,
    is_up_to_date,
    log_path,
    scratch_folder,
)
from cifar_lib.study_experiments import Experiment, load_preset
from cifar_lib.study_runs import runs

__all__ = ["runs", "study"]


def study(
    preset: str,
    only: str = "*",
    n_seeds: int | None = None,
    force: bool = False,
    console: TextIO = sys.stdout,
) -> list[Experiment]:
    """Runs a preset: every experiment that is not up to date, one after the other.

    A failing experiment does not stop the others.

    Returns:
        The experiments that failed, each with its notebook in `scratch_folder`.
    """

    def say(text: str) -> None:
        print(text, file=console, flush=True)

    experiments = load_preset(preset, only, n_seeds)
    left = sum(e.minutes for e in experiments)
    say(
        f"preset {preset}: {len(experiments)} experiments, about {_time(60 * left)} on two cores "
        "if none is up to date"
    )
    spent, expected = 0.0, 0.0
    failed = []
    for i, experiment in enumerate(experiments, 1):
        head = f"[{i}/{len(experiments)}] {experiment.label}"
        key = input_key(experiment)
        left -= experiment.minutes
        if is_up_to_date(experiment, key) and not force:
            say(f"{head}: up to date")
            continue
        # From here on nobody asks the network again: the data was found or is known missing.
        os.environ["CIFAR10_DOWNLOAD"] = "0"
        # The file's minutes, corrected by the pace so far; five minutes stand for the guess.
        minutes = (experiment.minutes + left) * (spent + 5) / (expected + 5)
        say(f"{head}: running, about {_time(60 * minutes)} left for all")
        began = time.perf_counter()
        if force:
            forget_runs(experiment)
        try:
            execute(experiment, key, console)
        except Exception as error:  # whatever it was, the others still run
            failed.append(experiment)
            say(f"{head}: FAILED: {_last_line(error)}")
        else:
            seconds = time.perf_counter() - began
            spent, expected = spent + seconds / 60, expected + experiment.minutes
            where = experiment.destination.relative_to(ROOT)
            say(f"{head}: done in {_time(seconds)}, {where}/executed.ipynb")
    for experiment in failed:
        notebook = (scratch_folder(experiment) / "executed.ipynb").relative_to(ROOT)
        log = log_path(experiment).relative_to(ROOT)
        say(f"failed: {experiment.label}; see {notebook} and {log}")
    return failed


def _last_line(error: Exception) -> str:
    if isinstance(error, PapermillExecutionError):
        return f"{error.ename}: {error.evalue}"
    return str(with_remedy(error) if isinstance(error, OSError) else error)


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
