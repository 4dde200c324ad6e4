"""A recipe is refused before anything is loaded, in a line that names field, value and range."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cifar_lib import execution
from cifar_lib.config import ROOT, TrainConfig, parse_config
from cifar_lib.config_yaml import read_yaml

# A published fingerprint hangs on the defaults: changing one would silently change what every
# summary that leaves it out says. Add fields freely; a changed default needs a new field name.
DEFAULTS = {
    "dataset": "auto",
    "data_dir": None,
    "n_train": None,
    "val_fraction": 0.1,
    "split_seed": 0,
    "model": "small_cnn",
    "width": None,
    "depth": None,
    "dropout": None,
    "whitening_epsilon": None,
    "image_size": 32,
    "weights": None,
    "backbone_rate": 1.0,
    "head_rate": 1.0,
    "norm_and_bias_rate": 1.0,
    "normalization": "data",
    "flip": "random",
    "translate": 4,
    "padding": "zeros",
    "rotate": 0.0,
    "affine": 0.0,
    "color_jitter": 0.0,
    "randaugment_ops": 0,
    "randaugment_magnitude": 7,
    "cutout": 0,
    "random_erasing": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "epochs": 10,
    "batch_size": 128,
    "micro_batch_size": None,
    "optimizer": "sgd",
    "learning_rate": 0.1,
    "momentum": 0.9,
    "nesterov": True,
    "weight_decay": 0.0,
    "decay_norm_and_bias": True,
    "label_smoothing": 0.0,
    "schedule": "constant",
    "warmup_epochs": 0.0,
    "step_epochs": 10,
    "gamma": 0.1,
    "low_resolution": 0,
    "low_resolution_epochs": 0,
    "keep_hardest": 1.0,
    "keep_hardest_from": 1,
    "ema_decay": 0.0,
    "early_stopping": 0,
    "tta": "none",
    "eval_batch_size": 500,
    "measure_train": 0,
    "device": "auto",
    "precision": "auto",
    "channels_last": True,
    "compile": False,
    "deterministic": False,
}


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"lr": 0.1}, ["'lr'", "learning_rate"]),
        ({"epochs": 0}, ["epochs", "0", "greater than or equal to 1"]),
        ({"epochs": "3"}, ["epochs", "'3'", "integer"]),
        ({"epochs": True}, ["epochs", "True"]),
        ({"learning_rate": "fast"}, ["learning_rate", "'fast'", "number"]),
        ({"learning_rate": "nan"}, ["learning_rate", "'nan'"]),
        ({"learning_rate": float("inf")}, ["learning_rate", "inf", "100"]),
        ({"flip": "both"}, ["flip", "'both'", "alternating"]),
        ({"val_fraction": 0.6}, ["val_fraction", "0.6", "0.5"]),
        ({"batch_size": 100, "micro_batch_size": 33}, ["micro_batch_size 33", "batch_size 100"]),
        ({"warmup_epochs": 11.0}, ["warmup_epochs 11", "epochs 10"]),
        ({"early_stopping": 3, "val_fraction": 0}, ["early_stopping 3", "val_fraction"]),
        ({"optimizer": "muon", "nesterov": False}, ["nesterov", "muon"]),
        ({"epoch": 3}, ["unknown field 'epoch'", "did you mean epochs?"]),
        ({"momentum": 0.0}, ["nesterov", "momentum 0"]),
        ({"data_dir": ""}, ["data_dir", "''", "at least 1 character"]),
    ],
)
def test_a_bad_value_is_refused_by_name(values, named):
    with pytest.raises(ValueError) as caught:
        parse_config(values)
    message = str(caught.value)
    assert "\n" not in message
    for part in named:
        assert part in message


def test_yaml_floats_without_a_dot_are_numbers():
    assert parse_config({"weight_decay": "5e-4"}).weight_decay == 5e-4


def test_a_configuration_cannot_be_changed():
    with pytest.raises(Exception, match="frozen"):
        TrainConfig().epochs = 3


def test_every_field_says_what_it_is():
    assert [name for name, f in TrainConfig.model_fields.items() if not f.description] == []


def test_defaults_stay_as_published():
    assert TrainConfig().model_dump() == DEFAULTS, "a new field: write its default into DEFAULTS"


def test_no_other_repositorys_commit_is_ours(tmp_path, monkeypatch):
    """Unpacked from an archive, inside the checkout of something else."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init"], ["commit", "--allow-empty", "-m", "theirs"]):
        subprocess.run([*git, *words], check=True, capture_output=True)
    (tmp_path / "ours").mkdir()
    monkeypatch.setattr(execution, "_PACKAGE", tmp_path / "ours/cifar_lib")
    assert execution.git_commit.__wrapped__() is None
    monkeypatch.setattr(execution, "_PACKAGE", tmp_path / "cifar_lib")
    assert len(execution.git_commit.__wrapped__()) == 40


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is the device that has to be missing")
def test_evaluation_elsewhere_keeps_the_precision_that_it_can(monkeypatch):
    monkeypatch.setattr(execution, "_computes_in_bf16", lambda _: True)
    chosen = [
        execution.choose_evaluation(TrainConfig(device="cuda", precision=precision)).precision
        for precision in ("fp32", "bf16", "fp16")
    ]
    assert chosen == ["fp32", "bf16", "bf16"]


