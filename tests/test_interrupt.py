"""Ctrl-C, SIGTERM and a kernel's interrupt: what is finished stays, and the next start goes on."""

import logging
import os
import re
import signal
import subprocess
import textwrap

import psutil
import pytest
from jupyter_client.manager import start_new_kernel

from cifar_lib import checkpoint, results, study_runs, train_stop
from cifar_lib import train as train_module
from cifar_lib.train import train

pytestmark = pytest.mark.timeout(400)  # processes that start on a busy machine
STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}
both = pytest.mark.parametrize("number", STATUS)
GOES_ON = "stopped; the same command goes on after what is finished\n"
# Python runs this as it starts: papermill always has the time to notice that its kernel is gone.
SLOW_TO_END = """
import asyncio
from jupyter_client.manager import AsyncKernelManager
shutdown = AsyncKernelManager.shutdown_kernel

async def slowly(self, *options, **named):
    await shutdown(self, *options, **named)
    await asyncio.sleep(2)

AsyncKernelManager.shutdown_kernel = slowly
"""


def epochs_in(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"seed 0 epoch (\d+)/", text)]


@pytest.fixture
def during_epoch_2(monkeypatch):
    """Calls something in the middle of epoch 2."""

    def install(act) -> None:
        real = train_module.augment_batch

        def augment(*args, epoch, **rest):
            if epoch == 1:
                act()
            return real(*args, epoch=epoch, **rest)

        monkeypatch.setattr(train_module, "augment_batch", augment)

    return install


@both
def test_the_first_signal_waits_for_the_epoch(
    tmp_path, digits, tiny, during_epoch_2, capfd, number
):
    sent = []
    during_epoch_2(lambda: sent or (sent.append(1), os.kill(os.getpid(), number)))
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stop, train_stop.listening():
        train(tiny(), 0, digits, tmp_path)
    assert stop.value.code == STATUS[number] and signal.getsignal(number) is before
    assert capfd.readouterr().err.startswith("stopping after this epoch")
    assert checkpoint.load_checkpoint(tmp_path)["epoch"] == 2
    assert results.load_weights(tmp_path)


@both
def test_the_second_signal_does_not_wait(tmp_path, digits, tiny, during_epoch_2, number):
    during_epoch_2(lambda: os.kill(os.getpid(), number))  # at each of its four steps
    with pytest.raises(SystemExit) as stop, train_stop.listening():
        train(tiny(), 0, digits, tmp_path)
    assert stop.value.code == STATUS[number]
    assert checkpoint.load_checkpoint(tmp_path)["epoch"] == 1


@both
def test_outside_an_epoch_nothing_waits(number):
    with pytest.raises(SystemExit) as stop, train_stop.listening():
        os.kill(os.getpid(), number)
    assert stop.value.code == STATUS[number]


