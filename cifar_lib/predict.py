"""A run's model on pictures from outside: any size and mode, labelled or not."""

import json
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from cifar_lib.data_sources import to_rgb
from cifar_lib.evaluate import predict_logits, top_k_accuracy
from cifar_lib.evaluate_classes import SCORES, class_scores
from cifar_lib.execution import choose_evaluation
from cifar_lib.files import writable
from cifar_lib.models import STORED_SIZE, build_model
from cifar_lib.results import WEIGHTS, Run, load_run, load_state

Score = tuple[dict[str, float], pd.DataFrame]
FORMATS = ("table", "csv", "json")
# Of all that Pillow opens; EPS, for one, would be handed to another program.
PICTURES = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
SHIPPED = Path(__file__).with_name("shipped")
"""A finished run with its weights in half precision, small enough for the repository."""
MAX_PIXELS = 110_000_000  # what the largest cameras take
"""A larger picture is refused before it is decoded: a small file can unpack to gigabytes."""


def find_images(paths: Iterable[Path], class_names: Sequence[str]) -> list[tuple[Path, str | None]]:
    """Lists files, and the files in folders, each with its class where its folder names one.

    Args:
        paths: files or folders; a folder is searched all the way down, hidden files left out; a
            file that is met twice counts once.
        class_names: of the model; a file is labelled by the nearest folder around it, inside the
            path that was given or that path itself, that has such a name, in capitals or not.

    Returns:
        Paths in name order within a folder, with the class or None.

    Raises:
        ValueError: a path does not exist, or there is no file at all.
    """
    found: dict[Path, tuple[Path, str | None]] = {}
    known = {name.casefold(): name for name in class_names}
    for path in paths:
        if not path.exists():
            raise ValueError(f"{path}: no such file or folder")
        root = Path(os.path.abspath(path))
        for file in _files_below(path) if path.is_dir() else [path]:
            place = Path(os.path.abspath(file))
            around = (f.name.casefold() for f in place.parents if f.is_relative_to(root))
            label = next(filter(None, map(known.get, around)), None)
            if label or place not in found:  # named alone before, it was without one
                found[place] = (file, label)
    if not found:
        raise ValueError(f"no file in {', '.join(map(str, paths))}")
    return list(found.values())


def _files_below(folder: Path) -> list[Path]:
    """The files below a folder, behind links to folders too (each but once), none hidden."""
    seen, files = {os.path.realpath(folder)}, []
    # A folder that can not be read stands as a file, which then says why it can not be either.
    for where, folders, names in os.walk(
        folder, followlinks=True, onerror=lambda error: files.append(Path(error.filename))
    ):
        # Of two ways to the same folder the first by name stays.
        real = {os.path.realpath(Path(where, n)): n for n in sorted(folders)[::-1] if n[0] != "."}
        folders[:] = [name for path, name in real.items() if path not in seen]
        seen |= real.keys()
        files.extend(Path(where, name) for name in names if name[0] != ".")
    return sorted(files)


def read_image(path: Path) -> Tensor:
    """Reads a picture as the networks see one.

    Turned as its EXIF record says; transparency laid on white; any mode made RGB; the largest
    centred square resized to 32×32 with antialiasing.

    Returns:
        uint8 (3, 32, 32).

    Raises:
        ValueError: not a picture, cut short, or more than MAX_PIXELS; one line with the path.
    """
    try:
        if path.is_fifo():
            raise ValueError("a named pipe, which may never end")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of size and of broken records: see below
            with Image.open(path, formats=PICTURES) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise ValueError(f"{width}×{height} pixels, at most {MAX_PIXELS:,} are read")
                if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
                    raise ValueError("32-bit pixels of unknown range; save it with 8 bits")
                upright = ImageOps.exif_transpose(image)
                square = ImageOps.fit(
                    to_rgb(upright), (STORED_SIZE, STORED_SIZE), Image.Resampling.BICUBIC
                )
    except Image.UnidentifiedImageError:
        raise ValueError(f"{path}: not a picture of {', '.join(PICTURES)}") from None
    except Exception as error:  # on damaged files every decoder has exceptions of its own
        said = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ValueError(f"{path}: {said or 'broken picture'}") from None
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous()


def find_run(name: str | Path) -> Run:
    """Loads the run of a folder, or with the word `shipped` the model that comes with the project.

    Raises:
        ValueError: it is not the folder of a finished run.
    """
    return load_run(SHIPPED if str(name) == SHIPPED.name else name)


