"""What others hand over: no code in it runs, no path in it leads out, and one line says why."""

import hashlib
import io
import json
import os
import pickle
import struct
import tarfile
import zlib
from pathlib import Path

import pytest
import torch
from conftest import PARAMS
from PIL import Image
from safetensors.torch import save
from test_data_sources import picture, write_official, write_pictures
from torchvision.datasets import CIFAR10

from cifar_lib import results, study_experiments, study_runs
from cifar_lib.checkpoint import load_checkpoint, save_checkpoint
from cifar_lib.config import parse_config
from cifar_lib.config_yaml import read_yaml
from cifar_lib.data_download import ARCHIVE, find_or_download
from cifar_lib.data_sources import find_source, read_source
from cifar_lib.files import inside, plain_name
from cifar_lib.predict import MAX_PIXELS, read_image
from cifar_lib.reports import Report
from cifar_lib.train import train


@pytest.fixture
def canary(tmp_path) -> Path:
    """The file that an attack would make; it is there at the end of no test."""
    path = tmp_path / "pwned"
    yield path
    assert not path.exists()


class Evil:
    """Runs a shell command where it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, digits, tiny) -> results.Run:
    return train(tiny(epochs=1), 0, digits, tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture
def run_dir(finished, tmp_path) -> Path:
    """A finished run as somebody else hands it over."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    for path in finished.path.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def one_line(error: str, *parts: object) -> None:
    assert error.strip().count("\n") == 0, error
    for part in parts:
        assert str(part) in error


# --- weights and states ---------------------------------------------------------------------


def test_the_attack_is_one(tmp_path):
    path = tmp_path / "made"
    pickle.loads(pickle.dumps(Evil(path)))  # noqa: S301
    assert path.exists()


@pytest.mark.parametrize("kind", ["ours", "plain pickle", "list"])
def test_a_state_with_code_in_it_is_not_run(tmp_path, digits, tiny, canary, kind):
    payload = io.BytesIO()
    if kind == "plain pickle":
        pickle.dump({"key": Evil(canary)}, payload)
    else:
        torch.save([1, 2] if kind == "list" else {"key": "k", "model": Evil(canary)}, payload)
    content = payload.getvalue()
    (tmp_path / "last.pt").write_bytes(content + hashlib.sha256(content).digest())
    with pytest.raises(ValueError, match="not a training state, nothing in it was run") as caught:
        train(tiny(), 0, digits, tmp_path)
    one_line(str(caught.value), tmp_path / "last.pt", "remove it")


@pytest.mark.parametrize("change", ["shape", "missing", "history", "optimizer"])
def test_a_state_that_does_not_fit_is_refused(tmp_path, digits, tiny, change):
    train(tiny(epochs=1), 0, digits, tmp_path)
    state = load_checkpoint(tmp_path)
    if change == "shape":
        name = next(iter(state["model"]))
        state["model"][name] = torch.zeros(1, 2, 3)
    elif change == "missing":
        del state["scaler"]
    elif change == "history":
        state["model"] = "weights"
    else:
        state["optimizer"] = {"state": 1, "param_groups": []}
    save_checkpoint(tmp_path, state)
    (tmp_path / "summary.json").unlink()
    with pytest.raises(ValueError, match="its training state does not fit this run") as caught:
        train(tiny(epochs=1), 0, digits, tmp_path)
    one_line(str(caught.value), tmp_path, "remove last.pt and previous.pt to start again")


@pytest.mark.parametrize("command", ["evaluate", "predict"])
@pytest.mark.parametrize("kind", ["pickle", "shapes", "names", "empty"])
def test_weights_that_are_none_of_the_model_are_refused(
    call, run_dir, tmp_path, canary, command, kind
):
    weights = results.load_weights(run_dir)
    contents = {
        "pickle": lambda: pickle.dumps(Evil(canary)),
        "shapes": lambda: save({k: torch.zeros(*v.shape, 2) for k, v in weights.items()}),
        "names": lambda: save({f"x{k}": v for k, v in weights.items()}),
        "empty": lambda: b"",
    }
    (run_dir / results.WEIGHTS).write_bytes(contents[kind]())
    (tmp_path / "a.png").write_bytes(picture(0))
    words = [str(run_dir)] + ([str(tmp_path / "a.png")] if command == "predict" else [])
    status, _, err = call(command, *words)
    assert status == 2
    said = "do not fit the model" if kind in ("shapes", "names") else "damaged"
    one_line(err, run_dir / results.WEIGHTS, said)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("class_names", None),
        ("class_names", "0123456789"),
        ("class_names", [1, 2]),
        ("normalization", None),
        ("normalization", {"mean": "x", "std": [1.0, 1.0, 1.0]}),
        ("normalization", {"mean": [0.0, 0.0], "std": [1.0, 1.0, 1.0]}),
        ("seed", "../../x"),
        ("dataset", []),
    ],
)
@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_a_record_without_what_is_needed_is_refused(call, run_dir, command, key, value):
    summary = json.loads((run_dir / results.SUMMARY).read_text())
    changed = {k: v for k, v in summary.items() if k != key} | ({key: value} if value else {})
    (run_dir / results.SUMMARY).write_text(json.dumps(changed))
    words = [str(run_dir)] + ([__file__] if command == "predict" else [])
    status, _, err = call(command, *words)
    assert status == 2
    one_line(err, run_dir, "broken run record", "train the run again with --force")


