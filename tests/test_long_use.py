"""The same run twice, and a long one: equal to the bit, and no larger at its end than early on."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cifar_lib import results

CODE = """
import json, logging, os, sys
from pathlib import Path
import psutil, torch
from cifar_lib import train as train_module
from cifar_lib.config import parse_config
from cifar_lib.data import load_splits
from cifar_lib.study_runs import _logged

torch.set_num_threads(int(sys.argv[3]))
config, folder, process = parse_config(json.loads(sys.argv[2])), Path(sys.argv[1]), psutil.Process()
measured, real = {}, train_module.train_epoch

def train_epoch(state, *rest):
    files = {path.name: path.stat().st_size for path in folder.iterdir()}
    measured[state.epoch] = {
        "memory": process.memory_info().rss, "files": process.num_fds(),
        "threads": process.num_threads(), "sizes": files,
    }
    return real(state, *rest)

train_module.train_epoch = train_epoch
with _logged(folder, ""):
    train_module.train(config, 0, load_splits(config), folder)
(folder / "measured.json").write_text(json.dumps(measured))
"""


def run(folder: Path, config, threads: int = 1) -> dict:
    words = [sys.executable, "-c", CODE, str(folder), config.model_dump_json(), str(threads)]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    return json.loads((folder / "measured.json").read_text())


@pytest.mark.timeout(400)
def test_deterministic_runs_of_two_processes_are_equal_to_the_bit(tmp_path, tiny):
    config = tiny(
        deterministic=True,
        flip="random",
        rotate=10.0,
        color_jitter=0.2,
        randaugment_ops=1,
        cutout=8,
        random_erasing=0.3,
        mixup=0.2,
        cutmix=1.0,
        dropout=0.2,
        ema_decay=0.9,
        optimizer="adamw",
        learning_rate=0.01,
        tta="mirror_translate",
    )
    for name in ("a", "b"):
        run(tmp_path / name, config)
    a, b = (results.load_run(tmp_path / name) for name in ("a", "b"))
    assert a.metrics.drop(columns="seconds").equals(b.metrics.drop(columns="seconds"))
    assert all(torch.equal(a.weights[name], b.weights[name]) for name in a.weights)
    assert torch.equal(a.test_logits, b.test_logits)
    assert a.summary["hardware"]["threads"] == 1


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_two_hundred_epochs_grow_nothing_but_their_record(tmp_path, tiny):
    measured = run(tmp_path / "run", tiny(epochs=201, ema_decay=0.9, tta="mirror", mixup=0.2))
    early, late = measured["50"], measured["200"]
    print(f"memory after 50 and 200 epochs: {early['memory']:,} and {late['memory']:,} bytes")
    assert late["memory"] - early["memory"] < 20e6, "bytes"
    assert late["files"] == early["files"] and late["threads"] == early["threads"]
    assert set(late["sizes"]) == set(early["sizes"])
    for name, size in late["sizes"].items():
        growth = (size - early["sizes"][name]) / 150
        bound = {"train.log": 200, "metrics.csv": 200, "last.pt": 800, "previous.pt": 800}
        assert growth <= bound.get(name, 0), f"{name}: {growth} bytes an epoch"