def test_what_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with train_stop.listening():
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_interrupt_in_a_notebook_keeps_the_state_and_frees_the_run(
    tmp_path, digits, tiny, during_epoch_2, monkeypatch
):
    monkeypatch.setattr(study_runs, "ROOT", tmp_path)
    during_epoch_2(lambda: os.kill(os.getpid(), signal.SIGINT))
    handlers = list(logging.getLogger("cifar_lib").handlers)
    given = {"experiment": "e", "splits": digits, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        study_runs.runs(tiny(), [0], **given)
    assert logging.getLogger("cifar_lib").handlers == handlers
    (folder,) = (tmp_path / "runs/e").iterdir()
    assert checkpoint.load_checkpoint(folder)["epoch"] == 1
    monkeypatch.undo()
    monkeypatch.setattr(study_runs, "ROOT", tmp_path)
    (run,) = study_runs.runs(tiny(), [0], **given)
    assert "resuming after epoch 1 of 3" in (folder / "train.log").read_text()
    assert run.summary["result"]["epochs"] == 3


def follow(process: subprocess.Popen, said: str) -> str:
    """Reads standard output until a line appears; returns all of it till then."""
    out = ""
    for line in process.stdout:
        out += line
        if said in line:
            return out
    pytest.fail(f"{said!r} was not said: {out}{process.stderr.read()}")


def goes_on(process: subprocess.Popen, last: int) -> None:
    """Holds that a command takes up after epoch `last`; ends it by force then."""
    try:
        assert epochs_in(follow(process, "seed 0 epoch")) == [last + 1]
    finally:
        process.kill()
        process.communicate()


def kernels_of(process: subprocess.Popen) -> list[psutil.Process]:
    found = psutil.Process(process.pid).children(recursive=True)
    assert any("ipykernel" in " ".join(kernel.cmdline()) for kernel in found)
    return found


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGINT, marks=pytest.mark.long), signal.SIGTERM]
)
def test_train_stops_with_its_status_and_goes_on(clone, number):
    process = clone.start("train", str(clone.params))
    first = follow(process, "epoch 2/")
    process.send_signal(number)
    out, err = process.communicate(timeout=200)
    assert process.returncode == STATUS[number]
    assert err.endswith(GOES_ON) and "Traceback" not in err and err.count("\n") <= 2
    goes_on(clone.start("train", str(clone.params)), epochs_in(first + out)[-1])


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long)]
)
def test_a_study_leaves_no_kernel_and_no_half_report_and_goes_on(clone, number):
    (clone.root / "sitecustomize.py").write_text(SLOW_TO_END)
    process = clone.start("study")
    first = follow(process, "epoch 2/")
    kernels = kernels_of(process)
    os.killpg(process.pid, number)  # as a terminal does it
    out, err = process.communicate(timeout=200)
    assert process.returncode == STATUS[number]
    assert err == GOES_ON
    assert psutil.wait_procs(kernels, timeout=60)[1] == []
    assert not [path for path in clone.root.glob("reports/**/*") if path.is_file()]
    (log,) = clone.root.glob("runs/one/*/train.log")
    last = epochs_in(log.read_text())[-1]
    assert last >= epochs_in(first + out)[-1]
    process = clone.start("study")
    follow(process, "running, about")
    goes_on(process, last)


@pytest.mark.long
def test_a_killed_study_leaves_no_kernel(clone):
    process = clone.start("study")
    follow(process, "epoch 1/")
    kernels = kernels_of(process)
    process.kill()
    process.communicate()
    assert psutil.wait_procs(kernels, timeout=60)[1] == []


def test_a_killed_study_leaves_no_worker(clone):
    process = clone.start("study", "--jobs", "2")
    follow(process, "epoch 1/")
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) >= 1
    process.kill()
    try:
        assert psutil.wait_procs(workers, timeout=60)[1] == []
    finally:
        for worker in filter(psutil.Process.is_running, workers):
            worker.kill()
        process.communicate()


@pytest.mark.long
def test_a_kernel_that_is_interrupted_lives_on_with_the_state_kept(clone):
    code = textwrap.dedent(
        """
        from cifar_lib.config import parse_config
        from cifar_lib.config_yaml import read_yaml
        from cifar_lib.study_runs import runs
        values = read_yaml("params/toy/one.yaml")
        del values["question"]
        runs(parse_config(values), [0], experiment="mine", progress=False)
        """
    )
    manager, client = start_new_kernel(kernel_name="python3", cwd=clone.root, env=clone.environment)

    def interrupted() -> str:
        said = []

        def hear(message) -> None:
            text = message["content"].get("text", "")
            if "seed 0 epoch" in text and not epochs_in("".join(said)):
                manager.interrupt_kernel()
            said.append(text)

        reply = client.execute_interactive(code, output_hook=hear, timeout=200)["content"]
        assert (reply["status"], reply.get("ename")) == ("error", "KeyboardInterrupt")
        return "".join(said)

    try:
        first, second = interrupted(), interrupted()
        assert epochs_in(second)[0] == epochs_in(first)[-1] + 1
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
