"""Charts of a sweep: runs of many variants, tidy, in; a matplotlib Figure (a `Chart`) out.

Every run is drawn, and beside them their mean with its interval: three points show what a bar
would hide. Accuracies in 0..1, losses in nats.
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from cifar_lib.evaluate import mean_interval
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


def run_points(frame: pd.DataFrame, *, caption_text: str = "") -> Chart:
    """Draws every run as a point and each variant's mean with Student's 95 % interval.

    Args:
        frame: a row a run: group (a panel each), variant and val_accuracy, 0..1; in the order in
            which they are drawn. A variant may stand in several groups.
        caption_text: see `caption`; what the bars are is added where there are any.
    """
    groups = frame["group"].unique()
    rows = frame.groupby("group", sort=False)["variant"].nunique()
    figure, axes = new_figure(0.32 * int(rows.sum()) + 0.6 * len(groups) + 0.5, rows=len(groups))
    several = frame.duplicated(["group", "variant"]).any()  # else each run is its own mean
    grid = axes[0].get_gridspec()
    assert grid is not None
    grid.set_height_ratios([n + 1 for n in rows])
    for ax, group in zip(axes, groups, strict=True):
        ax.sharex(axes[0])  # before anything is drawn: the limits then hold all groups
        part = frame[frame["group"] == group]
        names = list(part["variant"].unique())
        for row, name in enumerate(names):
            values = part.loc[part["variant"] == name, "val_accuracy"].astype(float).to_numpy()
            ax.plot(values, np.full(len(values), row), "o", color=GREY, alpha=0.6, markersize=4)
            interval = mean_interval(list(values))
            if interval.low is not None and interval.high is not None:
                ax.hlines(row + 0.22, interval.low, interval.high, color=BLUE, linewidth=2)
            if several:
                ax.plot(interval.mean, row + 0.22, "D", color=BLUE, markersize=5)
        ax.set_yticks(range(len(names)), names)
        ax.set_ylim(len(names) - 0.4, -0.5)
        ax.set_title(group, loc="left", fontsize=10)
        ax.xaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    low, high = axes[0].get_xlim()
    axes[0].set_xlim(max(low, -0.02), min(high, 1.02))  # an interval may reach beyond what can be
    told = ", one run each, no interval"
    if several:
        told = ": each run (grey), mean and 95 % interval over seeds (blue)"
        caption_text += (
            " Bars: each variant's own interval; verdicts are of differences paired by seed."
        )
    axes[-1].set_xlabel(f"validation accuracy{told}")
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
