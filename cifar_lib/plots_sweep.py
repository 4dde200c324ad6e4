"""Charts of a sweep: runs of many variants, tidy, in; a matplotlib Figure (a `Chart`) out.

Every run is drawn, and beside them their mean with its interval: three points show what a bar
would hide. Accuracies in 0..1, losses in nats.
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from cifar_lib.plots import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    Chart,
    caption,
    new_figure,
    seed_curves,
)

COLORS = (GREY, BLUE, ORANGE, GREEN, PURPLE, "#56B4E9", "#E69F00")


def run_points(frame: pd.DataFrame, table: pd.DataFrame, *, caption_text: str = "") -> Chart:
    """Draws every run, and beside it what its recipe is worth, with the intervals.

    On the left each run and each recipe's mean; on the right the differences by seed, where seeds
    are shared, their mean and the two intervals of `compare_recipes`. A verdict rests on the right
    side: two recipes whose runs lie apart by seed may well overlap on the left.

    Args:
        frame: a row a run: variant, seed and val_accuracy, 0..1.
        table: what `compare_recipes` says of it; a row of the figure each, in this order.
        caption_text: see `caption`; what the bars are is added where there are any.
    """
    names = [str(name) for name in table.index]
    figure, (left, right) = new_figure(0.36 * len(names) + 1.0, columns=2)
    right.sharey(left)
    values = frame.pivot(index="variant", columns="seed", values="val_accuracy").astype(float)
    several = bool((table["n"] > 1).any())  # else each run is its own mean
    for row, recipe in enumerate(table.reset_index().to_dict("records")):
        of = values.loc[recipe["variant"]]
        drawn = [(left, of, recipe["mean"])]
        if not pd.isna(recipe["worth"]):
            by_seed = of - values.loc[recipe["against"]]
            drawn.append((right, 100 * by_seed, 100 * recipe["worth"]))
        for ax, points, mean in drawn:
            points = points.dropna()
            ax.plot(points, np.full(len(points), row), "o", color=GREY, alpha=0.6, markersize=4)
            if several:
                ax.plot(mean, row + 0.22, "D", color=BLUE, markersize=5)
        for ends, color, width in (("worth", BLUE, 2), ("pooled", ORANGE, 1)):
            low, high = 100 * recipe[f"{ends}_low"], 100 * recipe[f"{ends}_high"]
            if not pd.isna(low):
                y = row + (0.22 if ends == "worth" else 0.38)
                right.hlines(y, low, high, color=color, linewidth=width)
    right.axvline(0, color=GREY, linewidth=1, zorder=1)
    left.set_yticks(range(len(names)), [name.replace(",", ",\n") for name in names])
    right.tick_params(labelleft=False)
    left.set_ylim(len(names) - 0.4, -0.5)
    percent = FuncFormatter(lambda accuracy, _: f"{100 * accuracy:.4g} %")
    left.xaxis.set(major_locator=MaxNLocator(4), major_formatter=percent)
    left.set_xlabel("validation accuracy")
    against = table["against"].dropna().unique()
    to = str(against[0]).replace(",", ",\n") if len(against) == 1 else "its reference"
    right.set_xlabel(f"difference to {to} (points)")
    if several:
        caption_text += (
            " Grey: each run, and each difference by seed; blue: mean, and the 95 % interval of "
            "the difference from these runs alone, on which the verdict rests; orange: with the "
            "SD pooled over all variants."
        )
    else:
        caption_text += " One run each: no interval."
    return caption(figure, caption_text)


def curves_by_panel(
    metrics: pd.DataFrame,
    columns: Mapping[str, str],
    *,
    ylabel: str,
    caption_text: str = "",
) -> Chart:
    """Draws quantities by epoch in small multiples: a thin line a seed, a thick mean.

    Args:
        metrics: a row an epoch: panel (an axes each), line (a colour each, the same in all
            panels), seed, epoch and the columns drawn.
        columns: column → line style of matplotlib, as "-" or "--"; what was measured nowhere is
            left out.
        ylabel: what they are, with the unit.
        caption_text: see `caption`; what thin and thick are is added where seeds are several.
    """
    panels, lines = metrics["panel"].unique(), metrics["line"].unique()
    measured = {column: style for column, style in columns.items() if column in metrics}
    across = min(len(panels), 3)
    down = -(-len(panels) // across)
    figure, axes = new_figure(2.8 * down + 0.4, rows=down, columns=across)
    colors = {name: COLORS[i % len(COLORS)] for i, name in enumerate(lines)}
    for ax, panel in zip(axes, panels, strict=False):
        ax.sharey(axes[0])
        for name, part in metrics[metrics["panel"] == panel].groupby("line", sort=False):
            for column, style in measured.items():
                by_seed, mean = seed_curves(part, column)
                for y, width, alpha in ((by_seed, 0.7, 0.4), (mean, 2, 1)):
                    for line in ax.plot(by_seed.index, y, style, linewidth=width, alpha=alpha):
                        line.set_color(colors[name])
        ax.set_title(str(panel), loc="left", fontsize=10)
        ax.set_xlabel("epoch")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    axes[0].set_ylabel(ylabel)
    named = [Line2D([], [], color=colors[name], linewidth=2, label=name) for name in lines]
    figure.legend(
        handles=named, fontsize=9, frameon=False, ncols=min(len(lines), 5), loc="outside upper left"
    )
    if metrics["seed"].nunique() > 1:
        caption_text += " Thin: a seed; thick: their mean."
    return caption(figure, caption_text)
