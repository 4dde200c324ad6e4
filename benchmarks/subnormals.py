"""Times training of a VGG16 whose dead filters hold subnormal weights, with and without the switch.

The recipe is that of 04_final/vgg16 (Adam, weight decay as part of the gradient), under which the
weights of filters that never fire sink below the smallest normal number: in its best epoch 52 to
76 % of the filters in the six layers of 512 had no weight above 1e-20. Here they are put there: a
share of those layers' filters, with a shift that keeps them from firing. The network as
initialised, which has none, stands beside it. All take turns in one process, each with weights
of its own; the images are noise.

    python benchmarks/subnormals.py [--out FILE.json] [--repeats 7] [--dead 0.6]
"""

import argparse
import statistics
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from loop import noise
from timing import spread, take_turns, write

from cifar_lib.config import TrainConfig
from cifar_lib.execution import Execution, choose_execution
from cifar_lib.launch import restart_with_allocator
from cifar_lib.train import train_epoch
from cifar_lib.train_state import TrainState

STEPS = 20
WIDTH = 512  # filters of the layers in question


def start(config: TrainConfig, execution: Execution, dead: float) -> TrainState:
    """The state before training, with this share of the widest layers' filters dead."""
    state = TrainState.start(config, 0, noise(STEPS * config.batch_size), execution)
    with torch.no_grad():
        for convolution, norm in pairwise(state.model.modules()):
            if isinstance(convolution, torch.nn.Conv2d) and isinstance(norm, torch.nn.BatchNorm2d):
                count = round(dead * WIDTH) if len(convolution.weight) == WIDTH else 0
                convolution.weight[:count] = 1e-39
                norm.bias[:count] = -10.0
    return state


def weights(state: TrainState) -> Iterator[torch.Tensor]:
    """The parameters and the optimiser's tensors of their size."""
    for parameter in state.model.parameters():
        yield parameter.detach()
        yield from (t for t in state.optimizer.state[parameter].values() if t.ndim)


def subnormal_share(state: TrainState) -> float:
    """The share of a state's numbers that are subnormal, 0..1."""
    tiny = torch.finfo(torch.float32).tiny
    counts = [(int(((t != 0) & (t.abs() < tiny)).sum()), t.numel()) for t in weights(state)]
    return sum(few for few, _ in counts) / sum(all_ for _, all_ in counts)


def main() -> None:
    """Measures the four in turns, prints a line each and writes the record."""
    parser = argparse.ArgumentParser(description="Times training with subnormal numbers.")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--repeats", type=int, default=7, help="rounds")
    parser.add_argument("--dead", type=float, default=0.6, help="share of the filters that is dead")
    options = parser.parse_args()
    config = TrainConfig(
        model="vgg16",
        batch_size=64,
        optimizer="adam",
        learning_rate=0.001,
        weight_decay=5e-5,
        val_fraction=0.0,
    )
    execution = choose_execution(config)
    ways = {"as PyTorch has it": train_epoch.__wrapped__, "as zero": train_epoch}  # type: ignore[attr-defined]
    states = {
        (dead, way): start(config, execution, dead) for dead in (0.0, options.dead) for way in ways
    }
    works = {
        f"{dead:.0%} dead, subnormals {way}": partial(ways[way], state, execution)
        for (dead, way), state in states.items()
    }
    times = take_turns(works, execution, options.repeats)
    results = []
    for name, state in zip(works, states.values(), strict=True):
        rates = [STEPS * config.batch_size / t for t in times[name]]
        share = subnormal_share(state)
        print(f"{name:42}{spread(rates):>24} images/s, {share:.0%} of the numbers subnormal")
        results.append({"case": name, "subnormal_share": share, "images_per_second": rates})
    plain, zero = (statistics.median(times[name]) for name in list(works)[2:])
    print(f"with dead filters {plain / zero:.2f} times as fast")
    record = {"model": config.model, "batch_size": config.batch_size, "dead": options.dead}
    write(options.out, execution=execution, results=results, **record)


if __name__ == "__main__":
    restart_with_allocator()
    main()
