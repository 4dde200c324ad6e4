"""A sweep: one base configuration, many variants of it, each with its seeds, in one YAML file."""

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cifar_lib import results
from cifar_lib.config import ROOT, TrainConfig, parse_config
from cifar_lib.config_yaml import read_yaml
from cifar_lib.data import Splits, load_splits
from cifar_lib.reports_runs import published_runs
from cifar_lib.study_runs import FRESH, check_seeds, runs
from cifar_lib.train import check_runnable

REPORT_ONLY = (
    "question",
    "corruption_images",
    "reported_accuracy",
    "reported_by",
    "reported_on",
    "reported_curve",
)
"""What a parameter file says beside the fields of TrainConfig."""
KEYS = ("question", "base", "seeds", "variants", "grid")
SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=,+-]{0,99}")


@dataclass(frozen=True)
class Sweep:
    """What a sweep file asks for: by the variant's name its configuration and its seeds."""

    name: str
    question: str
    variants: dict[str, TrainConfig]
    seeds: dict[str, list[int]]

    @property
    def pairs(self) -> Iterator[tuple[str, TrainConfig, int]]:
        """Variant, configuration and seed of every run."""
        for name, config in self.variants.items():
            for seed in self.seeds[name]:
                yield name, config, seed


def read_sweep(path: str | Path, seeds: Sequence[int] = ()) -> Sweep:
    """Reads a sweep file and checks every variant before anything runs.

    The file has `question`; `base`, the fields of TrainConfig or the path of a parameter file
    beside it; `seeds` (default [0]); and `variants` (name: fields that differ, and `seeds` if it
    has its own), `grid` (field: list of values, all combinations, named like
    `optimizer=adam,batch_size=64`), or both, one after the other.

    Args:
        path: the file, from the root of the checkout.
        seeds: for every variant instead of the file's, where there are any.

    Raises:
        ValueError: names the file, the variant and the field.
    """
    path = ROOT / path
    where = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    values = read_yaml(path)
    if unknown := sorted(set(values) - set(KEYS)):
        raise ValueError(f"{where}: unknown key {unknown[0]!r}; allowed are {', '.join(KEYS)}")
    question = values.get("question")
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"{where}: question: got {question!r}; allowed is one sentence")
    base = values.get("base")
    if isinstance(base, str):
        try:
            base = {k: v for k, v in read_yaml(path.parent / base).items() if k not in REPORT_ONLY}
        except ValueError as error:
            raise ValueError(f"{where}: base: {error}") from None
    if not isinstance(base, dict):
        raise ValueError(f"{where}: base: got {base!r}; allowed are fields or a parameter file")
    default = check_seeds(values.get("seeds", [0]), where)
    variants: dict[str, TrainConfig] = {}
    by_name: dict[str, list[int]] = {}
    for name, changes in _variants(values, where):
        if not SAFE_NAME.fullmatch(name) or name in variants:
            raise ValueError(
                f"{where}: variant {name!r}: allowed are different names of at most 100 letters, "
                "digits and ._=,+- that begin with a letter or digit"
            )
        own = check_seeds(changes.pop("seeds", default), f"{where}, variant {name!r}")
        try:
            variants[name] = parse_config(base | changes)
            check_runnable(variants[name])
        except (ValueError, TypeError) as error:  # TypeError: a field that is no string
            raise ValueError(f"{where}, variant {name!r}: {error}") from None
        by_name[name] = list(seeds) or own
    return Sweep(path.stem, question, variants, by_name)


def search_of(path: str | Path) -> Sweep | None:
    """The search that a sweep's choices come from: the file beside it that ends in `-search`."""
    beside = Path(path).with_stem(f"{Path(path).stem}-search")
    return read_sweep(beside) if (ROOT / beside).is_file() else None


def sweep_runs(sweep: Sweep, *, preset: str = "full") -> dict[str, list[results.Run]]:
    """Returns the finished runs of every variant, training those that are missing.

    All runs of a sweep lie in one folder, `runs/<sweep>/`, and a finished run is found again
    wherever it lies below `runs/`: what two variants or two sweeps have in common is trained once.
    What `reports/full` tells of a run that is not here is not trained again either: such a run has
    its figures, not its weights. So a sweep grows by a variant or a seed on any machine.

    Args:
        sweep: as `read_sweep` gives it.
        preset: as in :func:`cifar_lib.study_runs.runs`.

    Returns:
        By variant its runs, in the order of its seeds.

    Raises:
        RuntimeError: some runs failed, after all others were tried; a line for each.
    """
    splits: dict[tuple[Any, ...], Splits] = {}
    finished: dict[str, list[results.Run]] = {name: [] for name in sweep.variants}
    published = {} if preset in FRESH else published_runs()
    failed = []
    for name, c, seed in sweep.pairs:
        data = (c.dataset, c.data_dir, c.val_fraction, c.n_train, c.split_seed)
        if data not in splits:
            splits[data] = load_splits(c)
        try:
            finished[name] += runs(
                c,
                [seed],
                experiment=sweep.name,
                preset=preset,
                splits=splits[data],
                label=name,
                published=published,
            )
        except (ValueError, ArithmeticError, RuntimeError) as error:
            failed.append(f"{name}, seed {seed}: {error}")
    if failed:
        raise RuntimeError("\n".join([f"{len(failed)} runs failed", *failed]))
    return finished


def _variants(values: dict[str, Any], where: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    variants, grid = values.get("variants") or {}, values.get("grid") or {}
    if not isinstance(variants, dict) or not isinstance(grid, dict) or not (variants or grid):
        raise ValueError(f"{where}: variants, grid: allowed are names with their fields")
    for name, changes in variants.items():
        if not isinstance(changes or {}, dict):
            raise ValueError(f"{where}, variant {name!r}: got {changes!r}; allowed are fields")
        yield str(name), dict(changes or {})
    for field, options in grid.items():
        if not isinstance(options, list) or not options or field == "seeds":
            raise ValueError(f"{where}: grid: {field}: got {options!r}; allowed is a list")
    for combination in itertools.product(*grid.values()) if grid else ():
        changes = dict(zip(grid, combination, strict=True))
        yield ",".join(f"{field}={text_of(value)}" for field, value in changes.items()), changes


def text_of(value: Any) -> str:
    """A field's value as it stands in the name of a grid's variant."""
    if isinstance(value, list):
        return "-".join(map(text_of, value))
    return "null" if value is None else str(value)
