"""One run trained by two ranks under torchrun: the same run, told once, and ended well."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import psutil
import pytest
import torch
from torch import Tensor, nn

from cifar_lib import checkpoint, distributed, results
from cifar_lib.config import TrainConfig
from cifar_lib.data import Splits
from cifar_lib.execution import Execution
from cifar_lib.models import MODELS
from cifar_lib.predict_stage import evaluate_run
from cifar_lib.train import train

ROOT = Path(__file__).resolve().parents[1]
PLAIN = {  # no batch norm, no dropout: then ranks change nothing but the rounding
    "model": "plain",
    "width": None,
    "flip": "random",
    "mixup": 0.2,
    "keep_hardest": 0.5,
    "keep_hardest_from": 1,
    "learning_rate": 0.01,
    "micro_batch_size": 5,
}
NOISY = {"dropout": 0.2, "mixup": 0.2, "ema_decay": 0.9, "optimizer": "adam"}
START = """
import json, os, sys
from pathlib import Path
from torch import nn
from cifar_lib import models, study_runs
sys.path.insert(0, {tests!r})
from test_distributed import plain

models.MODELS["plain"] = plain
study_runs.ROOT = Path({root!r})
"""
# Rank 1, in the middle of epoch 3.
SIGNAL_ITSELF = """
import signal
from cifar_lib import train
augment_batch = train.augment_batch

def signal_itself(*args, epoch, **rest):
    if epoch == 2 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.{})
    return augment_batch(*args, epoch=epoch, **rest)

train.augment_batch = signal_itself
"""
COMMAND = """
from cifar_lib import __main__ as cli
cli.main()
"""
MANY_RUNS = """
import hashlib
from test_distributed import StopError, stop_after_epoch
from cifar_lib import checkpoint, distributed, results, study_runs, train
from cifar_lib.config import TrainConfig, parse_config
from cifar_lib.study_runs import runs

# Each experiment trains for itself, also what another has finished.
study_runs.find_folder = lambda *run: results.run_folder(study_runs.ROOT / "runs", *run)

plain, noisy = (parse_config(values) for values in json.loads(sys.argv[1]))
seen = {"states": [], "errors": []}
validate = train.validate

def spy(state, *rest):
    models = [state.model, *filter(None, [state.average])]
    tensors = [tensor.numpy().tobytes() for m in models for tensor in m.state_dict().values()]
    seen["states"].append(hashlib.sha256(b"".join(tensors)).hexdigest())
    return validate(state, *rest)

train.validate = spy
with distributed.joined():
    runs(plain, [0], experiment="plain")
    runs(plain, [0], experiment="back")
    runs(noisy, [0], experiment="whole")
    checkpoint.save_checkpoint = stop_after_epoch(2, checkpoint.save_checkpoint)
    try:
        runs(noisy, [0], experiment="cut")
    except StopError as error:
        seen["errors"].append(repr(error))
    runs(noisy, [0], experiment="cut")
    for changes in ({"batch_size": 51}, {"batch_size": 1}, {"micro_batch_size": 50},
                    {"batch_size": 2048, "n_train": 201}):
        try:
            runs(TrainConfig(**(noisy.model_dump() | changes)), [0], experiment="refused")
        except ValueError as error:
            seen["errors"].append(str(error))
    path = study_runs.ROOT / f"rank{distributed.rank()}.json"
