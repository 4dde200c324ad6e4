"""Metrics against scikit-learn, scipy and sums by hand; logits against a plain forward pass."""

import math

import numpy as np
import pytest
import torch
from conftest import many
from hypothesis import strategies as st
from scipy import special
from sklearn import metrics
from torch import Tensor, nn

from cifar_lib import evaluate
from cifar_lib.evaluate import mean_interval, predict_logits, proportion_interval
from cifar_lib.evaluate_classes import class_scores

MEAN, STD = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.25, 0.2, 0.1])


def random_predictions(n: int = 400, k: int = 10) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(k, (n,), generator=generator)
    logits = 2 * torch.randn(n, k, generator=generator)
    logits[torch.arange(n), labels] += 2
    return logits, labels


def random_images(n: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (n, 3, 32, 32), generator=generator, dtype=torch.uint8)


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.Flatten(), nn.Linear(7200, 4)
    )


class Pixel(nn.Module):
    """Shows what the model is given: one pixel of each image, as its logits."""

    def __init__(self, row: int, column: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.row, self.column = row, column

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x[:, :, self.row, self.column]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_logits_are_those_of_the_normalised_images(batch_size: int, channels_last: bool) -> None:
    model, images = small_model(), random_images(7)
    logits = predict_logits(
        model, images, mean=MEAN, std=STD, batch_size=batch_size, channels_last=channels_last
    )
    assert model.training
    x = (images / 255 - MEAN[:, None, None]) / STD[:, None, None]
    torch.testing.assert_close(logits, model.eval()(x), rtol=1e-4, atol=1e-4)
    assert logits.dtype == torch.float32 and not logits.is_inference()


def test_mirror_averages_the_image_and_its_mirror() -> None:
    images = random_images(5)
    logits = predict_logits(Pixel(3, 0), images, mean=MEAN, std=STD, tta="mirror")
    expected = (images[:, :, 3, 0].float() + images[:, :, 3, 31].float()) / 2
    torch.testing.assert_close(logits, (expected / 255 - MEAN) / STD)


def test_mirror_translate_weighs_six_views() -> None:
    images, row, column = random_images(5), 0, 4
    logits = predict_logits(Pixel(row, column), images, mean=MEAN, std=STD, tta="mirror_translate")
    # Up and left shows the pixel below and right; down and right the one above and left, which
    # at row 0 is row 1 by reflection. The mirror of column c is column 31 - c, moved likewise.
    views = [(0.5, 0, [4, 27]), (0.25, 1, [5, 28]), (0.25, 1, [3, 26])]
    expected = sum(w * images[:, :, r, c].float().mean(-1) for w, r, c in views)
    torch.testing.assert_close(logits, (expected / 255 - MEAN) / STD)


def test_views_add_up_to_one() -> None:
    x = torch.ones(1, 3, 32, 32)
    for tta in evaluate.TTA:
        assert sum(weight for weight, _ in evaluate._views(x, tta)) == 1


def test_autocast_returns_float32_near_the_full_precision() -> None:
    model, images = small_model(), random_images(6)
    exact = predict_logits(model, images, mean=MEAN, std=STD)
    rough = predict_logits(model, images, mean=MEAN, std=STD, dtype=torch.bfloat16)
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).abs().max() < 0.1


