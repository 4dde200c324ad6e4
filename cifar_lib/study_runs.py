"""The finished runs of a configuration, trained where they are missing."""

import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from cifar_lib import distributed, results
from cifar_lib.checkpoint import has_state, hold, remove_checkpoints
from cifar_lib.config import ROOT, TrainConfig
from cifar_lib.data import Splits, load_splits
from cifar_lib.execution import training_code_sha256
from cifar_lib.files import plain_name, shown
from cifar_lib.train import check_runnable, train

RUNS = "runs"
MAX_SEED = 2**40 - 1
"""An epoch's generator gets a million times the seed and more, which has to fit 64 bits."""
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
    published: Mapping[str, results.Run] | None = None,
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
        published: runs that count as finished where their folder is not here, as
            `published_runs` finds them; for whoever needs neither weights nor logits.

    Returns:
        The runs in the order of `seeds`.

    Raises:
        ValueError: the configuration cannot run here, or a name leads to another place.
    """
    check_runnable(config)
    plain_name(experiment, "experiment")
    check_seeds(list(seeds), experiment)
    splits = splits or distributed.on_main(lambda: load_splits(config))
    distributed.check_divisible(config, len(splits.train))
    fingerprint = config.fingerprint(splits.info.sha256)
    finished = []
    for seed in seeds:
        folder = distributed.on_main(partial(find_folder, experiment, seed, fingerprint))
        if force:
            distributed.on_main(partial(forget, folder))
        if published and folder.name in published and not results.is_finished(folder):
            finished.append(published[folder.name])
            other = finished[-1].summary.get("code_sha256") != training_code_sha256()
            print(
                f"{label}, seed {seed}: figures from {shown(finished[-1].path)}"
                + ", by other training code" * other
            )
            continue
        bar = _wants_bar(progress)
        finished.append(complete_run(folder, config, seed, splits, preset, label, bar))
    return finished


def check_seeds(seeds: Any, where: str | Path) -> list[int]:
    """Refuses what is no list of different whole numbers in 0..MAX_SEED, naming `where`."""
    whole = isinstance(seeds, list) and all(type(s) is int and 0 <= s <= MAX_SEED for s in seeds)
    if not whole or not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"{where}: seeds: got {seeds!r}; allowed are different ints ≥ 0, < 2^40")
    return list(seeds)


def complete_run(
    folder: Path,
    config: TrainConfig,
    seed: int,
    splits: Splits,
    preset: str,
    label: str | None = None,
    progress: bool = False,
) -> results.Run:
    """Returns the finished run in a folder, trained, or trained to its end, if it is missing.

    Args:
        folder: the run's.
        config: the recipe.
        seed: of the run.
        splits: the data.
        preset: as in `runs`.
        label: stands before every line that is printed; None prints none.
        progress: whether to show a bar.
    """
    # Asked before it is read: another process may be about to finish it, whose state then stays.
    stale = distributed.on_main(partial(results.is_finished, folder))
    run = distributed.on_main(partial(finished_run, folder, preset))
    if run is None:
        distributed.on_main(partial(forget, folder, keep_state=not stale))
        speaks = distributed.rank() == 0
        with _logged(folder, label) if speaks else nullcontext():
            run = train(config, seed, splits, folder, progress=progress and speaks)
    return run


def finished_run(folder: Path, preset: str) -> results.Run | None:
    """The run in a folder, if it is finished and need not be repeated under this preset."""
    run = results.load_run(folder) if results.is_finished(folder) else None
    if run and preset in FRESH and run.summary["code_sha256"] != training_code_sha256():
        return None
    return run


def find_folder(experiment: str, seed: int, fingerprint: str) -> Path:
    """The folder of a run: where it is finished or, if nowhere, begun, else this experiment's."""
    own = results.run_folder(ROOT / RUNS, experiment, seed, fingerprint)
    places = [own, *sorted((ROOT / RUNS).glob(f"*/{own.name}"))]
    return next(chain(filter(results.is_finished, places), filter(has_state, places)), own)


def forget(folder: Path, *, keep_state: bool = False) -> None:
    """Marks one run as not finished; without its training state it starts again.

    Raises:
        ValueError: another process trains it.
    """
    with hold(folder):
        (folder / results.SUMMARY).unlink(missing_ok=True)
        if not keep_state:
            remove_checkpoints(folder)


@contextmanager
def _logged(folder: Path, label: str | None) -> Iterator[None]:
    """A line an epoch, to `train.log` in the run's folder and, with a label, to the console."""
    folder.mkdir(parents=True, exist_ok=True)
    logger = logging.getLogger("cifar_lib")
    level, file = logger.level, logging.FileHandler(folder / "train.log", encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    file.handleError = lambda record: None  # type: ignore[method-assign]  # training tells it
    handlers: list[logging.Handler] = [file]
    if label is not None:
        console = logging.StreamHandler(sys.stdout)
        console.handleError = lambda record: None  # type: ignore[method-assign]  # `| head`
        console.setFormatter(logging.Formatter(f"{label}: %(message)s" if label else None))
        handlers.append(console)
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
