"""Reports side by side: what each source reports and what was measured, one stage and another."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from cifar_lib.config import ROOT, config_of
from cifar_lib.evaluate import mean_interval
from cifar_lib.models import STORED_SIZE
from cifar_lib.reports import read_summaries, row_of

MEASURES = {"validation": "val_accuracy_last", "TTA": "test_accuracy_tta"}
"""What a source's `reported_on` names → the same of ours, of a run; else plain test accuracy.
The sources that report validation do so for their last epoch."""

COLUMNS = [
    "study",
    "system",
    "reported",
    "reported_on",
    "measured",
    "low",
    "high",
    "with_tta",
    "n",
    "data",
    "n_train",
    "hours_a_seed",
    "at_most",
    "parameters",
    "status",
]
COUNTS = ["n", "n_train", "parameters"]
LIKE_FOR_LIKE = ["study", "experiment", "reported_on", "n", "reported", "measured", "values"]


def systems_frame(systems: pd.DataFrame, frame: pd.DataFrame) -> pd.DataFrame:
    """Every reported system, measured or not, then every experiment that has no source.

    Args:
        systems: columns study, system, reported_accuracy (0..1), reported_on, experiment
            (`notebook/experiment`) and needs (what running it takes that a clone lacks, or empty).
        frame: as `reports.comparison_frame` gives it; a quick experiment (`…-quick`) stands for
            its full one.

    Returns:
        COLUMNS, indexed by experiment; accuracies in percent, `measured` on test with its 95 %
        interval over n seeds, `with_tta` with test-time augmentation; `at_most` says that the
        hours are a bound, as other work ran beside; `status` says measured, or why not.
    """
    measured = frame.assign(
        experiment=frame["notebook"] + "/" + frame["experiment"].str.removesuffix("-quick"),
        measured=100 * frame["test_accuracy"],
        low=100 * frame["low"],
        high=100 * frame["high"],
        with_tta=100 * frame["test_accuracy_tta"],
        hours_a_seed=frame["train_seconds"] / 3600,
        at_most=frame["shared_machine"],
    )
    # What a source reports stands in `systems` alone.
    measured = measured.drop(columns=["reported_accuracy", "reported_by", "reported_on"])
    table = systems.merge(measured, on="experiment", how="outer", sort=False, indicator=True)
    needs = ("not measured: needs " + table["needs"]).fillna("not measured yet")
    own = table["_merge"] == "right_only"
    table = table.assign(
        reported=100 * table["reported_accuracy"],
        status=needs.where(table["_merge"] == "left_only", "measured"),
        study=table["study"].fillna("ours"),
        system=table["system"].fillna(table["model"]),
        order=pd.Index(systems["experiment"]).get_indexer(table["experiment"]) + 1e6 * own,
    )
    table = table.sort_values(["order", "experiment"]).set_index("experiment")[COLUMNS]
    return table.astype(dict.fromkeys(COUNTS, "Int64")).round(2)


def like_for_like(systems: pd.DataFrame, summaries: list[dict[str, Any]]) -> pd.DataFrame:
    """Every reported accuracy beside ours on the same part of the data, where it was measured.

    Args:
        systems: as for `systems_frame`.
        summaries: as `reports.read_summaries` gives them.

    Returns:
        Columns study, experiment, reported_on, reported, measured, low, high (0..1; the interval
        over n seeds, NaN for one), n and values, a list of each seed's.
    """
    ran = {f"{s['notebook']}/{s['experiment']}".removesuffix("-quick"): s for s in summaries}
    rows = []
    for system in systems.dropna(subset="reported_accuracy").to_dict("records"):
        measure = [ours for word, ours in MEASURES.items() if word in system["reported_on"]]
        runs = ran.get(system["experiment"], {"runs": []})["runs"]
        values = [run.get([*measure, "test_accuracy"][0]) for run in runs]
        if values and None not in values:
            interval = mean_interval(values)
            rows.append(system | asdict(interval) | {"measured": interval.mean, "values": values})
    return (
        pd.DataFrame(rows)
        .rename(columns={"reported_accuracy": "reported"})
        .reindex(columns=[*LIKE_FOR_LIKE, "low", "high"])
        .astype({"low": float, "high": float})
    )


def training_flops(summary: dict[str, Any]) -> float:
    """Counts the floating-point operations of training one seed, on average over the seeds.

    Three forward passes an image, the backward one being worth two, or one where all but the last
    layer is frozen; epochs at a lower resolution by their area (unless the model enlarges what it
    is given, to `image_size`), and of hard images alone by their share. Pretraining, validation
    and evaluation do not count. The same on every machine, which times are not.

    Args:
        summary: of a report that trained, as `reports.read_summaries` gives it.

    Source of the factor: Kaplan et al., Scaling Laws for Neural Language Models, arXiv 2001.08361,
    section 2.1.
    """
    c = config_of(summary["config"])
    an_epoch = summary["model"]["flops_per_image"] * summary["dataset"]["n_train"]
    low = c.small_side if c.image_size == STORED_SIZE else 0  # else the model enlarges all alike
    small = (low / STORED_SIZE) ** 2 if low else 1.0
    full = [
        (small if epoch < c.low_resolution_epochs else 1.0)
        * (c.keep_hardest if epoch >= c.keep_hardest_from else 1.0)
        for run in summary["runs"]
        for epoch in range(run["epochs"])
    ]
    return (3 if c.backbone_rate else 1) * an_epoch * sum(full) / len(summary["runs"])


def stage_tables(
    reports_dir: str | Path, table: str, dataset_sha256: str, but: str
) -> dict[str, pd.DataFrame]:
    """Reads a table of each stage's best other reports, the best by mean validation accuracy.

    What starts from ImageNet's weights and what does not stand apart. Reports without validation
    images were trained on all, and nothing tells which is best: all of them count too.

    Args:
        reports_dir: from the root of the checkout; may be missing.
        table: the file's name without suffix; reports without it do not count.
        dataset_sha256: of the data; reports of other data do not count.
        but: `notebook/experiment` that is left out.

    Returns:
        `notebook/experiment` → the table, in the order of the notebooks.
    """
    best: dict[tuple[str, bool], tuple[float, str]] = {}
    paths: list[str] = []
    for summary in read_summaries(reports_dir):
        notebook, path, val = summary["notebook"], summary["path"], summary["val_accuracy"]
        same_data = (summary["dataset"] or {}).get("sha256") == dataset_sha256
        has_table = (ROOT / reports_dir / path / f"{table}.csv").is_file()
        counts = path != but and same_data and has_table
        if counts and val:
            kind = notebook, bool(row_of(summary)["weights"])
            best[kind] = max(best.get(kind, (0.0, "")), (val["mean"], path))
        elif counts:
            paths.append(path)
    paths += [path for _, path in best.values()]
    return {path: pd.read_csv(ROOT / reports_dir / path / f"{table}.csv") for path in sorted(paths)}
