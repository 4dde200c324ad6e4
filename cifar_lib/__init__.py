"""CIFAR-10 training, measured: models, augmentations and one training loop.

Rooms, each importing only from those before it: config, files, launch, execution, distributed,
data, augment, fast, models, optim, evaluate, results, checkpoint, train, predict, plots, reports,
index, study. `tests/test_architecture.py` holds this order.
"""

__version__ = "0.1.0"
