"""Readers: the three layouts in which CIFAR-10 lies on disks, and the embedded digits.

A layout is first recognised by file names (:func:`find_source`), later decoded
(:func:`read_source`). A folder that shows a sign of a layout but not all of it is an error,
never "not found": half a data set must not be replaced in silence.
"""

import hashlib
import io
import os
import pickle
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from cifar_lib.files import writable

CIFAR10_CLASSES: tuple[str, ...] = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
OFFICIAL_FOLDER = "cifar-10-batches-py"
LAYOUTS = (
    f"{OFFICIAL_FOLDER}/, cifar-10-python.tar.gz, train*.parquet with test*.parquet, or "
    "train/<class>/*.png|jpg with test/<class>/*.png|jpg"
)
DOWNLOAD_COMMAND = "python -m cifar_lib data --download"

_OFFICIAL_TRAIN = tuple(f"data_batch_{i}" for i in range(1, 6))
_PICTURES = {".png", ".jpg", ".jpeg"}
_UNREAD = {".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm"}  # refused, lest they be missed


@dataclass(frozen=True)
class Source:
    """A recognised layout: official, parquet or folder, with its files in reading order."""

    layout: str
    folder: Path
    class_names: tuple[str, ...]
    train: tuple[Path, ...]
    test: tuple[Path, ...]

    def sha256(self) -> str:
        """SHA-256 (64 hexadecimal digits) over the names and the bytes of all files."""
        digest = hashlib.sha256(self.layout.encode())
        for path in self.train + self.test:
            content = _read(path)
            name = os.fsencode(path.relative_to(self.folder).as_posix())
            digest.update(b"\0%b\0%d\0" % (name, len(content)))
            digest.update(content)
        return digest.hexdigest()


def find_source(folder: Path) -> Source | None:
    """Recognises the layout in a folder, which need not exist, by file names alone.

    Returns:
        The source, or None when the folder shows no sign of any layout.

    Raises:
        ValueError: a layout is there in part; says what is missing and what to do.
    """
    for base in (folder / OFFICIAL_FOLDER, folder):
        if base.name == OFFICIAL_FOLDER and base.is_dir() or (base / _OFFICIAL_TRAIN[0]).exists():
            return _find_official(base)
    train, test = (_files(folder, f"{part}*", {".parquet"}) for part in ("train", "test"))
    if train or test:
        return _find_parquet(folder, train, test)
    if (folder / "train").is_dir() or (folder / "test").is_dir():
        return _find_pictures(folder)
    return None


def read_source(source: Source) -> tuple[dict[str, Tensor], bool]:
    """Decodes a source, in the order of its files.

    Returns:
        tensors: train_images and test_images, uint8 (N, 3, 32, 32), 0..255; train_labels and
            test_labels, int64 (N,), 0..K-1.
        lossy: a picture was stored as JPEG.

    Raises:
        ValueError: a file is unreadable, corrupted, wrongly shaped or mislabelled; names it
            and says what to do.
    """
    tensors: dict[str, Tensor] = {}
    lossy = False
    for part, paths in (("train", source.train), ("test", source.test)):
        if source.layout == "official":
            images, labels, part_lossy = _read_official(paths)
        else:
            rows = (
                _read_parquet(paths)
                if source.layout == "parquet"
                else _read_pictures(source, paths)
            )
            images, labels, part_lossy = _decode(rows, len(source.class_names))
        if not len(labels):
            raise ValueError(f"{source.folder}: the {part} part holds no image; add them")
        tensors |= {f"{part}_images": images, f"{part}_labels": labels}
        lossy |= part_lossy
    return tensors, lossy


def read_digits() -> tuple[Tensor, Tensor]:
    """Reads scikit-learn's 1,797 handwritten digits as pictures of CIFAR-10's shape.

    Returns:
        images: uint8 (1797, 3, 32, 32), 0..255, three equal channels.
        labels: int64 (1797,), 0..9.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998.
    """
    from sklearn.datasets import load_digits  # slow to import, and only needed here

    bunch = load_digits()
    # Values 0..16 resized before scaling are small multiples of 1/64: each step is exact in
    # float32, so the pixels (and their SHA-256) are the same on every machine.
    small = torch.from_numpy(bunch.images).float().unsqueeze(1)  # (N, 1, 8, 8)
    large = interpolate(small, size=(32, 32), mode="bilinear", align_corners=False)
    images = (large * (255 / 16)).round().to(torch.uint8).repeat(1, 3, 1, 1)
    return images, torch.from_numpy(bunch.target).long()


def _find_official(base: Path) -> Source:
    train, test = tuple(base / name for name in _OFFICIAL_TRAIN), (base / "test_batch",)
    if missing := [path.name for path in train + test if not path.is_file()]:
        raise ValueError(
            f"{base}: only a part of CIFAR-10, {', '.join(missing)} missing; "
            f"delete the folder and run `{DOWNLOAD_COMMAND}`"
        )
    return Source("official", base, CIFAR10_CLASSES, train, test)


def _find_parquet(folder: Path, train: tuple[Path, ...], test: tuple[Path, ...]) -> Source:
    for part, paths in (("train", train), ("test", test)):
        if not paths:
            raise ValueError(f"{folder}: no {part}*.parquet beside the other part; add it")
        shard = re.search(r"-of-(\d+)$", paths[0].stem)
        if shard and len(paths) != int(shard[1]):
            raise ValueError(
                f"{folder}: {len(paths)} of {int(shard[1])} {part}*.parquet files; add the others"
            )
    return Source("parquet", folder, CIFAR10_CLASSES, train, test)


