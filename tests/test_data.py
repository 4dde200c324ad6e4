"""Data sets as tensors: provenance, the cache, the splits, the statistics, the true CIFAR-10."""

import dataclasses
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data_sources import picture, write_official, write_parquet, write_pictures

from cifar_lib import data, data_download
from cifar_lib.config import TrainConfig
from cifar_lib.data import (
    DataInfo,
    ImageSet,
    channel_statistics,
    load_dataset,
    load_splits,
    split_train,
)
from cifar_lib.data_sources import CIFAR10_CLASSES, Source

INFO = DataInfo("custom", "folder", False, "0" * 64, 0, 0, 0)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("CI", "CIFAR10_MIRROR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CIFAR10_DOWNLOAD", "0")
    monkeypatch.setenv("CIFAR_LIB_CACHE", str(tmp_path / "cache"))
    data_download.say_once.cache_clear()
    return tmp_path / "cache"


@pytest.fixture
def small(tmp_path: Path) -> Path:
    pairs = [(picture(i, "JPEG"), i % 10) for i in range(20)]
    rows = {"train": pairs, "test": [(picture(99), 3)]}
    return write_parquet(tmp_path / "small", rows)


def image_set(labels: list[int], classes: int = 10) -> ImageSet:
    number = torch.arange(len(labels))  # each image carries its position
    images = number.view(-1, 1, 1, 1).expand(-1, 3, 32, 32).to(torch.uint8)
    return ImageSet(images, torch.tensor(labels), tuple(map(str, range(classes))), INFO)


def positions(images: ImageSet) -> list[int]:
    return images.images[:, 0, 0, 0].tolist()


def test_digits() -> None:
    train, test = load_dataset("digits")
    assert train.info.sha256.startswith("a0d2c585991a68bd"), "must not depend on the machine"
    assert (len(train), len(test)) == (1437, 360)
    assert train.info == dataclasses.replace(train.info, name="digits", source="embedded")
    assert (train.info.lossy, train.info.n_train, train.info.n_test) == (False, 1437, 360)
    assert train.class_names == tuple("0123456789")
    counts, test_counts = train.labels.bincount(), test.labels.bincount()
    assert ((test_counts / (counts + test_counts) - 360 / 1797).abs() < 1 / 170).all()


def test_auto_takes_digits_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CIFAR10_DIR", str(tmp_path / "nowhere"))
    assert load_dataset("auto")[0].info.name == load_dataset("auto")[1].info.name == "digits"
    assert capsys.readouterr().err.count("Taking digits, a stand-in") == 1