path.write_text(json.dumps(seen))
"""


def plain(num_classes: int) -> nn.Module:
    convolution = nn.Conv2d(3, 8, 3, stride=2)
    return nn.Sequential(convolution, nn.ReLU(), nn.Flatten(), nn.Linear(8 * 225, num_classes))


class StopError(Exception):
    """Stands for a job that ends between two epochs."""


def stop_after_epoch(epoch: int, save):
    def save_then_stop(run_dir, state):
        save(run_dir, state)
        if state["epoch"] == epoch:
            raise StopError

    return save_then_stop


@contextmanager
def torchrun(folder: Path, code: str, *words: str) -> Iterator[subprocess.Popen]:
    """Two ranks of a script; none of them outlives the block."""
    script = folder / "start.py"
    script.write_text(START.format(tests=str(ROOT / "tests"), root=str(folder)) + code)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    job = subprocess.Popen(
        [*launcher, str(script), *words],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    family = psutil.Process(job.pid)
    try:
        yield job
    finally:
        # The ranks are in sessions of their own: a signal to the launcher's would miss them.
        for process in [*(family.children(recursive=True) if family.is_running() else []), family]:
            if process.is_running():
                process.kill()
        job.communicate()


def train_two(folder: Path, config: TrainConfig, code: str, *words: str) -> tuple[int, str]:
    """The command `train` with two ranks: the launcher's status, and all that was said."""
    params = folder / "mine.yaml"
    params.write_text(json.dumps(config.model_dump(mode="json")))
    with torchrun(folder, code, "train", str(params), *words) as job:
        said, _ = job.communicate(timeout=600)  # pytest's own limit a test is the shorter
    return job.returncode, said


@pytest.fixture(autouse=True)
def _plain_is_a_model(monkeypatch):
    monkeypatch.setitem(MODELS, "plain", plain)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, tiny, digits: Splits) -> tuple[Path, str]:
    """The folder of several runs of two ranks, and what was said meanwhile."""
    folder = tmp_path_factory.mktemp("two")
    config = tiny(**PLAIN)
    back = results.run_folder(folder / "runs", "back", 0, config.fingerprint(digits.info.sha256))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(StopError):
        patch.setitem(MODELS, "plain", plain)
        stop = stop_after_epoch(1, checkpoint.save_checkpoint)
        patch.setattr(checkpoint, "save_checkpoint", stop)
        train(config, 0, digits, back)  # one process begins, two go on
    noisy = tiny(**NOISY, learning_rate=0.01)
    configs = json.dumps([config.model_dump(), noisy.model_dump()])
    with torchrun(folder, MANY_RUNS, configs) as job:
        said, _ = job.communicate(timeout=110)
    assert job.returncode == 0, said
    return folder, said


def only_run(two_ranks: tuple[Path, str], experiment: str) -> results.Run:
    (folder,) = (two_ranks[0] / "runs" / experiment).iterdir()
    return results.load_run(folder)


def assert_same_run(a: results.Run, b: results.Run, tolerance: float) -> None:
    drop = {"columns": "seconds"}
    pd.testing.assert_frame_equal(
        a.metrics.drop(**drop), b.metrics.drop(**drop), rtol=0, atol=tolerance
    )
    assert a.weights.keys() == b.weights.keys()
    assert all(torch.allclose(a.weights[k], b.weights[k], 0, tolerance) for k in a.weights)
    assert torch.allclose(a.test_logits, b.test_logits, 0, 10 * tolerance)


@pytest.mark.parametrize("experiment", ["plain", "back"])
def test_without_batch_norm_two_ranks_train_what_one_process_trains(
    tmp_path, digits, tiny, two_ranks, experiment
):
    one, two = train(tiny(**PLAIN), 0, digits, tmp_path), only_run(two_ranks, experiment)
    assert_same_run(one, two, 1e-5)
    assert one.metrics.train_loss.iloc[-1] < one.metrics.train_loss.iloc[0]
    assert one.summary["hardware"]["processes"] == 1 and two.summary["hardware"]["processes"] == 2
    again = evaluate_run(two, digits)
    assert again["test_accuracy"] == two.summary["result"]["test_accuracy"]


def test_two_ranks_that_are_stopped_go_on_to_the_bit(two_ranks):
    assert_same_run(only_run(two_ranks, "whole"), only_run(two_ranks, "cut"), 0)


