"""Transfer: weights from a file into all of a network but its last layer, and what stays frozen.

"Backbone" is everything before the last linear layer, the only one that knows the classes.
"""

import hashlib
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from cifar_lib.config import TrainConfig
from cifar_lib.models.imagenet import PUBLISHED, is_named_by


def find_weights(config: TrainConfig) -> Path | None:
    """Finds the file that `config.weights` names; downloads it where that is its publisher's way.

    Returns:
        An existing file, or None where `weights` is null.

    Raises:
        ValueError: there is no such file, or the model has no published weights.
    """
    if config.weights is None:
        return None
    if config.weights == "imagenet":
        if config.model not in PUBLISHED:
            raise ValueError(
                f"weights: got 'imagenet', which {', '.join(PUBLISHED)} have; model "
                f"{config.model} takes null or a file"
            )
        return PUBLISHED[config.model].find()
    path = config.weights_path
    if not path.is_file():
        raise ValueError(f"weights: {path}: no such file; allowed are null, 'imagenet' or a file")
    return path


def check_transfer(config: TrainConfig) -> None:
    """Refuses, before anything is read, weights and statistics that are not to be had here.

    Raises:
        ValueError: names the field (weights, normalization).
    """
    find_weights(config)
    expected_statistics(config)


def expected_statistics(config: TrainConfig) -> tuple[Tensor, Tensor] | None:
    """Mean and std of the images that a model's published weights expect.

    Returns:
        Two float32 (3,), over [0, 1]; None where normalisation is by the data.

    Raises:
        ValueError: the model has no published weights.
    """
    if config.normalization == "data":
        return None
    if config.model not in PUBLISHED:
        raise ValueError(
            f"normalization: got 'weights', for {', '.join(PUBLISHED)} alone; model "
            f"{config.model} takes 'data'"
        )
    published = PUBLISHED[config.model]
    return torch.tensor(published.mean), torch.tensor(published.std)


def load_pretrained(model: nn.Module, config: TrainConfig) -> dict[str, str] | None:
    """Loads the backbone's weights, if `config.weights` names some; freezes it at rate 0.

    Args:
        model: changed in place; its last linear layer stays as it was.
        config: model, weights and backbone_rate count.

    Returns:
        `file` (its name) and `sha256` of what was loaded, for the record; None for null.

    Raises:
        ValueError: the file is missing, is not a state dict, has other names or shapes, or is
            not the published one; one line.
    """
    if config.backbone_rate == 0:
        model.requires_grad_(False)
        last_layer(model)[1].requires_grad_(True)
    path = find_weights(config)
    if path is None:
        return None
    content = hashlib.sha256(path.read_bytes()).hexdigest()
    if config.weights == "imagenet" and not is_named_by(path, content):
        raise ValueError(f"weights: {path}: damaged, its SHA-256 is {content}; remove it")
    rename = PUBLISHED[config.model].rename if config.model in PUBLISHED else str
    head = last_layer(model)[0] + "."
    state = {rename(name): tensor for name, tensor in _read_state(path).items()}
    state = {name: tensor for name, tensor in state.items() if not name.startswith(head)}
    own = {name: t for name, t in model.state_dict().items() if name.startswith(head)}
    try:
        model.load_state_dict(state | own)
    except RuntimeError as error:
        first = str(error).splitlines()[1:2] or [str(error)]
        raise ValueError(
            f"weights: {path} does not fit model {config.model}: {first[0].strip()[:300]}"
        ) from None
    return {"file": path.name, "sha256": content}


def _read_state(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file fails in as many ways as there are formats
        raise ValueError(
            f"weights: {path}: not a file of tensors that can be read safely "
            f"({type(error).__name__})"
        ) from None
    if not isinstance(state, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()
    ):
        raise ValueError(
            f"weights: {path}: expected a state dict (names to tensors), got {type(state).__name__}"
        )
    return state


def last_layer(model: nn.Module) -> tuple[str, nn.Linear]:
    """The last linear layer, which gives the logits, and its name."""
    return [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)][-1]


def set_training_mode(model: nn.Module) -> None:
    """Training mode, but for modules of which no parameter trains.

    A frozen batch norm so keeps its running statistics and normalises by them: a frozen backbone
    computes the same features in training and in evaluation.
    """
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            module.eval()
