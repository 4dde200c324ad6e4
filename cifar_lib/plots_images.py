"""Grids of pictures: uint8 images in, a matplotlib Figure (a `Chart`) out.

Images are uint8 0..255 or float 0..1, (N, 3, H, W), tensors or arrays. Augmented images that are
to be shown come out of `augment.augment_batch` in 0..1 with mean 0 and std 1.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from torch import Tensor

from cifar_lib.plots import WIDTH, Chart, caption, new_figure

Images = Tensor | npt.NDArray[Any]


def example_grid(
    images: Images,
    labels: npt.ArrayLike,
    class_names: Sequence[str],
    augmented: Sequence[Images] = (),
    *,
    row_names: Sequence[str] | None = None,
    per_band: int = 8,
    caption_text: str = "",
) -> Chart:
    """Shows images, each with its augmentations below it, in bands.

    Args:
        images: the originals, (N, 3, H, W).
        labels: int (N,).
        class_names: K names.
        augmented: any number of further (N, 3, H, W), in the same order.
        row_names: what the originals and each of `augmented` are; by default "original",
            "draw 1", "draw 2", ….
        per_band: images side by side.
        caption_text: see `plots.caption`.
    """
    sets = [to_pixels(images), *(to_pixels(a) for a in augmented)]
    names = row_names or ["original", *(f"draw {i + 1}" for i in range(len(augmented)))]
    truth = np.asarray(labels)
    bands = -(-len(truth) // per_band)
    cell = (WIDTH - 0.9) / per_band  # inches; the names of the rows take the rest
    height = bands * (len(sets) * cell + 0.3)
    figure, axes = new_figure(height, bands * len(sets), per_band)
    for position, ax in enumerate(axes):
        row, column = divmod(position, per_band)
        band, kind = divmod(row, len(sets))
        index = band * per_band + column
        picture = sets[kind][index] if index < len(truth) else None
        show(ax, picture, class_names[truth[index]] if picture is not None and kind == 0 else "")
        if column == 0 and len(sets) > 1:
            ax.set_ylabel(names[kind], fontsize=9, rotation=0, ha="right", va="center")
    return caption(figure, caption_text)


def mistakes_grid(
    images: Images,
    labels: npt.ArrayLike,
    probabilities: npt.ArrayLike,
    class_names: Sequence[str],
    n: int = 18,
    *,
    caption_text: str = "",
) -> Chart:
    """Shows the wrong predictions of which the model was surest, surest first.

    Args:
        images: (N, 3, H, W).
        labels: int (N,).
        probabilities: float (N, K), 0..1.
        class_names: K names.
        n: show at most this many.
        caption_text: see `plots.caption`.
    """
    truth, p = np.asarray(labels), np.asarray(probabilities)
    predicted, confidence = p.argmax(axis=1), p.max(axis=1)
    wrong = np.flatnonzero(predicted != truth)
    wrong = wrong[np.argsort(-confidence[wrong], kind="stable")][:n]
    columns = 6
    rows = max(1, -(-len(wrong) // columns))
    figure, axes = new_figure(rows * (WIDTH / columns + 0.6) + 0.25, rows, columns)
    pictures = to_pixels(images[wrong]) if len(wrong) else ()
    for position, ax in enumerate(axes):
        if position >= len(wrong):
            show(ax, None)
            continue
        i = wrong[position]
        title = (
            f"{class_names[truth[i]]}\ncalled {class_names[predicted[i]]}\n"
            f"{100 * confidence[i]:.2f} %"
        )
        show(ax, pictures[position], title)
    if not len(wrong):
        axes[0].set_title("no mistakes", fontsize=9, loc="left")
    return caption(figure, caption_text)


def show(ax: Axes, picture: npt.NDArray[np.uint8] | None, title: str = "") -> None:
    """Draws one picture (H, W, 3) without ticks, its pixels as squares; None leaves a gap."""
    ax.grid(visible=False)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    if picture is not None:
        ax.imshow(picture, interpolation="nearest")
    ax.set_title(title, fontsize=9, pad=3)


def to_pixels(images: Images) -> npt.NDArray[np.uint8]:
    """Turns (N, 3, H, W), uint8 or float 0..1, into uint8 (N, H, W, 3) for matplotlib.

    Raises:
        ValueError: not four dimensions with three channels.
    """
    tensor = torch.as_tensor(images).detach().cpu()
    if tensor.ndim != 4 or tensor.shape[1] != 3:
        raise ValueError(f"images: got shape {tuple(tensor.shape)}; allowed is (N, 3, H, W)")
    if tensor.is_floating_point():
        tensor = (tensor.float().clamp(0, 1) * 255).round().to(torch.uint8)
    return tensor.permute(0, 2, 3, 1).contiguous().numpy()
