"""Nonsense in, one line or the right thing out: parameters, data files and pictures at random."""

import contextlib
import io
import json
import random
import tempfile
import types
import typing
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import many
from hypothesis import strategies as st
from PIL import Image
from test_data_sources import picture, write_pictures

from cifar_lib.config import TrainConfig, parse_config
from cifar_lib.config_yaml import read_yaml
from cifar_lib.data import load_dataset
from cifar_lib.data_sources import find_source, read_source
from cifar_lib.files import write_atomic
from cifar_lib.predict import read_image

# --- parameters -----------------------------------------------------------------------------


def sensible(name: str) -> st.SearchStrategy:
    """Values of a field's type and, mostly, of its range."""
    field = TrainConfig.model_fields[name]
    kinds, bounds = [field.annotation], {}
    for item in field.metadata:
        for side in ("ge", "gt", "le", "lt"):
            bounds[side] = getattr(item, side, bounds.get(side))
    low = bounds.get("ge") if bounds.get("ge") is not None else bounds.get("gt")
    high = bounds.get("le") if bounds.get("le") is not None else bounds.get("lt")
    choices = [st.just(field.default)]
    while kinds:
        kind = kinds.pop()
        origin = typing.get_origin(kind)
        if origin is typing.Literal:
            choices.append(st.sampled_from(typing.get_args(kind)))
        elif origin in (types.UnionType, typing.Union, typing.Annotated):
            kinds += [a for a in typing.get_args(kind) if typing.get_origin(a) or a in (int, float)]
        elif kind is bool:
            choices.append(st.booleans())
        elif kind is int:
            choices.append(st.integers(int(low or 0), int(high or 99)))
        elif kind is float:
            choices.append(st.floats(low or 0.0, high or 9.0).map(lambda x: round(x, 3)))
    return st.one_of(choices)


NONSENSE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["5e-4", "nan", "-1", "1e999", "none", "auto", [], {}, [3, 1], [1, "2"]]),
    st.lists(st.integers(-2, 30), max_size=4),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)
FIELDS = sorted(TrainConfig.model_fields)


@many(100, 10_000, values=st.fixed_dictionaries({}, optional={n: sensible(n) for n in FIELDS}))
def test_what_is_taken_comes_back_the_same(values):
    try:
        config = parse_config(values)
    except ValueError as error:
        assert "\n" not in str(error) and any(name in str(error) for name in values)
        return
    text = yaml.safe_dump(config.model_dump(mode="json"))
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(text)
        file.flush()
        again = parse_config(read_yaml(file.name))
    assert again == config == parse_config(json.loads(config.model_dump_json()))
    assert again.fingerprint("x") == config.fingerprint("x")


@many(300, 10_000, name=st.sampled_from(FIELDS), value=NONSENSE, other=st.sampled_from(FIELDS))
def test_a_refusal_names_its_field_and_no_other(name, value, other):
    try:
        parse_config({name: value, other: TrainConfig.model_fields[other].default} | {name: value})
    except ValueError as error:
        said = str(error)
        assert name in said and "\n" not in said
        first = {part.split(":")[0].split(".")[0] for part in said.split("; ") if ": got" in part}
        assert first <= {name}, said


# --- data files -----------------------------------------------------------------------------


def damage(content: bytes, seed: int) -> bytes:
    """Flips bits, overwrites, cuts or lengthens, as disks, transfers and people do."""
    draw, broken = random.Random(seed), bytearray(content)
    kind, at = draw.randrange(5), draw.randrange(len(broken))
    if kind == 0:
        broken[at] ^= 1 << draw.randrange(8)
    elif kind == 1:
        for _ in range(draw.randrange(2, 20)):
            broken[draw.randrange(len(broken))] = draw.randrange(256)
    elif kind == 2:
        del broken[at:]
    elif kind == 3:
        broken[at:at] = draw.randbytes(draw.randrange(1, 9))
    else:
        size = draw.randrange(1, 64)
        broken[at : at + size] = bytes(len(broken[at : at + size]))
    return bytes(broken)


@contextlib.contextmanager
def damaged(path: Path, seed: int) -> Iterator[None]:
    # Another file in its place: what maps the old one into memory keeps it.
    whole = path.read_bytes()
    write_atomic(path, damage(whole, seed))
    try:
        yield
    finally:
        write_atomic(path, whole)


