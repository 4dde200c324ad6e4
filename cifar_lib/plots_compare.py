"""Charts that compare systems: a DataFrame with a row each in, a matplotlib Figure (a `Chart`) out.

Rows are those of `reports.comparison_frame`; accuracies in 0..1, missing values NaN.
"""

from itertools import cycle

import numpy as np
import numpy.typing as npt
import pandas as pd
import seaborn
from adjustText import adjust_text
from matplotlib.axes import Axes
from matplotlib.ticker import (
    EngFormatter,
    FixedLocator,
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    PercentFormatter,
    StrMethodFormatter,
)
from scipy.special import expit, logit

from cifar_lib.execution import UNITS, duration
from cifar_lib.plots import BLUE, GREY, ORANGE, Chart, caption, new_figure

COSTS = {
    "train_seconds": "training time of one seed",
    "parameters": "parameters",
    "depth": "weighted layers",
    "training_flops": "floating-point operations of training one seed",
}
"""Columns that `accuracy_vs_cost` can put on its x axis, and what they are."""
MARKERS = "osD^vPXp"  # a machine each, with room for a white centre


def accuracy_vs_cost(
    frame: pd.DataFrame, cost: str = "train_seconds", *, caption_text: str = ""
) -> Chart:
    """Draws accuracy against a cost (logarithmic), a labelled point with interval a row.

    Args:
        frame: columns notebook, experiment, test_accuracy, low, high (0..1, may be missing),
            weights (what it starts from, or None) and the cost; with train_seconds also machine,
            which has its own marker, and shared_machine, whose points have a white centre. An
            experiment's name that several notebooks have gets the notebook's number.
        cost: a key of `COSTS`.
        caption_text: see `caption`.

    Raises:
        ValueError: `cost` is not a key of `COSTS`.
    """
    if cost not in COSTS:
        raise ValueError(f"cost: got {cost!r}; allowed are {', '.join(COSTS)}")
    figure, (ax,) = new_figure(5.2)
    points = frame.dropna(subset=[cost, "test_accuracy"])
    if points.empty:
        return caption(figure, caption_text)
    # Intervals of few seeds reach beyond what can be; on a logit scale 0 and 1 lie nowhere.
    points = points.assign(**points[["test_accuracy", "low", "high"]].clip(0.001, 0.999))
    x, y = points[cost].to_numpy(), points["test_accuracy"].to_numpy()
    ax.errorbar(x, y, yerr=_errors(points, "test_accuracy"), fmt="none", ecolor=GREY, capsize=3)
    timed = cost == "train_seconds"
    points = points.assign(start=np.where(points["weights"].notna(), "ImageNet's weights", SCRATCH))
    style = "machine" if timed and points["machine"].nunique() > 1 else None
    colors = {SCRATCH: BLUE, "ImageNet's weights": ORANGE}
    markers = dict(zip(points[style].unique(), cycle(MARKERS), strict=False)) if style else True
    seaborn.scatterplot(
        points,
        x=cost,
        y="test_accuracy",
        hue="start",
        palette=colors,
        style=style,
        markers=markers,
        ax=ax,
        s=80,
        linewidth=0,
        zorder=3,
    )
    if (legend := ax.get_legend()) is not None:
        legend.remove()
    # The names without seaborn's headings, which are the columns'.
    told = zip(*ax.get_legend_handles_labels(), strict=True)
    handles, names = zip(*[entry for entry in told if entry[1] not in points], strict=True)
    if len(names) > 1:
        figure.legend(handles, names, fontsize=9, frameon=False, ncols=2, loc="outside upper left")
    ax.set_xlim(x.min() / 2, x.max() * 2)  # room for the labels, and at least two ticks
    note = "; white centre: at most, beside other work" if timed else ""
    # A logit scale, as a point more means more, the nearer it lies to 100 %.
    ax.set(
        xscale="log",
        yscale="logit",
        xlabel=f"{COSTS[cost]} (log scale{note})",
        ylabel="test accuracy (logit scale)",
    )
    drawn = logit(points[["test_accuracy", "low", "high"]].to_numpy(float))
    ends = np.array([np.nanmin(drawn), np.nanmax(drawn)])
    ax.set_ylim(*expit(ends + max(0.15 * np.ptp(ends), 0.1) * np.array([-1, 1])))
    if timed:
        shared = points["shared_machine"].astype(bool)
        ax.plot(x[shared], y[shared], "o", color="white", markersize=3.5, zorder=4)
        times = FixedLocator([n * unit for _, unit in UNITS for n in (1, 3, 10, 30)])
        ax.xaxis.set(major_locator=times, major_formatter=FuncFormatter(duration))
    elif cost == "depth":
        ax.xaxis.set_major_locator(FixedLocator(sorted(set(x))))
        ax.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
    else:
        ax.xaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter=EngFormatter())
    ax.minorticks_off()
    _set_accuracy_ticks(ax)
    caption(figure, caption_text)
    _name_points(ax, points, cost)
    return figure


