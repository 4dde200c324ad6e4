"""The command line: every command explains itself; a mistake is one line and exit status 2."""

import errno
import io
import logging
import sys

import pytest
import torch
from conftest import PARAMS

from cifar_lib import index, study, study_runs
from cifar_lib.config import ROOT

SWEEP = str(ROOT / "params/02_speed/ablations.yaml")
FIXTURES = str(ROOT / "tests/fixtures/reports/02_speed")
ONE_IMAGE = ["-p", "model=imagenet_resnet18", "-p", "width=null", "-p", "micro_batch_size=1"]
COMMANDS = ["study", "train", "evaluate", "export", "predict", "data", "report", "compare"]


def test_help_names_every_command(call):
    status, out, _ = call("--help")
    assert status == 0 and call() == (0, out, "")
    for command in COMMANDS:
        assert f"\n  {command} " in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["study"], "stopped; the same command goes on"),
        (["study", "--force"], "stopped; --force would begin anew: leave it out"),
    ],
)
def test_who_is_stopped_is_told_how_to_go_on(call, monkeypatch, words, said):
    def stopped(*_, **__):
        raise SystemExit(143)

    monkeypatch.setattr("cifar_lib.study.study", stopped)
    status, _, err = call(*words)
    assert status == 143 and err.startswith(said) and err.count("\n") == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself(call, command):
    status, out, _ = call(command, "--help")
    assert status == 0 and "Usage" in out and len(out) > 150


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["study", "--preset", "fast"], "unknown preset 'fast'"),
        (["study", "--seeds", "0"], "--seeds"),
        (["study", "--seeds", "99999999999999999999"], "--seeds"),
        (["train", "PARAMS", "-p", "eval_batch_size=99999999999999999999"], "eval_batch_size: got"),
        (["study", "--nothing"], "--nothing"),
        (["nothing"], "nothing"),
        (["compare", "shipped", "02_speed/none"], "no report with predictions; there are 01_"),
        (["compare", "shipped", "02_speed/smallcnn"], "has no logits.safetensors"),
        (["train", "none.yaml"], "none.yaml: No such file"),
        (["train", "PARAMS", "-p", "epochs"], "-p 'epochs': expected NAME=VALUE"),
        (["train", "PARAMS", "-p", "epochs=[1"], "the value is not YAML"),
        (["train", "PARAMS", "-p", "epochs=2024-99-99"], "-p 'epochs=2024-99-99': the value is"),
        (["train", "PARAMS", "-p", f"epochs={'[' * 9999}"], "the value is not YAML"),
        (["train", "PARAMS", "-p", "epochs=!!bool maybe"], "the value is not YAML"),
        (["train", "PARAMS", "-p", "epochs=!!int ''"], "the value is not YAML"),
        (["train", "PARAMS", "-p", "epochs=!!timestamp x"], "the value is not YAML"),
        (["train", "PARAMS", "-p", f"epochs=1{':00' * 200}.0"], "the value is not YAML"),
        (["train", "PARAMS", *ONE_IMAGE], "batch_size: imagenet_resnet18's batch norm needs two"),
        (["train", "PARAMS", "-p", "dataset=cifar10", "-p", "data_dir=~nobody-here/x"], "~nobody"),
        (["train", "PARAMS", "-p", "epochs=many"], "epochs: got 'many'"),
        (["train", "PARAMS", "-p", "lr=1"], "unknown field 'lr'"),
        (["train", "PARAMS", "-p", "model=big"], "model: got 'big'"),
        (["train", "PARAMS", "--seed", "-1"], "--seed"),
        (["train", SWEEP], "a sweep; list it in params/study.yaml if it is not, then: "),
        (["train", "PARAMS", "-p", "dataset=cifar10", "-p", "data_dir=EMPTY"], "EMPTY"),
        (["data", "--dataset", "cifar100"], "dataset: got 'cifar100'"),
        (["evaluate", "EMPTY"], "not a finished run"),
        (
            ["evaluate", str(ROOT / "tests/fixtures/reports/02_speed")],
            "name one of those in it: smoke",
        ),
        (["export", "EMPTY"], "not a finished run"),
        (["predict", "EMPTY", "PARAMS"], "not a finished run"),
        (["predict", "EMPTY", "PARAMS", "--format", "xml"], "--format: got 'xml'"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(call, tmp_path, monkeypatch, words, said):
    monkeypatch.setattr(study_runs, "ROOT", tmp_path)
    params, empty = tmp_path / "params.yaml", tmp_path / "empty"
    params.write_text(PARAMS)
    empty.mkdir()
    places = {"PARAMS": str(params), "EMPTY": str(empty)}
    for name, place in places.items():
        words = [word.replace(name, place) for word in words]
        said = said.replace(name, place)
    status, _, err = call(*words)
    assert status == 2
    assert not (tmp_path / "runs").exists()
    assert err.startswith("error: ") and err.count("\n") == 1 and said in err


def test_who_reads_no_further_is_told_nothing(call, tmp_path, monkeypatch, capsys):
    """As with `| head -1`: a line an epoch goes nowhere, the last one ends the command."""

    def nobody(*_: object) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    gone = io.StringIO()
    monkeypatch.setattr(gone, "write", nobody)
    with monkeypatch.context() as context:
        context.setattr(sys, "stdout", gone)
        with study_runs._logged(tmp_path, ""):
            logging.getLogger("cifar_lib").info("epoch 1")
    assert capsys.readouterr().err == ""
    assert "epoch 1" in (tmp_path / "train.log").read_text()
    monkeypatch.setattr(index, "drifted_files", nobody)
    assert call("report", "--check") == (1, "", "")


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_stream_that_was_closed_is_not_asked(call, monkeypatch, name):
    monkeypatch.setattr(sys, name, None)
    assert call("data", "--dataset", "digits")[0] == 0


def test_train_then_evaluate(call, tmp_path, monkeypatch):
    monkeypatch.setattr(study_runs, "ROOT", tmp_path)
    params = tmp_path / "mine.yaml"
    params.write_text(PARAMS)
    status, out, _ = call("train", str(params), "-p", "tta=mirror", "--seed", "4")
    assert status == 0 and "seed 4" in out and "test_accuracy_tta" in out
    (folder,) = (tmp_path / "runs/mine").iterdir()
    status, again, _ = call("evaluate", str(folder))
    assert status == 0
    assert again.split("test_accuracy ")[1].split(" ")[0] in out


@pytest.mark.timeout(400)
def test_study_leaves_an_index_repeats_nothing_and_says_what_failed(clone):
    text = clone.params.read_text().replace("epochs: 1000", "epochs: 1")
    clone.params.write_text(text)
    status, out, err = clone.run("study")
    assert (status, err) == (0, "") and "[1/1] toy/one: done in" in out
    index = clone.root / "reports/quick/README.md"
    assert out.endswith("index: reports/quick/README.md\n")
    assert "(toy/one/executed.ipynb)" in index.read_text()
    status, out, _ = clone.run("study")
    assert status == 0 and "[1/1] toy/one: up to date" in out
    notebook = clone.root / "notebooks/toy.ipynb"
    notebook.write_text(notebook.read_text().replace("progress=False", "progress=1 / 0"))
    status, out, _ = clone.run("study")
    assert status == 1 and "[1/1] toy/one: FAILED" in out and "failed: toy/one" in out
    assert "(toy/one/executed.ipynb)" in index.read_text()  # the report before is still there


def test_data_says_what_it_found(call):
    status, out, _ = call("data", "--dataset", "digits")
    assert status == 0
    assert "name: digits" in out and "sha256: " in out and "n_test: 360" in out


def test_data_download_asks_for_cifar10_itself(call, monkeypatch, tmp_path):
    monkeypatch.setenv("CIFAR10_DIR", str(tmp_path))
    monkeypatch.setenv("CIFAR10_DOWNLOAD", "0")
    status, _, err = call("data", "--download")
    assert status == 2 and str(tmp_path) in err and "CIFAR10_DOWNLOAD" in err
    status, out, err = call("data", "--dataset", "digits", "--download")
    assert (status, out) == (2, "") and "brings cifar10, and --dataset is digits" in err


def test_every_option_is_handed_on(call, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(study, "runs", lambda *_, **given: asked.append(given["force"]) or [])
    monkeypatch.setattr(
        study, "study", lambda *given, **named: asked.append((*given, *named.values())) or []
    )
    monkeypatch.setattr(index, "write_preset_index", lambda _: tmp_path)
    (tmp_path / "p.yaml").write_text("dataset: digits")
    for words in ([], ["--force"]):
        assert call("train", str(tmp_path / "p.yaml"), *words)[0] == 0
    words = ["--preset", "own", "--only", "a/*", "--seeds", "2", "--force"]
    assert call("study", *words, "--engine", "ray", "--jobs", "3", "--address", "auto")[0] == 0
    assert asked == [False, True, ("own", "a/*", 2, True, "ray", 3, "auto")]


def test_a_training_that_went_astray_is_status_1(call, tmp_path, monkeypatch):
    def astray(*_, **__):
        raise FloatingPointError("the loss is not finite")

    monkeypatch.setattr(study, "runs", astray)
    (tmp_path / "p.yaml").write_text("dataset: digits")
    assert call("train", str(tmp_path / "p.yaml")) == (1, "", "error: the loss is not finite\n")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 9 TiB"),
        MemoryError(),
        RuntimeError("unable to mmap 9 bytes from file <x>:\nCannot allocate memory (12)"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 TiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_a_full_memory_is_one_line(call, tmp_path, monkeypatch, error):
    def full(*_, **__):
        raise error

    monkeypatch.setattr(study, "runs", full)
    (tmp_path / "p.yaml").write_text("dataset: digits")
    status, out, err = call("train", str(tmp_path / "p.yaml"))
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("error: out of memory: ") and " ".join(str(error).split()) in err
    assert "MemoryError" in err or str(error)
    assert "micro_batch_size" in err


def test_another_error_of_a_library_keeps_its_traceback(call, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(study, "runs", broken)
    (tmp_path / "p.yaml").write_text("dataset: digits")
    with pytest.raises(RuntimeError, match="shapes differ"):
        call("train", str(tmp_path / "p.yaml"))