def _find_pictures(folder: Path) -> Source:
    files: dict[str, tuple[Path, ...]] = {}
    names: dict[str, list[str]] = {}
    for part in ("train", "test"):
        folders = (folder / part).glob("[!.]*")
        # CIFAR-10's own order is that of the alphabet.
        names[part] = sorted(path.name for path in folders if path.is_dir())
        found = [_files(folder / part / name, "*", _PICTURES) for name in names[part]]
        if len(found) < 2 or not all(found):
            raise ValueError(
                f"{folder / part}: needed are two class folders or more, each with png or jpg "
                f"pictures, got {dict(zip(names[part], map(len, found), strict=True))}"
            )
        files[part] = sum(found, ())
        inside = sorted((folder / part).glob("[!.]*/[!.]*"))
        if strange := [p for p in inside if p.is_dir() or p.suffix.lower() in _UNREAD]:
            raise ValueError(
                f"{strange[0]}: neither png nor jpg, as {len(strange)} in {folder / part}; "
                "convert or move them"
            )
    if names["train"] != names["test"]:
        odd = ", ".join(sorted(set(names["train"]) ^ set(names["test"])))
        raise ValueError(f"{folder}: classes in only one of train and test: {odd}; add them")
    classes = tuple(map(writable, names["train"]))
    return Source("folder", folder, classes, files["train"], files["test"])


def _read_official(paths: tuple[Path, ...]) -> tuple[Tensor, Tensor, bool]:
    from torchvision.datasets import CIFAR10  # slow to import; a cached load goes without

    md5 = dict(CIFAR10.train_list + CIFAR10.test_list)
    batches = []
    for path in paths:
        content = _read(path)
        if (found := hashlib.md5(content, usedforsecurity=False).hexdigest()) != md5[path.name]:
            raise ValueError(
                f"{path}: corrupted, its MD5 is {found} instead of {md5[path.name]}; "
                f"delete {path.parent} and run `{DOWNLOAD_COMMAND}`"
            )
        # A pickle can run any code; these very bytes have just been checked.
        batches.append(pickle.loads(content, encoding="latin1"))  # noqa: S301
    images = torch.from_numpy(np.concatenate([batch["data"] for batch in batches]))
    labels = torch.tensor([label for batch in batches for label in batch["labels"]])
    return images.view(-1, 3, 32, 32), labels, False


def _read_parquet(paths: tuple[Path, ...]) -> Iterator[tuple[str, bytes, int]]:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    for path in paths:
        try:
            # Not every writer adds checksums; where they are, they are held.
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                table = file.read()
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # names that are no text
            reason = " ".join(str(error).split())
            raise ValueError(f"{path}: not a whole Parquet file ({reason}); replace it") from None
        try:
            pictures = table["img" if "img" in table.column_names else "image"]
            contents = pc.struct_field(pictures, "bytes").to_pylist()
            labels = table["label"].to_pylist()
        except (KeyError, pa.ArrowException):
            schema = ", ".join(f"{field.name}: {field.type}" for field in table.schema)
            raise ValueError(
                f"{path}: needed are the columns img (or image), a struct with bytes, and label, "
                f"got {schema}"
            ) from None
        for row, (content, label) in enumerate(zip(contents, labels, strict=True)):
            yield f"{path} row {row}", content, label


def _read_pictures(source: Source, paths: tuple[Path, ...]) -> Iterator[tuple[str, bytes, int]]:
    for path in paths:
        yield str(path), _read(path), source.class_names.index(writable(path.parent.name))


def _decode(rows: Iterable[tuple[str, bytes, int]], classes: int) -> tuple[Tensor, Tensor, bool]:
    # Pillow: torchvision's decoder gave the same pixels for all of CIFAR-10 and needs half the
    # time, but a second to be imported; this happens once.
    pixels, labels, lossy = [], [], False
    for name, content, label in rows:
        if not isinstance(label, int) or not 0 <= label < classes:
            raise ValueError(f"{name}: label {label!r}, allowed are 0..{classes - 1}; correct it")
        try:
            with _open(content) as picture:
                size = picture.size
                picture.verify()  # the checksums of a PNG, which decoding leaves unread
            if size == (32, 32):
                with _open(content) as picture:
                    pixels.append(to_rgb(picture).tobytes())
        except Exception as error:  # broken content makes Pillow raise nearly anything
            kind = type(error).__name__
            raise ValueError(f"{name}: not a whole PNG or JPEG ({kind}); replace it") from None
        if size != (32, 32):
            raise ValueError(f"{name}: {size[0]}x{size[1]} pixels, needed are 32x32; resize it")
        labels.append(label)
        lossy |= content.startswith(b"\xff\xd8")  # JPEG's magic number
    images = torch.from_numpy(np.frombuffer(bytearray().join(pixels), np.uint8))
    images = images.view(len(labels), 32, 32, 3).permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor(labels, dtype=torch.int64), lossy


def to_rgb(image: Image.Image) -> Image.Image:
    """Makes a picture of any mode RGB, as all of this library sees it; transparency is white."""
    if image.mode.startswith("I"):  # 16-bit grey: Pillow would clip it, not scale it
        grey = np.asarray(image).astype(np.float64) / 257
        image = Image.fromarray(grey.clip(0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _open(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content), formats=("PNG", "JPEG"))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; make it readable") from None


def _files(folder: Path, pattern: str, suffixes: set[str]) -> tuple[Path, ...]:
    found = (path for path in folder.glob(pattern) if path.suffix.lower() in suffixes)
    # A link to nothing counts: reading it says so.
    return tuple(sorted(p for p in found if p.name[0] != "." and (p.is_file() or p.is_symlink())))
