"""The finished runs of a configuration, trained where they are missing."""

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path

from cifar_lib import distributed, results
from cifar_lib.checkpoint import remove_checkpoints
from cifar_lib.config import ROOT, TrainConfig
from cifar_lib.data import Splits, load_splits
from cifar_lib.execution import training_code_sha256
from cifar_lib.files import plain_name
from cifar_lib.train import check_runnable, train

RUNS = "runs"
FRESH = ("quick", "smoke")
"""Presets that always show today's code: seconds or minutes, so a run of other code is repeated."""


def runs(
    config: TrainConfig,
    seeds: Sequence[int],
    *,
    experiment: str,
    preset: str = "full",
    splits: Splits | None = None,
    progress: bool | None = None,
    force: bool = False,
    label: str = "",
) -> list[results.Run]:
    """Returns the finished runs of a configuration, training those that are missing.

    Args:
        config: the recipe.
        seeds: one run each.
        experiment: the folder's name below `runs/`; a finished run is found in any other too.
        preset: under `quick` and `smoke` a run of other training code is repeated; under any
            other preset a finished run stays, and its summary tells what code it is of.
        splits: the data, if it is loaded already.
        progress: whether to show a bar; None shows it in a terminal and in JupyterLab.
        force: train even where a finished run exists.
        label: stands before every line that is printed, not in the log.

    Returns:
        The runs in the order of `seeds`.

    Raises:
        ValueError: the configuration cannot run here, or a name leads to another place.
    """
    check_runnable(config)
    plain_name(experiment, "experiment")
    if not all(isinstance(seed, int) for seed in seeds):  # a seed, too, names a folder
        raise ValueError(f"seeds: got {list(seeds)!r}; allowed are ints")
    splits = splits or distributed.on_main(lambda: load_splits(config))
    distributed.check_divisible(config, len(splits.train))
    finished = []
    for seed in seeds:
        fingerprint = config.fingerprint(splits.info.sha256)
        folder = distributed.on_main(partial(find_folder, experiment, seed, fingerprint))
        run = distributed.on_main(partial(_find, folder))
        stale = run and preset in FRESH and run.summary["code_sha256"] != training_code_sha256()
        if run is None or stale or force:
            distributed.on_main(partial(forget, folder, keep_state=run is None and not force))
            speaks = distributed.rank() == 0
            with _logged(folder, label) if speaks else nullcontext():
                bar = speaks and _wants_bar(progress)
                run = train(config, seed, splits, folder, progress=bar)
        finished.append(run)
    return finished


def _find(folder: Path) -> results.Run | None:
    return results.load_run(folder) if results.is_finished(folder) else None


def find_folder(experiment: str, seed: int, fingerprint: str) -> Path:
    """The folder of a run: where it is finished, below any experiment, else this experiment's."""
    own = results.run_folder(ROOT / RUNS, experiment, seed, fingerprint)
    places = [own, *sorted((ROOT / RUNS).glob(f"*/{own.name}"))]
    return next(filter(results.is_finished, places), own)


def forget(folder: Path, *, keep_state: bool = False) -> None:
    """Marks one run as not finished; without its training state it starts again."""
    (folder / results.SUMMARY).unlink(missing_ok=True)
    if not keep_state:
        remove_checkpoints(folder)


@contextmanager
def _logged(folder: Path, label: str) -> Iterator[None]:
    """A line an epoch, to the console and to `train.log` in the run's folder at once."""
    folder.mkdir(parents=True, exist_ok=True)
    logger = logging.getLogger("cifar_lib")
    level, file = logger.level, logging.FileHandler(folder / "train.log", encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    file.handleError = lambda record: None  # type: ignore[method-assign]  # training tells it
    console = logging.StreamHandler(sys.stdout)
    console.setFormatter(logging.Formatter(f"{label}: %(message)s" if label else None))
    handlers: list[logging.Handler] = [console, file]
    logger.setLevel(logging.INFO)
    for handler in handlers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        logger.setLevel(level)
        for handler in handlers:
            logger.removeHandler(handler)
        with suppress(OSError):
            file.close()


def _wants_bar(progress: bool | None) -> bool:
    # A kernel that JupyterLab starts knows its notebook's name; papermill's and nbval's do not.
    return (
        (sys.stderr.isatty() or "JPY_SESSION_NAME" in os.environ) if progress is None else progress
    )
