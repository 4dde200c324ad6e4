"""A run that is killed, again and again and anywhere, ends as one that never was."""

import contextlib
import multiprocessing
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from cifar_lib import results
from cifar_lib import train as train_module
from cifar_lib.checkpoint import load_checkpoint
from cifar_lib.config import TrainConfig
from cifar_lib.data import load_splits
from cifar_lib.train import train

CODE = """
import json, logging, sys
from pathlib import Path
import torch
from cifar_lib.config import parse_config
from cifar_lib.data import load_splits
from cifar_lib.train import train

torch.set_num_threads(1)
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
config = parse_config(json.loads(sys.argv[2]))
train(config, 0, load_splits(config), Path(sys.argv[1]))
"""


def start(run_dir: Path, config) -> subprocess.Popen:
    words = [sys.executable, "-u", "-c", CODE, str(run_dir), config.model_dump_json()]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)


def kill_after(process: subprocess.Popen, epoch: int) -> str:
    """Kills a process just after it said that an epoch ended; returns what it said till then."""
    said = ""
    for line in process.stdout:
        said += line
        if f"epoch {epoch}/" in line:
            process.kill()
            break
    process.wait()
    process.stdout.close()
    return said


def test_three_kills_change_nothing(tmp_path, tiny):
    config = tiny(n_train=None, epochs=8, dropout=0.2, mixup=0.2, ema_decay=0.9, optimizer="adam")
    config = config.model_copy(update={"learning_rate": 0.01})
    whole = start(tmp_path / "whole", config)
    whole.communicate()
    assert whole.returncode == 0
    for epoch in (1, 3, 5):
        said = kill_after(start(tmp_path / "killed", config), epoch)
        assert epoch == 1 or "resuming after epoch" in said
        assert not results.is_finished(tmp_path / "killed")
    last = start(tmp_path / "killed", config)
    said, _ = last.communicate()
    assert last.returncode == 0 and "resuming after epoch" in said
    assert_equal_to_the_bit(tmp_path / "whole", tmp_path / "killed")


def assert_equal_to_the_bit(*folders: Path) -> None:
    """Holds two runs equal: what they reached, and the whole state they would go on from."""
    a, b = map(results.load_run, folders)
    pd.testing.assert_frame_equal(
        a.metrics.drop(columns="seconds"), b.metrics.drop(columns="seconds"), check_exact=True
    )
    assert all(torch.equal(a.weights[name], b.weights[name]) for name in a.weights)
    assert torch.equal(a.test_logits, b.test_logits)
    assert same(*(load_checkpoint(folder) for folder in folders))


def same(a, b) -> bool:
    """Whether two states are equal to the bit, but for what a clock said."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        names = a.keys() - {"seconds", "other_load"}
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in names)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


# --- many lives: each is forked from a process that has imported everything ------------------


def live(run_dir: str, config: dict, dies_at: int | None, ready) -> None:
    """Trains to the end, or kills itself just before the nth time it makes a file durable."""
    torch.set_num_threads(1)
    left = [dies_at or 0]

    def dying(call):
        def wrapped(*args):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args)

        return wrapped

    if dies_at:
        os.fsync, os.replace = dying(os.fsync), dying(os.replace)
    parsed, real = TrainConfig(**config), train_module.train_epoch

    def train_epoch(*args):
        ready.send_bytes(b"ready")
        return real(*args)

    train_module.train_epoch = train_epoch
    train(parsed, 0, load_splits(parsed), Path(run_dir))


@pytest.fixture(scope="module")
def spawn():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "sklearn.datasets"])

    def start_life(run_dir: Path, config: TrainConfig, dies_at=None, in_epoch=False):
        here, there = context.Pipe()
        given = (str(run_dir), config.model_dump(), dies_at, there)
        process = context.Process(target=live, args=given)
        process.start()
        there.close()
        if in_epoch:
            with contextlib.suppress(EOFError):  # nothing was left to train
                here.recv_bytes()
        process.ears = here  # open as long as the process is spoken of
        return process

    return start_life


@pytest.fixture
def everything(tiny):
    """A recipe with all the state there is: momenta, schedule, average, early stopping."""
    return tiny(
        epochs=120,
        optimizer="adamw",
        learning_rate=0.003,
        schedule="warmup_cosine",
        warmup_epochs=2.0,
        ema_decay=0.9,
        dropout=0.2,
        mixup=0.2,
        early_stopping=40,
    )


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_fifty_kills_at_random_moments_change_nothing(tmp_path, everything, spawn):
    """The moments are drawn; `KILL_SEED` repeats those of a failure, `KILLS` sets how many."""
    seed = int(os.environ.get("KILL_SEED", random.SystemRandom().randrange(10**6)))
    kills = int(os.environ.get("KILLS", "50"))
    draw, killed, lives, epochs = random.Random(seed), 0, 0, []
    whole = spawn(tmp_path / "whole", everything)
    whole.join()
    assert whole.exitcode == 0
    few_epochs = 6 * results.load_run(tmp_path / "whole").metrics["seconds"].mean()
    assert results.load_run(tmp_path / "whole").summary["result"]["epochs"] < 120  # stopped early
    while killed < kills:
        training = draw.random() < 0.8  # else it may still be loading or resuming
        life = spawn(tmp_path / "killed", everything, in_epoch=training)
        life.join(draw.uniform(0, few_epochs if training else 2.0))
        life.kill()
        life.join()
        lives += 1
        if life.exitcode == 0:  # it came to its end: once more, from the start
            assert_equal_to_the_bit(tmp_path / "whole", tmp_path / "killed")
            (tmp_path / "killed").rename(tmp_path / f"killed-{lives}")
            continue
        killed += 1
        state = load_checkpoint(tmp_path / "killed") if (tmp_path / "killed").exists() else None
        epochs.append(state["epoch"] if state else 0)
    life = spawn(tmp_path / "killed", everything)
    life.join()
    said = f"KILL_SEED={seed}: {killed} kills, after epochs {epochs}"
    print(said)
    assert life.exitcode == 0, said
    assert len(set(epochs)) > kills // 5, said
    assert_equal_to_the_bit(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_kill_at_any_moment_of_saving_changes_nothing(tmp_path, tiny, spawn):
    config = tiny(epochs=3, n_train=100, ema_decay=0.9, optimizer="adam", learning_rate=0.01)
    whole = spawn(tmp_path / "whole", config)
    whole.join()
    moments = finished = 0
    while True:  # until a life ends before it comes to so many
        moments += 1
        run_dir = tmp_path / f"dies-{moments}"
        first = spawn(run_dir, config, moments)
        first.join()
        if first.exitcode == 0:
            break
        assert first.exitcode == -signal.SIGKILL
        finished += results.is_finished(run_dir)
        second = spawn(run_dir, config)
        second.join()
        assert second.exitcode == 0
        assert_equal_to_the_bit(tmp_path / "whole", run_dir)
        leftovers = {path.name for path in run_dir.iterdir()}
        assert not [n for n in leftovers if n == "pending.pt" or n.endswith(".tmp")], moments
    assert moments > 30
    assert finished <= 1  # the last moment of all: the summary has its name, its folder waits
