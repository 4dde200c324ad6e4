"""Times training under several allocators, each measurement in a process of its own, taking turns.

As it is: glibc's malloc without settings. Settings: those of `cifar_lib.launch`, with which every
command and kernel of ours starts. Mimalloc: preloaded, its pages kept, where the environment has it
(`pip install cmeel-mimalloc`). Large batches have maps of more than 32 MB, the most that glibc
keeps by a threshold.

    python benchmarks/allocator.py [--out FILE.json] [--repeats 3]
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

from loop import noise
from timing import in_a_process, rate, spread, write

from cifar_lib.config import TrainConfig
from cifar_lib.execution import choose_execution
from cifar_lib.launch import allocator_settings
from cifar_lib.train import train_epoch
from cifar_lib.train_state import TrainState

CASES = [  # model, side of its images, images a step, steps
    ("speed_net", 32, 2000, 2),
    ("speed_net", 32, 250, 12),
    ("resnet18", 32, 384, 2),
    ("efficientnet_lite0", 128, 64, 6),
]


def ways() -> dict[str, dict[str, str]]:
    """The variables that each allocator wants; mimalloc only where it is installed."""
    found = {"as it is": {}, "settings": allocator_settings({})}
    for library in sorted(Path(sys.prefix).glob("lib/python*/site-packages/**/libmimalloc.so")):
        kept = {"MIMALLOC_PURGE_DELAY": "-1", "MIMALLOC_ALLOW_LARGE_OS_PAGES": "1"}
        found["mimalloc"] = {"LD_PRELOAD": str(library), **kept}
    return found


def measure(model: str, size: int, batch: int, steps: int) -> float:
    """Images a second of an epoch of `train`, after one that warms up."""
    config = TrainConfig(model=model, image_size=size, batch_size=batch, val_fraction=0.0)
    execution = choose_execution(config)
    state = TrainState.start(config, 0, noise(steps * batch), execution)
    return rate(lambda: train_epoch(state, execution), steps * batch, execution)


def main() -> None:
    """Measures every case under every allocator, prints a line each and writes the record."""
    parser = argparse.ArgumentParser(description="Times training under several allocators.")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--repeats", type=int, default=3, help="rounds")
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure is not None:
        print(measure(*CASES[options.measure]))
        return
    results = list[dict[str, Any]]()
    for i, (model, size, batch, _) in enumerate(CASES):
        rates: dict[str, list[float]] = {way: [] for way in ways()}
        for _ in range(options.repeats):
            for way, variables in ways().items():
                words = (__file__, "--measure", str(i))
                rates[way] += in_a_process(*words, variables=variables)
        usual = statistics.median(rates["as it is"])
        for way, values in rates.items():
            gain = statistics.median(values) / usual
            print(f"{model:20}batch {batch:5}  {way:10}{spread(values):>24} images/s {gain:6.2f}")
        case = {"model": model, "image_size": size, "batch_size": batch}
        results.append(case | {"images_per_second": rates})
    write(options.out, results=results)


if __name__ == "__main__":
    main()
