"""What many tests share: the embedded digits, and a configuration that trains in a second."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from hypothesis import given, settings

from cifar_lib import __main__ as cli
from cifar_lib import train_evaluate
from cifar_lib.config import TrainConfig
from cifar_lib.data import Splits, load_splits

ROOT = Path(__file__).resolve().parents[1]
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


PARAMS = """\
question: What?
dataset: digits
n_train: 100
width: 0.125
epochs: 1
batch_size: 50
precision: fp32
"""
"""A parameter file that trains in a second."""


@pytest.fixture(scope="session")
def digits() -> Splits:
    return load_splits(TrainConfig(**TINY))


@pytest.fixture(scope="session")
def tiny():
    """Makes a configuration from TINY with some fields changed."""
    return lambda **changes: TrainConfig(**(TINY | changes))


@pytest.fixture(autouse=True, scope="session")
def _ctrl_c_is_heard():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)  # tiny work: more threads only wait for each other


@pytest.fixture
def evaluated(monkeypatch) -> list[int]:
    """How many images each evaluation of a training looked at, in order."""
    seen: list[int] = []
    real = train_evaluate.predict_logits
    monkeypatch.setattr(
        train_evaluate,
        "predict_logits",
        lambda model, images, **rest: (seen.append(len(images)), real(model, images, **rest))[1],
    )
    return seen


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


PARAMETERS = """\
question: str = "What?"  # what it asks
dataset: str = "digits"  # auto, cifar10 or digits
n_train: int = 200  # images
width: float = 0.125  # factor
epochs: int = 3  # passes
batch_size: int = 50  # images
precision: str = "fp32"  # autocast type
seeds: list = [0]  # one run each
experiment: str = "smoke"  # its name
preset: str = "smoke"  # its preset
report_dir: str = ""  # where to"""
TOY = """\
from cifar_lib.config import TrainConfig, parse_config
from cifar_lib.reports import Report
from cifar_lib.study_runs import runs
config = parse_config({k: v for k, v in globals().items() if k in TrainConfig.model_fields})
finished = runs(config, seeds, experiment=experiment, preset=preset, progress=False)
_ = Report(report_dir, "toy", experiment, preset, question).finish(config, finished)"""
TOY_PARAMS = """\
question: What?
dataset: digits
n_train: 200
width: 0.125
epochs: 1000
batch_size: 50
precision: fp32
"""


def many(short: int, long: int, **strategies):
    """Tries a property often: `short` times in the normal suite, `long` times under `long`.

    The short one tries the same every time; the long one tries others each time.
    """

    def decorate(body):
        @pytest.mark.timeout(3600)
        @pytest.mark.parametrize("times", [short, pytest.param(long, marks=pytest.mark.long)])
        def test(times):
            options = {"max_examples": times, "derandomize": times == short, "deadline": None}
            settings(**options, database=None)(given(**strategies)(body))()

        test.__name__, test.__doc__ = body.__name__, body.__doc__
        return test

    return decorate


class Clone:
    """A checkout of its own for real processes: the library, and one toy notebook to study."""

    def __init__(self, root: Path) -> None:
        self.root, self.params = root, root / "params/toy/one.yaml"
        self.params.parent.mkdir(parents=True)
        (root / "notebooks").mkdir()
        shutil.copytree(ROOT / "cifar_lib", root / "cifar_lib")
        cells = [nbformat.v4.new_code_cell(text) for text in (PARAMETERS, TOY)]
        cells[0].metadata["tags"] = ["parameters"]
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
        nbformat.write(notebook, root / "notebooks/toy.ipynb")
        self.params.write_text(TOY_PARAMS)
        (root / "params/study.yaml").write_text(
            "presets:\n  quick:\n    - {notebook: toy, params: toy/one.yaml}\n"
        )
        self.environment = os.environ | {
            "PYTHONPATH": str(root),
            "CIFAR10_DOWNLOAD": "0",
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
        }

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "cifar_lib", *words]

    def start(self, *words: str) -> subprocess.Popen:
        """Starts a command in a session of its own, in which Ctrl-C is not ignored."""
        return subprocess.Popen(
            self.command(*words),
            cwd=self.root,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def run(self, *words: str) -> tuple[int, str, str]:
        process = self.start(*words)
        out, err = process.communicate(timeout=300)
        return process.returncode, out, err


@pytest.fixture
def clone(tmp_path) -> Clone:
    return Clone(tmp_path / "checkout")
