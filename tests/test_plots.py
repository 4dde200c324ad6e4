"""Charts draw the values they are given, name what they show and leave nothing behind."""

import io
from itertools import combinations, product

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from cifar_lib import execution, plots, plots_compare, plots_evaluation, plots_images, plots_speed

NAMES = ("cat", "dog", "frog")


def metrics(seeds: int = 2, epochs: int = 4) -> pd.DataFrame:
    """Values that tell seed, epoch and column apart."""
    rows = [
        {"seed": s, "epoch": e, "train_loss": 1 / e + s, "val_loss": 2 / e + s}
        | {"train_accuracy": e / 10 + s / 100, "val_accuracy": e / 20 + s / 100}
        for s in range(seeds)
        for e in range(1, epochs + 1)
    ]
    return pd.DataFrame(rows)


def comparison() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "notebook": ["03_improved", "02_speed", "04_final", "01_baseline"],
            "experiment": ["slow", "fast", "new", "pending"],
            "test_accuracy": [0.93, 0.94, 0.91, np.nan],
            "low": [0.925, np.nan, 0.905, np.nan],
            "high": [0.935, np.nan, 0.915, np.nan],
            "train_seconds": [4000.0, 300.0, 310.0, np.nan],
            "shared_machine": [True, False, False, True],
            "machine": ["a GPU", "a CPU", "a CPU", None],
            "weights": ["imagenet", None, None, None],
            "parameters": [11_173_962, 1_972_792, 964_170, 5],
            "training_flops": [1e15, 1e14, 1e13, 1.0],
            "depth": [56, 32, 20, 8],
        }
    )


def told() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "study": ["D", "airbench"],
            "experiment": ["03/slow", "02/fast"],
            "reported_on": ["test", "test, with TTA"],
            "n": [3, 1],
            "reported": [0.92, 0.9401],
            "measured": [0.93, 0.9],
            "low": [0.925, np.nan],
            "high": [0.935, np.nan],
            "values": [[0.928, 0.93, 0.932], [0.9]],
        }
    )


def images(n: int, height: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (n, 3, height, 32), generator=generator, dtype=torch.uint8)


def texts(figure: Figure) -> list[str]:
    return [t.get_text() for t in figure.findobj(Text) if t.get_text()]


def reliability() -> pd.DataFrame:
    bins = {"n": [1, 3], "confidence": [0.4, 0.9], "accuracy": [0.5, 0.75]}
    return pd.DataFrame(bins | {"low": [0.2, 0.6], "high": [0.8, 1.0]})


def corruptions(system: int = 1) -> pd.DataFrame:
    """Two seeds that differ by 0.02; each corruption costs as much as it comes late."""
    rows = [
        {"corruption": c, "severity": s, "accuracy": 1 - system / 20 - k * s / 50 + seed / 50}
        | {"seed": seed}
        for seed in (0, 1)
        for k, c in enumerate(["none", "noise", "blur", "contrast", "brightness", "jpeg"])
        for s in ((0,) if c == "none" else range(1, 6))
    ]
    return pd.DataFrame(rows)


def scores() -> pd.DataFrame:
    values = {
        f"{name}{end}": [0.7 + move, 1.0 - move / 10, np.nan]
        for name in ("precision", "recall", "f1")
        for end, move in (("", 0.0), ("_low", -0.1), ("_high", 0.1))
    }
    return pd.DataFrame({"class_name": NAMES, "n": [50, 50, 0]} | values)


def every_chart() -> dict[str, Figure]:
    p = np.eye(3)[[0, 1, 2, 0]]
    note = "CIFAR-10, four images " * 9
    return {
        "learning_curves": plots.learning_curves(metrics(), caption_text=note),
        "confusion_heatmap": plots.confusion_heatmap(
            np.eye(3, dtype=int), NAMES, caption_text=note
        ),
        "class_histogram": plots.class_histogram({"train": [0, 1]}, NAMES, caption_text=note),
        "accuracy_vs_cost": plots_compare.accuracy_vs_cost(comparison(), caption_text=note),
        "reported_vs_measured": plots_compare.reported_vs_measured(told(), caption_text=note),
        "reliability_diagram": plots_evaluation.reliability_diagram(
            {"as trained": reliability(), "divided by 1.5": reliability()}, caption_text=note
        ),
        "corruption_curves": plots_evaluation.corruption_curves(
            {f"0{i}_notebook/experiment": corruptions(i) for i in range(1, 5)}, caption_text=note
        ),
        "class_score_dots": plots_evaluation.class_score_dots(scores(), caption_text=note),
        "example_grid": plots_images.example_grid(images(3), [0, 1, 2], NAMES, caption_text=note),
        "mistakes_grid": plots_images.mistakes_grid(
            images(4), [0, 1, 1, 2], p, NAMES, caption_text=note
        ),
    }


