"""A sweep's charts draw every run, the mean and its interval, and leave out what is not there."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex

from cifar_lib import plots, plots_sweep
from cifar_lib.evaluate_statistics import compare_recipes

RUNS = {
    "default": [0.70, 0.71, 0.72],
    "optimizer=sgd": [0.60, 0.75, 0.69],
    "schedule=cosine,gamma=0.5": [0.9],
}
NOTE = "CIFAR-10, 10,000 images, three seeds. " * 6


def points(runs=RUNS) -> tuple[pd.DataFrame, pd.DataFrame]:
    rows = [(name, seed, x) for name, xs in runs.items() for seed, x in enumerate(xs)]
    frame = pd.DataFrame(rows, columns=["variant", "seed", "val_accuracy"])
    return frame, compare_recipes(frame, dict.fromkeys(runs, "default"))


def history(panels=("vgg11", "vgg16")) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"panel": panel, "line": line, "seed": seed, "epoch": epoch}
            | {"val_loss": epoch / 10 + seed + i, "clean_train_loss": 1 / epoch}
            for panel in panels
            for i, line in enumerate(("plain", "pair"))
            for seed in range(2)
            for epoch in range(1, 4)
        ]
    )


def test_where_each_variant_has_one_run_no_mean_is_drawn_or_promised() -> None:
    figure = plots_sweep.run_points(*points({name: xs[:1] for name, xs in RUNS.items()}))
    left, right = figure.axes
    assert len(left.lines) == len(RUNS) and not right.collections
    told = figure.get_supxlabel()
    assert "no interval" in told and "mean" not in told


def test_one_seed_has_no_thin_lines_to_explain() -> None:
    one, two = (
        plots_sweep.curves_by_panel(frame, {"val_loss": "-"}, ylabel="loss (nats)").get_supxlabel()
        for frame in (history().query("seed == 0"), history())
    )
    assert "thick" not in one and "thick" in two


def test_every_run_its_difference_by_seed_and_both_intervals_are_drawn() -> None:
    frame, table = points()
    left, right = plots_sweep.run_points(frame, table, caption_text=NOTE).axes
    names = [label.get_text() for label in left.get_yticklabels()]
    assert names == ["default", "optimizer=sgd", "schedule=cosine,\ngamma=0.5"]
    assert left.get_ylim() == right.get_ylim()
    for row, xs in enumerate(RUNS.values()):
        runs, mean = left.lines[2 * row : 2 * row + 2]
        assert list(runs.get_xdata()) == xs and set(runs.get_ydata()) == {row}
        assert mean.get_xdata() == pytest.approx([np.mean(xs)])
    sgd, sgd_mean, _, cosine_mean, zero = right.lines  # the default has no difference
    assert list(sgd.get_xdata()) == pytest.approx([-10.0, 4.0, -3.0])
    assert sgd_mean.get_xdata() == pytest.approx([-3.0])
    assert cosine_mean.get_xdata() == pytest.approx([20.0])  # at the seed that both have
    assert list(zero.get_xdata()) == [0, 0]
    ends = [list(bar.get_segments()[0][:, 0]) for bar in right.collections]
    expected = [
        100 * table.loc[name, [f"{kind}_low", f"{kind}_high"]]
        for name, kind in [("optimizer=sgd", "worth"), ("optimizer=sgd", "pooled")]
        + [("schedule=cosine,gamma=0.5", "pooled")]  # one run has no interval of its own
    ]
    np.testing.assert_allclose(ends, expected)
    assert right.get_xlabel() == "difference to default (points)"


def test_where_references_are_several_the_axis_names_none() -> None:
    frame, _ = points()
    two = compare_recipes(
        frame, {"optimizer=sgd": "default", "schedule=cosine,gamma=0.5": "optimizer=sgd"}
    )
    assert plots_sweep.run_points(frame, two).axes[1].get_xlabel() == (
        "difference to its reference (points)"
    )


def test_curves_are_a_thin_line_a_seed_and_a_thick_mean() -> None:
    frame = history()
    columns = {"val_loss": "-", "clean_train_loss": "--"}
    figure = plots_sweep.curves_by_panel(frame, columns, ylabel="loss (nats)", caption_text=NOTE)
    first, second = figure.axes
    assert first.get_title(loc="left") == "vgg11" and first.get_ylabel() == "loss (nats)"
    assert len(first.lines) == len(second.lines) == 2 * 2 * 3
    thick = [line for line in first.lines if line.get_linewidth() == 2]
    assert [line.get_linestyle() for line in thick] == ["-", "--", "-", "--"]
    np.testing.assert_allclose(thick[0].get_ydata(), [0.6, 0.7, 0.8])  # seeds 0 and 1, plain
    np.testing.assert_allclose(thick[2].get_ydata(), [1.6, 1.7, 1.8])  # pair
    colors = {to_hex(line.get_color()) for line in first.lines}
    assert colors == {c.lower() for c in plots_sweep.COLORS[:2]}
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["plain", "pair"]
    assert first.get_ylim() == second.get_ylim()


def test_a_mean_ends_with_the_seed_that_stopped_first() -> None:
    frame = history().query("not (seed == 1 and epoch == epoch.max())")
    figure = plots_sweep.curves_by_panel(frame, {"val_loss": "-"}, ylabel="loss (nats)")
    thick = next(line for line in figure.axes[0].lines if line.get_linewidth() == 2)
    np.testing.assert_allclose(thick.get_ydata(), [0.6, 0.7, np.nan])


def test_what_was_not_measured_is_not_drawn() -> None:
    frame = history(panels="abcd").assign(clean_train_loss=np.nan)
    columns = {"clean_train_loss": "-", "running_loss": ":"}  # the second is no column at all
    figure = plots_sweep.curves_by_panel(frame, columns, ylabel="loss")
    assert [ax.get_visible() for ax in figure.axes] == [True] * 4 + [False] * 2
    assert all(np.isnan(line.get_ydata()).all() for line in figure.axes[0].lines)


@pytest.mark.parametrize("chart", ["points", "curves"])
def test_charts_are_wide_legible_captioned_and_within_their_canvas(chart: str) -> None:
    if chart == "points":
        figure = plots_sweep.run_points(*points(), caption_text=NOTE)
    else:
        frame = history(("vgg11", "vgg16", "vgg19", "cifar_resnet"))
        figure = plots_sweep.curves_by_panel(
            frame, {"val_loss": "-"}, ylabel="loss (nats)", caption_text=NOTE
        )
    assert figure.get_figwidth() == plots.WIDTH and figure.get_supxlabel().startswith("CIFAR-10")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    box = figure.get_tightbbox(canvas.get_renderer())
    assert box.x0 >= -0.01 and box.x1 <= figure.get_figwidth() + 0.01
    assert box.y0 >= -0.01 and box.y1 <= figure.get_figheight() + 0.01
