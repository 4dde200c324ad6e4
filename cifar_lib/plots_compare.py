"""Charts that compare systems: a DataFrame with a row each in, a matplotlib Figure (a `Chart`) out.

Rows are those of `reports.comparison_frame`; accuracies in 0..1, missing values null or NaN.
"""

from itertools import product

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Annotation, Text
from matplotlib.ticker import (
    EngFormatter,
    FixedLocator,
    FuncFormatter,
    LogLocator,
    PercentFormatter,
    StrMethodFormatter,
)
from matplotlib.transforms import Bbox

from cifar_lib.execution import OtherLoad
from cifar_lib.plots import BLUE, ORANGE, Chart, caption, new_figure

COSTS = {
    "train_seconds": "training time of one seed",
    "parameters": "parameters",
    "depth": "weighted layers",
    "flops_per_image": "floating-point operations of one forward pass, an image",
}
"""Columns that `accuracy_vs_cost` can put on its x axis, and what they are."""


def accuracy_vs_cost(
    frame: pd.DataFrame, cost: str = "train_seconds", *, caption_text: str = ""
) -> Chart:
    """Draws accuracy against a cost (logarithmic), a labelled point with interval a row.

    Args:
        frame: columns experiment, test_accuracy, low, high (0..1, may be missing) and the cost;
            with train_seconds also other_load, 0..1: points of a shared machine are hollow.
        cost: a key of `COSTS`.
        caption_text: see `caption`.

    Raises:
        ValueError: `cost` is not a key of `COSTS`.
    """
    if cost not in COSTS:
        raise ValueError(f"cost: got {cost!r}; allowed are {', '.join(COSTS)}")
    figure, (ax,) = new_figure(4.6)
    points = _numeric(frame, [cost, "test_accuracy", "low", "high"])
    points = points.dropna(subset=[cost, "test_accuracy"])
    x, y = points[cost].to_numpy(), points["test_accuracy"].to_numpy()
    ax.errorbar(x, y, yerr=_errors(points), fmt="o", color=BLUE, capsize=3, markersize=6)
    note = ""
    if cost == "train_seconds":
        note = "; hollow: at most, beside other work"
        shared = points["other_load"].fillna(0) > OtherLoad.NEGLIGIBLE
        hollow = ax.plot(x[shared], y[shared], "o", color=BLUE, markersize=6)[0]
        hollow.set(markerfacecolor="white", zorder=3)  # above the errorbar's points
    ax.set_xscale("log")
    if len(points):  # room for the labels, and at least two ticks
        ax.set_xlim(x.min() / 2, x.max() * 2)
    ax.margins(y=0.15)
    ax.set_xlabel(f"{COSTS[cost]} (log scale{note})")
    if cost == "train_seconds":
        ax.xaxis.set_major_locator(FixedLocator([n * unit for _, unit in UNITS for n in STEPS]))
        ax.xaxis.set_major_formatter(FuncFormatter(duration_tick))
    elif cost == "depth":
        ax.xaxis.set_major_locator(FixedLocator(sorted(set(x))))
        ax.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
    else:
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter(EngFormatter())
    ax.minorticks_off()
    ax.set_ylabel("test accuracy")
    ax.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    caption(figure, caption_text)
    _place_labels(ax, points, cost)
    return figure


def reported_vs_measured(frame: pd.DataFrame, *, caption_text: str = "") -> Chart:
    """Draws for each system what its source reports beside what was measured here.

    Args:
        frame: columns experiment, reported_accuracy, reported_by, test_accuracy, low, high
            (0..1, may be missing).
        caption_text: see `caption`.
    """
    figure, (ax,) = new_figure(0.36 * len(frame) + 1.2)
    points = _numeric(frame, ["reported_accuracy", "test_accuracy", "low", "high"])
    rows = np.arange(len(points))
    reported, measured = points["reported_accuracy"], points["test_accuracy"]
    ax.hlines(rows, reported, measured, color="#bbbbbb", linewidth=2, zorder=1)
    ax.errorbar(
        measured,
        rows,
        xerr=_errors(points),
        fmt="o",
        color=BLUE,
        capsize=3,
        label="measured here, test (mean, 95 % interval over seeds)",
    )
    diamonds = ax.plot(reported, rows, "D", color=ORANGE, label="reported by the source")
    diamonds[0].set(markerfacecolor="white", markeredgewidth=1.8, markersize=7)
    by = [f" ({name})" if isinstance(name, str) else "" for name in points["reported_by"]]
    ax.set_yticks(rows, [f"{e}{b}" for e, b in zip(points["experiment"], by, strict=True)])
    ax.set_ylim(len(points) - 0.5, -0.5)
    ax.margins(x=0.06)
    ax.set_xlabel("accuracy")
    ax.xaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    figure.legend(fontsize=9, frameon=False, ncols=2, loc="outside upper center")
    return caption(figure, caption_text)


