"""Engines: who trains the missing runs of a study before its notebooks ask for them.

An engine takes a task while it has room and gives it back when the run has ended. All that a run
leaves lies in its folder: a worker that dies costs no more than the epoch it was in, and progress
is read from `train.log`, wherever the worker is.
"""

import contextlib
import multiprocessing
import os
import platform
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Protocol

import torch
from filelock import FileLock

from cifar_lib.config import TrainConfig
from cifar_lib.data import load_dataset, load_splits
from cifar_lib.reports_runs import published_runs
from cifar_lib.study_experiments import Experiment
from cifar_lib.study_runs import FRESH, complete_run, find_folder, finished_run

RETRIES = 3
"""How often a run is tried again whose worker died; a run that fails is not."""


@dataclass(frozen=True)
class Task:
    """One run: its name on the console, its recipe and where it lies."""

    label: str
    preset: str
    config: TrainConfig
    seed: int
    folder: Path
    figures_suffice: bool = False  # of a published run, as for a sweep; else its weights count


class Engine(Protocol):
    """What trains tasks somewhere else."""

    @property
    def room(self) -> int:
        """How many more tasks it takes now."""

    def start(self, task: Task) -> None:
        """Takes a task."""

    def finished(self, timeout: float) -> list[tuple[Task, str]]:
        """Waits at most `timeout` seconds; returns tasks that ended, and why where they failed."""

    def close(self) -> None:
        """Ends all workers."""


def tasks_of(experiments: Sequence[Experiment]) -> list[Task]:
    """Every run of some experiments, what they share once; finished or not."""
    sha256: dict[tuple[str, str | None], str] = {}
    tasks: dict[str, Task] = {}
    for experiment in experiments:
        for label, config, seed in experiment.runs:
            data = (config.dataset, config.data_dir)
            if data not in sha256:
                sha256[data] = load_dataset(*data)[0].info.sha256
            folder = find_folder(experiment.name, seed, config.fingerprint(sha256[data]))
            suffice = "sweep" in experiment.parameters and experiment.preset not in FRESH
            task = Task(label, experiment.preset, config, seed, folder, suffice)
            tasks.setdefault(folder.name, task)
    return list(tasks.values())


def missing(tasks: Sequence[Task]) -> list[Task]:
    """The tasks whose run is not finished, or has to be repeated under its preset.

    Where figures suffice, those that `reports/full` tells do.
    """
    figures = published_runs() if any(task.figures_suffice for task in tasks) else {}
    return [
        task
        for task in tasks
        if finished_run(task.folder, task.preset) is None
        and not (task.figures_suffice and task.folder.name in figures)
    ]


def train_tasks(
    tasks: Sequence[Task], engine: Engine, say: Callable[[str], None]
) -> dict[str, str]:
    """Trains runs on an engine; a failing one does not stop the others. Closes the engine.

    Args:
        tasks: what is missing.
        engine: who trains.
        say: gets a line an epoch and a line a run.

    Returns:
        By the name of its folder, why a run failed.
    """
    waiting = deque(tasks)
    active: dict[Path, tuple[Task, int]] = {}
    failed: dict[str, str] = {}
    ended, read_at = 0, 0.0
    try:
        while waiting or active:
            while waiting and engine.room > 0:
                task = waiting.popleft()
                task.folder.mkdir(parents=True, exist_ok=True)
                active[task.folder] = task, len(_log_lines(task.folder))
                engine.start(task)
            done = engine.finished(timeout=1.0)
            due = time.monotonic() > read_at + 1.0  # many logs on a shared disk: not at every end
            read_at = time.monotonic() if due else read_at
            for folder in list(active) if due else [task.folder for task, _ in done]:
                task, shown = active[folder]
                lines = _log_lines(folder)
                active[folder] = task, len(lines)
                for line in lines[shown:]:
                    say(f"      {task.label}: {line}")
            for task, error in done:
                del active[task.folder]
                ended += 1
                head = f"  {ended}/{len(tasks)} {task.label}, seed {task.seed}"
                say(f"{head}: FAILED: {error}" if error else f"{head}: done")
                if error:
                    failed[task.folder.name] = f"{task.label}, seed {task.seed}: {error}"
    finally:
        engine.close()
    return failed


