"""Published runs: of each seed in a report its figures, so that nobody has to train it again."""

import json
import logging
from pathlib import Path

import pandas as pd

from cifar_lib.config import ROOT, config_of
from cifar_lib.files import shown
from cifar_lib.reports import OF_A_RUN, Report, machines_line, summary_paths
from cifar_lib.results import Run

logger = logging.getLogger(__name__)


def published_runs(
    reports_dir: str | Path = "reports/full", *, whole: bool = False
) -> dict[str, Run]:
    """Reads every run of the reports below a folder, those of a sweep's variants too.

    A run found so has its configuration, history and figures; neither weights nor logits, for its
    `path` is the report's folder. An older report names the hardware of one run alone, and that is
    taken for all of its runs. A broken report tells nothing; a warning names it.

    Args:
        reports_dir: from the root of the checkout, or absolute; may be missing.
        whole: refuse a broken report, or one of its tables, instead of passing over it.

    Returns:
        By the name that the folder of such a run has, `<seed>-<config fingerprint>`.

    Raises:
        ValueError: something is broken, and `whole` was asked for; names the file.
    """
    found: dict[str, Run] = {}
    for path in summary_paths(ROOT / reports_dir):
        broken = path
        try:
            summary = json.loads(path.read_text(encoding="utf-8"))
            if whole and summary.get("runs") is None:
                continue  # of a notebook whose report is its own
            if not summary["runs"]:
                continue
            # A field that was deleted since leaves a fingerprint that nobody asks for.
            config = config_of(summary["config"])
            broken = path.with_name("metrics.csv")
            history = dict(tuple(pd.read_csv(broken).groupby("seed")))
            for result in summary["runs"]:
                seed, facts = result["seed"], summary | result
                facts["result"] = {k: v for k, v in result.items() if k not in OF_A_RUN}
                name = f"{seed}-{summary['config_fingerprint']}"
                found[name] = Run(path.parent, config, seed, history[seed], facts)
            for table in path.parent.glob("*.csv") if whole else ():
                broken = table
                pd.read_csv(table)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if whole:
                raise ValueError(
                    f"{shown(broken)}: broken ({error!r}), and what its report tells would be "
                    f"lost: restore it, or delete {shown(path.parent)} to begin anew"
                ) from None
            logger.warning("%s: broken (%r), so it tells of no run", path, error)
    return found


def keep_other_seeds(new: Path, old: Path) -> None:
    """Adds to a new report of one configuration what the old one tells of its other seeds.

    So the seeds of a report may come from several machines, one after the other: each counts in
    the summary's means and intervals, and in every table that has a row or a column for each seed.
    Figures and what the notebook says are of the seeds that it was executed with; the first line
    of the summary's `answer` says which are not among them.

    Args:
        new: the folder of the report just executed; changed in place.
        old: that of the report it replaces; may be missing.
    """
    here = {run.seed: run for run in published_runs(new).values() if run.path == new}
    alike = {run.summary["config_fingerprint"] for run in here.values()}
    before = published_runs(old).values()
    told = {run.seed: run for run in before if run.summary["config_fingerprint"] in alike}
    seeds = sorted(told.keys() - here.keys())
    if not seeds:
        return
    summary = json.loads((new / "summary.json").read_text(encoding="utf-8"))
    head = ("notebook", "experiment", "preset", "question")
    report = Report(str(new), *map(summary.get, head))
    report.head = summary  # so that what the notebook adds of its own stays
    for path in filter(lambda path: (old / path.name).is_file(), new.glob("*.csv")):
        frame, earlier = pd.read_csv(path), pd.read_csv(old / path.name)
        if "seed" in frame:
            kept = earlier[earlier["seed"].isin(seeds)]
            frame = pd.concat([kept, frame]).sort_values("seed", kind="stable")
        frame = frame.assign(**earlier[[f"seed_{s}" for s in seeds if f"seed_{s}" in earlier]])
        in_order = sorted(map(str, frame), key=lambda c: int(c[5:]) if c[:5] == "seed_" else -1)
        report.table(path.stem, frame[in_order])
    note = (
        f"seeds {', '.join(map(str, seeds))} are kept from an earlier execution; the notebook "
        "shows the others"
    )
    runs = [run for _, run in sorted((told | here).items())]
    answer = [note, *machines_line(runs), *summary.get("answer", [])]
    report.finish(runs[0].config, runs, reported=summary["reported"], answer=answer)
