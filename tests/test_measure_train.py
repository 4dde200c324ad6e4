"""The loss on unaugmented training images: what it is measured on, and that it changes nothing."""

import pytest
import torch

from cifar_lib import results
from cifar_lib.data import split_train
from cifar_lib.evaluate import accuracy, cross_entropy, predict_logits
from cifar_lib.models import build_model
from cifar_lib.train import train

HARD = {"dropout": 0.5, "flip": "random", "translate": 8, "epochs": 2}  # far from the clean images


@pytest.fixture(scope="module")
def measured(tmp_path_factory, digits, tiny):
    return train(tiny(measure_train=60, **HARD), 0, digits, tmp_path_factory.mktemp("measured"))


def test_it_is_the_evaluation_of_a_stratified_subset(measured, digits):
    _, clean = split_train(digits.train, 60 / len(digits.train), None, 0)
    assert len(clean) == 60 and set(clean.labels.bincount().tolist()) <= {5, 6, 7}
    state = torch.load(measured.path / "last.pt")
    model = build_model(measured.config, 10)
    results.load_state(model, state["model"], "last.pt")
    mean, std = digits.train.statistics
    logits = predict_logits(model, clean.images, mean=mean, std=std, channels_last=True)
    last = measured.metrics.iloc[-1]
    assert last.clean_train_loss == pytest.approx(cross_entropy(logits, clean.labels), rel=1e-4)
    assert last.clean_train_accuracy == accuracy(logits, clean.labels)


def test_the_contracted_columns_stay_first_and_the_training_as_it_was(
    measured, digits, tiny, tmp_path
):
    assert list(measured.metrics) == [*results.METRIC_COLUMNS, *results.CLEAN_COLUMNS]
    plain = train(tiny(**HARD), 0, digits, tmp_path)
    assert list(plain.metrics) == results.METRIC_COLUMNS
    for column in results.METRIC_COLUMNS[:-1]:
        assert plain.metrics[column].equals(measured.metrics[column]), column
    both = results.metrics_frame([measured, plain])
    assert both.clean_train_loss.notna().tolist() == [True, True, False, False]


def test_more_images_than_there_are_means_all(digits, tiny, tmp_path, evaluated):
    train(tiny(epochs=1, measure_train=10_000), 0, digits, tmp_path)
    assert evaluated == [len(digits.val), len(digits.train), len(digits.test)]
