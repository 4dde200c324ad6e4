"""A run that is killed, again and again, ends as one that never was."""

import subprocess
import sys
from pathlib import Path

import pandas as pd
import torch

from cifar_lib import results

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
    a, b = (results.load_run(tmp_path / name) for name in ("whole", "killed"))
    pd.testing.assert_frame_equal(
        a.metrics.drop(columns="seconds"), b.metrics.drop(columns="seconds"), check_exact=True
    )
    assert all(torch.equal(a.weights[name], b.weights[name]) for name in a.weights)
    assert torch.equal(a.test_logits, b.test_logits)