def load_model(run: Run) -> tuple[nn.Module, Tensor, Tensor]:
    """Builds a run's network with its weights, in fp32, on the device that is to be had.

    Returns:
        The network, and mean and standard deviation (3,) of its training images, over 0..1.

    Raises:
        ValueError: the weights do not fit the run's model.
    """
    model = build_model(run.config, len(run.summary["class_names"]))
    load_state(model, run.weights, run.path / WEIGHTS)
    mean, std = (torch.tensor(run.summary["normalization"][name]) for name in ("mean", "std"))
    return model.to(choose_evaluation(run.config).device), mean, std


def predictor(run: Run, *, tta: bool = False) -> Callable[[Tensor], Tensor]:
    """Loads a run's weights once and answers for any images.

    Args:
        run: a finished run.
        tta: whether with the run's test-time augmentation.

    Returns:
        A function: uint8 (N, 3, 32, 32), 0..255 → logits, float32 (N, K), on the CPU.

    Raises:
        ValueError: the weights do not fit the run's model.
    """
    model, mean, std = load_model(run)
    return partial(
        predict_logits,
        model,
        mean=mean,
        std=std,
        batch_size=run.config.eval_batch_size,
        dtype=choose_evaluation(run.config).autocast_dtype,
        channels_last=run.config.channels_last,
        tta=run.config.tta if tta else "none",
    )


def predictions_frame(
    files: Sequence[tuple[Path, str | None]],
    probabilities: Tensor,
    class_names: Sequence[str],
    top: int = 5,
) -> pd.DataFrame:
    """One row a picture: path, label, and the `top` classes with their probabilities (0..1)."""
    values, order = probabilities.topk(min(top, len(class_names)), dim=1)
    rows = []
    for (path, label), row_values, row_order in zip(files, values, order, strict=True):
        row: dict[str, object] = {"path": writable(path), "label": label}
        for rank, (value, k) in enumerate(zip(row_values, row_order, strict=True), 1):
            row[f"class_{rank}"] = class_names[int(k)]
            row[f"probability_{rank}"] = round(float(value), 4)
        rows.append(row)
    return pd.DataFrame(rows)


def score(
    files: Sequence[tuple[Path, str | None]], probabilities: Tensor, class_names: Sequence[str]
) -> Score | None:
    """Accuracy on the labelled pictures.

    Returns:
        n, top1 and top5 (0..1), and the table of `evaluate_classes.class_scores`, the classes that
        occur; None where no picture has a label.
    """
    labelled = [i for i, (_, label) in enumerate(files) if label is not None]
    if not labelled:
        return None
    labels = torch.tensor([class_names.index(str(files[i][1])) for i in labelled])
    logits = probabilities[labelled].log()
    table = class_scores([logits], labels, class_names)
    totals = {
        "n": len(labelled),
        "top1": top_k_accuracy(logits, labels, 1),
        "top5": top_k_accuracy(logits, labels, min(5, len(class_names))),
    }
    return totals, table[table["n"] > 0]


def render(frame: pd.DataFrame, score: Score | None, form: str) -> str:
    """Writes predictions out, and what `score` says of them.

    Args:
        frame: as `predictions_frame` returns it.
        score: as `score` returns it.
        form: `table` for eyes; `csv`, the predictions alone; or `json`, an object with
            `predictions`, `score` (null without labels) and `per_class`.
    """
    if form == "csv":
        return frame.to_csv(index=False).rstrip()
    totals, table = score or (None, frame[:0])
    if form == "json":
        frames = {"predictions": frame, "per_class": table}
        tables = {name: json.loads(f.to_json(orient="records")) for name, f in frames.items()}
        return json.dumps({"score": totals, **tables}, indent=2, ensure_ascii=False)
    lines = [frame.dropna(axis=1, how="all").fillna("").to_string(index=False)]
    if totals:
        top1, top5 = (f"{100 * totals[key]:.2f} %" for key in ("top1", "top5"))
        lines += ["", f"{totals['n']} labelled: top-1 {top1}, top-5 {top5}"]
        lines += [
            table[["class_name", "n", *SCORES, "recall_low", "recall_high"]]
            .round(4)
            .to_string(index=False)
        ]
    return "\n".join(lines)