@pytest.mark.parametrize(
    ("images", "tta", "message"),
    [
        (torch.zeros(2, 3, 32, 32), "none", "images: got torch.float32"),
        (torch.zeros(0, 3, 32, 32, dtype=torch.uint8), "none", "N at least 1"),
        (random_images(1), "rotate", "tta: got 'rotate'; allowed are none, mirror"),
    ],
)
def test_predict_logits_refuses(images: Tensor, tta: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        predict_logits(small_model(), images, mean=MEAN, std=STD, tta=tta)  # type: ignore[arg-type]


def test_accuracies_and_losses_agree_with_scikit_learn() -> None:
    logits, labels = random_predictions()
    y, p, k = labels.numpy(), logits.double().softmax(1).numpy(), range(10)
    assert evaluate.accuracy(logits, labels) == metrics.accuracy_score(y, p.argmax(1))
    for top in (1, 5, 9):
        expected = metrics.top_k_accuracy_score(y, p, k=top, labels=k)
        assert evaluate.top_k_accuracy(logits, labels, top) == pytest.approx(expected)
    loss = metrics.log_loss(y, p, labels=k)
    assert evaluate.cross_entropy(logits, labels) == pytest.approx(loss)
    brier = ((p - np.eye(10)[y]) ** 2).sum(1).mean()
    assert evaluate.brier_score(logits, labels) == pytest.approx(brier)


@many(50, 2000, n=st.integers(1, 60), k=st.integers(2, 12), seed=st.integers(0, 2**32))
def test_every_metric_agrees_with_its_reference(n: int, k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(k, (n,), generator=generator)
    logits = (seed % 7) * torch.randn(n, k, generator=generator, dtype=torch.float64)
    logits += 1e-6 * torch.randn(n, k, generator=generator, dtype=torch.float64)  # no ties
    y, p, names = labels.numpy(), logits.softmax(1).numpy(), [str(i) for i in range(k)]
    predicted = p.argmax(1)
    assert evaluate.accuracy(logits, labels) == metrics.accuracy_score(y, predicted)
    order = (-p).argsort(1)
    for top in {1, min(5, k), k}:
        hits = [y[i] in order[i, :top] for i in range(n)]
        assert evaluate.top_k_accuracy(logits, labels, top) == pytest.approx(np.mean(hits))
    # scikit-learn's log_loss takes no probability below 2e-16 for what it is.
    loss = -special.log_softmax(logits.numpy(), axis=1)[np.arange(n), y].mean()
    assert evaluate.cross_entropy(logits, labels) == pytest.approx(loss, abs=1e-9)
    brier = ((p - np.eye(k)[y]) ** 2).sum(1).mean()
    assert evaluate.brier_score(logits, labels) == pytest.approx(brier)
    matrix = metrics.confusion_matrix(y, predicted, labels=range(k))
    np.testing.assert_array_equal(evaluate.confusion(logits, labels, k), matrix)
    table = class_scores([logits], labels, names)
    given = {"labels": range(k), "average": None, "zero_division": np.nan}
    np.testing.assert_allclose(table["recall"], metrics.recall_score(y, predicted, **given))
    np.testing.assert_allclose(table["precision"], metrics.precision_score(y, predicted, **given))
    error = 0.0
    for low in np.arange(15) / 15:
        inside = (p.max(1) > low) & (p.max(1) <= low + 1 / 15)
        if inside.any():
            gap = (predicted == y)[inside].mean() - p.max(1)[inside].mean()
            error += inside.mean() * abs(gap)
    assert evaluate.calibration_error(logits, labels) == pytest.approx(error, abs=1e-9)


def test_confusion_agrees_with_counting() -> None:
    logits, labels = random_predictions(k=4)
    predicted = logits.argmax(1)
    matrix = evaluate.confusion(logits, labels, 4)
    for i in range(4):
        for j in range(4):
            assert matrix[i, j] == ((labels == i) & (predicted == j)).sum()


def test_a_class_without_images_has_no_recall() -> None:
    table = class_scores([torch.eye(3)[:2]], torch.tensor([0, 1]), "abc")
    assert table["recall"].tolist()[:2] == [1, 1] and table["n"].tolist() == [1, 1, 0]
    assert math.isnan(table["recall"][2]) and math.isnan(table["precision"][2])
    assert evaluate.confusion(torch.eye(3)[:2], torch.tensor([0, 1]), 3).shape == (3, 3)


def test_calibration_error_by_hand() -> None:
    confidence = torch.tensor([0.9, 0.9, 0.9, 0.6, 0.6])
    logits = torch.stack([confidence.log(), (1 - confidence).log()], dim=1)
    labels = torch.tensor([0, 0, 1, 0, 0])  # right: two of three, two of two
    expected = 3 / 5 * (0.9 - 2 / 3) + 2 / 5 * (1 - 0.6)
    assert evaluate.calibration_error(logits, labels) == pytest.approx(expected, abs=1e-6)
    # One bin: over- and underconfidence cancel to the difference of the means.
    one_bin = abs(4 / 5 - confidence.mean().item())
    assert evaluate.calibration_error(logits, labels, bins=1) == pytest.approx(one_bin, abs=1e-6)


def test_a_bin_includes_its_upper_edge() -> None:
    logits = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]])  # probabilities 0.5 and 0.75
    labels = torch.tensor([0, 1])
    # With 2 bins 0.5 lies in the first and 0.75 in the second: the gaps do not cancel.
    assert evaluate.calibration_error(logits, labels, bins=2) == pytest.approx((0.5 + 0.75) / 2)


def test_mean_interval_is_students() -> None:
    interval = mean_interval([0.90, 0.92, 0.94])
    half = 4.302653 * 0.02 / math.sqrt(3)  # t of 2 degrees of freedom, 97.5 %
    assert (interval.mean, interval.n) == (pytest.approx(0.92), 3)
    assert (interval.low, interval.high) == (
        pytest.approx(0.92 - half, abs=1e-7),
        pytest.approx(0.92 + half, abs=1e-7),
    )
    same = mean_interval([0.5, 0.5])
    assert (same.low, same.high) == (0.5, 0.5)


def test_one_run_has_no_interval_and_none_is_refused() -> None:
    assert mean_interval([0.9]) == evaluate.Interval(0.9, None, None, 1)
    with pytest.raises(ValueError, match="values: got none"):
        mean_interval([])


def test_proportion_interval_is_wilsons() -> None:
    n, p, z = 10_000, 0.92, 1.959964
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    interval = proportion_interval(p, n)
    assert interval.low == pytest.approx(centre - half, abs=1e-8)
    assert interval.high == pytest.approx(centre + half, abs=1e-8)
    low = proportion_interval(1.0, 10).low
    assert low is not None and low > 0.6  # not of width 0, as the normal one would be


@pytest.mark.parametrize(("accuracy", "n", "field"), [(1.2, 10, "accuracy"), (0.5, 0, "n")])
def test_proportion_interval_refuses(accuracy: float, n: int, field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}: got"):
        proportion_interval(accuracy, n)


def test_mismatched_shapes_are_refused() -> None:
    logits, labels = random_predictions(10)
    with pytest.raises(ValueError, match=r"logits: got shape \(10, 10\) with labels \(9,\)"):
        evaluate.accuracy(logits, labels[:9])
    with pytest.raises(ValueError, match="k: got 11; allowed is 1..10"):
        evaluate.top_k_accuracy(logits, labels, 11)
    with pytest.raises(ValueError, match="class_names: got 3; the logits have 10"):
        class_scores([logits], labels, "abc")