def test_without_a_checkout_the_current_folder_stands_in_its_place(tmp_path):
    shutil.copytree(ROOT / "cifar_lib", tmp_path / "site-packages/cifar_lib")
    subprocess.run(["git", "init", tmp_path / "mine"], check=True, capture_output=True)
    code = """
from cifar_lib import config, execution
print(config.__file__, config.ROOT, execution.git_commit(), execution.training_code_sha256())
"""
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site-packages")}
    words = [sys.executable, "-c", code]
    told = subprocess.run(
        words, capture_output=True, text=True, check=True, cwd=tmp_path / "mine", env=environment
    ).stdout.split()
    assert told[:2] == [f"{tmp_path}/site-packages/cifar_lib/config.py", f"{tmp_path}/mine"]
    assert told[2:] == ["None", execution.training_code_sha256()]


def test_fingerprint_is_the_same_in_another_process():
    code = "from cifar_lib.config import *; print(TrainConfig(epochs=7).fingerprint('abc'))"
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert other == TrainConfig(epochs=7).fingerprint("abc") == "b8268963f12e"


def test_fingerprint_tells_recipes_and_data_apart_but_not_places():
    base = TrainConfig().fingerprint()
    assert TrainConfig(epochs=11).fingerprint() != base
    assert TrainConfig().fingerprint("data") != base
    assert TrainConfig(data_dir="/elsewhere", device="cpu").fingerprint() == base


@given(
    epochs=st.integers(1, 100),
    learning_rate=st.floats(1e-6, 100),
    flip=st.sampled_from(["none", "random", "alternating"]),
    width=st.none() | st.floats(0.1, 16),
)
def test_round_trip_through_json(epochs, learning_rate, flip, width):
    config = parse_config(
        {"epochs": epochs, "learning_rate": learning_rate, "flip": flip, "width": width}
    )
    again = parse_config(json.loads(json.dumps(config.model_dump(mode="json"))))
    assert again == config
    assert again.fingerprint() == config.fingerprint()


@given(
    st.dictionaries(
        st.text(max_size=12), st.none() | st.booleans() | st.integers() | st.text(), min_size=1
    )
)
def test_no_mapping_ends_in_anything_but_a_configuration_or_one_line(values):
    try:
        parse_config(values)
    except ValueError as error:
        assert "\n" not in str(error)
        assert any(repr(name) in str(error) for name in values)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3: duplicate key 'a'"),
        ("a: {1: 2, 0x1: 3}\n", "line 1: duplicate key 1"),
        ("a: {<<: {b: 1}, <<: {b: 2}}\n", "line 1: duplicate key '<<'"),
        ("- 1\n- 2\n", "expected a mapping"),
        ("a: [1\n", "expected"),
        ("a: !!python/object/apply:os.system ['true']\n", "could not determine a constructor"),
        ("", "expected a mapping"),
        ("1: 2\n", "expected a mapping of names"),
        ("? [a]\n: 1\n", "unhashable"),
    ],
)
def test_bad_yaml_is_one_line_with_the_file(tmp_path, text, said):
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        read_yaml(path)
    assert str(path) in str(caught.value) and said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_mapping_may_be_merged_with_others(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text("a: &a\n  b: &b {<<: {x: 1}, x: 2}\nc: {<<: *b, y: 3}\nd: {<<: *b, x: 4}\n")
    values = read_yaml(path)
    assert values == {"a": {"b": {"x": 2}}, "c": {"x": 2, "y": 3}, "d": {"x": 4}}


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"none\.yaml: No such file"):
        read_yaml(tmp_path / "none.yaml")
