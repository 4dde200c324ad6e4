"""Where images come from: provenance, the cache of decoded images, and the splits.

data_download.py finds CIFAR-10 or downloads it, data_sources.py decodes it. Decoded images are
kept in `data/cache` (`$CIFAR_LIB_CACHE` names another folder), in a file named by the SHA-256
of its source files. Old files there may be deleted at any time.
"""

import functools
import hashlib
import logging
import os
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from cifar_lib.config import ROOT, TrainConfig
from cifar_lib.data_download import find_or_download, say_once
from cifar_lib.data_sources import CIFAR10_CLASSES, Source, read_digits, read_source
from cifar_lib.files import write_atomic

logger = logging.getLogger(__name__)

_CACHE_FORMAT = "3"  # raise it when the content of the cache files changes
_N_DIGITS_TEST = 360  # of 1,797, a fifth as is usual
_PARTS = ("train", "test")
_TENSORS = ("train_images", "train_labels", "test_images", "test_labels")


@dataclass(frozen=True)
class DataInfo:
    """Provenance of a data set, as it stands in a run's summary.

    `name` is cifar10, digits, or custom: a parquet or folder source whose classes or counts
    are not CIFAR-10's, so that its numbers never pass as CIFAR-10's. `source` is official,
    parquet, folder or embedded. `lossy`: a picture was stored as JPEG (a PNG made from a JPEG
    can not be told). `sha256`: 64 hexadecimal digits over pixels and labels, train then test,
    in source order, whole and before any split; alike for official and parquet, while image
    folders are read class by class and so have another.
    """

    name: str
    source: str
    lossy: bool
    sha256: str
    n_train: int
    n_val: int
    n_test: int


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images with their labels.

    `images` uint8 (N, 3, 32, 32), 0..255; `labels` int64 (N,), 0..K-1; `class_names` K names;
    `info` the provenance of the whole data set.
    """

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    info: DataInfo

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> "ImageSet":
        """Returns the same set on a device."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def subset(self, index: Tensor) -> "ImageSet":
        """Returns the images at `index`, int64 positions or a bool mask (N,)."""
        return replace(self, images=self.images[index], labels=self.labels[index])

    @functools.cached_property
    def statistics(self) -> tuple[Tensor, Tensor]:
        """:func:`channel_statistics` of these images, computed once."""
        return channel_statistics(self.images)


@dataclass(frozen=True, eq=False)
class Splits:
    """The three parts of a data set; all of them, and `info`, carry the counts after the split."""

    train: ImageSet
    val: ImageSet
    test: ImageSet
    info: DataInfo


def load_splits(config: TrainConfig) -> Splits:
    """Loads and splits the data of a configuration; raises what :func:`load_dataset` raises."""
    train, test = load_dataset(config.dataset, config.data_dir)
    train, val = split_train(train, config.val_fraction, config.n_train, config.split_seed)
    return Splits(train, val, replace(test, info=train.info), train.info)


def evenly_spread(n: int, limit: int | None) -> Tensor:
    """Indices of at most `limit` of n images, evenly spread: a file may be sorted by class."""
    return torch.linspace(0, n - 1, min(limit or n, n)).long()


def load_dataset(dataset: str, data_dir: str | None = None) -> tuple[ImageSet, ImageSet]:
    """Loads the whole training part and the whole test part.

    Args:
        dataset: auto, cifar10 or digits.
        data_dir: folder that holds CIFAR-10; None searches `$CIFAR10_DIR` and downloads.

    Returns:
        Train and test; there is no validation part yet.

    Raises:
        ValueError: the data is not there and can not be had, or it is damaged; says what was
            looked for, where, and what to do. Damaged data is an error under `auto` too.
    """
    if dataset not in ("auto", "cifar10", "digits"):
        raise ValueError(f"dataset {dataset!r} must be auto, cifar10 or digits")
    source = None if dataset == "digits" else find_or_download(data_dir, stand_in=dataset == "auto")
    if source:
        tensors, lossy, sha256 = _read_cached(source)
        names, layout = source.class_names, source.layout
    else:
        tensors, lossy, names, layout = _split_digits(), False, tuple("0123456789"), "embedded"
        sha256 = _hash_tensors(tensors)
    x, y, x_test, y_test = (tensors[key] for key in _TENSORS)
    name = _name(source, y, y_test) if source else "digits"
    info = DataInfo(name, layout, lossy, sha256, len(y), 0, len(y_test))
    return ImageSet(x, y, names, info), ImageSet(x_test, y_test, names, info)