@pytest.fixture(autouse=True)
def no_pyplot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once pyplot is at work in a notebook, it shows all figures its own way, in more bytes."""
    monkeypatch.setattr(plt, "draw_if_interactive", lambda: pytest.fail("pyplot was used"))


def test_every_chart_is_wide_legible_captioned_and_within_its_canvas() -> None:
    style = dict(mpl.rcParams)
    for name, figure in every_chart().items():
        assert figure.get_figwidth() == plots.WIDTH and figure.dpi == 100, name
        shown = [t for t in figure.findobj(Text) if t.get_text() and t.get_visible()]
        assert min(t.get_fontsize() for t in shown) >= 9, name
        assert any(t.startswith("CIFAR-10, four images") for t in texts(figure)), name
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        box = figure.get_tightbbox(canvas.get_renderer())
        assert box.x0 >= -0.01 and box.x1 <= figure.get_figwidth() + 0.01, name
        assert box.y0 >= -0.01 and box.y1 <= figure.get_figheight() + 0.01, name
        shown_png = Image.open(io.BytesIO(figure._repr_png_()))  # what a notebook shows
        assert shown_png.format == "PNG", name
        assert shown_png.mode == ("RGB" if name.endswith("_grid") else "P"), name
    assert plt.get_fignums() == []
    assert dict(mpl.rcParams) == style


def test_caption_is_wrapped_and_the_figure_grows_by_it() -> None:
    figure, _ = plots.new_figure(3.0)
    assert plots.caption(figure, "") is figure and figure.get_figheight() == 3
    plots.caption(figure, "n = 3. " * 40)
    assert figure.get_figheight() > 3.3
    assert all(len(line) < 120 for line in figure.get_supxlabel().split("\n"))


def test_learning_curves_draw_each_seed_and_the_mean() -> None:
    frame = metrics(seeds=2)
    loss, accuracy = plots.learning_curves(frame).axes
    assert len(loss.lines) == len(accuracy.lines) == 6  # train and val: two seeds and the mean
    named = {line.get_label(): line for line in accuracy.lines}
    np.testing.assert_array_equal(named["val (mean of 2 seeds)"].get_xdata(), [1, 2, 3, 4])
    expected = frame.groupby("epoch")["val_accuracy"].mean()
    np.testing.assert_allclose(named["val (mean of 2 seeds)"].get_ydata(), expected)
    np.testing.assert_allclose(loss.lines[1].get_ydata(), frame[frame.seed == 1]["train_loss"])
    assert (loss.get_xlabel(), loss.get_ylabel()) == ("epoch", "cross-entropy loss (nats)")


def test_the_mean_ends_where_the_first_seed_stopped() -> None:
    frame = metrics(seeds=2).query("seed == 0 or epoch < 3")
    _, accuracy = plots.learning_curves(frame).axes
    named = {line.get_label(): line for line in accuracy.lines}
    assert list(named["train (mean of 2 seeds)"].get_xdata()) == [1, 2]
    assert len(accuracy.lines[0].get_xdata()) == 4  # the longer seed is drawn whole


@pytest.mark.parametrize("missing", [np.nan, None])
def test_one_seed_without_validation_is_one_line(missing: float | None) -> None:
    frame = metrics(seeds=1).assign(val_loss=missing, val_accuracy=missing)
    for ax in plots.learning_curves(frame).axes:
        assert [line.get_label() for line in ax.lines] == ["train"]


def test_a_reported_curve_without_numbers_is_not_drawn() -> None:
    reported = pd.DataFrame({"epoch": [1, 2], "val_accuracy": [0.5, 0.6], "val_loss": [None] * 2})
    figure = plots.learning_curves(metrics(seeds=1), reported=reported, reported_by="study A")
    dotted = [[line for line in ax.lines if line.get_linestyle() == ":"] for ax in figure.axes]
    assert [len(lines) for lines in dotted] == [0, 1]


def test_reported_curves_are_dotted_beside_ours() -> None:
    reported = pd.DataFrame({"epoch": [1, 2], "val_accuracy": [0.5, 0.6]})
    figure = plots.learning_curves(metrics(seeds=1), reported=reported, reported_by="study A")
    loss, accuracy = figure.axes
    assert len(loss.lines) == 2
    (dotted,) = [line for line in accuracy.lines if line.get_linestyle() == ":"]
    assert dotted.get_label() == "val, study A"
    assert list(dotted.get_ydata()) == [0.5, 0.6]


def test_confusion_heatmap_writes_counts_and_shades_shares() -> None:
    matrix = np.array([[8, 2, 0], [1, 0, 3], [0, 0, 0]])
    ax = plots.confusion_heatmap(matrix, NAMES).axes[0]
    assert [t.get_text() for t in ax.texts] == [str(n) for n in matrix.ravel()]
    shares = [[0.8, 0.2, 0], [0.25, 0, 0.75], [0, 0, 0]]
    np.testing.assert_allclose(ax.collections[0].get_array(), shares)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("predicted class", "true class")
    assert [label.get_text() for label in ax.get_yticklabels()] == list(NAMES)


def test_class_histogram_counts_each_split() -> None:
    labels = {"train": torch.tensor([0, 0, 1]), "test": np.array([1])}
    (ax,) = plots.class_histogram(labels, NAMES).axes
    assert [bar.get_height() for bar in ax.patches] == [2, 1, 0, 0, 1, 0]
    legend = ax.get_legend()
    assert legend is not None
    assert [t.get_text() for t in legend.get_texts()] == ["train (3)", "test (1)"]


@pytest.mark.parametrize("cost", plots_compare.COSTS)
def test_accuracy_vs_cost_places_and_names_the_points(cost: str) -> None:
    figure = plots_compare.accuracy_vs_cost(comparison(), cost)
    (ax,) = figure.axes
    known = comparison().dropna(subset="test_accuracy")
    (drawn,) = [c for c in ax.collections if isinstance(c, PathCollection)]
    np.testing.assert_array_equal(drawn.get_offsets(), known[[cost, "test_accuracy"]].astype(float))
    colors = [mpl.colors.to_hex(color).upper() for color in drawn.get_facecolors()]  # type: ignore[attr-defined]
    assert colors == [plots.ORANGE, plots.BLUE, plots.BLUE]  # a start from ImageNet stands out
    (legend,) = figure.legends
    shown = {t.get_text() for t in legend.get_texts()}
    timed = cost == "train_seconds"  # a time is a machine's
    assert shown == {"random weights", "ImageNet's weights"} | (
        {"a GPU", "a CPU"} if timed else set()
    )
    assert [t.get_text() for t in ax.texts] == ["slow", "fast", "new"]
    assert ax.get_xscale() == "log" and "log scale" in ax.get_xlabel()
    low, high = ax.get_xlim()
    ticks = [tick for tick in ax.get_xticks() if low <= tick <= high]
    assert len(ticks) >= 2
    assert "logit scale" in ax.get_ylabel()
    if timed:  # a time from a shared machine has a white centre
        (white,) = [line for line in ax.lines if line.get_color() == "white"]
        assert white.get_xdata().tolist() == [4000]
        assert white.get_zorder() > drawn.get_zorder()


def test_labels_cover_neither_each_other_nor_another_point() -> None:
    frame = pd.DataFrame(
        {
            "notebook": "01_baseline",
            "experiment": [f"experiment_{i}" for i in range(8)],
            "test_accuracy": 0.93 + 0.001 * np.arange(8) % 0.003,
            "low": np.nan,
            "high": np.nan,
            "parameters": 1e6 * (1 + 0.02 * np.arange(8)),
            "weights": "imagenet",
        }
    )
    frame.loc[8] = ["01_baseline", "far", 0.8, np.nan, np.nan, 2e7, "imagenet"]
    figure = plots_compare.accuracy_vs_cost(frame, "parameters")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    (ax,) = figure.axes
    boxes = []
    for label in ax.texts:
        boxes.append(Text.get_window_extent(label, canvas.get_renderer()))
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    dots = ax.transData.transform(frame[["parameters", "test_accuracy"]].astype(float).to_numpy())
    for (i, box), (j, dot) in product(enumerate(boxes), enumerate(dots)):
        near = 5 if i == j else 10  # pixels; nearer, it would seem to name the other point
        assert not box.padded(near).contains(*dot)
    inside = ax.get_window_extent(canvas.get_renderer())
    assert all(inside.containsx(b.x0) and inside.containsx(b.x1) for b in boxes)


def test_accuracies_and_intervals_at_the_ends_of_the_scale_hide_no_point() -> None:
    columns = ["notebook", "experiment", "test_accuracy", "low", "high", "parameters", "weights"]
    rows = [("", "all", 1.0, 0.9, 1.1, 1e5, None), ("", "wide", 0.5, -0.2, 1.2, 1e6, None)]
    (ax,) = plots_compare.accuracy_vs_cost(pd.DataFrame(rows, columns=columns), "parameters").axes
    low, high = ax.get_ylim()
    (drawn,) = [c for c in ax.collections if isinstance(c, PathCollection)]
    assert 0 < low < 0.5 < high < 1
    assert all(low < y < high for y in drawn.get_offsets()[:, 1])


@pytest.mark.parametrize("spread", [0.3, 0.015, 0.004])
def test_however_close_the_accuracies_lie_the_axis_has_different_numbers(spread: float) -> None:
    columns = ["notebook", "experiment", "test_accuracy", "low", "high", "parameters", "weights"]
    rows = [("", str(i), 0.816 - i * spread, np.nan, np.nan, 10**5 * 2**i, None) for i in range(2)]
    (ax,) = plots_compare.accuracy_vs_cost(pd.DataFrame(rows, columns=columns), "parameters").axes
    low, high = ax.get_ylim()
    said = ax.yaxis.get_major_formatter().format_ticks(list(ax.get_yticks()))
    seen = [t for y, t in zip(ax.get_yticks(), said, strict=True) if low <= y <= high]
    assert len(set(seen)) == len(seen) >= 2


@pytest.mark.parametrize("accuracy", [0.004, 0.5, 0.978])
def test_one_point_alone_lies_inside_the_axes(accuracy: float) -> None:
    frame = comparison().head(1).assign(test_accuracy=accuracy, low=np.nan, high=np.nan)
    (ax,) = plots_compare.accuracy_vs_cost(frame).axes
    low, high = ax.get_ylim()
    assert 0.5 * accuracy < low < accuracy < high < min(1, 1.5 * accuracy)


def test_experiments_of_one_name_are_told_apart_by_their_notebooks() -> None:
    frame = comparison().head(3).assign(experiment=["vgg16", "small", "vgg16"])
    frame = frame.assign(notebook=["01_baseline", "02_speed", "04_final"])
    (ax,) = plots_compare.accuracy_vs_cost(frame).axes
    assert [t.get_text() for t in ax.texts] == ["01/vgg16", "small", "04/vgg16"]


def test_a_chart_of_nothing_measured_is_empty_not_an_error() -> None:
    (ax,) = plots_compare.accuracy_vs_cost(comparison().tail(1)).axes
    assert len(ax.texts) == 0


def test_unknown_cost_is_refused() -> None:
    with pytest.raises(ValueError, match="cost: got 'price'; allowed are train_seconds, "):
        plots_compare.accuracy_vs_cost(comparison(), "price")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.5, "0.5 s"), (30, "30 s"), (60, "1 min"), (1800, "30 min")]
)
def test_duration_ticks(seconds: float, text: str) -> None:
    assert execution.duration(seconds) == text
    assert execution.duration(3600 * 10) == "10 h"


def test_reported_vs_measured_pairs_the_dots() -> None:
    (ax,) = plots_compare.reported_vs_measured(told()).axes
    lines = {line.get_label(): line for line in ax.lines}
    reported = np.asarray(lines["reported by the source"].get_xdata())
    np.testing.assert_array_equal(reported, [0.92, 0.9401])
    np.testing.assert_array_equal(ax.lines[0].get_xdata(), [0.93, 0.9])
    (interval,) = [s for s in ax.collections[1].get_segments() if not np.isnan(s).any()][:1]
    np.testing.assert_allclose(interval[:, 0], [0.925, 0.935])
    seeds = lines["each seed"].get_xydata()
    np.testing.assert_allclose(seeds[:, 0], [0.928, 0.93, 0.932, 0.9])
    assert np.floor(seeds[:, 1]).tolist() == [0, 0, 0, 1]
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert names == ["D: 03/slow\ntest, n = 3", "airbench: 02/fast\ntest, with TTA, n = 1"]


def test_reliability_diagram_draws_a_panel_each() -> None:
    figure = plots_evaluation.reliability_diagram({"before": reliability(), "after": reliability()})
    assert [ax.get_title() for ax in figure.axes] == ["before", "after"]
    for ax in figure.axes:
        assert [bar.get_height() for bar in ax.patches] == [0.25, 0.75]
        np.testing.assert_array_equal(ax.lines[1].get_xydata(), [[0.4, 0.5], [0.9, 0.75]])
        (segments,) = [c.get_segments() for c in ax.collections]
        np.testing.assert_allclose(segments[1][:, 1], [0.6, 1.0])


def test_corruption_curves_draw_means_over_seeds_and_their_range() -> None:
    figure = plots_evaluation.corruption_curves({"a": corruptions(1), "b": corruptions(2)})
    titles = [ax.get_title() for ax in figure.axes]
    assert titles == ["noise", "blur", "contrast", "brightness", "JPEG", "mean of all"]
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["a, n = 2", "b, n = 2"]
    noise, *_, everything = figure.axes
    drawn = [line for line in noise.lines if len(line.get_xdata()) == 6]
    np.testing.assert_allclose(drawn[0].get_ydata(orig=False), 0.96 - np.arange(6) / 50)
    np.testing.assert_allclose(drawn[1].get_ydata(orig=False), 0.91 - np.arange(6) / 50)
    np.testing.assert_allclose(
        everything.lines[0].get_ydata(orig=False), 0.96 - 3 * np.arange(6) / 50
    )
    np.testing.assert_allclose(noise.collections[0].get_segments()[0][:, 1], [0.95, 0.97])
    # Each panel begins a step of ten below what lies lowest in it.
    assert [round(ax.get_ylim()[0], 2) for ax in figure.axes] == [0.8, 0.7, 0.6, 0.5, 0.4, 0.6]
    many = plots_evaluation.corruption_curves({str(i): corruptions(1) for i in range(9)})
    curves = [line for line in many.axes[0].lines if len(line.get_xdata()) == 6]
    assert len({(line.get_color(), line.get_linestyle()) for line in curves}) == 9
    one = corruptions().query("seed == 0").drop(columns="seed")
    assert curves[-1].get_color() == "black"  # the report's own, drawn last and so on top
    line = plots_evaluation.corruption_curves({"a": one}).axes[0].lines[0]
    np.testing.assert_allclose(line.get_ydata(orig=False), 0.95 - np.arange(6) / 50)


def test_class_scores_are_dots_with_their_intervals() -> None:
    panels = plots_evaluation.class_score_dots(scores()).axes
    assert [ax.get_title() for ax in panels] == ["precision", "recall", "F1"]
    assert [label.get_text() for label in panels[0].get_yticklabels()] == list(NAMES)
    for ax in panels:
        np.testing.assert_allclose(ax.lines[0].get_xdata(orig=False), [0.7, 1.0, np.nan])
        np.testing.assert_allclose(ax.collections[0].get_segments()[0][:, 0], [0.6, 0.8])
        assert ax.get_xlim()[0] < 0.6


def test_evidence_is_laid_over_a_grey_picture() -> None:
    maps = torch.zeros(2, 32, 32)
    maps[:, 0, 0] = 1
    laid = plots_evaluation.overlay(images(2), maps)
    assert laid.shape == (2, 3, 32, 32) and laid.min() >= 0 and laid.max() <= 1
    np.testing.assert_allclose(
        laid[:, :, 1, 1],
        0.35 * images(2).float().mean(1)[:, 1, 1, None].expand(2, 3) / 255,
        atol=0.01,
    )
    assert (laid[:, :, 0, 0] > 0.4).all()


def test_example_grid_puts_each_augmentation_below_its_original() -> None:
    originals, draw = images(3), images(3).flip(-1).float() / 255
    figure = plots_images.example_grid(originals, [2, 0, 1], NAMES, [draw], per_band=2)
    grid = np.array([ax.images[0].get_array() if ax.images else None for ax in figure.axes], object)
    pixels = originals.permute(0, 2, 3, 1).numpy()
    mirrored = pixels[:, :, ::-1]
    # Bands of two: originals 0 and 1, their draws, original 2 and a gap, its draw and a gap.
    expected = [pixels[0], pixels[1], mirrored[0], mirrored[1], pixels[2], None, mirrored[2], None]
    for drawn, wanted in zip(grid, expected, strict=True):
        assert (drawn is None) == (wanted is None)
        if wanted is not None:
            np.testing.assert_array_equal(drawn, wanted)
    titles = [ax.get_title() for ax in figure.axes]
    assert titles == ["frog", "cat", "", "", "dog", "", "", ""]
    assert [ax.get_ylabel() for ax in figure.axes][::2] == ["original", "draw 1"] * 2


def test_mistakes_come_surest_first() -> None:
    probabilities = np.array([[0.6, 0.3, 0.1], [0.1, 0.9, 0], [0.05, 0, 0.95], [0.3, 0.3, 0.4]])
    labels = [1, 1, 0, 0]  # wrong: 0 as cat 60 %, 2 as frog 95 %, 3 as frog 40 %
    figure = plots_images.mistakes_grid(images(4), labels, probabilities, NAMES, n=2)
    drawn = [ax for ax in figure.axes if ax.images]
    assert [ax.get_title() for ax in drawn] == [
        "cat\ncalled frog\n95.00 %",
        "dog\ncalled cat\n60.00 %",
    ]
    for ax, i in zip(drawn, (2, 0), strict=True):
        np.testing.assert_array_equal(ax.images[0].get_array(), images(4)[i].permute(1, 2, 0))


def test_no_mistakes_says_so() -> None:
    figure = plots_images.mistakes_grid(images(3), [0, 1, 2], np.eye(3), NAMES)
    assert "no mistakes" in {ax.get_title(loc="left") for ax in figure.axes}


def test_pictures_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"images: got shape \(3, 32, 32\); allowed is"):
        plots_images.to_pixels(images(1)[0])


def test_a_ladder_shows_gain_and_loss_and_says_why() -> None:
    frame = pd.DataFrame(
        {
            "rung": ["a", "b", "c"],
            "why": ["slow", "faster", "more work"],
            "images_per_second": [10.0, 100.0, 50.0],
            "low": [9.0, 90.0, 40.0],
            "high": [11.0, 110.0, 60.0],
        }
    )
    (ax,) = plots_speed.ladder(frame, caption_text="c").axes
    said = [text.get_text() for text in ax.texts]
    assert 50 <= max(ax.get_xticks()) <= 220, "where the labels are, ticks say nothing"
    assert "100, 10 times · faster" in said[1] and "50, 0.5 times · more work" in said[2]
    widths = [bar.get_width() for bar in ax.patches]
    assert widths == [0, 90, -50]
    colors = {bar.get_facecolor() for bar in ax.patches[1:]}
    assert len(colors) == 2


def test_shares_fill_each_bar_and_name_the_large_ones() -> None:
    frame = pd.DataFrame({"convolutions": [6.0, 1.0], "all else": [2.0, 0.01]}, index=["a", "b"])
    (ax,) = plots_speed.shares(frame, caption_text="c").axes
    ends = [[bar.get_x() + bar.get_width() for bar in bars] for bars in ax.containers]
    assert ends[-1] == pytest.approx([1, 1])
    assert [text.get_text() for text in ax.texts] == ["75", "99", "25", ""]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b"]


@pytest.mark.parametrize("slowdown", [None, 3.0])
def test_accuracy_against_seconds_adds_the_usual_pace_where_it_is_known(slowdown) -> None:
    metrics = pd.DataFrame(
        {"seed": [0, 0], "epoch": [1, 2], "seconds": [2.0, 4.0], "val_accuracy": [0.5, 0.6]}
    )
    (ax,) = plots_speed.accuracy_against_seconds(metrics, slowdown).axes
    lines = [line.get_xdata().tolist() for line in ax.lines]
    assert lines == [[2, 6]] + ([[6, 18]] if slowdown else [])