def test_auto_takes_what_is_there_and_damage_is_an_error(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CIFAR10_DIR", str(small))
    assert load_dataset("auto")[0].info.source == "parquet"
    (small / "train.parquet").write_bytes(b"PAR1, or so")
    with pytest.raises(ValueError, match="not a whole Parquet file"):
        load_dataset("auto")


def test_unknown_data_set() -> None:
    with pytest.raises(ValueError, match="dataset 'mnist' must be auto, cifar10 or digits"):
        load_dataset("mnist")


def test_official_is_cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = load_dataset("cifar10", str(write_official(tmp_path, monkeypatch)))
    assert (train.info.name, train.info.source, train.info.lossy) == ("cifar10", "official", False)
    assert (train.info.n_train, train.info.n_val, train.info.n_test) == (20, 0, 4)
    assert train.class_names == test.class_names == CIFAR10_CLASSES


def test_other_counts_or_classes_are_named_custom(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert load_dataset("cifar10", str(small))[0].info.name == "custom"
    assert "20 and 1 images, CIFAR-10 has 50,000 and 10,000" in capsys.readouterr().err
    train, _ = load_dataset("cifar10", str(write_pictures(tmp_path / "mine")))
    assert (train.info.name, train.class_names) == ("custom", ("ant", "cat"))


def test_hash_is_of_pixels_and_labels_whatever_the_layout(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    rows: dict[str, list[tuple]] = {"train": [], "test": []}
    for part in rows:
        for k, name in enumerate(CIFAR10_CLASSES):
            (folder / part / name).mkdir(parents=True)
            (folder / part / name / "0.jpg").write_bytes(picture(k, "JPEG"))
            rows[part].append((picture(k, "JPEG"), k))
    write_parquet(tmp_path / "parquet", rows)
    a, _ = load_dataset("cifar10", str(folder))
    b, _ = load_dataset("cifar10", str(tmp_path / "parquet"))
    assert a.info.sha256 == b.info.sha256 and a.info.lossy and b.info.lossy
    rows["test"][0] = (rows["test"][0][0], 1)
    c, _ = load_dataset("cifar10", str(write_parquet(tmp_path / "other", rows)))
    assert c.info.sha256 != a.info.sha256


def test_second_load_is_from_the_cache_and_equal(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load_dataset("cifar10", str(small))
    monkeypatch.setattr(data, "read_source", lambda _: pytest.fail("decoded again"))
    second = load_dataset("cifar10", str(small))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
        assert a.info == b.info and a.class_names == b.class_names


def test_changed_files_are_decoded_again(small: Path) -> None:
    before = load_dataset("cifar10", str(small))[0]
    write_parquet(small, {"train": [(picture(i + 1), i % 10) for i in range(20)]})
    after = load_dataset("cifar10", str(small))[0]
    assert not torch.equal(before.images, after.images)
    assert before.info.sha256 != after.info.sha256


@pytest.mark.parametrize("damage", ["truncated", "a bit", "empty", "header"])
def test_a_damaged_cache_is_rebuilt(
    small: Path, cache: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    caplog.set_level(logging.INFO, "cifar_lib.data")
    first = load_dataset("cifar10", str(small))[0]
    (path,) = cache.iterdir()
    content = path.read_bytes()
    path.write_bytes(
        {
            "truncated": content[:-10],
            "a bit": content[:-10] + bytes([content[-10] ^ 1]) + content[-9:],
            "empty": b"",
            "header": content.replace(b"sha256", b"sha255"),
        }[damage]
    )
    caplog.clear()
    again = load_dataset("cifar10", str(small))[0]
    assert torch.equal(first.images, again.images) and first.info == again.info
    assert "damaged" in caplog.text and [p.name for p in cache.iterdir()] == [path.name]
    caplog.clear()
    load_dataset("cifar10", str(small))
    assert caplog.text == ""


def test_a_cache_that_can_not_be_written_is_only_a_warning(
    small: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.write_text("a file where the folder should be")
    assert len(load_dataset("cifar10", str(small))[0]) == 20
    assert "can not be written" in caplog.text


def test_a_cache_that_can_not_be_read_is_only_a_warning(
    small: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CIFAR_LIB_CACHE", f"/{300 * 'x'}")  # longer than a name can be
    assert len(load_dataset("cifar10", str(small))[0]) == 20
    assert "can not be written" in caplog.text


def test_files_that_change_while_they_are_read_are_not_kept(
    small: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_source(source: Source) -> tuple[dict[str, torch.Tensor], bool]:
        write_parquet(small, {"train": [(picture(i + 1), i % 10) for i in range(20)]})
        return decode(source)

    decode = data.read_source
    monkeypatch.setattr(data, "read_source", read_source)
    with pytest.raises(ValueError, match="small: changed while it was read; start again"):
        load_dataset("cifar10", str(small))
    assert not cache.exists()


def test_load_splits_counts(small: Path) -> None:
    config = TrainConfig(dataset="cifar10", data_dir=str(small), n_train=10, val_fraction=0.5)
    splits = load_splits(config)
    assert len(splits.train) == len(splits.val) == 10 and len(splits.test) == 1
    assert sorted(splits.train.labels.tolist()) == sorted(splits.val.labels.tolist())
    assert (splits.info.n_train, splits.info.n_val, splits.info.n_test) == (10, 10, 1)
    assert splits.info == splits.train.info == splits.val.info == splits.test.info
    assert json.loads(json.dumps(dataclasses.asdict(splits.info)))["sha256"] == splits.info.sha256


def test_image_set(small: Path) -> None:
    train, _ = load_dataset("cifar10", str(small))
    assert train.subset(torch.tensor([3, 1])).labels.tolist() == [3, 1]
    assert len(train.subset(train.labels == 4)) == 2
    assert train.to("meta").images.is_meta and train.to("meta").labels.is_meta
    assert train.statistics is train.statistics


@settings(max_examples=60, deadline=None)
@given(
    labels=st.lists(st.integers(0, 4), min_size=4, max_size=120),
    fraction=st.floats(0, 0.5),
    n_train=st.integers(10, 130),
    seed=st.integers(0, 2**40),
)
def test_split_is_a_stratified_partition(
    labels: list[int], fraction: float, n_train: int, seed: int
) -> None:
    whole = image_set(labels)
    train, val = split_train(whole, fraction, None, seed)
    assert sorted(positions(train) + positions(val)) == list(range(len(labels)))
    assert positions(train) == sorted(positions(train)) and len(val) == round(fraction * len(whole))
    part, same_val = split_train(whole, fraction, n_train, seed)
    assert positions(same_val) == positions(val)
    assert len(part) == min(n_train, len(train)) and set(positions(part)) <= set(positions(train))
    assert part.info.n_train == len(part) and part.info.n_val == len(val)
    counts = whole.labels.bincount()
    for subset in (val, part):
        share = counts / len(whole)
        off = (subset.labels.bincount(minlength=len(counts)) - share * len(subset)).abs()
        # Ends of a stretch: half an image each, and what the K classes' halves shift them by.
        assert (off <= 1 + share * len(counts) + 1e-4).all()
    assert torch.equal(part.labels, torch.tensor(labels)[positions(part)])


def test_classes_of_one_size_get_the_same_number() -> None:
    for n_train in (10, 50, 57, 180):
        for part in split_train(image_set([i // 20 for i in range(200)]), 0.1, n_train, 3):
            counts = part.labels.bincount(minlength=10)
            assert counts.max() - counts.min() == (1 if n_train == 57 and len(part) == 57 else 0)


def test_split_is_the_same_on_every_machine() -> None:
    whole = image_set([i % 3 for i in range(30)])
    train, val = split_train(whole, 0.2, 6, 7)
    assert (positions(val), positions(train)) == ([4, 7, 9, 11, 14, 18], [1, 2, 5, 10, 12, 27])
    assert positions(split_train(whole, 0.2, 6, 8)[1]) != positions(val)


def test_a_smaller_subset_is_part_of_a_larger_one() -> None:
    whole = image_set([i % 10 for i in range(200)])
    subsets = [set(positions(split_train(whole, 0.1, n, 0)[0])) for n in (10, 50, 51, 180, 999)]
    assert all(a < b for a, b in zip(subsets, subsets[1:4], strict=False))
    assert subsets[3] == subsets[4] and len(subsets[3]) == 180  # at most


def test_channel_statistics() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (50, 3, 32, 32), generator=generator).to(torch.uint8)
    images[:, 1] //= 2
    images[:, 2] = 255
    mean, std = channel_statistics(images)
    scaled = images.double() / 255
    assert torch.allclose(mean.double(), scaled.mean((0, 2, 3)), atol=1e-7)
    assert torch.allclose(std.double(), scaled.std((0, 2, 3), correction=0), atol=1e-7)
    assert mean.dtype == std.dtype == torch.float32 and std[2] < 1e-6


def test_true_cifar10(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        train, test = load_dataset("cifar10")
    except ValueError as error:
        pytest.skip(str(error))
    assert train.info.name == "cifar10"
    assert train.labels.bincount().tolist() == [5000] * 10
    assert test.labels.bincount().tolist() == [1000] * 10
    assert train.images.shape == (50_000, 3, 32, 32) and test.images.shape == (10_000, 3, 32, 32)
    lossy = ((0.49125, 0.48209, 0.44652), (0.24523, 0.24278, 0.26063))
    original = ((0.49140, 0.48216, 0.44653), (0.24703, 0.24349, 0.26159))
    known = torch.tensor(lossy if train.info.lossy else original)
    assert torch.allclose(torch.stack(train.statistics), known, atol=1e-5)
    monkeypatch.setattr(data, "read_source", lambda _: pytest.fail("decoded again"))
    again, test_again = load_dataset("cifar10")
    assert torch.equal(train.images, again.images) and torch.equal(train.labels, again.labels)
    assert torch.equal(test.images, test_again.images) and train.info == again.info
    shutil.rmtree(cache)  # 185 MB that pytest would keep
    rest, val = split_train(train, 0.1, None, 0)
    assert (len(rest), len(val)) == (45_000, 5_000)
    assert val.labels.bincount().tolist() == [500] * 10
