"""Times what Ray adds to a run: the smallest runs on the digits, through Ray and in this process.

Both train run after run, one at a time and on as many threads, in turns; each run loads its data,
trains one epoch and writes its folder. What starting Ray and its first worker costs is paid once
and stated apart.

    python benchmarks/ray_overhead.py [--out FILE.json] [--runs 300] [--turns 5]
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from timing import write

from cifar_lib.config import TrainConfig
from cifar_lib.data import load_splits
from cifar_lib.study_engine import Task, train_task, train_tasks
from cifar_lib.study_ray import RayEngine

CONFIG = TrainConfig(
    dataset="digits", n_train=100, width=0.125, batch_size=50, epochs=1, device="cpu"
)


class KeptEngine(RayEngine):
    """Stays open from turn to turn; `train_tasks` closes the engine that it is given."""

    def close(self) -> None:
        """Does nothing."""


def new_tasks(folder: Path) -> Iterator[Task]:
    """Runs that differ in their seed alone, without end."""
    fingerprint = CONFIG.fingerprint(load_splits(CONFIG).info.sha256)
    seed = 0
    while True:
        run_dir = folder / f"{seed}-{fingerprint}"
        run_dir.mkdir(parents=True)
        yield Task("bench", "full", CONFIG, seed, run_dir)
        seed += 1


def through_ray(engine: RayEngine, tasks: list[Task]) -> float:
    """Seconds a run, one at a time, as a study trains them."""
    began = time.perf_counter()
    errors = train_tasks(tasks, engine, lambda line: None)
    assert not errors, errors
    return (time.perf_counter() - began) / len(tasks)


def in_process(threads: int, tasks: list[Task]) -> float:
    """Seconds a run, one at a time."""
    began = time.perf_counter()
    for task in tasks:
        error = train_task(task, threads)
        assert not error, error
    return (time.perf_counter() - began) / len(tasks)


def main() -> None:
    """Measures both, prints the difference and writes what was measured."""
    parser = argparse.ArgumentParser(description="Times what Ray adds to a run.")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--runs", type=int, default=300, help="timed runs of each")
    parser.add_argument("--turns", type=int, default=5, help="turns they are timed in")
    options = parser.parse_args()
    ray_seconds, own_seconds = [], []
    with tempfile.TemporaryDirectory() as folder:
        tasks = new_tasks(Path(folder))
        in_process(1, list(islice(tasks, 1)))  # untimed: warms up
        began = time.perf_counter()
        engine = KeptEngine(jobs=1)
        try:
            through_ray(engine, list(islice(tasks, 1)))
            start_seconds = time.perf_counter() - began
            for _ in range(options.turns):
                some = max(1, options.runs // options.turns)
                ray_seconds.append(through_ray(engine, list(islice(tasks, some))))
                own_seconds.append(in_process(engine.cpus, list(islice(tasks, some))))
        finally:
            RayEngine.close(engine)
    overhead = [a - b for a, b in zip(ray_seconds, own_seconds, strict=True)]
    record = {
        "runs": options.runs,
        "ray_start_seconds": start_seconds,
        "seconds_a_run": {"ray": ray_seconds, "in_process": own_seconds},
        "overhead_seconds_a_run": {
            "median": statistics.median(overhead),
            "min": min(overhead),
            "max": max(overhead),
        },
    }
    print(f"Ray and its first worker: {start_seconds:.1f} s, once")
    for name, seconds in (("Ray", ray_seconds), ("in process", own_seconds), ("added", overhead)):
        span = f"{min(seconds):.2f} to {max(seconds):.2f}"
        print(f"{name:12}{statistics.median(seconds):6.2f} s a run, median of turns ({span})")
    write(options.out, load=None, **record)  # Ray's workers are no children of this process


if __name__ == "__main__":
    main()