@pytest.fixture(scope="module", autouse=True)
def _places(tmp_path_factory):
    """Fills `PLACES`: a data set of every layout, with what reading it gives."""
    root = tmp_path_factory.mktemp("data")
    write_pictures(root / "png", n=3)
    write_pictures(root / "jpeg", n=3)
    for path in sorted((root / "jpeg").rglob("*.png")):
        path.write_bytes(picture(len(str(path)), "JPEG"))
    (root / "parquet").mkdir()
    for part, n in (("train", 40), ("test", 10)):
        structs = [{"bytes": picture(i), "path": None} for i in range(n)]
        table = pa.table({"img": structs, "label": [7 * i % 10 for i in range(n)]})
        pq.write_table(table, root / "parquet" / f"{part}.parquet", write_page_checksum=True)
    for name in ("png", "jpeg", "parquet"):
        PLACES[name] = root / name, *read(root / name)
    yield
    PLACES.clear()


PLACES: dict[str, tuple] = {}


def read(folder: Path) -> tuple[dict[str, torch.Tensor], bool]:
    source = find_source(folder)
    assert source is not None
    return read_source(source)


@many(
    100,
    6000,
    layout=st.sampled_from(["png", "jpeg", "parquet"]),
    which=st.integers(0, 99),
    seed=st.integers(0, 2**40),
)
def test_a_damaged_file_is_refused_or_read_right(layout, which, seed):
    folder, tensors, lossy = PLACES[layout]
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = files[which % len(files)]
    with damaged(path, seed), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found, found_lossy = read(folder)
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            return
    for key in tensors:  # a JPEG has no checksum: its pixels may differ, its label may not
        assert found[key].shape == tensors[key].shape
        assert torch.equal(found[key], tensors[key]) or (layout == "jpeg" and "images" in key)
    assert found_lossy == lossy


@many(60, 3000, seed=st.integers(0, 2**40))
def test_a_damaged_cache_is_found_out(seed):
    folder = PLACES["png"][0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CIFAR_LIB_CACHE", str(folder.parent / "cache"))
        first = load_dataset("cifar10", str(folder))
        (path,) = (folder.parent / "cache").iterdir()
        with damaged(path, seed):
            again = load_dataset("cifar10", str(folder))
        for a, b in zip(first, again, strict=True):
            assert a.info == b.info and a.class_names == b.class_names
            assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
            assert (a.images.dtype, a.labels.dtype) == (b.images.dtype, b.labels.dtype)


def test_a_cache_of_other_types_is_found_out(monkeypatch, tmp_path):
    """The same bytes under another type: labels without a sign, pixels with one."""
    folder = PLACES["png"][0]
    monkeypatch.setenv("CIFAR_LIB_CACHE", str(tmp_path))
    first, _ = load_dataset("cifar10", str(folder))
    (path,) = tmp_path.iterdir()
    for a, b in ((b'"I64"', b'"U64"'), (b'"U8"', b'"I8"'), (b'"True"', b'"Tru_"')):
        whole = path.read_bytes()
        write_atomic(path, whole.replace(a, b) if a in whole else whole.replace(b"False", b"Fa_se"))
        again, _ = load_dataset("cifar10", str(folder))
        assert again.labels.dtype == torch.int64 and again.images.dtype == torch.uint8
        assert again.info == first.info


def test_a_png_whose_pixels_do_not_match_its_checksum_is_refused():
    folder, *_ = PLACES["png"]
    path = next(folder.rglob("train/*/*.png"))
    broken = bytearray(path.read_bytes())
    crc = broken.index(b"IEND") - 8  # the checksum of the last IDAT, which decoding leaves unread
    broken[crc] ^= 1
    whole = path.read_bytes()
    path.write_bytes(broken)
    try:
        with pytest.raises(ValueError, match="not a whole PNG"):
            read(folder)
    finally:
        path.write_bytes(whole)


# --- pictures -------------------------------------------------------------------------------


def photo(kind: str) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8)
    content, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(content, kind, **({"exif": exif} if kind == "JPEG" else {}))
    return content.getvalue()


@many(
    150,
    6000,
    kind=st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"]),
    seed=st.integers(0, 2**40),
)
def test_a_damaged_picture_is_a_line_or_a_picture(kind, seed):
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("error")
        path = Path(folder, "photo")
        path.write_bytes(damage(photo(kind), seed))
        try:
            image = read_image(path)
        except ValueError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
        else:
            assert image.dtype == torch.uint8 and tuple(image.shape) == (3, 32, 32)
