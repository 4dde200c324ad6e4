"""A careful evaluation against sums by hand, scipy, scikit-learn and Pillow."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from scipy import ndimage, stats
from sklearn.metrics import precision_recall_fscore_support
from torch import Tensor, nn

from cifar_lib.config import TrainConfig
from cifar_lib.evaluate import accuracy, calibration_error, cross_entropy
from cifar_lib.evaluate_calibration import (
    TEMPERATURES,
    calibration_frame,
    fit_temperature,
    reliability_frame,
)
from cifar_lib.evaluate_classes import class_scores
from cifar_lib.evaluate_compare import compare_paired
from cifar_lib.evaluate_robustness import SEVERITIES, corrupt, corruption_frame
from cifar_lib.evaluate_saliency import hires_cam
from cifar_lib.models import MODELS, build_model

EVERY = [(name, severity) for name in SEVERITIES for severity in range(1, 6)]


def random_predictions(n: int = 400, k: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(k, (n,), generator=torch.Generator().manual_seed(0))
    logits = 2 * torch.randn(n, k, generator=generator)
    logits[torch.arange(n), labels] += 2
    return logits, labels


def pictures(n: int = 3) -> Tensor:
    """Smooth as photographs are, each different."""
    generator = torch.Generator().manual_seed(0)
    small = torch.randint(40, 216, (n, 3, 6, 6), generator=generator).float()
    return nn.functional.interpolate(small, size=32, mode="bicubic").clamp(0, 255).byte()


# --- classes --------------------------------------------------------------------------------


def test_class_scores_are_scikit_learns_with_wilsons_intervals() -> None:
    logits, labels = random_predictions()
    table = class_scores([logits], labels, "abcd")
    scores = precision_recall_fscore_support(labels, logits.argmax(1))
    for name, expected in zip(("precision", "recall", "f1"), scores, strict=False):
        np.testing.assert_allclose(table[name], expected)
        assert (table[f"{name}_low"] < table[name]).all()
        assert (table[f"{name}_high"] > table[name]).all()
    called, true = logits.argmax(1) == 2, labels == 2
    both = int((called & true).sum())
    for name, of in (("precision", called), ("recall", true), ("f1", called | true)):
        interval = stats.binomtest(both, int(of.sum())).proportion_ci(method="wilson")
        ends = np.array([interval.low, interval.high])
        ends = 2 * ends / (1 + ends) if name == "f1" else ends
        np.testing.assert_allclose(table.loc[2, [f"{name}_low", f"{name}_high"]], ends)


def test_the_interval_of_f1_covers_it_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    kinds = [0.08, 0.02, 0.03, 0.87]  # right, missed, wrongly called, neither
    f1 = 2 * 0.08 / (2 * 0.08 + 0.05)
    covered = 0
    for counts in generator.multinomial(1000, kinds, size=150):
        truth = torch.tensor([1, 1, 0, 0]).repeat_interleave(torch.tensor(counts))
        called = torch.tensor([1, 0, 1, 0]).repeat_interleave(torch.tensor(counts))
        row = class_scores([nn.functional.one_hot(called, 2).float()], truth, "ab").loc[1]
        covered += row.f1_low <= f1 <= row.f1_high
    assert 0.9 <= covered / 150 <= 0.99


def test_several_seeds_are_averaged_and_never_count_as_more_images() -> None:
    (one, labels), (other, _) = random_predictions(), random_predictions(seed=1)
    single, twice = (class_scores(s, labels, "abcd") for s in ([one], [one, one]))
    np.testing.assert_allclose(single.iloc[:, 1:], twice.iloc[:, 1:])
    seven = class_scores([random_predictions(seed=seed)[0] for seed in range(7)], labels, "abcd")
    assert seven["n"].tolist() == labels.bincount(minlength=4).tolist()  # a mean may lie below
    both = class_scores([one, other], labels, "abcd").recall
    separate = [class_scores([s], labels, "abcd").recall for s in (one, other)]
    np.testing.assert_allclose(both, np.mean(separate, axis=0))


def test_a_class_never_called_has_no_precision() -> None:
    table = class_scores([torch.eye(3)[[0, 0, 1]]], torch.tensor([0, 2, 1]), "abc")
    assert table.precision.isna().tolist() == [False, False, True]
    assert table.loc[2, ["recall", "f1"]].tolist() == [0, 0]
    assert table.loc[2, "recall_high"] > 0.5  # one image says little


# --- calibration ----------------------------------------------------------------------------


@pytest.mark.parametrize("true", [0.5, 1.0, 3.0])
def test_the_temperature_that_made_the_labels_is_found(true: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(20_000, 5, generator=generator)
    labels = (logits / true).softmax(1).multinomial(1, generator=generator).squeeze(1)
    fitted = fit_temperature(logits, labels)
    assert fitted == pytest.approx(true, rel=0.05)
    nearby = [cross_entropy(logits / (fitted * f), labels) for f in (0.98, 1.02)]
    assert cross_entropy(logits / fitted, labels) < min(nearby)
    before, after = calibration_frame(logits, labels, fitted).itertuples()
    assert (before.temperature, after.temperature) == (1.0, fitted)
    assert after.ece < 0.02 and after.nll <= before.nll and after.brier <= before.brier + 1e-4
    assert accuracy(logits, labels) == accuracy(logits / fitted, labels)


def test_a_model_without_mistakes_has_a_temperature_all_the_same() -> None:
    assert fit_temperature(torch.eye(3), torch.arange(3)) == pytest.approx(TEMPERATURES[0], 0.01)
    assert len(calibration_frame(torch.eye(3), torch.arange(3), None)) == 1


@pytest.mark.parametrize("bins", [1, 15])
def test_the_reliability_diagram_adds_up_to_the_calibration_error(bins: int) -> None:
    logits, labels = random_predictions()
    table = reliability_frame(logits, labels, bins)
    gap = (table.n * (table.accuracy - table.confidence).abs()).sum() / table.n.sum()
    assert gap == pytest.approx(calibration_error(logits, labels, bins))
    assert table.n.sum() == len(labels)
    assert (table.low <= table.accuracy).all() and (table.accuracy <= table.high).all()


# --- corruptions ----------------------------------------------------------------------------


def plain(image: Tensor, name: str, severity: int) -> np.ndarray:
    """One image corrupted by other code: scipy's or Pillow's."""
    value, pixels = SEVERITIES[name][severity - 1], image.permute(1, 2, 0).numpy()
    if name == "gaussian_blur":
        return ndimage.gaussian_filter(pixels.astype(float), (value, value, 0), mode="mirror")
    picture, file = Image.fromarray(pixels), io.BytesIO()
    if name == "jpeg":
        picture.save(file, "JPEG", quality=int(value))
        return np.asarray(Image.open(file)).astype(float)
    kind = {"contrast": ImageEnhance.Contrast, "brightness": ImageEnhance.Brightness}[name]
    return np.asarray(kind(picture).enhance(value)).astype(float)


@pytest.mark.parametrize(("name", "severity"), [e for e in EVERY if e[0] != "gaussian_noise"])
def test_corruptions_are_those_of_scipy_and_pillow(name: str, severity: int) -> None:
    images = pictures()
    for image, corrupted in zip(images, corrupt(images, name, severity), strict=True):
        difference = corrupted.permute(1, 2, 0).numpy() - plain(image, name, severity)
        assert np.abs(difference).max() <= 2


@pytest.mark.parametrize("severity", range(1, 6))
def test_noise_has_its_deviation_and_leaves_the_global_generator(severity: int) -> None:
    grey, state = torch.full((8, 3, 32, 32), 128, dtype=torch.uint8), torch.get_rng_state()
    difference = corrupt(grey, "gaussian_noise", severity).double() - 128
    sigma = 255 * SEVERITIES["gaussian_noise"][severity - 1]
    assert difference.std().item() == pytest.approx(sigma, rel=0.02)
    assert abs(difference.mean().item()) < 5 * sigma / difference.numel() ** 0.5
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("name", SEVERITIES)
def test_each_severity_changes_more_and_always_in_the_same_way(name: str) -> None:
    images = pictures(20)
    before, changes = images.clone(), []
    for severity in range(1, 6):
        corrupted = corrupt(images, name, severity)
        assert torch.equal(corrupted, corrupt(images, name, severity))
        assert corrupted.dtype == torch.uint8 and corrupted.shape == images.shape
        changes.append((corrupted.float() - images.float()).abs().mean().item())
    assert changes == sorted(changes) and changes[0] > 0
    assert torch.equal(images, before)


@pytest.mark.parametrize(
    ("name", "severity", "said"),
    [("fog", 1, "corruption: got 'fog'; allowed"), ("jpeg", 0, "severity: got 0; allowed is 1..5")],
)
def test_an_unknown_corruption_is_refused(name: str, severity: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        corrupt(pictures(), name, severity)


def test_accuracy_is_measured_on_clean_and_corrupted_images() -> None:
    images, seen = pictures(6), []
    labels = torch.tensor([0, 0, 1, 1, 1, 1])

    def predict(batch: Tensor) -> Tensor:
        """Knows the clean images; calls every other one class 0."""
        seen.append(len(batch))
        clean = torch.stack([(b == images).all((1, 2, 3)).any() for b in batch])
        return nn.functional.one_hot(labels * clean, 2).float()

    table = corruption_frame(predict, images, labels)
    assert len(table) == 26 and set(seen) == {6}
    assert list(zip(table.corruption, table.severity, strict=True)) == [("none", 0), *EVERY]
    assert table.accuracy.tolist() == [1.0, *[pytest.approx(1 / 3)] * 25]
    assert (table.low < table.accuracy).all() and table.high[0] == 1
    seen.clear()
    labels = labels[[0, 2, 5]]  # evenly spread: a file may be sorted by class
    limited = corruption_frame(predict, images, torch.tensor([0, 0, 1, 1, 1, 1]), limit=3)
    assert set(seen) == {3} and limited.accuracy[0] == 1


# --- two models -----------------------------------------------------------------------------


def answers(both: int, only_first: int, only_second: int, neither: int) -> tuple[list, list]:
    first = [True] * (both + only_first) + [False] * (only_second + neither)
    second = [True] * both + [False] * only_first + [True] * only_second + [False] * neither
    return first, second


def test_a_paired_comparison_by_hand() -> None:
    result = compare_paired(*answers(50, 8, 1, 41))
    assert (result["n"], result["only_first"], result["only_second"]) == (100, 8, 1)
    assert result["accuracy_first"] == pytest.approx(0.58)
    assert result["accuracy_second"] == pytest.approx(0.51)
    assert result["difference"] == pytest.approx(0.07)
    assert result["p_exact"] == pytest.approx(2 * (1 + 9) / 2**9)  # 0 or 1 head of 9 coins


def test_the_bootstrap_is_one_over_images() -> None:
    first, second = map(np.array, answers(500, 60, 30, 410))
    result = compare_paired(first, second)
    generator = np.random.default_rng(1)
    picked = generator.integers(1000, size=(4000, 1000))
    differences = (first[picked].astype(int) - second[picked]).mean(axis=1)
    low, high = np.quantile(differences, [0.025, 0.975])
    assert result["low"] == pytest.approx(low, abs=0.002)
    assert result["high"] == pytest.approx(high, abs=0.002)


def test_the_comparison_is_the_same_from_both_sides() -> None:
    first, second = answers(50, 20, 12, 10)
    there, back = compare_paired(first, second), compare_paired(second, first)
    assert there["p_exact"] == back["p_exact"]
    assert there["difference"] == -back["difference"]
    same = compare_paired(first, first)
    assert (same["p_exact"], same["low"], same["high"]) == (1, 0, 0)


@pytest.mark.parametrize("second", [[], [True], [[True, False]]])
def test_answers_to_different_images_are_refused(second: list) -> None:
    with pytest.raises(ValueError, match="first, second: got shapes"):
        compare_paired([True, False] if second else [], second)


# --- saliency -------------------------------------------------------------------------------

ZERO, ONE = torch.zeros(3), torch.ones(3)


def test_evidence_lies_where_the_network_looks() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 1, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 2)
    )
    for parameter, value in zip(model.parameters(), (1.0, 0.0, 1.0, 0.0), strict=True):
        nn.init.constant_(parameter, value)
    with torch.no_grad():
        model[-1].weight[1] = -1  # class 0 for bright pixels, else class 1
        model[-1].bias[1] = 0.03
    model[0].eval()
    images = torch.zeros(3, 3, 32, 32, dtype=torch.uint8)
    images[0, :, 4:12, 20:28] = 200
    images[1, :, 20:28, 0:8] = 100
    images[2, :, 4:8, 4:8] = 10  # class 1, and what is bright speaks against it
    maps = hires_cam(model, images, mean=ZERO, std=ONE)
    assert maps[2].max() == 0
    for image, heat in zip(images[:2], maps[:2], strict=True):
        torch.testing.assert_close(heat, (image[0] > 0).float())
    assert model.training and not model[0].training
    assert not any(module._forward_hooks for module in model.modules())
    assert hires_cam(model, torch.zeros_like(images), mean=ZERO, std=ONE).max() == 0


@pytest.mark.parametrize("name", MODELS)
def test_every_network_has_maps_to_look_at(name: str) -> None:
    torch.manual_seed(0)
    model = build_model(TrainConfig(model=name), 10)
    maps = hires_cam(model, pictures(), mean=0.5 * ONE, std=0.25 * ONE)
    assert maps.shape == (3, 32, 32) and maps.isfinite().all()
    assert maps.min() >= 0 and maps.amax((1, 2)).tolist() == [1, 1, 1]
