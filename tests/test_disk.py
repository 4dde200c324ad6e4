"""A disk that is full, read-only or not ours: one line with path and remedy, nothing lost."""

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import torch
from test_data_sources import picture, write_parquet

from cifar_lib import results, study, study_execute, study_experiments, study_runs
from cifar_lib.checkpoint import load_checkpoint
from cifar_lib.data import load_dataset
from cifar_lib.train import train

FULL = "No space left on device; free some space and start again"


AS_ROOT = [] if os.geteuid() == 0 else ["sudo", "-n"]  # who may neither skips: no disk is mounted


class Disk:
    """A small disk of its own."""

    def __init__(self, path: Path) -> None:
        self.path, self.filler = path, path / "filler"

    def fill(self, leave: int) -> None:
        """Leaves so many bytes, in whole pages of 4 KiB."""
        free = shutil.disk_usage(self.path).free
        self.filler.write_bytes(bytes(max(0, free - leave)))

    def remount(self, mode: str) -> None:
        subprocess.run([*AS_ROOT, "mount", "-o", f"remount,{mode}", str(self.path)], check=True)


@pytest.fixture
def disk(tmp_path) -> Iterator[Disk]:
    path = tmp_path / "disk"
    path.mkdir()
    options = "size=4m,mode=777"
    command = [*AS_ROOT, "mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        pytest.skip(f"no small disk can be mounted here: {error}")
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.strip()}")
    yield Disk(path)
    subprocess.run([*AS_ROOT, "umount", str(path)], check=True)


@pytest.fixture
def params(tmp_path) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "dataset: digits\nn_train: 100\nwidth: 0.125\nepochs: 3\nbatch_size: 50\nprecision: fp32\n"
    )
    return str(path)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# An epoch needs about 0.45 MB here: state, weights, history. Each amount fails at another of them.
@pytest.mark.parametrize("leave", [0, 8_192, 60_000, 150_000, 300_000])
def test_a_full_disk_stops_a_training_that_goes_on_when_there_is_space(
    tmp_path, digits, tiny, disk, leave
):
    config = tiny(ema_decay=0.9)
    whole = train(config, 0, digits, tmp_path / "whole")
    run_dir = disk.path / "run"
    train(config.model_copy(update={"epochs": 1}), 0, digits, run_dir)
    shutil.rmtree(run_dir)
    run_dir.mkdir()
    disk.fill(leave)
    with pytest.raises(OSError, match=FULL) as caught:
        train(config, 0, digits, run_dir)
    assert str(run_dir) in str(caught.value) and "\n" not in str(caught.value)
    assert not [name for name in names(run_dir) if name.endswith(".tmp")]
    assert not results.is_finished(run_dir)
    state = load_checkpoint(run_dir)
    assert state is None or state["epoch"] >= 1
    disk.filler.unlink()
    resumed = train(config, 0, digits, run_dir)
    pd.testing.assert_frame_equal(
        whole.metrics.drop(columns="seconds"), resumed.metrics.drop(columns="seconds")
    )
    assert all(torch.equal(whole.weights[name], resumed.weights[name]) for name in whole.weights)


def test_train_says_which_path_and_what_to_do(call, disk, params, monkeypatch):
    monkeypatch.setattr(study_runs, "ROOT", disk.path)
    disk.fill(16_384)
    status, _, err = call("train", params)
    assert status == 1 and err.count("\n") == 1
    assert err.startswith("error: ") and FULL in err and str(disk.path / "runs") in err
    disk.filler.unlink()
    status, out, err = call("train", params)
    assert (status, err) == (0, "") and "test_accuracy" in out


def test_a_read_only_disk_is_one_line(call, disk, params, monkeypatch):
    monkeypatch.setattr(study_runs, "ROOT", disk.path)
    disk.remount("ro")
    status, _, err = call("train", params)
    assert status == 1 and err.count("\n") == 1 and str(disk.path / "runs") in err
    assert "Read-only file system; make it writable and start again" in err
    disk.remount("rw")
    assert call("train", params)[0] == 0
    (folder,) = (disk.path / "runs/mine").iterdir()
    assert results.is_finished(folder)
    (folder / "summary.json").unlink()
    disk.remount("ro")  # in the middle of a run
    status, _, err = call("train", params)
    assert status == 1 and err.count("\n") == 1 and "make it writable" in err
    disk.remount("rw")
    assert call("train", params)[0] == 0 and results.is_finished(folder)