def reported_vs_measured(frame: pd.DataFrame, *, caption_text: str = "") -> Chart:
    """Draws for each system what its source reports beside what was measured here.

    Args:
        frame: as `reports_compare.like_for_like` gives it.
        caption_text: see `caption`.
    """
    figure, (ax,) = new_figure(0.5 * len(frame) + 1.0)
    rows = np.arange(len(frame))
    ax.hlines(rows, frame["reported"], frame["measured"], color="#bbbbbb", linewidth=2, zorder=1)
    ax.errorbar(
        frame["measured"],
        rows,
        xerr=_errors(frame, "measured"),
        fmt="o",
        color=BLUE,
        capsize=3,
        label="measured here (mean, 95 % interval over seeds)",
    )
    ax.plot(
        frame["values"].explode().astype(float),
        np.repeat(rows, frame["n"]) + 0.25,
        ".",
        color=BLUE,
        alpha=0.5,
        markersize=5,
        label="each seed",
    )
    diamonds = ax.plot(frame["reported"], rows, "D", color=ORANGE, label="reported by the source")
    diamonds[0].set(markerfacecolor="white", markeredgewidth=1.8, markersize=7)
    told = [f"{r.study}: {r.experiment}\n{r.reported_on}, n = {r.n}" for r in frame.itertuples()]
    ax.set_yticks(rows, told)
    ax.margins(x=0.06)
    ax.set(ylim=(len(frame) - 0.5, -0.5), xlabel="accuracy")
    ax.xaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    figure.legend(fontsize=9, frameon=False, ncols=3, loc="outside upper center")
    return caption(figure, caption_text)


SCRATCH = "random weights"
SHOWN = (0.02, 0.05, *np.arange(1, 9) / 10, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99)


def _errors(points: pd.DataFrame, mean: str) -> npt.NDArray[np.float64]:
    return np.stack([points[mean] - points["low"], points["high"] - points[mean]])


def _set_accuracy_ticks(ax: Axes) -> None:
    """Sets round percentages, and finer ones where fewer than three of those are in sight."""
    low, high = ax.get_ylim()
    ticks = [tick for tick in SHOWN if low <= tick <= high]
    if len(ticks) < 3:
        ticks = list(MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(low, high))
    percent = FuncFormatter(lambda accuracy, _: f"{100 * accuracy:.4g} %")
    ax.yaxis.set(major_locator=FixedLocator(ticks), major_formatter=percent)


def _name_points(ax: Axes, points: pd.DataFrame, cost: str) -> None:
    """Writes each experiment's name beside its point, off the others; last, when limits are set."""
    figure = ax.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # the layout decides where there is room
    x, y = points[cost].to_numpy(), points["test_accuracy"].to_numpy()
    short = points["experiment"]
    long = points["notebook"].str[:2] + "/" + short
    told = zip(x, y, short.where(~short.duplicated(keep=False), long), strict=True)
    names = [ax.text(left, top, name, fontsize=9) for left, top, name in told]
    adjust_text(
        names,
        x,
        y,
        ax=ax,
        iter_lim=3000,
        expand=(1.4, 2.4),
        force_text=(0.8, 1.2),
        force_static=(0.3, 0.6),
        arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.8},
    )
