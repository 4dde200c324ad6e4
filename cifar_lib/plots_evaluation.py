"""Charts of a careful evaluation: tables of the `evaluate_*` files in, a `Chart` out."""

from collections.abc import Mapping

import matplotlib as mpl
import numpy as np
import pandas as pd
import torch
from torch import Tensor

from cifar_lib.plots import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PERCENT,
    PURPLE,
    Chart,
    caption,
    new_figure,
)

COLORS = (BLUE, ORANGE, GREEN, PURPLE, "#E69F00", "#56B4E9", GREY)


def reliability_diagram(tables: Mapping[str, pd.DataFrame], *, caption_text: str = "") -> Chart:
    """Draws accuracy by confidence with 95 % intervals, a panel each; below, where images lie.

    On the dashed line probabilities mean what they say; below it the model is too sure of itself.

    Args:
        tables: title → as `evaluate_calibration.reliability_frame` returns it.
        caption_text: see `plots.caption`.
    """
    figure, axes = new_figure(4.3, columns=len(tables))
    for ax, (title, table) in zip(axes, tables.items(), strict=True):
        ax.plot([0, 1], [0, 1], "--", color=GREY, linewidth=1)
        bars = ax.bar(table.confidence, table.n / table.n.sum(), width=0.04, color="#cccccc")
        bars.set_label("share of the images")
        errors = [table.accuracy - table.low, table.high - table.accuracy]
        points = ax.errorbar(table.confidence, table.accuracy, np.abs(errors), fmt="o", color=BLUE)
        points.set_label("accuracy, 95 % interval")
        ax.set(title=title, xlabel="confidence", xlim=(0, 1.02), ylim=(0, 1.02), aspect="equal")
        ax.xaxis.set_major_formatter(PERCENT)
        ax.yaxis.set_major_formatter(PERCENT)
    axes[0].set_ylabel("accuracy; share of the images")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, fontsize=9, frameon=False, ncols=2, loc="outside upper left")
    return caption(figure, caption_text)


def corruption_curves(tables: Mapping[str, pd.DataFrame], *, caption_text: str = "") -> Chart:
    """Draws accuracy by severity, a panel a corruption and one for their mean, a line a system.

    The lines are means over seeds; bars reach from the lowest seed to the highest. The last
    system is the report's own and lies on top, black and thick.

    Args:
        tables: name of the system → rows as `evaluate_robustness.corruption_frame` returns them,
            of one seed or, with a column seed, of several.
        caption_text: see `plots.caption`.
    """
    names = [n for n in dict.fromkeys(next(iter(tables.values())).corruption) if n != "none"]
    figure, axes = new_figure(5.6, 2, -(-(len(names) + 1) // 2))
    for i, (system, table) in enumerate(tables.items()):
        rows = table.assign(seed=table.get("seed", 0))
        clean = rows[rows.corruption == "none"]
        corrupted = rows[rows.corruption != "none"]
        label = f"{system}, n = {rows.seed.nunique()}"
        color, style, width = COLORS[i % len(COLORS)], "-" if i < len(COLORS) else "--", 1.2
        if i == len(tables) - 1:
            color, style, width = "black", "-", 2.5
        for ax, name in zip(axes, [*names, "mean of all"], strict=False):
            chosen = corrupted if name == "mean of all" else corrupted[corrupted.corruption == name]
            by_seed = pd.concat([clean, chosen]).groupby(["severity", "seed"]).accuracy.mean()
            spread = by_seed.groupby("severity").agg(["mean", "min", "max"])
            errors = [spread["mean"] - spread["min"], spread["max"] - spread["mean"]]
            ax.errorbar(spread.index, spread["mean"], np.abs(errors), color=color, label=label)
            ax.lines[-1].set(marker="o", markersize=4, linestyle=style, linewidth=width)
            ax.set_title(name.replace("_", " ").replace("jpeg", "JPEG"), fontsize=10)
    for ax in axes:
        ax.set(ylim=(np.floor(10 * ax.dataLim.y0) / 10, 1), xticks=range(6))
        ax.yaxis.set_major_formatter(PERCENT)
    axes[0].set_ylabel("test accuracy, each on its scale")
    for ax in axes[len(axes) // 2 :]:
        ax.set_xlabel("severity, 0 is clean")
    handles, systems = axes[0].get_legend_handles_labels()
    figure.legend(handles, systems, fontsize=9, frameon=False, ncols=3, loc="outside upper left")
    return caption(figure, caption_text)


def class_score_dots(scores: pd.DataFrame, *, caption_text: str = "") -> Chart:
    """Draws precision, recall and F1 of each class with their intervals, a panel each.

    Args:
        scores: as `evaluate_classes.class_scores` returns it.
        caption_text: see `plots.caption`.
    """
    figure, axes = new_figure(0.3 * len(scores) + 0.9, columns=3)
    rows = np.arange(len(scores))
    for ax, name, color in zip(axes, ("precision", "recall", "f1"), COLORS, strict=False):
        value, low, high = (scores[name + end] for end in ("", "_low", "_high"))
        errors = np.abs([value - low, high - value])
        ax.errorbar(value, rows, xerr=errors, fmt="o", color=color, clip_on=False)
        ax.set_title(name.replace("f1", "F1"), fontsize=10)
        ax.set_yticks(rows, scores["class_name"] if ax is axes[0] else [""] * len(scores))
        ax.set_ylim(len(rows) - 0.5, -0.5)
        ax.set_xlim(left=min(scores.filter(like="_low").min()) - 0.02, right=1)
        ax.xaxis.set_major_formatter(PERCENT)
    return caption(figure, caption_text)


def overlay(images: Tensor, maps: Tensor) -> Tensor:
    """Lays saliency over pictures made grey, for `plots_images.example_grid`.

    Args:
        images: uint8 (N, 3, H, W), 0..255.
        maps: float (N, H, W), 0..1, as `evaluate_saliency.hires_cam` returns them.

    Returns:
        float (N, 3, H, W), 0..1; dark where there is no evidence, bright where there is most.
    """
    grey = images.float().mean(dim=1, keepdim=True) / 255
    heat = torch.from_numpy(mpl.colormaps["inferno"](maps.numpy())[..., :3]).float()
    return 0.35 * grey + 0.65 * heat.permute(0, 3, 1, 2)