def split_train(
    train: ImageSet, val_fraction: float, n_train: int | None, split_seed: int
) -> tuple[ImageSet, ImageSet]:
    """Holds a validation part out of the training part, and optionally takes a subset of the rest.

    Both are stratified (of classes of one size they get the same number, within one image) and
    depend on the labels and the seed alone, on every machine. A smaller subset is part of a
    larger one.

    Args:
        train: the whole training part.
        val_fraction: share held out, 0..0.5; 0 gives an empty validation part.
        n_train: at most so many images are left to train on; None is all. Does not touch val.
        split_seed: at least 0.

    Returns:
        Train and val, each in source order.
    """
    order = torch.from_numpy(_stratified_order(train.labels.cpu().numpy(), split_seed))
    n_val = round(val_fraction * len(order))
    end = len(order) if n_train is None else n_val + n_train
    val, rest = order[:n_val].sort().values, order[n_val:end].sort().values
    info = replace(train.info, n_train=len(rest), n_val=len(val))
    train = replace(train, info=info)
    return train.subset(rest), train.subset(val)


def channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Computes mean and standard deviation of each channel over all pixels.

    Args:
        images: uint8 (N, 3, H, W), N at least 1, on any device.

    Returns:
        Mean and standard deviation over [0, 1], float32 (3,), on the CPU; from counts of the
        256 values, hence exact and independent of the order.
    """
    counts = torch.stack([x.flatten().bincount(minlength=256) for x in images.unbind(1)])
    share = counts.cpu().double() / (images.numel() / 3)
    values = torch.arange(256, dtype=torch.float64) / 255
    mean = share @ values
    variance = (share * (values - mean[:, None]) ** 2).sum(1)
    return mean.float(), variance.sqrt().float()


def _stratified_order(labels: np.ndarray, seed: int) -> np.ndarray:
    """An order of the positions in which every stretch has the classes in proportion."""
    # Each class is shuffled and spread evenly over 0..1. Of NumPy's generators only the raw
    # bits are promised to stay the same in all versions (NEP 19).
    bits = np.random.PCG64(seed)
    place = np.empty(len(labels))
    for k in np.unique(labels):
        where = np.flatnonzero(labels == k)
        shuffled = where[np.argsort(bits.random_raw(len(where)), kind="stable")]
        place[shuffled] = (np.arange(len(where)) + 0.5) / len(where)
    return np.lexsort((labels, place))


def _split_digits() -> dict[str, Tensor]:
    images, labels = read_digits()
    order = torch.from_numpy(_stratified_order(labels.numpy(), seed=0))
    test, train = (part.sort().values for part in order.tensor_split([_N_DIGITS_TEST]))
    parts = (images[train], labels[train], images[test], labels[test])
    return dict(zip(_TENSORS, parts, strict=True))


def _name(source: Source, labels: Tensor, test_labels: Tensor) -> str:
    if source.class_names != CIFAR10_CLASSES:
        return "custom"
    counts = [x.bincount(minlength=10).tolist() for x in (labels, test_labels)]
    if counts == [10 * [5000], 10 * [1000]] or source.layout == "official":
        return "cifar10"
    say_once(
        f"{source.folder}: {len(labels):,} and {len(test_labels):,} images, CIFAR-10 has 50,000 "
        "and 10,000, a tenth of each class; the data set is named custom, its numbers say nothing "
        "about CIFAR-10"
    )
    return "custom"


def _read_cached(source: Source) -> tuple[dict[str, Tensor], bool, str]:
    folder = ROOT / os.path.expanduser(os.environ.get("CIFAR_LIB_CACHE") or "data/cache")
    key = source.sha256()
    path = folder / f"{key}-{_CACHE_FORMAT}.safetensors"
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in _TENSORS}
        if _is_whole(tensors, metadata):  # takes 0.1 s
            return tensors, metadata["lossy"] == "True", metadata["sha256"]
        logger.info("%s is damaged: decoding again", path)
    except FileNotFoundError:
        pass
    except (OSError, KeyError, TypeError, safetensors.SafetensorError) as error:
        logger.info("%s is damaged (%s): decoding again", path, error)
    logger.info("decoding %s, once; kept in %s", source.folder, folder)
    tensors, lossy = read_source(source)
    if source.sha256() != key:  # the cache would give what was read for what is there
        raise ValueError(f"{source.folder}: changed while it was read; start again")
    sha256 = _hash_tensors(tensors)
    try:
        content = safetensors.torch.save(tensors, {"sha256": sha256, "lossy": str(lossy)})
        write_atomic(path, content)
    except OSError as error:
        logger.warning("%s can not be written (%s): the next run decodes again", folder, error)
    return tensors, lossy, sha256


def _is_whole(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bool:
    """Whether tensors and metadata are as they were written; the hash knows of bytes alone."""
    kinds = [(x.dtype, tuple(x.shape[1:])) for x in (tensors[key] for key in _TENSORS)]
    return (
        kinds == 2 * [(torch.uint8, (3, 32, 32)), (torch.int64, ())]
        and all(len(tensors[f"{p}_images"]) == len(tensors[f"{p}_labels"]) for p in _PARTS)
        and metadata["lossy"] in ("True", "False")
        and _hash_tensors(tensors) == metadata["sha256"]
    )


def _hash_tensors(tensors: dict[str, Tensor]) -> str:
    digest: Any = hashlib.sha256()
    for key in _TENSORS:
        digest.update(tensors[key].contiguous().numpy())
    return digest.hexdigest()
