"""One finished run, saved and loaded; many runs as one tidy DataFrame."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from cifar_lib.config import TrainConfig, config_of
from cifar_lib.config_yaml import read_yaml
from cifar_lib.execution import OtherLoad
from cifar_lib.files import write_atomic, write_json

METRIC_COLUMNS = [
    "seed",
    "epoch",
    "learning_rate",
    "train_loss",
    "train_accuracy",
    "val_loss",
    "val_accuracy",
    "seconds",
]
CLEAN_COLUMNS = ["clean_train_loss", "clean_train_accuracy"]
"""Measured where the configuration asks for it (`measure_train`); after METRIC_COLUMNS."""
CONFIG, METRICS, WEIGHTS, LOGITS, SUMMARY = (
    "config.yaml",
    "metrics.csv",
    "best.safetensors",
    "logits.safetensors",
    "summary.json",
)


_A_RUN = "a folder like runs/EXPERIMENT/SEED-FINGERPRINT"
_AGAIN = "train the run again with --force"


@dataclass(frozen=True)
class Run:
    """A finished run: what it was, its history and what it reached.

    `metrics` has METRIC_COLUMNS and maybe CLEAN_COLUMNS, a row an epoch, accuracies in 0..1,
    seconds an epoch with what is measured after it. `summary` holds `seed`, `result` (one row of
    a report's `runs`), `dataset`, `model`, `hardware`, `environment`, `class_names` and where the
    code came from.
    """

    path: Path
    config: TrainConfig
    seed: int
    metrics: pd.DataFrame
    summary: dict[str, Any]

    @property
    def test_logits(self) -> Tensor:
        """Logits of the test images without test-time augmentation, float32 (N, K)."""
        logits = _load_tensors(self.path / LOGITS)
        if "test" not in logits:
            raise ValueError(f"{self.path / LOGITS}: holds no test logits; {_AGAIN}")
        return logits["test"]

    @property
    def test_logits_tta(self) -> Tensor | None:
        """The same with test-time augmentation; None where the configuration has none."""
        return _load_tensors(self.path / LOGITS).get("test_tta")

    @property
    def weights(self) -> dict[str, Tensor]:
        """The state dict of the epoch that validation chose."""
        return load_weights(self.path)


def load_weights(run_dir: Path) -> dict[str, Tensor]:
    """Loads the state dict saved in a run's folder, on the CPU.

    Raises:
        ValueError: the file is damaged; names it.
    """
    return _load_tensors(run_dir / WEIGHTS)


def _load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged ({error}); {_AGAIN}") from None


def run_folder(root: Path, experiment: str, seed: int, fingerprint: str) -> Path:
    """The folder of one run: `<root>/<experiment>/<seed>-<fingerprint>`."""
    return root / experiment / f"{seed}-{fingerprint}"


def save_weights(run_dir: Path, state: dict[str, Tensor], epoch: int = 0) -> None:
    """Saves a state dict as safetensors, atomically, with the epoch (from 1) that it is of."""
    content = {k: v.detach().contiguous() for k, v in state.items()}
    write_atomic(run_dir / WEIGHTS, save(content, metadata={"epoch": str(epoch)}))


def epoch_of_weights(run_dir: Path) -> int | None:
    """The epoch that a run's saved weights are of; None where that is not to be told."""
    try:
        with safe_open(run_dir / WEIGHTS, "pt") as file:
            return int((file.metadata() or {})["epoch"])
    except (OSError, SafetensorError, KeyError, ValueError):
        return None


def save_logits(run_dir: Path, logits: dict[str, Tensor]) -> None:
    """Saves logits by name (`test`, `test_tta`), float32 (N, K)."""
    write_atomic(run_dir / LOGITS, save({k: v.float().contiguous() for k, v in logits.items()}))


def save_config(run_dir: Path, config: TrainConfig) -> None:
    """Writes the configuration of a run as YAML, every field."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    write_atomic(run_dir / CONFIG, text.encode())


def save_metrics(run_dir: Path, rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Writes the history of a run as CSV; returns it as a DataFrame."""
    frame = _ordered(pd.DataFrame(rows))
    write_atomic(run_dir / METRICS, frame.to_csv(index=False).encode())
    return frame


def save_summary(run_dir: Path, summary: dict[str, Any]) -> None:
    """Writes the summary of a run; its presence marks the run as finished, so it comes last."""
    write_json(run_dir / SUMMARY, summary)


def is_finished(run_dir: Path) -> bool:
    """Whether a run ended and left everything that `load_run` needs."""
    return all((run_dir / name).is_file() for name in (CONFIG, METRICS, WEIGHTS, LOGITS, SUMMARY))


def load_run(run_dir: str | Path) -> Run:
    """Loads a finished run.

    Raises:
        ValueError: the folder is not that of a finished run, or a file in it is broken.
    """
    run_dir = Path(run_dir)
    missing = [n for n in (CONFIG, METRICS, WEIGHTS, SUMMARY) if not (run_dir / n).is_file()]
    if missing:
        inside = sorted(path.parent.name for path in run_dir.glob(f"*/{SUMMARY}"))
        raise ValueError(
            f"{run_dir}: not a finished run, {', '.join(missing)} missing; name "
            + (f"one of those in it: {', '.join(inside[:5])}" if inside else _A_RUN)
        )
    try:
        summary = json.loads((run_dir / SUMMARY).read_text(encoding="utf-8"))
        metrics = pd.read_csv(run_dir / METRICS)
        # A field that was deleted since said nothing of the network: its weights are checked.
        config = config_of(read_yaml(run_dir / CONFIG))
        _check(summary)
        return Run(run_dir, config, int(summary["seed"]), metrics, summary)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{run_dir}: broken run record: {error}; {_AGAIN}") from None


def _check(summary: dict[str, Any]) -> None:
    """Refuses a summary without what evaluation and prediction build on."""
    names, statistics = summary["class_names"], summary["normalization"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"class_names: got {names!r:.80}; allowed is a list of names")
    for key in ("mean", "std"):
        if not (values := statistics[key]) or [type(v) for v in values] != 3 * [float]:
            raise ValueError(f"normalization {key}: got {values!r:.80}; allowed are three floats")
        if not all(math.isfinite(v) and (key == "mean" or v > 0) for v in values):
            raise ValueError(f"normalization {key}: got {values!r:.80}; nothing can be seen so")
    for key in ("test_accuracy", "test_loss"):
        if type(value := summary["result"][key]) is not float or not math.isfinite(value):
            raise ValueError(f"{key}: got {value!r:.80}; allowed is a finite number")
    _ = summary["result"]["seed"], summary["dataset"]["sha256"], summary["dataset"]["name"]


def alone(result: dict[str, Any]) -> bool:
    """Whether a run's `result` tells times of its own: it had one machine to itself."""
    return (
        float(result.get("other_load", 0.0)) <= OtherLoad.NEGLIGIBLE
        and result.get("machines", 1) == 1
    )


def metrics_frame(runs: list[Run]) -> pd.DataFrame:
    """The histories of many runs in one tidy DataFrame, METRIC_COLUMNS and maybe CLEAN_COLUMNS."""
    return _ordered(pd.concat([run.metrics for run in runs], ignore_index=True))


def _ordered(frame: pd.DataFrame) -> pd.DataFrame:
    """The contracted columns, then what else was measured."""
    return frame[METRIC_COLUMNS + [name for name in CLEAN_COLUMNS if name in frame]]


def results_frame(runs: list[Run]) -> pd.DataFrame:
    """What many runs reached: a row a run, the columns of a report's `runs`."""
    return pd.DataFrame([run.summary["result"] for run in runs])


def load_state(model: torch.nn.Module, state: dict[str, Tensor], origin: str | Path) -> None:
    """Loads weights into a model, in place.

    Args:
        model: the network.
        state: its state dict, every name.
        origin: where the weights came from, for the message.

    Raises:
        ValueError: names or shapes differ from the model's.
    """
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        first = str(error).strip().splitlines()[1:2] or [str(error)]
        raise ValueError(
            f"{origin}: these weights do not fit the model: {first[0].strip()}"
        ) from None