def test_no_permission_is_one_line(tmp_path, params):
    (tmp_path / "runs").mkdir(mode=0o555)
    code = (
        "import sys; from pathlib import Path; from cifar_lib import __main__ as cli, study_runs;"
        f"study_runs.ROOT = Path({str(tmp_path)!r}); sys.argv[1:] = ['train', {params!r}];"
        "cli.main()"
    )
    command = [sys.executable, "-c", code]
    if os.geteuid() == 0:  # the bits do not bind root, unless it gives its powers away
        if not shutil.which("setpriv"):
            pytest.skip("root, and no setpriv to be less")
        command = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", *command]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=study_runs.ROOT)
    if "setpriv:" in ended.stderr:
        pytest.skip(f"root, and {ended.stderr.strip()}")
    assert ended.returncode == 1 and ended.stderr.count("\n") == 1, ended.stderr
    assert "Permission denied; allow access to it and start again" in ended.stderr
    assert str(tmp_path / "runs") in ended.stderr


@pytest.mark.parametrize("how", ["full", "read-only"])
def test_the_cache_is_whole_or_not_there(tmp_path, disk, monkeypatch, caplog, how):
    rows = {"train": [(picture(i), i % 10) for i in range(20)], "test": [(picture(99), 3)]}
    source = write_parquet(tmp_path / "source", rows)
    monkeypatch.setenv("CIFAR_LIB_CACHE", str(disk.path / "cache"))
    disk.fill(16_384)
    if how == "read-only":
        disk.remount("ro")
    train_set, _ = load_dataset("cifar10", str(source))
    assert len(train_set) == 20
    assert str(disk.path / "cache") in caplog.text and "decodes again" in caplog.text
    disk.remount("rw")
    assert not (disk.path / "cache").exists() or not names(disk.path / "cache")
    disk.filler.unlink()
    again, _ = load_dataset("cifar10", str(source))
    assert torch.equal(again.images, train_set.images) and len(names(disk.path / "cache")) == 1


def test_a_report_is_whole_or_the_one_before(tmp_path, disk, monkeypatch):
    for module in (study, study_execute, study_experiments, study_runs):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(study, "load_preset", lambda *_: [experiment])
    (tmp_path / "reports").symlink_to(disk.path)
    experiment = study_experiments.Experiment("quick", "toy", "one", {"dataset": "digits"})
    size = [1000]

    def execute_notebook(_source, target, _parameters, **_options):
        folder = Path(target).parent
        (folder / "figures").mkdir()
        (folder / "figures/a.png").write_bytes(bytes(size[0]))
        (folder / "summary.json").write_text(json.dumps({"size": size[0]}))
        shutil.copy(notebook, target)

    notebook = study_execute.ROOT / "toy.ipynb"
    notebook.write_text('{"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}')
    monkeypatch.setattr(study_execute.papermill, "execute_notebook", execute_notebook)
    monkeypatch.setattr(study_execute, "input_key", lambda _: str(size[0]))
    monkeypatch.setattr(study, "input_key", lambda _: str(size[0]))

    def run() -> str:
        console = io.StringIO()
        study.study("quick", console=console)
        return console.getvalue()

    assert "toy/one: done" in run()
    size[0] = 1_000_000
    disk.fill(500_000)
    said = run()
    assert "toy/one: FAILED" in said and "free some space and start again" in said
    assert "No space left on device" in said and "reports/quick/toy" in said
    assert names(disk.path / "quick/toy") == {"one"}
    place = experiment.destination
    assert '"size": 1000' in (place / "summary.json").read_text()
    assert (place / "figures/a.png").stat().st_size == 1000
    disk.filler.unlink()
    assert "toy/one: done" in run()
    assert (place / "figures/a.png").stat().st_size == 1_000_000
    assert names(disk.path / "quick/toy") == {"one"}
