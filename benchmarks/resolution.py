"""Times training at 32 pixels against 224, the finding of study D's first stage ("5 to 8 times").

Steps of `train`'s epoch with torchvision's ResNet-18 on random weights (what they are does not
change the time), batch 64, augmentation and enlarging included; EfficientNet-Lite0 at the sizes of
its parameter files beside it. All take turns, a few steps each, until each has made `--steps`. The
images are noise, the first turn warms up and is not counted.

    python benchmarks/resolution.py [--out FILE.json] [--steps 50]
"""

import argparse
import statistics
from functools import partial
from pathlib import Path

from loop import noise
from timing import seconds, write

from cifar_lib.config import TrainConfig
from cifar_lib.execution import choose_execution
from cifar_lib.launch import restart_with_allocator
from cifar_lib.models import flops_per_image
from cifar_lib.train import train_epoch
from cifar_lib.train_state import TrainState

BATCH = 64
TURN = 5  # steps
CASES = [
    ("imagenet_resnet18", 32),
    ("imagenet_resnet18", 224),
    ("efficientnet_lite0", 32),
    ("efficientnet_lite0", 96),
]


def main() -> None:
    """Measures every case, prints a line each and writes what was measured."""
    parser = argparse.ArgumentParser(description="Times training at several image sizes.")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--steps", type=int, default=50, help="timed steps a case")
    options = parser.parse_args()
    turns = max(1, options.steps // TURN)
    splits = noise(TURN * BATCH)
    execution = choose_execution(TrainConfig())
    states = {}
    for model, size in CASES:
        config = TrainConfig(
            model=model, image_size=size, batch_size=BATCH, val_fraction=0.0, optimizer="adam"
        )
        states[model, size] = TrainState.start(config, 0, splits, execution)
    rates: dict[tuple[str, int], list[float]] = {case: [] for case in states}
    for turn in range(turns + 1):
        for case, state in states.items():
            spent = seconds(partial(train_epoch, state, execution), execution)
            if turn:  # the first one warms up
                rates[case].append(TURN * BATCH / spent)
    results = []
    for (model, size), values in rates.items():
        median = statistics.median(values)
        results.append(
            {
                "model": model,
                "image_size": size,
                "flops_per_image": flops_per_image(states[model, size].model),
                "images_per_second": values,
                "times_as_long_as_32": statistics.median(rates[model, 32]) / median,
            }
        )
        print(
            f"{model:20}{size:4} px {median:9,.1f} images/s ({min(values):,.1f} to "
            f"{max(values):,.1f}), {results[-1]['times_as_long_as_32']:.1f} times as long as 32 px",
            flush=True,
        )
    write(options.out, batch_size=BATCH, steps=turns * TURN, results=results)


if __name__ == "__main__":
    restart_with_allocator()
    main()
