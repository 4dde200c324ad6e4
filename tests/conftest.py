"""What many tests share: the embedded digits, and a configuration that trains in a second."""

import sys

import pytest
import torch

from cifar_lib import __main__ as cli
from cifar_lib.config import TrainConfig
from cifar_lib.data import Splits, load_splits

TINY = {
    "dataset": "digits",
    "n_train": 200,
    "model": "small_cnn",
    "width": 0.125,
    "flip": "none",
    "translate": 1,
    "epochs": 3,
    "batch_size": 50,
    "learning_rate": 0.05,
    "precision": "fp32",
}


@pytest.fixture(scope="session")
def digits() -> Splits:
    return load_splits(TrainConfig(**TINY))


@pytest.fixture(scope="session")
def tiny():
    """Makes a configuration from TINY with some fields changed."""
    return lambda **changes: TrainConfig(**(TINY | changes))


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)  # tiny work: more threads only wait for each other


@pytest.fixture
def call(monkeypatch, capsys):
    """Calls the command line as a shell would: status, standard output, standard error."""

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["cifar_lib", *words])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        output = capsys.readouterr()
        return int(caught.value.code or 0), output.out, output.err

    return run
