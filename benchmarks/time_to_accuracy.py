"""Prints, for the speed recipes, what accuracy they reach and in how many seconds.

A recipe counts as reaching 94 or 96 % when its mean test accuracy (with test-time augmentation)
over the seeds does; the seconds are those of training and of evaluation, after decoding and
compilation, which are stated apart. On a GPU the model is compiled and an untimed epoch precedes.

    python benchmarks/time_to_accuracy.py [--out FILE.json] [--seeds 5] [--recipes FILE.yaml …]
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from timing import write

from cifar_lib.config import ROOT, TrainConfig, parse_config
from cifar_lib.config_yaml import read_yaml
from cifar_lib.data import load_splits
from cifar_lib.evaluate import mean_interval
from cifar_lib.execution import choose_execution
from cifar_lib.launch import restart_with_allocator
from cifar_lib.train import train

RECIPES = ("params/02_speed/speed-94.yaml", "params/04_final/speed-96.yaml")


def measure(path: Path, seeds: int) -> dict[str, Any]:
    """Trains one recipe with some seeds: accuracies and seconds, a run each."""
    values = {k: v for k, v in read_yaml(path).items() if k in TrainConfig.model_fields}
    on_gpu = choose_execution(TrainConfig()).device.type == "cuda"
    config = parse_config(values | {"compile": on_gpu})
    splits = load_splits(config)
    runs = []
    with tempfile.TemporaryDirectory() as scratch:
        if on_gpu:
            short = config.model_copy(update={"epochs": max(1, config.low_resolution_epochs + 1)})
            train(short, 0, splits, Path(scratch) / "warm-up")
        for seed in range(seeds):
            summary = train(config, seed, splits, Path(scratch) / str(seed)).summary
            runs.append(summary["result"])
    return {"recipe": path.stem, "dataset": splits.info.name, "lossy": splits.info.lossy} | {
        name: [run[name] for run in runs]
        for name in ("test_accuracy", "test_accuracy_tta", "train_seconds", "evaluation_seconds",
                     "compile_seconds", "other_load")
    }  # fmt: skip


def main() -> None:
    """Measures every recipe, prints a line each and writes what was measured."""
    parser = argparse.ArgumentParser(description="Prints seconds to an accuracy.")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each recipe")
    parser.add_argument("--recipes", type=Path, nargs="+", default=[ROOT / r for r in RECIPES])
    options = parser.parse_args()
    results = []
    for path in options.recipes:
        result = measure(path, options.seeds)
        results.append(result)
        with_tta = None not in result["test_accuracy_tta"]
        reached = mean_interval(result["test_accuracy_tta" if with_tta else "test_accuracy"])
        interval = ""
        if reached.low is not None and reached.high is not None:
            interval = f" [{100 * reached.low:.2f}, {100 * reached.high:.2f}]"
        both = zip(result["train_seconds"], result["evaluation_seconds"], strict=True)
        print(
            f"{result['recipe']}: {100 * reached.mean:.2f} %{interval} test accuracy, "
            f"{'with' if with_tta else 'no'} test-time augmentation, n = {reached.n}, median "
            f"{statistics.median(map(sum, both)):.1f} s "
            f"({result['dataset']}{', JPEG copy' if result['lossy'] else ''})",
            flush=True,
        )
        write(options.out, results=results)  # after each: what was measured is not lost


if __name__ == "__main__":
    restart_with_allocator()
    main()
