"""Pictures of any size and mode are read upright; bad ones cost one line and nothing else."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from cifar_lib import predict
from cifar_lib.predict import find_images, predictions_frame, read_image, score
from cifar_lib.results import save_summary
from cifar_lib.train import train


@pytest.fixture(scope="module")
def run(tmp_path_factory, digits, tiny):
    return train(tiny(epochs=1), 0, digits, tmp_path_factory.mktemp("run"))


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


def test_files_are_found_and_labelled_by_their_folder(tmp_path):
    for name in ("3/b.png", "3/a.png", "other/c.png", ".hidden/d.png", "3/.e.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = find_images([tmp_path], ["3", "4"])
    names = [(path.relative_to(tmp_path).as_posix(), label) for path, label in found]
    assert names == [("3/a.png", "3"), ("3/b.png", "3"), ("other/c.png", None)]
    assert find_images([tmp_path / "3/a.png"], ["3"]) == [(tmp_path / "3/a.png", None)]
    with pytest.raises(ValueError, match="none: no such file"):
        find_images([tmp_path / "none"], [])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no file in"):
        find_images([tmp_path / "empty"], [])


def test_probabilities_are_those_of_the_run(run, digits):
    probabilities = predict.predict_probabilities(run, digits.test.images)
    assert torch.allclose(probabilities, run.test_logits.softmax(1), atol=1e-5)


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
        (row,) = json.loads(out)
        assert row["label"] == "3" and 0 <= row["probability_1"] <= 1
    if form == "table":
        assert "1 labelled: top-1" in out


def test_weights_that_do_not_fit_are_refused(tmp_path, run, digits):
    for path in run.path.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    save_summary(tmp_path, run.summary | {"class_names": ["a", "b"]})
    other = predict.Run(tmp_path, run.config, 0, run.metrics, run.summary | {"class_names": ["a"]})
    with pytest.raises(ValueError, match="do not fit"):
        predict.predict_probabilities(other, digits.test.images[:2])
