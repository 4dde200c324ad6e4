"""Pictures of any size and mode are read upright; bad ones cost one line and nothing else."""

import io
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cifar_lib import __main__ as cli
from cifar_lib import predict, predict_export
from cifar_lib.files import beside
from cifar_lib.predict import (
    find_images,
    find_run,
    predictions_frame,
    predictor,
    read_image,
    score,
)
from cifar_lib.predict_export import CARD, MAX_BYTES, export_run, model_card
from cifar_lib.results import WEIGHTS, Run, load_run
from cifar_lib.train import train

PHOTOGRAPHS = Path(__file__).with_name("fixtures") / "photographs"
"""cat/chelsea.jpg: by Stéfan van der Walt, from scikit-image, CC0."""


@pytest.fixture(scope="module")
def run(tmp_path_factory, digits, tiny):
    return train(tiny(epochs=1, tta="mirror"), 0, digits, tmp_path_factory.mktemp("run"))


@pytest.fixture
def half_red(tmp_path):
    """A picture twice as wide as high: red on the left, blue on the right."""
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, :40, 0], pixels[:, 40:, 2] = 255, 255
    return Image.fromarray(pixels)


def test_the_centred_square_is_resized(tmp_path, half_red):
    half_red.save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png")
    assert image.dtype == torch.uint8 and tuple(image.shape) == (3, 32, 32)
    assert image[0, :, :12].min() > 250 and image[2, :, 20:].min() > 250


@pytest.mark.parametrize("mode", ["RGBA", "L", "CMYK", "P", "1", "LA", "YCbCr"])
def test_every_mode_becomes_rgb(tmp_path, half_red, mode):
    path = tmp_path / ("a.tif" if mode in ("CMYK", "YCbCr") else "a.png")
    half_red.convert("RGB").convert(mode).save(path)
    image = read_image(path)
    assert tuple(image.shape) == (3, 32, 32)
    assert image[0, :, :12].float().mean() != image[0, :, 20:].float().mean()


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    Image.fromarray(np.full((40, 40), 257 * 100, np.uint16)).save(tmp_path / "a.png")
    assert set(read_image(tmp_path / "a.png").flatten().tolist()) == {100}


