"""A sweep's charts draw every run, the mean and its interval, and leave out what is not there."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex

from cifar_lib import plots, plots_sweep
from cifar_lib.evaluate import mean_interval

RUNS = {
    ("optimizer", "adam (default)"): [0.70, 0.71, 0.72],
    ("optimizer", "sgd"): [0.60, 0.75, 0.69],
    ("schedule", "constant (default)"): [0.70, 0.71, 0.72],
    ("schedule", "cosine"): [0.9],
}
NOTE = "CIFAR-10, 10,000 images, three seeds. " * 6


def points() -> pd.DataFrame:
    rows = [(*key, seed, x) for key, xs in RUNS.items() for seed, x in enumerate(xs)]
    return pd.DataFrame(rows, columns=["group", "variant", "seed", "val_accuracy"])


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
    (ax, *_) = plots_sweep.run_points(points().drop_duplicates(["group", "variant"])).axes
    assert len(ax.lines) == len(ax.get_yticklabels())
    told = ax.figure.axes[-1].get_xlabel()
    assert "mean" not in told and "no interval" in told
    assert "Bars" not in ax.figure.get_supxlabel()


def test_one_seed_has_no_thin_lines_to_explain() -> None:
    one, two = (
        plots_sweep.curves_by_panel(frame, {"val_loss": "-"}, ylabel="loss (nats)").get_supxlabel()
        for frame in (history().query("seed == 0"), history())
    )
    assert "thick" not in one and "thick" in two


def test_every_run_the_mean_and_its_interval_are_drawn() -> None:
    figure = plots_sweep.run_points(points(), caption_text=NOTE)
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["optimizer", "schedule"]
    drawn = {}
    for ax in figure.axes:
        names = [label.get_text() for label in ax.get_yticklabels()]
        for i, name in enumerate(names):
            runs, mean = ax.lines[2 * i], ax.lines[2 * i + 1]
            drawn[ax.get_title(loc="left"), name] = list(runs.get_xdata())
            values = RUNS[ax.get_title(loc="left"), name]
            assert mean.get_xdata() == pytest.approx([np.mean(values)])
            assert set(runs.get_ydata()) == {i}
    assert drawn == RUNS
    optimizer, schedule = figure.axes
    (adam,) = optimizer.collections[0].get_segments()
    interval = mean_interval(RUNS["optimizer", "adam (default)"])
    assert list(adam[:, 0]) == pytest.approx([interval.low, interval.high])
    assert len(optimizer.collections) == 2
    assert len(schedule.collections) == 1  # one run has no interval
    assert optimizer.get_xlim() == schedule.get_xlim()
    low, high = optimizer.get_xlim()
    assert low < mean_interval(RUNS["optimizer", "sgd"]).low and high > 0.9
    assert "Bars" in figure.get_supxlabel()


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
        figure = plots_sweep.run_points(points(), caption_text=NOTE)
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
