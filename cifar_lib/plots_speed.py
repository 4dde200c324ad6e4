"""Charts of stage two: the ladder of its steps, where a step's time goes, accuracy against seconds.

A DataFrame in, a matplotlib Figure (a `Chart`) out.
"""

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.ticker import FuncFormatter, LogLocator, PercentFormatter

from cifar_lib.plots import BLUE, GREY, ORANGE, Chart, caption, new_figure


def ladder(frame: pd.DataFrame, *, caption_text: str = "") -> Chart:
    """Draws images a second, rung by rung, logarithmic: a bar from the rung before to this one.

    A step that costs speed, a network with more arithmetic for instance, is orange.

    Args:
        frame: a row a rung, in order, with rung, why and images_per_second (the median, above 0);
            low and high (the least and the most measured).
        caption_text: see `caption`.
    """
    figure, (ax,) = new_figure(0.42 * len(frame) + 1.2)
    rates = frame["images_per_second"].to_numpy(dtype=float)
    before = [rates[0], *rates[:-1]]
    y = range(len(frame))
    colors = [BLUE if rate >= was else ORANGE for rate, was in zip(rates, before, strict=True)]
    ax.barh(y, rates - before, left=before, color=colors, height=0.55)
    spans = frame[["low", "high"]].to_numpy(dtype=float)
    ax.hlines(y, spans[:, 0], spans[:, 1], color=GREY, linewidth=1)
    ax.plot(rates, y, "o", color=BLUE, markersize=5)
    for i, (rate, was, why) in enumerate(zip(rates, before, frame["why"], strict=True)):
        gain = "" if i == 0 else f", {rate / was:.3g} times"
        right = max(spans[i, 1], was)
        ax.annotate(f"  {rate:,.0f}{gain} · {why}", (right, i), va="center", fontsize=8)
    ax.set_yticks(list(y), frame["rung"].tolist())
    ax.invert_yaxis()
    ax.set(xscale="log", xlabel="images a second in training (log scale)")
    ax.set_xlim(spans.min() / 1.3, spans.max() * 60)  # room for what the labels say
    ticks = LogLocator(subs=(1, 2, 5)).tick_values(spans.min(), spans.max())
    ax.set_xticks([t for t in ticks if spans.min() / 1.3 <= t <= 2 * spans.max()])
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    ax.minorticks_off()
    ax.grid(axis="y", visible=False)
    return caption(figure, caption_text)


def shares(frame: pd.DataFrame, *, caption_text: str = "") -> Chart:
    """Draws where a training step's time goes, a bar a network.

    Args:
        frame: a row a network (the index is its name), a column a kind of operator; seconds.
        caption_text: see `caption`.
    """
    figure, (ax,) = new_figure(0.4 * len(frame) + 1.3)
    parts = frame.div(frame.sum(axis=1), axis=0)
    colors = colormaps["Set2"](np.linspace(0, 1, len(parts.columns)))
    left = 0 * parts.sum(axis=1)
    for kind, color in zip(parts, colors, strict=True):
        bars = ax.barh(parts.index, parts[kind], 0.6, left, color=color, label=kind)
        left += parts[kind]
        # A share below 4 % has no room for its number.
        told = [f"{100 * part:.0f}" if part >= 0.04 else "" for part in parts[kind]]
        ax.bar_label(bars, told, label_type="center", fontsize=8)
    ax.invert_yaxis()
    ax.set(xlim=(0, 1), xlabel="share of a training step", ylabel="")
    ax.xaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    figure.legend(fontsize=9, frameon=False, ncols=4, loc="outside upper center")
    return caption(figure, caption_text)


def accuracy_against_seconds(
    metrics: pd.DataFrame, slowdown: float | None = None, *, caption_text: str = ""
) -> Chart:
    """Draws accuracy against training time, a line a seed.

    Args:
        metrics: columns seed, epoch, seconds and an accuracy, val_accuracy or (where there is no
            validation) train_accuracy, 0..1.
        slowdown: how many times as long the conventional loop takes on this network, measured; the
            same epochs at its pace are then drawn beside, dashed: computed, not run.
        caption_text: see `caption`.
    """
    column = "val_accuracy" if metrics["val_accuracy"].notna().any() else "train_accuracy"
    figure, (ax,) = new_figure(3.6)
    paces = [("ours", 1.0, "-", BLUE)]
    if slowdown:
        said = f"the usual loop's pace ({slowdown:.1f} times as long)"
        paces.append((said, slowdown, "--", ORANGE))
    for name, factor, style, color in paces:
        for i, (_, run) in enumerate(metrics.groupby("seed")):
            (line,) = ax.plot(run["seconds"].cumsum() * factor, run[column], style)
            line.set(color=color, label=name if i == 0 else None, linewidth=1.3)
    says = {"xlabel": "seconds of training (log scale)", "ylabel": column.replace("_", " ")}
    ax.set(xscale="log", **says)
    seconds_text = FuncFormatter(lambda x, _: f"{x:,g}")
    ax.xaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter=seconds_text)
    ax.minorticks_off()
    ax.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    ax.legend(frameon=False)
    return caption(figure, caption_text)