def test_ranks_hold_the_same_weights_and_meet_the_same_errors(two_ranks):
    one, two = (json.loads((two_ranks[0] / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert one == two
    assert len(one["states"]) == 3 + 2 + 3 + 3
    assert one["states"][5:8] == one["states"][8:]  # stopped and gone on, as uninterrupted
    said = ["StopError", "batch_size: got 51", "batch_size: got 1 ", "micro_batch_size: got 50"]
    assert all(a in b for a, b in zip([*said, "got 201"], one["errors"], strict=True))
    assert not (two_ranks[0] / "runs/refused").exists()


def test_rank_0_alone_speaks_and_writes(two_ranks):
    folder, said = two_ranks
    epochs = re.findall(r"^seed 0 epoch (\d)/3", said, re.MULTILINE)
    assert epochs == [*"123", *"23", *"123", "1", "3"]  # stopped before it told of epoch 2
    assert said.count("resuming after epoch") == 2
    log = only_run(two_ranks, "whole").path / "train.log"
    assert len(log.read_text().splitlines()) == 3 + 1  # epochs, and what came of them
    assert not [path for path in folder.rglob("*") if "tmp" in path.name or "pending" in path.name]


def test_a_killed_rank_ends_the_job_and_one_process_goes_on(tmp_path, digits, tiny):
    config = tiny(**PLAIN | {"epochs": 4})
    status, said = train_two(tmp_path, config, SIGNAL_ITSELF.format("SIGKILL") + COMMAND)
    assert status != 0 and "Signal 9 (SIGKILL) received" in said
    assert said.count("Traceback") == 1, said  # torchrun's own
    (folder,) = (tmp_path / "runs/mine").iterdir()
    assert checkpoint.load_checkpoint(folder)["epoch"] == 2
    resumed = train(config, 0, digits, folder)
    assert_same_run(train(config, 0, digits, tmp_path / "whole"), resumed, 1e-5)


@pytest.mark.long
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["-p", "batch_size=51", "-p", "micro_batch_size=null"],
            "batch_size: got 51 images a step with 2 ranks",
        ),
        (["-p", "epochs=many"], "epochs: got 'many'"),
    ],
)
def test_a_mistake_is_told_once_with_status_2(tmp_path, tiny, words, said):
    status, output = train_two(tmp_path, tiny(**PLAIN), COMMAND, *words)
    assert status != 0 and "exitcode  : 2" in output  # torchrun's own status is always 1
    (line,) = re.findall("^error: .*", output, re.MULTILINE)
    assert said in line and output.count("Traceback") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.long
def test_a_frozen_rank_ends_the_job(tmp_path, tiny):
    code = SIGNAL_ITSELF.format("SIGSTOP") + COMMAND
    status, said = train_two(tmp_path, tiny(**PLAIN | {"epochs": 4}), code)
    assert status != 0
    assert "error: rank 0 of 2: another rank ended or is silent" in said


# --- in one process ---------------------------------------------------------------------------


def as_rank(monkeypatch, rank: int, size: int) -> None:
    for name, value in {"rank": rank, "size": size, "size_here": size}.items():
        monkeypatch.setattr(distributed, name, lambda value=value: value)


def parts(monkeypatch, batch: Tensor, size: int) -> list[Tensor]:
    shares = []
    for rank in range(size):
        as_rank(monkeypatch, rank, size)
        shares.append(distributed.shard(batch))
    return shares


def test_shards_make_up_the_batch(monkeypatch):
    batch = torch.arange(14).view(7, 2)
    assert torch.equal(torch.cat(parts(monkeypatch, batch, 3)), batch)
    assert all(torch.equal(part, batch[:2]) for part in parts(monkeypatch, batch[:2], 3))


@pytest.mark.parametrize(
    ("device", "changes", "said"),
    [
        ("cpu", {"batch_size": 130}, "batch_size: got 130 images a step with 4 ranks"),
        ("cpu", {"micro_batch_size": 64}, "micro_batch_size: got 64 with 4 ranks; .*, 32"),
        ("cuda", {}, "device: got 4 ranks on a machine with 2 CUDA devices"),
        ("mps", {}, "device: got 'mps' with 4 ranks"),
    ],
)
def test_what_can_not_be_divided_is_refused(monkeypatch, tiny, device, changes, said):
    as_rank(monkeypatch, 1, 4)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    here = Execution(torch.device(device), torch.float32)
    monkeypatch.setattr(distributed, "choose_execution", lambda _: here)
    config = tiny(**{"batch_size": 128} | changes)
    with pytest.raises(ValueError, match=said):
        distributed.check_divisible(config)