def test_transparency_is_laid_on_white(tmp_path):
    Image.new("RGBA", (40, 40), (255, 0, 0, 0)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").min() == 255


def test_a_picture_is_turned_as_its_exif_record_says(tmp_path, half_red):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side: turn by 90° clockwise
    half_red.save(tmp_path / "a.jpg", exif=exif, quality=95)
    image = read_image(tmp_path / "a.jpg").float()
    assert image[0, :10].mean() > 200 > image[0, 22:].mean()  # red is at the top now


def broken(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (99, 99, 3), np.uint8)).save(
        buffer, "PNG"
    )
    whole = buffer.getvalue()
    return {"text": b"hello", "empty": b"", "cut": whole[: len(whole) // 2]}[kind]


@pytest.mark.parametrize("kind", ["text", "empty", "cut"])
def test_a_bad_file_is_one_line_with_its_name(tmp_path, kind):
    path = tmp_path / "bad.png"
    path.write_bytes(broken(kind))
    with pytest.raises(ValueError) as caught:
        read_image(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_a_pipe_is_not_waited_for(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.png")
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("opened"))
    with pytest.raises(ValueError, match=r"pipe\.png: a named pipe"):
        read_image(tmp_path / "pipe.png")


def test_a_folder_that_can_not_be_read_stands_among_the_files(tmp_path, monkeypatch):
    for name in ("3/a.png", "4/b.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"")

    def scan(path, scan=os.scandir):
        if os.fspath(path) == str(tmp_path / "4"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", scan)
    found = [path for path, _ in find_images([tmp_path], ["3", "4"])]
    assert found == [tmp_path / "3/a.png", tmp_path / "4"]
    with pytest.raises(ValueError, match="4: "):
        read_image(tmp_path / "4")


def test_files_are_found_and_labelled_by_their_folder(tmp_path):
    for name in ("3/b.png", "3/a.png", "other/c.png", ".hidden/d.png", "3/.e.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = find_images([tmp_path], ["3", "4"])
    names = [(path.relative_to(tmp_path).as_posix(), label) for path, label in found]
    assert names == [("3/a.png", "3"), ("3/b.png", "3"), ("other/c.png", None)]
    assert find_images([tmp_path / "3/a.png"], ["3"]) == [(tmp_path / "3/a.png", None)]
    assert find_images([tmp_path / "3"], ["3"])[0] == (tmp_path / "3/a.png", "3")
    with pytest.raises(ValueError, match="none: no such file"):
        find_images([tmp_path / "none"], [])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no file in"):
        find_images([tmp_path / "empty"], [])


def test_the_nearest_folder_with_a_classs_name_labels_in_capitals_or_not(tmp_path):
    for name in ("cat/Dog/from_may/a.png", "CAT/b.png", "plane/c.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(b"")
    found = {path.name: label for path, label in find_images([tmp_path], ["cat", "dog"])}
    assert found == {"a.png": "dog", "b.png": "cat", "c.png": None}


def test_a_folder_that_names_no_class_beside_some_that_do_is_named(
    call, tmp_path, run, half_red, monkeypatch
):
    for name in ("3", "three"):
        (tmp_path / name).mkdir()
        half_red.save(tmp_path / name / "a.png")
    status, out, err = call("predict", str(run.path), str(tmp_path))
    assert status == 0 and "1 labelled" in out
    assert err.startswith("not scored: three name no class; classes are 0, 1") and len(err) < 200
    assert call("predict", str(run.path), str(tmp_path / "three"))[2] == ""
    given = (str(tmp_path / "3"), str(tmp_path / "three/a.png"))
    assert call("predict", str(run.path), *given)[2] == "", "a file given by name needs no label"
    monkeypatch.chdir(tmp_path / "three")
    assert "not scored: three name" in call("predict", str(run.path), ".", str(tmp_path / "3"))[2]


def test_a_picture_met_twice_counts_once_and_links_to_folders_are_followed(tmp_path, monkeypatch):
    (tmp_path / "in/dog").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for path in ("in/dog/a.png", "elsewhere/b.png"):
        (tmp_path / path).write_bytes(b"")
    (tmp_path / "in/cat").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in/cat/round").symlink_to(tmp_path / "in")  # a circle
    (tmp_path / "in/pet").symlink_to(tmp_path / "elsewhere")  # and a second way
    found = find_images([tmp_path / "in", tmp_path / "in/dog"], ["cat", "dog"])
    names = [(path.relative_to(tmp_path).as_posix(), label) for path, label in found]
    assert names == [("in/cat/b.png", "cat"), ("in/dog/a.png", "dog")]
    monkeypatch.chdir(tmp_path / "in/dog")
    assert find_images([Path()], ["dog"]) == [(Path("a.png"), "dog")]
    for paths in ([Path("a.png"), Path()], [Path(), Path("a.png")]):  # in any order with its label
        assert find_images(paths, ["dog"]) == [(Path("a.png"), "dog")]


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pixels_of_unknown_range_are_refused(tmp_path, mode):
    Image.new(mode, (40, 40), 1).save(tmp_path / "a.tiff")
    with pytest.raises(ValueError, match="a.tiff: 32-bit pixels of unknown range; save it with 8"):
        read_image(tmp_path / "a.tiff")


def test_logits_are_those_of_the_run(run, digits):
    images = digits.test.images
    assert torch.allclose(predictor(run)(images), run.test_logits, atol=1e-5)
    assert torch.allclose(predictor(run, tta=True)(images), run.test_logits_tta, atol=1e-5)
    assert not torch.allclose(run.test_logits, run.test_logits_tta, atol=1e-2)


def test_the_score_counts_labelled_pictures_alone(tmp_path):
    files = [(tmp_path / n, label) for n, label in (("a", "x"), ("b", "y"), ("c", None))]
    probabilities = torch.tensor([[0.7, 0.3], [0.6, 0.4], [0.5, 0.5]])
    totals, table = score(files, probabilities, ["x", "y"])
    assert totals == {"n": 2, "top1": 0.5, "top5": 1.0}
    assert list(table["recall"]) == [1.0, 0.0]
    assert score(files[2:], probabilities[2:], ["x", "y"]) is None
    frame = predictions_frame(files, probabilities, ["x", "y"])
    assert list(frame["class_1"])[:2] == ["x", "x"] and frame["probability_1"][0] == 0.7


@pytest.mark.parametrize("form", ["table", "csv", "json"])
def test_bad_files_do_not_stop_the_others(call, tmp_path, run, half_red, form):
    (tmp_path / "3").mkdir()
    half_red.save(tmp_path / "3/good.png")
    (tmp_path / "3/bad.png").write_bytes(b"no")
    status, out, err = call("predict", str(run.path), str(tmp_path), "--format", form)
    assert status == 1
    assert err.count("\n") == 1 and "bad.png: not a picture" in err
    assert "good.png" in out and "bad.png" not in out
    if form == "json":
        record = json.loads(out)
        (row,) = record["predictions"]
        assert row["label"] == "3" and 0 <= row["probability_1"] <= 1
        assert record["score"]["n"] == 1 and record["per_class"][0]["class_name"] == "3"
    if form == "table":
        assert "1 labelled: top-1" in out


def test_pictures_without_labels_have_no_score(call, tmp_path, run, half_red):
    half_red.save(tmp_path / "a.png")
    status, out, err = call("predict", str(run.path), str(tmp_path / "a.png"), "--top", "2")
    assert (status, err) == (0, "")
    assert out.split()[:2] == ["path", "class_1"] and out.count("\n") == 2
    _, out, _ = call("predict", str(run.path), str(tmp_path / "a.png"), "--format", "json")
    assert json.loads(out)["score"] is None and json.loads(out)["per_class"] == []


def test_a_name_that_is_no_text_and_a_link_to_nowhere_do_not_stop_the_others(
    call, tmp_path, run, half_red
):
    path = tmp_path / os.fsdecode(b"a\xff.png")
    try:
        half_red.save(path)
    except OSError:
        pytest.skip("this file system takes only names that are text")
    (tmp_path / "b.png").symlink_to("nowhere")
    status, out, err = call("predict", str(run.path), str(tmp_path), "--format", "csv")
    assert status == 1 and "a\\udcff.png" in out
    assert err == f"error: {tmp_path / 'b.png'}: No such file or directory\n"


def test_a_terminal_without_the_letters_of_a_name_gets_all_answers(
    monkeypatch, tmp_path, run, half_red
):
    half_red.save(tmp_path / "猫.png")
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "argv", ["cifar_lib", "predict", str(run.path), str(tmp_path)])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    terminal.flush()
    assert rb"\u732b.png" in terminal.buffer.getvalue()


def test_weights_that_do_not_fit_are_refused(run, digits):
    other = replace(run, summary=run.summary | {"class_names": ["a"]})
    with pytest.raises(ValueError, match="do not fit"):
        predictor(other)(digits.test.images[:2])


# --- the model that comes with the project --------------------------------------------------


def test_an_exported_run_says_the_same_in_half_the_bytes(call, tmp_path, monkeypatch, run, digits):
    monkeypatch.setattr(predict, "SHIPPED", tmp_path / "shipped")
    words = ("predict", "shipped", str(tmp_path / "3"))
    status, _, err = call(*words)
    assert status == 2 and "shipped: not a finished run" in err
    status, out, _ = call("export", str(run.path))
    assert status == 0 and out == f"wrote {tmp_path / 'shipped'}\n"
    exported = find_run("shipped")
    for name, tensor in exported.weights.items():
        assert (tensor.dtype == torch.float16) == (tensor.ndim > 1)
        assert torch.allclose(tensor.float(), run.weights[name].float(), rtol=1e-3, atol=1e-6)
    before, after = predictor(run)(digits.test.images), predictor(exported)(digits.test.images)
    assert torch.allclose(before, after, atol=0.02) and not torch.equal(before, after)
    whole, half = ((r.path / WEIGHTS).stat().st_size for r in (run, exported))
    assert half < 0.7 * whole
    (tmp_path / "3").mkdir()
    Image.fromarray(digits.test.images[0].permute(1, 2, 0).numpy()).save(tmp_path / "3/a.png")
    status, out, err = call(*words)
    assert (status, err) == (0, "") and "1 labelled" in out
    status, out, _ = call("evaluate", "shipped")
    assert status == 0 and "test_accuracy_tta" in out


def test_an_export_names_no_folder_of_this_machine_and_says_what_it_is(tmp_path, run):
    config = run.config.model_copy(update={"data_dir": "/somewhere"})
    exported = export_run(replace(run, config=config), tmp_path / "new")
    assert exported.config == run.config
    assert {path.name for path in (tmp_path / "new").iterdir()} == {
        "config.yaml", "metrics.csv", "summary.json", WEIGHTS, CARD
    }  # fmt: skip
    assert list(tmp_path.iterdir()) == [tmp_path / "new"]
    card = (tmp_path / "new" / CARD).read_text()
    for key in ("val_accuracy", "test_accuracy", "test_accuracy_tta"):
        assert f"{100 * run.summary['result'][key]:.2f} %" in card
    assert "digits" in card and "`mirror`" in card and f"{len(run.metrics)} epochs" in card


def test_what_is_too_large_is_refused_and_nothing_is_left(tmp_path, monkeypatch, run):
    monkeypatch.setattr(predict_export, "MAX_BYTES", 1000)
    with pytest.raises(ValueError, match=r"bytes in half precision; allowed is 1,000"):
        export_run(run, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_export_that_fails_leaves_the_former_one_whole(tmp_path, monkeypatch, run):
    target = tmp_path / "target"
    export_run(run, target)
    before = contents(target)
    broken = replace(run, summary={k: v for k, v in run.summary.items() if k != "hardware"})
    with pytest.raises(ValueError, match="broken run record: KeyError\\('hardware'\\)"):
        export_run(broken, target)
    broken = replace(run, summary=run.summary | {"hardware": None})
    with pytest.raises(ValueError, match="broken run record: TypeError"):
        export_run(broken, target)
    monkeypatch.setattr(predict_export, "save_summary", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_run(run, target)
    assert contents(target) == before and list(tmp_path.iterdir()) == [target]


def test_an_export_takes_nothing_from_a_killed_one(tmp_path, run):
    target = tmp_path / "target"
    export_run(run, target)
    left = beside(target, "new")
    left.mkdir()
    (left / ".best.safetensors.1.tmp").write_bytes(b"half")
    before = set(contents(target))
    export_run(run, target)
    assert set(contents(target)) == before


def test_an_export_destroys_neither_the_run_nor_another_folder(tmp_path, run):
    before = contents(run.path)
    with pytest.raises(ValueError, match="is the run itself"):
        export_run(run, run.path)
    assert contents(run.path) == before
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(ValueError, match="holds something else"):
        export_run(run, tmp_path)
    assert contents(tmp_path) == {"README.md": b"mine"}


def test_an_export_refuses_what_could_not_be_used(tmp_path, monkeypatch, run):
    wider = replace(run, config=run.config.model_copy(update={"width": 0.5}))
    with pytest.raises(ValueError, match="do not fit the model"):
        export_run(wider, tmp_path / "new")
    name, large = next((k, v * 0 + 1e6) for k, v in run.weights.items() if v.ndim > 1)
    weights = run.weights | {name: large}
    monkeypatch.setattr(Run, "weights", property(lambda _: weights))
    with pytest.raises(ValueError, match=f"{name} has values beyond half precision"):
        export_run(run, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_shipped_model_knows_a_photographed_cat(call):
    status, out, err = call("predict", "shipped", str(PHOTOGRAPHS), "--format", "json")
    record = json.loads(out)
    assert (status, err) == (0, "") and record["score"] == {"n": 1, "top1": 1.0, "top5": 1.0}
    assert record["predictions"][0]["probability_1"] > 0.8


def test_the_shipped_model_is_whole_small_and_described():
    run: Run = load_run(predict.SHIPPED)
    assert (run.path / WEIGHTS).stat().st_size <= MAX_BYTES
    assert (run.path / CARD).read_text() == model_card(run)
    assert predictor(run)(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).isfinite().all()


def test_predict_answers_with_the_runs_views(call, tmp_path, run, half_red):
    half_red.save(tmp_path / "a.png")
    _, out, _ = call("predict", str(run.path), str(tmp_path / "a.png"), "--format", "json")
    (row,) = json.loads(out)["predictions"]
    best = predictor(run, tta=True)(read_image(tmp_path / "a.png")[None]).softmax(1).max()
    assert row["probability_1"] == pytest.approx(best.item(), abs=1e-4)