def train_task(task: Task, threads: int) -> str:
    """Trains one run in this process without a word; returns why it failed, or nothing."""
    torch.set_num_threads(threads)
    try:
        splits = load_splits(task.config)
        name = f"{task.seed}-{task.config.fingerprint(splits.info.sha256)}"
        if task.folder.name != name or not task.folder.is_dir():
            return (
                f"{platform.node()} has other data, or does not see {task.folder}: a cluster "
                "needs both, under one path"
            )
        # A worker thought dead may still be at it: whoever comes second waits, then finds the run.
        with FileLock(task.folder / ".claim"):
            complete_run(task.folder, task.config, task.seed, splits, task.preset)
    except Exception as error:  # whatever it was, the others still run
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return ""


class LocalEngine:
    """Processes on this machine; one that dies is replaced, and its run goes on."""

    def __init__(self, jobs: int) -> None:
        """Starts the processes.

        Args:
            jobs: how many, at least 1; they share the threads that one run would have, and
                have the GPUs in turn.
        """
        self.threads = max(1, torch.get_num_threads() // jobs)
        self.idle = [self._start_process(number) for number in range(jobs)]
        self.busy: dict[Connection, tuple[SpawnProcess, Task, int]] = {}

    @property
    def room(self) -> int:
        """How many processes wait for a run."""
        return len(self.idle)

    def start(self, task: Task, tries: int = 1) -> None:
        """Hands a run to a process that waits for one."""
        process, connection = self.idle.pop()
        try:
            connection.send(task)
        except OSError:  # it died while it waited
            process.join()
            process, connection = self._start_process(int(process.name))
            connection.send(task)
        self.busy[connection] = process, task, tries

    def finished(self, timeout: float) -> list[tuple[Task, str]]:
        """Waits at most `timeout` seconds; returns tasks that ended, and why where they failed."""
        done = []
        for connection in wait(list(self.busy), timeout):
            assert isinstance(connection, Connection)
            process, task, tries = self.busy.pop(connection)
            try:
                done.append((task, connection.recv()))
                self.idle.append((process, connection))
            except (EOFError, OSError):
                process.join()
                self.idle.append(self._start_process(int(process.name)))
                if tries <= RETRIES:
                    self.start(task, tries + 1)
                else:
                    error = f"its process died {tries} times, exit status {process.exitcode}"
                    done.append((task, error))
        return done

    def close(self) -> None:
        """Ends the processes; a run that one of them was at goes on from its last epoch."""
        for process in [p for p, _ in self.idle] + [p for p, _, _ in self.busy.values()]:
            process.terminate()
            process.join()

    def _start_process(self, number: int) -> tuple[SpawnProcess, Connection]:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(
            target=_serve, args=(theirs, self.threads, number), name=str(number), daemon=True
        )
        process.start()
        theirs.close()  # so that the death of the process is the end of the connection
        return process, ours


def take_gpu(number: int) -> None:
    """Makes a GPU this process's own, if there are any: the first process's is the first."""
    if gpus := torch.cuda.device_count():
        torch.cuda.set_device(number % gpus)


def _serve(connection: Connection, threads: int, number: int) -> None:
    take_gpu(number)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its processes, in order:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(EOFError, OSError):  # the parent is gone
        while True:
            connection.send(train_task(connection.recv(), threads))


def _end_with_parent() -> None:
    """Waits in a worker until its parent is gone, killed for instance, then ends the worker."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _log_lines(folder: Path) -> list[str]:
    """The whole lines of a run's log, without their times."""
    log = folder / "train.log"
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    return [line.split(" ", 2)[-1] for line in text.split("\n")[:-1]]
