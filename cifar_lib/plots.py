"""Charts: a DataFrame or arrays in, a matplotlib Figure (a `Chart`) out.

Nothing here trains, reads a file or touches pyplot's global state. Figures are about as wide as a
notebook's column (8 inches at 100 dpi); colours are Okabe and Ito's, which colour-blind readers
can tell apart; accuracies come in 0..1 and are shown in percent. `plots_compare` holds the charts
that compare systems, `plots_evaluation` those of one model's answers, `plots_images` the grids of
pictures, `plots_speed` those of times, `plots_sweep` those of many runs.
"""

import io
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd
import seaborn
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter
from PIL import Image

BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
GREY = "#666666"
WIDTH = 8.0  # inches


PERCENT = PercentFormatter(1, decimals=0, symbol=" %")


class Chart(Figure):
    """A figure that a notebook shows as a picture without pyplot knowing of it."""

    def _repr_png_(self) -> bytes:
        return png(self)


def png(figure: Figure) -> bytes:
    """A figure as an opaque PNG, as small as that goes: notebooks hold many.

    Of 256 colours where it shows no pictures: its own and the shades at their edges.
    """
    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, dpi=100, format="png", bbox_inches="tight")
    image = Image.open(drawn).convert("RGB")
    if not any(ax.images for ax in figure.axes):
        image = image.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    image.save(small, "PNG", optimize=True)
    return small.getvalue()


def new_figure(height: float, rows: int = 1, columns: int = 1) -> tuple[Chart, list[Axes]]:
    """Makes a figure of the notebook's width and its axes, row by row.

    Args:
        height: inches, without the caption.
        rows: of axes.
        columns: of axes.
    """
    figure = Chart(figsize=(WIDTH, height), dpi=100, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(color="#dddddd", linewidth=0.6)
        ax.set_axisbelow(True)
    return figure, list(axes.flat)


def caption(figure: Chart, text: str) -> Chart:
    """Puts a caption below a figure: data set, n, what the lines are, source.

    Args:
        figure: is changed and grows by the caption's lines.
        text: wrapped to the figure's width; empty does nothing.

    Returns:
        The same figure.
    """
    lines = textwrap.wrap(text, width=int(figure.get_figwidth() * 14.5))
    if lines:
        figure.set_figheight(figure.get_figheight() + 0.17 * len(lines) + 0.05)
        # As the label of the whole figure it has its place in the constrained layout.
        figure.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize=9, color="#333333")
    return figure


def seed_curves(metrics: pd.DataFrame, column: str) -> tuple[pd.DataFrame, pd.Series]:
    """A column by epoch: of each seed that measured it, and their mean while all of them last."""
    by_seed = metrics.pivot(index="epoch", columns="seed", values=column)
    by_seed = by_seed.astype(float).dropna(axis="columns", how="all")
    return by_seed, by_seed.mean(axis="columns", skipna=False)


def learning_curves(
    metrics: pd.DataFrame,
    *,
    reported: pd.DataFrame | None = None,
    reported_by: str = "reported",
    caption_text: str = "",
) -> Chart:
    """Draws loss and accuracy by epoch, train against val: a thin line a seed, a thick mean.

    The mean covers the epochs that every seed reached. What is missing throughout (val without a
    validation set) is left out.

    Args:
        metrics: columns seed, epoch, train_loss, val_loss, train_accuracy, val_accuracy (0..1).
        reported: the same columns but seed, from a source study, drawn dotted; may lack some.
        reported_by: whose they are, for the legend.
        caption_text: see `caption`.
    """
    figure, axes = new_figure(3.3, columns=2)
    seeds = metrics["seed"].nunique()
    of = f" (mean of {seeds} seeds)" if seeds > 1 else ""
    for ax, quantity in zip(axes, ("loss", "accuracy"), strict=True):
        for part, color in (("train", BLUE), ("val", ORANGE)):
            by_seed, mean = seed_curves(metrics, f"{part}_{quantity}")
            if by_seed.shape[1] > 1:
                for seed in by_seed:
                    values = by_seed[seed].dropna()
                    ax.plot(values.index, values, color=color, linewidth=0.8, alpha=0.45)
            mean = mean.dropna()
            if len(mean):
                marker = "o" if len(mean) <= 12 else ""
                line = ax.plot(mean.index, mean, color=color, linewidth=2, label=part + of)
                line[0].set(marker=marker, markersize=4)
            if reported is not None and f"{part}_{quantity}" in reported:
                values = reported.set_index("epoch")[f"{part}_{quantity}"].dropna()
                if values.empty:
                    continue
                label = f"{part}, {reported_by}"
                dots = "." if len(values) <= 12 else ""  # the epochs that the source tells
                values = values.reindex(range(int(values.index.min()), int(values.index.max()) + 1))
                ax.plot(values.index, values, ":" + dots, color=color, linewidth=1.8, label=label)
        ax.set_xlabel("epoch")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axes[0].set_ylabel("cross-entropy loss (nats)")
    axes[1].set_ylabel("accuracy")
    axes[1].yaxis.set_major_formatter(PERCENT)
    axes[1].legend(fontsize=9, frameon=False, loc="best")
    return caption(figure, caption_text)


def confusion_heatmap(
    matrix: npt.ArrayLike, class_names: Sequence[str], *, caption_text: str = ""
) -> Chart:
    """Draws a confusion matrix: counts as numbers, shares of each true class as shades.

    Args:
        matrix: counts (K, K), rows the true class, as `evaluate.confusion` returns.
        class_names: K names.
        caption_text: see `caption`.
    """
    counts = np.asarray(matrix)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure, (ax,) = new_figure(6.2)
    seaborn.heatmap(
        shares,
        norm=PowerNorm(0.5, 0, 1),  # the square root spreads the small shares: the mistakes
        cmap="Blues",
        annot=counts,
        fmt="d",
        annot_kws={"fontsize": 9},
        cbar_kws={
            "format": PERCENT,
            "shrink": 0.8,
            "label": "share of the true class",
            "ticks": [0, 0.01, 0.05, 0.2, 0.5, 1],
        },
        xticklabels=list(class_names),
        yticklabels=list(class_names),
        ax=ax,
    )
    ax.set_xticks(ax.get_xticks(), class_names, rotation=40, ha="right", rotation_mode="anchor")
    ax.set(xlabel="predicted class", ylabel="true class")
    ax.grid(visible=False)
    return caption(figure, caption_text)


def class_histogram(
    labels: Mapping[str, npt.ArrayLike], class_names: Sequence[str], *, caption_text: str = ""
) -> Chart:
    """Draws how many images each class has in each split.

    Args:
        labels: split name → int labels (N,), 0..K-1.
        class_names: K names.
        caption_text: see `caption`.
    """
    figure, (ax,) = new_figure(3.2)
    width = 0.8 / len(labels)
    colors = (BLUE, ORANGE, GREEN, PURPLE)
    for i, (split, values) in enumerate(labels.items()):
        counts = np.bincount(np.asarray(values), minlength=len(class_names))
        x = np.arange(len(class_names)) + (i - (len(labels) - 1) / 2) * width
        label = f"{split} ({counts.sum():,})"
        ax.bar(x, counts, width=width, color=colors[i % len(colors)], label=label)
    ax.set_xticks(range(len(class_names)), class_names, rotation=25, ha="right")
    ax.set_ylabel("images")
    ax.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    ax.grid(visible=False, axis="x")
    ax.legend(fontsize=9, frameon=False, ncols=4, loc="lower left", bbox_to_anchor=(0, 1))
    return caption(figure, caption_text)