# --- data -----------------------------------------------------------------------------------


def test_a_batch_with_code_in_it_is_not_run(tmp_path, monkeypatch, canary):
    folder = write_official(tmp_path / "data", monkeypatch)
    path = folder / "cifar-10-batches-py/data_batch_2"
    path.write_bytes(pickle.dumps({"data": Evil(canary), "labels": []}))
    source = find_source(folder)
    with pytest.raises(ValueError, match="corrupted, its MD5 is") as caught:
        read_source(source)
    one_line(str(caught.value), path, "delete")


def archive_with(member: tarfile.TarInfo, folder: Path, monkeypatch) -> None:
    """Lays an archive there that holds the member, and whose MD5 counts as the right one."""
    folder.mkdir(parents=True)
    with tarfile.open(folder / ARCHIVE, "w:gz") as tar:
        member.size = 3 if member.isfile() else 0
        tar.addfile(member, io.BytesIO(b"bad"))
    md5 = hashlib.md5((folder / ARCHIVE).read_bytes(), usedforsecurity=False).hexdigest()
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5)


@pytest.mark.parametrize("kind", ["relative", "absolute", "symbolic link", "hard link", "device"])
def test_an_archive_writes_nowhere_else(tmp_path, monkeypatch, canary, kind):
    member = tarfile.TarInfo({"relative": "../../pwned", "absolute": str(canary)}.get(kind, "in"))
    if "link" in kind:
        member.type = tarfile.SYMTYPE if kind == "symbolic link" else tarfile.LNKTYPE
        member.linkname = "../../../secret" if kind == "hard link" else str(tmp_path)
    elif kind == "device":
        member.type = tarfile.CHRTYPE
    (tmp_path / "secret").write_text("mine")
    folder = tmp_path / "a/b"
    archive_with(member, folder, monkeypatch)
    with pytest.raises(ValueError) as caught:
        find_or_download(str(folder), stand_in=False)
    one_line(str(caught.value), folder)
    assert {path.name for path in folder.iterdir()} <= {ARCHIVE, ".download.lock"}
    assert (tmp_path / "secret").read_text() == "mine"


def bomb(side: int) -> bytes:
    """A PNG of a few bytes that says it is so many pixels wide and high."""

    def chunk(name: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + check

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(b"0"))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + body + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [11_000, 14_000, 40_000])
def test_a_picture_that_would_fill_the_memory_is_not_decoded(tmp_path, monkeypatch, side):
    assert side**2 > MAX_PIXELS
    write_pictures(tmp_path / "data")
    paths = tmp_path / "photo.png", tmp_path / "data/train/ant/0.png"
    for path in paths:
        path.write_bytes(bomb(side))
    source = find_source(tmp_path / "data")
    monkeypatch.setattr(Image.Image, "load", lambda _: pytest.fail("decoded"))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda _: pytest.fail("decoded"))
    for path, read in zip(paths, (read_image, lambda _: read_source(source)), strict=True):
        with pytest.raises(ValueError) as caught:
            read(path)
        one_line(str(caught.value), path)


def test_a_picture_that_is_a_program_is_not_handed_to_its_interpreter(tmp_path, monkeypatch):
    path = tmp_path / "photo.png"
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\n")
    with Image.open(path) as picture_:
        assert picture_.format == "EPS"  # which Pillow hands to Ghostscript
    with pytest.raises(ValueError, match="not a picture of PNG, JPEG"):
        read_image(path)


# --- parameter files ------------------------------------------------------------------------

TAGS = ["!!python/object/apply:os.system ['touch {}']", "!!python/name:os.system"]


@pytest.mark.parametrize("tag", TAGS)
def test_an_object_in_a_yaml_file_is_not_made(call, tmp_path, run_dir, monkeypatch, canary, tag):
    line = f"epochs: {tag.format(canary)}\n"
    params = tmp_path / "theirs.yaml"
    params.write_text(PARAMS.replace("epochs: 1\n", line))
    status, _, err = call("train", str(params))
    assert status == 2
    one_line(err, params, "could not determine a constructor")
    (run_dir / "config.yaml").write_text(line)
    status, _, err = call("evaluate", str(run_dir))
    assert status == 2
    one_line(err, run_dir, "could not determine a constructor")
    params.write_text(PARAMS)
    status, _, err = call("train", str(params), "-p", line.strip().replace(": ", "=", 1))
    assert status == 2
    one_line(err, "the value is not YAML")
    (tmp_path / "params").mkdir()
    (tmp_path / "params/study.yaml").write_text(f"presets: {tag.format(canary)}\n")
    monkeypatch.setattr(study_experiments, "ROOT", tmp_path)
    status, _, err = call("study")
    assert status == 2
    one_line(err, "study.yaml", "could not determine a constructor")


