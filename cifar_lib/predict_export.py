"""A finished run made small enough to come with the project, and its model card."""

import shutil
from pathlib import Path

from safetensors.torch import save

from cifar_lib.files import beside, replace_folder, write_atomic
from cifar_lib.predict import load_model
from cifar_lib.results import (
    CONFIG,
    METRICS,
    SUMMARY,
    WEIGHTS,
    Run,
    alone,
    load_run,
    save_config,
    save_summary,
)

MAX_BYTES = 2_000_000
CARD = "README.md"
_EXPORTED = {CONFIG, METRICS, WEIGHTS, SUMMARY, CARD}


def export_run(run: Run, folder: Path) -> Run:
    """Copies a run into a folder, its matrices and filters in half precision, with a model card.

    What is a vector (biases, batch norm's scales and statistics) stays in fp32: it is small, and
    a variance may not fit half precision's range. The folder is that of a finished run again;
    a former export there is replaced once the new one is whole, and nothing else ever is.

    Args:
        run: a finished run.
        folder: where to.

    Returns:
        The run in its new place; its summary is that of the run as it was trained.

    Raises:
        ValueError: the weights are larger than `MAX_BYTES` even so, beyond half precision or not
            the model's; or the folder is the run itself or holds something else.
    """
    folder = folder.resolve()
    if folder == run.path.resolve():
        raise ValueError(f"{folder}: is the run itself; name another folder")
    if folder.exists() and {p.name for p in folder.iterdir()} not in (set(), _EXPORTED):
        raise ValueError(f"{folder}: holds something else; name a new or empty folder")
    load_model(run)  # weights that do not fit are refused here
    weights = {k: v.half() if v.ndim > 1 else v for k, v in run.weights.items()}
    if beyond := [k for k, v in weights.items() if not bool(v.isfinite().all())]:
        raise ValueError(f"{run.path}: {beyond[0]} has values beyond half precision")
    content = save(weights)
    if len(content) > MAX_BYTES:
        raise ValueError(
            f"{run.path}: {len(content):,} bytes in half precision; allowed is {MAX_BYTES:,}"
        )
    try:
        card = model_card(run)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{run.path}: broken run record: {error!r}") from None
    new = beside(folder, "new")
    shutil.rmtree(new, ignore_errors=True)  # what a killed export left
    try:
        write_atomic(new / WEIGHTS, content)
        write_atomic(new / METRICS, (run.path / METRICS).read_bytes())
        save_config(new, run.config.model_copy(update={"data_dir": None}))
        write_atomic(new / CARD, card.encode())
        save_summary(new, run.summary)
        replace_folder(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return load_run(folder)


def model_card(run: Run) -> str:
    """Says in Markdown what a shipped model is, how it was trained and what it reaches."""
    summary, config, result = run.summary, run.config, run.summary["result"]
    data, model, hardware = summary["dataset"], summary["model"], summary["hardware"]
    copy = ", a copy stored as JPEG" if data["lossy"] else ""
    tta = result["test_accuracy_tta"]
    measured = {
        "test accuracy, one view": result["test_accuracy"],
        f"test accuracy, test-time augmentation `{config.tta}`": tta,
        "validation accuracy": result["val_accuracy"],
    }
    bound = "" if alone(result) else "at most "
    chosen = f"the best epoch on {data['n_val']:,} validation images"
    if not data["n_val"]:
        chosen = "the last epoch, without validation"
    rows = [f"| {k} | {100 * v:.2f} % |" for k, v in measured.items() if v is not None]
    return f"""# The model that comes with the project

One run of `{model["name"]}`, {model["parameters"]:,} parameters, written by
`python -m cifar_lib export`: filters and matrices in half precision, the rest in fp32.

| measured before the rounding | |
|---|---|
{chr(10).join(rows)}

- **Trained** on {data["n_train"]:,} images of {data["name"]} ({data["source"]}{copy}):
  seed {run.seed}, {result["epochs"]} epochs of {config.optimizer},
  {bound}{result["train_seconds"]:.0f} s on {hardware["name"]}, {hardware["precision"]}.
  Every setting is in `config.yaml`, every epoch in `{METRICS}`, the rest in `{SUMMARY}`.
- **Chosen**: the weights of {chosen}.
  The {data["n_test"]:,} test images chose no weights.
- **Knows** {", ".join(summary["class_names"])}.
  A picture of anything else gets one of these names too, often with a high probability.
- **Is sure** as training made it: with label smoothing {config.label_smoothing:g} here. Its
  probabilities rank its answers; how often they are right, and what noise, blur and the like do
  to them, is in the report of its experiment.
- **Sees** the largest centred square of a picture, resized to 32×32 pixels.
- **Try it** with `python -m cifar_lib predict shipped PHOTO`; measure it as rounded with
  `python -m cifar_lib evaluate shipped`.
"""
