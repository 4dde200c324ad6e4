"""Times augmentation beside the conventional pipeline, in one run, taking turns.

Conventional: torchvision's transforms of PIL images, in a `Dataset`, through a `DataLoader`
with two workers. Ours: `augment_batch` on uint8 images that lie on the device. Both end in
normalised float32 batches of 500 on the device. The images are noise: content costs nothing.

    python benchmarks/augment.py [--out FILE.json] [--images 5000] [--repeats 7]
"""

import argparse
import math
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timing import seconds, write
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.transforms import v2

from cifar_lib.augment import augment_batch
from cifar_lib.config import TrainConfig
from cifar_lib.execution import Execution, choose_execution

BATCH = 500
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


class Cutout:
    """One square of a normalised image set to 0; torchvision has no such transform."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, image: Tensor) -> Tensor:
        y, x = (int(torch.randint(32, ())) - self.size // 2 for _ in range(2))
        image[:, max(y, 0) : y + self.size, max(x, 0) : x + self.size] = 0
        return image


TENSOR = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
CROP_FLIP = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
TURN = transforms.RandomAffine(15, scale=(0.9, 1.1), shear=math.degrees(0.1))
JITTER = transforms.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4)
STILL: dict[str, Any] = {"flip": "none", "translate": 0}
# What is compared: torchvision's transforms, what it mixes a batch with, our configuration.
CASES: dict[str, tuple[list[Any], Any, TrainConfig]] = {
    "flip, translation, Cutout, MixUp": (
        [*CROP_FLIP, *TENSOR, Cutout(16)],
        v2.MixUp(alpha=0.2, num_classes=10),
        TrainConfig(cutout=16, mixup=0.2),
    ),
    "rotation, affine, flip, translation": (
        [*CROP_FLIP, TURN, *TENSOR],
        None,
        TrainConfig(rotate=15.0, affine=0.1),
    ),
    "RandAugment, 2 operations, magnitude 7": (
        [transforms.RandAugment(2, 7), *TENSOR],
        None,
        TrainConfig(**STILL, randaugment_ops=2, randaugment_magnitude=7),
    ),
    "colour jitter": ([JITTER, *TENSOR], None, TrainConfig(**STILL, color_jitter=0.4)),
    "random erasing": (
        [*TENSOR, transforms.RandomErasing(p=0.5)],
        None,
        TrainConfig(**STILL, random_erasing=0.5),
    ),
    "CutMix": (TENSOR, v2.CutMix(alpha=1.0, num_classes=10), TrainConfig(**STILL, cutmix=1.0)),
    # torchvision has no alternating flip; its random one costs as much.
    "alternating flip": (
        [transforms.RandomHorizontalFlip(), *TENSOR],
        None,
        TrainConfig(flip="alternating", translate=0),
    ),
}


class Images(Dataset[tuple[Tensor, int]]):
    """Images in memory, each turned into a PIL image and transformed when it is asked for."""

    def __init__(self, images: Tensor, transform: Callable[[Image.Image], Tensor]) -> None:
        self.arrays = images.permute(0, 2, 3, 1).contiguous().numpy()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.arrays)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.arrays[index])), index % 10


def conventional(loader: DataLoader[Any], mix: Any, device: torch.device) -> Iterator[Tensor]:
    """One epoch; MixUp and CutMix as torchvision has them: one draw a batch."""
    for images, labels in loader:
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        yield mix(images, labels)[0] if mix else images


def ours(images: Tensor, config: TrainConfig, generator: torch.Generator) -> Iterator[Tensor]:
    """One epoch of shuffled batches, the gathering of their images included."""
    device = images.device
    mean, std = torch.tensor(MEAN, device=device), torch.tensor(STD, device=device)
    options: dict[str, Any] = {"mean": mean, "std": std, "config": config, "generator": generator}
    for indices in torch.randperm(len(images), generator=generator, device=device).split(BATCH):
        picked = images.index_select(0, indices), indices % 10, indices
        yield augment_batch(*picked, epoch=0, num_classes=10, **options)[0]


def images_per_second(epoch: Iterator[Tensor], execution: Execution) -> float:
    """Times one epoch, until the device has its last batch ready."""
    counts: list[int] = []
    taken = seconds(lambda: counts.extend(len(batch) for batch in epoch), execution)
    return sum(counts) / taken


def main() -> None:
    """Measures every case, prints a table and writes what was measured."""
    parser = argparse.ArgumentParser(description="Times augmentation.")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--images", type=int, default=5000, help="images an epoch")
    parser.add_argument("--repeats", type=int, default=7, help="timed epochs of each")
    options = parser.parse_args()
    execution = choose_execution(TrainConfig(precision="fp32"))
    device = execution.device
    generator = torch.Generator(device).manual_seed(0)
    images = torch.randint(0, 256, (options.images, 3, 32, 32), dtype=torch.uint8)
    resident = images.to(device)
    results: list[dict[str, Any]] = []
    print(f"{'images/s, median (min to max)':40}{'conventional':25}{'ours':33}ratio")
    for name, (steps, mix, config) in CASES.items():
        loader: DataLoader[Any] = DataLoader(
            Images(images, transforms.Compose(steps)),
            batch_size=BATCH,
            shuffle=True,
            num_workers=2,
            persistent_workers=True,  # they start once, in the untimed epoch
            pin_memory=device.type == "cuda",
        )
        theirs, mine = [], []
        for _ in range(options.repeats + 1):
            theirs.append(images_per_second(conventional(loader, mix, device), execution))
            mine.append(images_per_second(ours(resident, config, generator), execution))
        both = {"conventional": theirs[1:], "ours": mine[1:]}  # the first epochs warm up
        base, fast = map(statistics.median, both.values())
        spans = [f"({min(r):,.0f} to {max(r):,.0f})" for r in both.values()]
        columns = f"{base:>8,.0f} {spans[0]:16}{fast:>10,.0f} {spans[1]:22}"
        print(f"{name:40}{columns}{fast / base:>6.1f}", flush=True)
        results.append({"name": name, "images_per_second": both, "ratio": fast / base})
    write(
        options.out,
        execution=execution,
        batch_size=BATCH,
        images=options.images,
        results=results,
    )


if __name__ == "__main__":
    main()