def test_gradients_are_exchanged_once_a_step(monkeypatch):
    asked = []
    forward = SimpleNamespace(no_sync=lambda: nullcontext(asked.append(1)))
    for size, here in ((1, True), (2, False), (2, True)):
        as_rank(monkeypatch, 0, size)
        with distributed.gradients_stay(forward, here):
            pass
    assert asked == [1]


def test_a_batch_is_never_larger_than_the_data(monkeypatch, tiny):
    as_rank(monkeypatch, 1, 4)
    config = tiny(batch_size=128, micro_batch_size=32)
    distributed.check_divisible(config, 64)
    with pytest.raises(ValueError, match="batch_size: got 65 images"):
        distributed.check_divisible(config, 65)


def set_variables(monkeypatch, **variables: str) -> None:
    for name in distributed.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


OF_TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "1",
}


@pytest.mark.parametrize("there", [["RANK"], ["MASTER_ADDR", "MASTER_PORT"], [*OF_TORCHRUN][:5]])
def test_half_set_variables_are_one_line(call, monkeypatch, there):
    set_variables(monkeypatch, **{name: OF_TORCHRUN[name] for name in there})
    status, _, err = call("train", "none.yaml")
    assert status == 2 and err.startswith("error: torchrun's variables are half set: " + there[0])
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [({}, "127.0.0.1:1: "), ({"RANK": "first"}, "'first'"), ({"LOCAL_RANK": "x"}, "'x'|did not")],
)
def test_ranks_that_do_not_meet_say_so_in_one_line(monkeypatch, capfd, changes, said):
    set_variables(monkeypatch, **OF_TORCHRUN | changes)
    monkeypatch.setattr(distributed, "SILENCE", distributed.timedelta(seconds=1))
    with pytest.raises(ValueError, match=said) as caught, distributed.joined():
        pass
    assert "\n" not in str(caught.value) and capfd.readouterr().err == ""


def test_one_rank_is_one_process(monkeypatch):
    set_variables(monkeypatch, **OF_TORCHRUN | {"RANK": "0", "WORLD_SIZE": "1"})
    with distributed.joined():
        assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(("given", "threads"), [("1", 4), ("3", 1)])
def test_the_cores_are_divided_among_the_ranks(monkeypatch, given, threads):
    set_variables(monkeypatch, OMP_NUM_THREADS=given, **OF_TORCHRUN)
    monkeypatch.setattr(distributed, "_cores", lambda: 8)
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda *_, **__: None)
    set_to = [1]
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    distributed._join()
    assert set_to[-1] == threads


@pytest.mark.parametrize(
    ("error", "rank", "ends"),
    [
        (ValueError("x"), 0, ValueError),
        (ValueError("x"), 1, SystemExit(2)),
        (FloatingPointError("x"), 1, SystemExit(1)),
        (KeyboardInterrupt(), 1, SystemExit(130)),
        (RuntimeError("gloo/transport/tcp/pair.cc: closed"), 1, ConnectionError),
        (RuntimeError("shapes"), 1, RuntimeError),
    ],
)
def test_an_error_of_all_ranks_is_told_by_rank_0(monkeypatch, error, rank, ends):
    set_variables(monkeypatch, **OF_TORCHRUN)
    monkeypatch.setattr(distributed, "_join", lambda: None)
    as_rank(monkeypatch, rank, 2)
    kind = type(ends) if isinstance(ends, BaseException) else ends
    with pytest.raises(kind) as caught, distributed.joined():
        raise error
    assert type(caught.value) is kind
    assert not isinstance(ends, SystemExit) or caught.value.code == ends.code
