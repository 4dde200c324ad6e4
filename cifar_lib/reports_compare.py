"""The comparison by system: what each source reports, beside what was measured here."""

import pandas as pd

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
    "parameters",
    "status",
]
COUNTS = ["n", "n_train", "parameters"]


def systems_frame(systems: pd.DataFrame, frame: pd.DataFrame) -> pd.DataFrame:
    """Every reported system, measured or not, then every experiment that has no source.

    Args:
        systems: columns study, system, reported_accuracy (0..1), reported_on, experiment
            (`notebook/experiment`) and needs (what running it takes that a clone lacks, or empty).
        frame: as `reports.comparison_frame` gives it; a quick experiment (`…-quick`) stands for
            its full one.

    Returns:
        COLUMNS, indexed by experiment; accuracies in percent, `measured` on test with its 95 %
        interval over n seeds, `with_tta` with test-time augmentation; `status` says measured, or
        why not.
    """
    measured = frame.assign(
        experiment=frame["notebook"] + "/" + frame["experiment"].str.removesuffix("-quick"),
        measured=100 * frame["test_accuracy"],
        low=100 * frame["low"],
        high=100 * frame["high"],
        with_tta=100 * frame["test_accuracy_tta"],
        hours_a_seed=frame["train_seconds"] / 3600,
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