def test_yaml_that_stands_for_gigabytes_is_refused_in_a_line(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    for i in range(1, 12):
        lines.append(f"a{i}: &a{i} [{', '.join(9 * [f'*a{i - 1}'])}]")
    path = tmp_path / "laughs.yaml"
    path.write_text("\n".join([*lines, "epochs: *a11", ""]))
    with pytest.raises(ValueError) as caught:
        parse_config(read_yaml(path))
    one_line(str(caught.value), "epochs: got [")
    assert len(str(caught.value)) < 20_000
    path.write_text("epochs: " + 50_000 * "[")
    with pytest.raises(ValueError) as caught:
        read_yaml(path)
    one_line(str(caught.value), path)


# --- names that lead elsewhere --------------------------------------------------------------

ELSEWHERE = ["../../x", "..", "a/../../x", "runs/../../x"]


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_report_stays_in_the_checkout_unless_somebody_says_where(tmp_path, monkeypatch, name):
    monkeypatch.setattr("cifar_lib.reports.ROOT", tmp_path / "checkout")
    with pytest.raises(ValueError, match="report_dir: got .*leads out of checkout/"):
        Report(name, "toy", "one", "mine", "What?")
    assert not (tmp_path / "x").exists()
    wanted = tmp_path / "elsewhere"
    Report(str(wanted), "toy", "one", "mine", "What?").finish(None, [])
    assert (wanted / "summary.json").is_file()


@pytest.mark.parametrize("name", [*ELSEWHERE, "/x", "", ".scratch", "a\0b"])
def test_an_experiment_stays_below_runs(tmp_path, tiny, digits, monkeypatch, name):
    monkeypatch.setattr(study_runs, "ROOT", tmp_path / "checkout")
    with pytest.raises(ValueError, match="experiment: got .*without / and leading dot") as caught:
        study_runs.runs(tiny(), [0], experiment=name, splits=digits)
    one_line(str(caught.value))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("seed", ["../../x", -1, 2**40])  # the last: no generator takes it
def test_a_seed_is_a_number_from_0_that_a_generator_takes(
    seed, tmp_path, tiny, digits, monkeypatch
):
    monkeypatch.setattr(study_runs, "ROOT", tmp_path / "checkout")
    with pytest.raises(ValueError, match="seeds: got .*allowed are different ints"):
        study_runs.runs(tiny(), [seed], experiment="e", splits=digits)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("{notebook: ../evil, params: toy/one.yaml}", "notebook: got '../evil'"),
        ("{notebook: toy, params: ../../one.yaml}", "params: got '../../one.yaml'"),
        ("{notebook: toy, params: toy/.yaml}", "params: got '.yaml'"),
        ("{notebook: 3, params: toy/one.yaml}", "an experiment has"),
    ],
)
@pytest.mark.parametrize("preset", ["quick", "../x"])
def test_a_study_runs_only_what_lies_in_its_folders(tmp_path, monkeypatch, preset, entry, said):
    root = tmp_path / "checkout"
    monkeypatch.setattr(study_experiments, "ROOT", root)
    (root / "params/toy").mkdir(parents=True)
    for path in (root / "params/toy/one.yaml", root / "params/toy/.yaml", tmp_path / "one.yaml"):
        path.write_text("question: What?\n")
    (root / "params/study.yaml").write_text(f"presets:\n  {preset}: [{entry}]\n")
    with pytest.raises(ValueError) as caught:
        study_experiments.load_preset(preset)
    names = preset != "quick" and "an experiment has" not in said and "../../" not in said
    one_line(str(caught.value), "preset: got '../x'" if names else said)


def test_names_are_words_to_nobodys_shell(call, tmp_path, monkeypatch, canary):
    monkeypatch.setattr(study_runs, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    name = "x; touch pwned $(touch pwned) `touch pwned` & {0}"
    params = tmp_path / f"{name}.yaml"
    params.write_text(PARAMS)
    status, out, err = call("train", str(params))
    assert (status, err) == (0, "")
    (folder,) = (tmp_path / "runs" / name).iterdir()
    status, _, err = call("evaluate", str(folder))
    assert (status, err) == (0, "")


def test_inside_and_plain_names():
    root = Path("/root-of-it")
    assert inside(root, "reports/mine", "f") == root / "reports/mine"
    assert inside(root, "/else/where", "f") == Path("/else/where")
    assert inside(root, "a/../b", "f") == root / "b"
    assert plain_name("x; rm -r é", "f") == "x; rm -r é"
