"""Published runs: of each seed in a report its figures, so that nobody has to train it again."""

from pathlib import Path

import pandas as pd

from cifar_lib.config import ROOT, TrainConfig, parse_config
from cifar_lib.reports import read_summaries
from cifar_lib.results import Run


def published_runs(reports_dir: str | Path = "reports/full") -> dict[str, Run]:
    """Reads every run of the reports below a folder, those of a sweep's variants too.

    A run found so has its configuration, history and figures; neither weights nor logits, for its
    `path` is the report's folder. Of its hardware only what the report names is known.

    Args:
        reports_dir: from the root of the checkout; may be missing.

    Returns:
        By the name that the folder of such a run has, `<seed>-<config fingerprint>`.

    Raises:
        ValueError: a summary or its history is broken; names the file.
    """
    found: dict[str, Run] = {}
    for summary in read_summaries(reports_dir, variants=True):
        if not summary["runs"]:
            continue
        path = ROOT / reports_dir / summary["path"]
        try:
            # A field that was deleted since leaves a fingerprint that nobody asks for.
            known = summary["config"].keys() & TrainConfig.model_fields.keys()
            config = parse_config({key: summary["config"][key] for key in known})
            history = dict(tuple(pd.read_csv(path / "metrics.csv").groupby("seed")))
            for result in summary["runs"]:
                name = f"{result['seed']}-{summary['config_fingerprint']}"
                facts = summary | result | {"result": result}
                found[name] = Run(path, config, result["seed"], history[result["seed"]], facts)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: broken report: {type(error).__name__}: {error}; run its notebook again"
            ) from None
    return found
