"""The readers: every layout, and every way in which its files can be wrong."""

import hashlib
import io
import os
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10

from cifar_lib.data_sources import CIFAR10_CLASSES, find_source, read_digits, read_source
from cifar_lib.predict import read_image

BATCHES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


def pixels(seed: int, size: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)


def picture(seed: int, kind: str = "PNG", size: int = 32, mode: str = "RGB") -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels(seed, size)).convert(mode).save(content, kind)
    return content.getvalue()


def write_parquet(folder: Path, rows: dict[str, list[tuple]], column: str = "img") -> Path:
    """`rows`: file name without suffix → (content, label)."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, pairs in rows.items():
        structs = [{"bytes": content, "path": None} for content, _ in pairs]
        pq.write_table(
            pa.table({column: structs, "label": [label for _, label in pairs]}),
            folder / f"{name}.parquet",
        )
    return folder


def write_pictures(folder: Path, classes: tuple[str, ...] = ("cat", "ant"), n: int = 2) -> Path:
    for part, names in (("train", classes), ("test", classes)):
        for k, name in enumerate(names):
            (folder / part / name).mkdir(parents=True)
            for i in range(n):
                (folder / part / name / f"{i}.png").write_bytes(picture(100 * k + i))
    return folder


def write_official(folder: Path, monkeypatch: pytest.MonkeyPatch, n: int = 4) -> Path:
    """Six small batches as Python 2 named things, their MD5 put in the place of the true ones."""
    base = folder / "cifar-10-batches-py"
    base.mkdir(parents=True)
    md5 = []
    for i, name in enumerate(BATCHES):
        data = np.random.default_rng(i).integers(0, 256, (n, 3072), np.uint8)
        content = pickle.dumps({"data": data, "labels": [(i + j) % 10 for j in range(n)]}, 2)
        content = content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
        (base / name).write_bytes(content)
        md5.append([name, hashlib.md5(content, usedforsecurity=False).hexdigest()])
    monkeypatch.setattr(CIFAR10, "train_list", md5[:5])
    monkeypatch.setattr(CIFAR10, "test_list", md5[5:])
    return folder


def read(folder: Path) -> tuple[dict[str, torch.Tensor], bool]:
    source = find_source(folder)
    assert source is not None
    return read_source(source)


def one_line(error: pytest.ExceptionInfo[ValueError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_official_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_official(tmp_path, monkeypatch)
    tensors, lossy = read(tmp_path)
    first = np.random.default_rng(0).integers(0, 256, (4, 3072), np.uint8)
    assert torch.equal(tensors["train_images"][:4], torch.from_numpy(first).view(4, 3, 32, 32))
    assert tensors["train_labels"].tolist() == [(i + j) % 10 for i in range(5) for j in range(4)]
    assert tensors["test_images"].shape == (4, 3, 32, 32)
    assert not lossy
    inside = find_source(tmp_path / "cifar-10-batches-py")  # the folder itself may be named
    assert inside == find_source(tmp_path) and inside is not None
    assert inside.class_names == CIFAR10_CLASSES


def test_official_is_not_unpickled_before_its_md5_matched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_official(tmp_path, monkeypatch)
    path = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    path.write_bytes(path.read_bytes()[:-1])
    monkeypatch.setattr(pickle, "loads", lambda content, **_: {"data": [], "labels": []})
    with pytest.raises(ValueError, match="data_batch_3: corrupted, its MD5.*delete.*--download"):
        read(tmp_path)


def test_official_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_official(tmp_path, monkeypatch)
    for name in ("data_batch_1", "test_batch"):
        (tmp_path / "cifar-10-batches-py" / name).unlink()
    with pytest.raises(ValueError, match="data_batch_1, test_batch missing; delete"):
        find_source(tmp_path)


@pytest.mark.parametrize(("kind", "lossy"), [("PNG", False), ("JPEG", True)])
@pytest.mark.parametrize("column", ["img", "image"])
def test_parquet(tmp_path: Path, kind: str, lossy: bool, column: str) -> None:
    train = [(picture(1), 9), (picture(2, kind), 0)]
    tensors, found_lossy = read(
        write_parquet(tmp_path, {"train": train, "test-00000-of-00001": [(picture(3), 4)]}, column)
    )
    assert torch.equal(tensors["train_images"][0].permute(1, 2, 0), torch.from_numpy(pixels(1)))
    assert torch.equal(tensors["test_images"][0].permute(1, 2, 0), torch.from_numpy(pixels(3)))
    decoded = np.asarray(Image.open(io.BytesIO(train[1][0])))
    assert torch.equal(tensors["train_images"][1].permute(1, 2, 0), torch.tensor(decoded))
    assert tensors["train_labels"].tolist() == [9, 0] and tensors["test_labels"].tolist() == [4]
    assert found_lossy is lossy


def test_parquet_shards_are_read_in_name_order(tmp_path: Path) -> None:
    shards = {f"train-0000{i}-of-00003": [(picture(i), i)] for i in (2, 0, 1)}
    tensors, _ = read(write_parquet(tmp_path, shards | {"test": [(picture(9), 9)]}))
    assert tensors["train_labels"].tolist() == [0, 1, 2]
    (tmp_path / "train-00001-of-00003.parquet").unlink()
    with pytest.raises(ValueError, match="2 of 3 train.*add the others"):
        find_source(tmp_path)


@pytest.mark.parametrize(
    ("content", "label", "says"),
    [
        (picture(1), 10, "train.parquet row 1: label 10, allowed are 0..9; correct"),
        (picture(1), -1, "row 1: label -1, allowed"),
        (picture(1), None, "row 1: label None, allowed"),
        (picture(1, size=28), 1, "row 1: 28x28 pixels, needed are 32x32; resize"),
        (picture(1)[:-900], 1, "row 1: not a whole PNG or JPEG.*replace"),
        (picture(1, "JPEG")[:-300], 1, "row 1: not a whole PNG or JPEG.*replace"),
        (picture(1, "GIF"), 1, "row 1: not a whole PNG or JPEG"),
        (b"", 1, "row 1: not a whole PNG or JPEG"),
        (None, 1, "row 1: not a whole PNG or JPEG"),
    ],
)
def test_parquet_with_a_bad_row(tmp_path: Path, content: object, label: object, says: str) -> None:
    write_parquet(tmp_path, {"train": [(picture(0), 0), (content, label)], "test": []})
    with pytest.raises(ValueError, match=says) as error:
        read(tmp_path)
    assert str(tmp_path) in one_line(error)


def test_parquet_with_wrong_columns_or_no_rows(tmp_path: Path) -> None:
    write_parquet(tmp_path, {"train": [(picture(0), 0)], "test": [(picture(0), 0)]}, "picture")
    with pytest.raises(ValueError, match=r"train.parquet: needed.*img.*label, got picture: struct"):
        read(tmp_path)
    pq.write_table(pa.table({"img": [1, 2], "label": [0, 1]}), tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="train.parquet: needed.*got img: int64, label: int64"):
        read(tmp_path)
    write_parquet(tmp_path, {"train": [(picture(0), 0)]})
    empty = pa.table({"img": [{"bytes": b"", "path": ""}], "label": [0]}).slice(0, 0)
    pq.write_table(empty, tmp_path / "test.parquet")
    with pytest.raises(ValueError, match="the test part holds no image"):
        read(tmp_path)


def test_parquet_whose_column_names_are_no_text(tmp_path: Path) -> None:
    table = pa.table({"img": [{"bytes": b"", "path": None}], "label": [0]})
    for part in ("train", "test"):
        pq.write_table(table, tmp_path / f"{part}.parquet")
    path = tmp_path / "train.parquet"
    path.write_bytes(path.read_bytes().replace(b"img", b"im\xcf"))
    source = find_source(tmp_path)
    assert source is not None
    with pytest.raises(ValueError, match="train.parquet: not a whole Parquet.*replace"):
        read_source(source)


def test_parquet_in_part_or_truncated(tmp_path: Path) -> None:
    write_parquet(tmp_path, {"train": [(picture(i), i) for i in range(9)]})
    with pytest.raises(ValueError, match=r"no test\*.parquet beside the other part; add it"):
        find_source(tmp_path)
    content = (tmp_path / "train.parquet").read_bytes()
    (tmp_path / "test.parquet").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="test.parquet: not a whole Parquet.*replace") as error:
        read(tmp_path)
    one_line(error)


def test_folders_of_any_classes(tmp_path: Path) -> None:
    write_pictures(tmp_path, ("cat", "ant"))
    (tmp_path / "train" / "cat" / "0.png").write_bytes(picture(7, mode="L"))
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not a picture")
    (tmp_path / "train" / "cat" / "._0.png").write_bytes(b"what macOS leaves behind")
    (tmp_path / "train" / ".hidden").mkdir()
    source = find_source(tmp_path)
    assert source is not None and source.class_names == ("ant", "cat")
    tensors, lossy = read_source(source)
    assert tensors["train_labels"].tolist() == [0, 0, 1, 1] and not lossy
    grey = tensors["train_images"][2]
    assert torch.equal(grey[0], grey[2])
    assert torch.equal(tensors["train_images"][0].permute(1, 2, 0), torch.from_numpy(pixels(100)))
    (tmp_path / "test" / "ant" / "9.JPG").write_bytes(picture(8, "JPEG"))
    assert read(tmp_path)[1]


def test_pictures_of_any_mode_are_seen_as_prediction_sees_them(tmp_path: Path) -> None:
    write_pictures(tmp_path, ("cat", "ant"))
    ramp = np.arange(1024, dtype=np.uint16).reshape(32, 32) * 64
    Image.fromarray(ramp).save(tmp_path / "train/ant/0.png")
    Image.new("RGBA", (32, 32)).save(tmp_path / "train/ant/1.png")
    tensors, _ = read(tmp_path)
    grey, transparent = tensors["train_images"][:2]
    assert grey[0].float().mean().item() == pytest.approx(127, abs=2)
    assert (transparent == 255).all()
    assert torch.equal(grey, read_image(tmp_path / "train/ant/0.png"))


def test_folders_of_cifar10s_classes_keep_its_order(tmp_path: Path) -> None:
    source = find_source(write_pictures(tmp_path, tuple(sorted(CIFAR10_CLASSES)[::-1]), n=1))
    assert source is not None and source.class_names == CIFAR10_CLASSES
    assert [path.parent.name for path in source.train] == list(CIFAR10_CLASSES)
    assert read_source(source)[0]["test_labels"].tolist() == list(range(10))


def test_folders_in_part(tmp_path: Path) -> None:
    write_pictures(tmp_path, ("ant", "bee", "cat"), n=1)
    (tmp_path / "test" / "bee" / "0.png").unlink()
    with pytest.raises(ValueError, match=r"test: needed.*'bee': 0"):
        find_source(tmp_path)
    (tmp_path / "test" / "bee").rmdir()
    with pytest.raises(ValueError, match="classes in only one of train and test: bee; add"):
        find_source(tmp_path)
    (tmp_path / "train").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"train: needed are two class folders or more.*got \{\}"):
        find_source(tmp_path)


def test_a_bad_picture_is_named(tmp_path: Path) -> None:
    write_pictures(tmp_path)
    path = tmp_path / "test" / "cat" / "1.png"
    path.write_bytes(picture(0, size=64))
    with pytest.raises(ValueError, match=r"cat.1\.png: 64x64 pixels, needed are 32x32"):
        read(tmp_path)
    path.write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"cat.1\.png: not a whole PNG or JPEG"):
        read(tmp_path)


def test_what_would_be_left_out_is_named(tmp_path: Path) -> None:
    write_pictures(tmp_path)
    ant = tmp_path / "train" / "ant"
    (ant / "2.png").symlink_to("nowhere")
    with pytest.raises(ValueError, match=r"ant.2\.png: No such file or directory; make it"):
        read(tmp_path)
    (ant / "2.png").unlink()
    (ant / "more").mkdir()
    (ant / "3.webp").write_bytes(picture(3, "WEBP"))
    (ant / ".hidden").write_text("no picture, and not meant as one")
    says = r"ant.3\.webp: neither png nor jpg, as 2 in .*train; convert or move them"
    with pytest.raises(ValueError, match=says):
        find_source(tmp_path)


def test_a_class_whose_name_is_no_text_is_a_class(tmp_path: Path) -> None:
    try:
        write_pictures(tmp_path, ("ant", os.fsdecode(b"b\xff")))
    except OSError:
        pytest.skip("this file system takes only names that are text")
    source = find_source(tmp_path)
    assert source is not None and len(source.sha256()) == 64
    assert source.class_names == ("ant", r"b\udcff")  # as summaries can have it
    assert read_source(source)[0]["train_labels"].tolist() == [0, 0, 1, 1]


def test_nothing_is_found_in_nothing(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("no data")
    assert find_source(tmp_path) is None
    assert find_source(tmp_path / "missing") is None


def test_hash_changes_with_bytes_and_names(tmp_path: Path) -> None:
    def sha256() -> str:
        source = find_source(tmp_path)
        assert source is not None
        return source.sha256()

    write_pictures(tmp_path)
    path = tmp_path / "train" / "ant" / "0.png"
    seen = [sha256()]
    path.rename(path.with_name("2.png"))
    seen.append(sha256())
    path.with_name("2.png").write_bytes(picture(55))
    seen.append(sha256())
    assert len(set(seen)) == 3


def test_digits_are_the_same_everywhere() -> None:
    images, labels = read_digits()
    assert images.shape == (1797, 3, 32, 32) and images.dtype == torch.uint8
    assert (int(images.min()), int(images.max())) == (0, 255)
    assert labels.dtype == torch.int64 and labels[:10].tolist() == list(range(10))
    digest = hashlib.sha256(images.numpy()).hexdigest()
    assert digest[:16] == "6b72b28023b654e8", "the pixels must not depend on machine or version"
