"""CIFAR-10 training, measured: models, augmentations and one training loop.

Rooms, each importing only from those before it: config, data, augment, fast, models, optim,
evaluate, results, checkpoint, train, predict, plots, study.
"""

__version__ = "0.1.0"