UNITS = (("s", 1), ("min", 60), ("h", 3600))
STEPS = (1, 3, 10, 30)


def duration_tick(seconds: float, _position: object = None) -> str:
    """Writes a duration in the unit that reads best, for an axis."""
    name, size = max((u for u in UNITS if seconds >= u[1]), key=lambda u: u[1], default=UNITS[0])
    return f"{seconds / size:.3g} {name}"


def _numeric(frame: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """JSON's null makes a column of objects; as numbers it is NaN, which matplotlib skips."""
    return frame.assign(**{column: pd.to_numeric(frame[column]) for column in columns})


def _errors(points: pd.DataFrame) -> npt.NDArray[np.float64]:
    mean = points["test_accuracy"]
    return np.stack([mean - points["low"], points["high"] - mean]).astype(float)


# Where a label may stand: direction from its point, first choice first.
_DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))
_DISTANCES = (8, 20, 32, 44, 60)  # typographic points
_HORIZONTAL = {1: "left", 0: "center", -1: "right"}
_VERTICAL = {1: "bottom", 0: "center", -1: "top"}


def _place_labels(ax: Axes, points: pd.DataFrame, cost: str) -> None:
    """Writes each experiment's name beside its point, greedily at the first free place.

    Free is what lies inside the axes, covers no interval and no label placed before, and is not
    so near to another point that it seems to name that one. A label that had to move away gets a
    thin line to its point; where nothing is free it takes the place that covers least. Comes
    last: it needs the limits and the layout to be settled.
    """
    figure = ax.get_figure(root=True)
    assert figure is not None
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    inside = ax.get_window_extent(renderer)
    x, y = points[cost], points["test_accuracy"]
    dots = ax.transData.transform(np.column_stack([x, y]))
    low = ax.transData.transform(np.column_stack([x, points["low"].fillna(y)]))
    high = ax.transData.transform(np.column_stack([x, points["high"].fillna(y)]))
    taken = [Bbox([a - 5, b + 5]) for a, b in zip(low, high, strict=True)]
    halos = [Bbox([dot - 11, dot + 11]) for dot in dots]
    for i, name in enumerate(points["experiment"]):
        obstacles = taken + halos[:i] + halos[i + 1 :]
        best: tuple[float, Annotation, Bbox] | None = None
        for distance, direction in product(_DISTANCES, _DIRECTIONS):
            text = _annotate(ax, str(name), (x.iloc[i], y.iloc[i]), direction, distance)
            # As of a plain text: an annotation's own extent includes the line to its point.
            text.update_positions(renderer)
            box = Text.get_window_extent(text, renderer).padded(1)
            covered = sum(_overlap(box, other) for other in obstacles)
            covered += box.width * box.height - _overlap(box, inside)
            if best is not None and covered >= best[0] - 1e-6:
                text.remove()
                continue
            if best is not None:
                best[1].remove()
            best = (covered, text, box)
            if covered < 1e-6:
                break
        assert best is not None
        taken.append(best[2])


def _annotate(
    ax: Axes, label: str, point: tuple[float, float], direction: tuple[int, int], distance: int
) -> Annotation:
    dx, dy = direction
    line = {"arrowstyle": "-", "color": "#777777", "linewidth": 0.8, "shrinkA": 0, "shrinkB": 3}
    return ax.annotate(
        label,
        point,
        xytext=(dx * distance, dy * distance),
        textcoords="offset points",
        ha=_HORIZONTAL[dx],
        va=_VERTICAL[dy],
        fontsize=9,
        in_layout=False,
        # The line starts at the side or corner of the text that faces the point.
        arrowprops=line | {"relpos": ((1 - dx) / 2, (1 - dy) / 2)}
        if distance > _DISTANCES[0]
        else None,
    )


def _overlap(a: Bbox, b: Bbox) -> float:
    both = Bbox.intersection(a, b)
    return 0.0 if both is None else both.width * both.height
