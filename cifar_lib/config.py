"""The configuration of one training run: every field with its unit, range and default.

A recipe is a :class:`TrainConfig`; besides it only seed and data decide what a run computes. An
unknown name, a wrong type or a value out of range is refused before anything is loaded.
"""

import difflib
import hashlib
import json
import math
import os
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

_HOME = Path(__file__).resolve().parents[1]
ROOT = _HOME if (_HOME / "params").is_dir() else Path.cwd()  # installed alone: no site-packages
"""The checkout: `params/`, `notebooks/`, `reports/`, `runs/` and `data/` lie below it."""


def _number(value: object) -> object:
    """PyYAML reads `5e-4` (no dot) as a string; take such a string for the number it spells."""
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            return value
        return number if math.isfinite(number) else value
    return value


Float = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]

# Fields that change where or how comfortably a run happens, never what it computes.
NOT_FINGERPRINTED = frozenset({"data_dir", "device"})


class TrainConfig(BaseModel):
    """Everything that decides what a training run computes, except its seed and its data."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    # data
    dataset: Literal["auto", "cifar10", "digits"] = Field(
        "auto", description="data set; auto is cifar10 where it can be had, else digits"
    )
    data_dir: str | None = Field(
        None, min_length=1, description="folder that holds CIFAR-10; null searches $CIFAR10_DIR"
    )
    n_train: int | None = Field(
        None, ge=10, description="train on at most this many images, stratified; null is all"
    )
    val_fraction: Float = Field(
        0.1, ge=0, le=0.5, description="share of train held out for validation, 0..0.5"
    )
    split_seed: int = Field(0, ge=0, description="seed of the validation split and the subset")

    # model
    model: str = Field("small_cnn", description="a name in cifar_lib.models.MODELS")
    width: Float | None = Field(
        None, gt=0, le=16, description="factor on the channel counts; null is the model's default"
    )
    depth: int | None = Field(None, ge=1, le=1202, description="layers; null is the default")
    dropout: Float | None = Field(None, ge=0, lt=1, description="drop probability, 0..1")
    whitening_epsilon: Float | None = Field(
        None,
        gt=0,
        le=1e3,
        description="variance added to every direction before whitening, so that directions with "
        "less are not stretched like signal; null is the model's default",
    )
    image_size: int = Field(
        32, ge=32, le=512, description="side to which the model enlarges its images, pixels"
    )
    weights: str | None = Field(
        None,
        min_length=1,
        description="start of all but the last layer: 'imagenet', a state dict's file, or null",
    )
    backbone_rate: Float = Field(
        1.0, ge=0, le=1, description="factor on learning_rate before the last layer; 0 freezes"
    )
    head_rate: Float = Field(
        1.0, gt=0, le=1e4, description="factor on learning_rate of the last layer"
    )
    norm_and_bias_rate: Float = Field(
        1.0, gt=0, le=1e4, description="factor on learning_rate of norms and biases"
    )
    normalization: Literal["data", "weights"] = Field(
        "data", description="by the statistics of train, or of the images of 'imagenet' weights"
    )

    # augmentation, in the order in which it is applied
    flip: Literal["none", "random", "alternating"] = Field(
        "random", description="horizontal flip: a coin per image, or every other epoch"
    )
    translate: int = Field(4, ge=0, le=16, description="largest shift, pixels, each direction")
    padding: Literal["zeros", "reflect"] = Field("zeros", description="what a translation moves in")
    rotate: Float = Field(0.0, ge=0, le=180, description="largest rotation, degrees")
    affine: Float = Field(
        0.0, ge=0, lt=1, description="largest relative scale change and shear (radians), below 1"
    )
    color_jitter: Float = Field(
        0.0, ge=0, le=1, description="strength of brightness, contrast and saturation jitter, 0..1"
    )
    randaugment_ops: int = Field(0, ge=0, le=14, description="RandAugment operations an image")
    randaugment_magnitude: int = Field(7, ge=0, le=30, description="RandAugment magnitude bin")
    cutout: int = Field(0, ge=0, le=32, description="side of the square cut out, pixels; 0 is off")
    random_erasing: Float = Field(0.0, ge=0, le=1, description="probability of random erasing")
    mixup: Float = Field(0.0, ge=0, le=10, description="alpha of MixUp's Beta; 0 is off")
    cutmix: Float = Field(0.0, ge=0, le=10, description="alpha of CutMix's Beta; 0 is off")

    # optimisation
    epochs: int = Field(10, ge=1, le=10_000, description="passes over the training images")
    batch_size: int = Field(128, ge=1, le=65_536, description="images an optimiser step")
    micro_batch_size: int | None = Field(
        None, ge=1, description="images a forward pass (gradients add up); null is batch_size"
    )
    optimizer: Literal["sgd", "adam", "adamw", "rmsprop", "muon"] = Field(
        "sgd", description="optimiser; muon: the filters by Muon, all else by sgd"
    )
    learning_rate: Float = Field(0.1, gt=0, le=100, description="peak learning rate")
    momentum: Float = Field(0.9, ge=0, lt=1, description="momentum of sgd and rmsprop")
    nesterov: bool = Field(True, description="Nesterov momentum (sgd)")
    weight_decay: Float = Field(0.0, ge=0, le=10, description="as the optimiser defines it")
    decay_norm_and_bias: bool = Field(
        True, description="whether weight decay also acts on norms and biases"
    )
    label_smoothing: Float = Field(0.0, ge=0, lt=1, description="label smoothing, 0..1")
    schedule: Literal["constant", "step", "exponential", "cosine", "warmup_cosine", "linear"] = (
        Field("constant", description="learning-rate schedule, evaluated every step")
    )
    warmup_epochs: Float = Field(0.0, ge=0, description="warm-up (warmup_cosine, linear), epochs")
    step_epochs: int = Field(10, ge=1, description="epochs between the steps of schedule step")
    gamma: Float = Field(0.1, gt=0, le=1, description="factor of step and (an epoch) exponential")
    low_resolution: int = Field(
        0, ge=0, le=32, description="side of the images in the first epochs, pixels; 0 is full"
    )
    low_resolution_epochs: int = Field(0, ge=0, description="epochs at low_resolution")
    keep_hardest: Float = Field(
        1.0, gt=0, le=1, description="share of the images an epoch keeps, by their last loss"
    )
    keep_hardest_from: int = Field(
        1, ge=1, description="full epochs before the first that keeps only the hardest"
    )
    ema_decay: Float = Field(0.0, ge=0, lt=1, description="averaged weights' decay a step; 0: off")
    early_stopping: int = Field(
        0, ge=0, description="stop after so many epochs without a better val_accuracy; 0 is off"
    )

    # evaluation
    tta: Literal["none", "mirror", "mirror_translate"] = Field(
        "none", description="test-time augmentation reported beside the plain accuracy"
    )
    eval_batch_size: int = Field(
        500, ge=1, le=65_536, description="images a forward pass in evaluation"
    )
    measure_train: int = Field(
        0,
        ge=0,
        description="training images, a fixed stratified subset, on which loss and accuracy are "
        "measured after each epoch, unaugmented, in evaluation mode and within its seconds; 0: off",
    )

    # execution
    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="where to compute")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="autocast type; auto is bf16 where the processor has it, else fp32"
    )
    channels_last: bool = Field(
        True, description="memory format of images and weights; without it no fast paths on CPUs"
    )
    compile: bool = Field(False, description="torch.compile the model")
    deterministic: bool = Field(
        False,
        description="deterministic algorithms only, slower on CUDA. A CPU run repeats to the bit "
        "anyway, with the same number of threads: another one adds in another order",
    )

    @model_validator(mode="after")
    def _check_together(self) -> "TrainConfig":
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size {self.micro_batch_size} must divide batch_size {self.batch_size}"
            )
        if self.warmup_epochs > self.epochs:
            raise ValueError(
                f"warmup_epochs {self.warmup_epochs:g} must be at most epochs {self.epochs}"
            )
        if self.optimizer == "sgd" and self.nesterov and self.momentum == 0:
            raise ValueError("nesterov true needs momentum above 0, got momentum 0")
        if self.optimizer == "muon" and not self.nesterov:
            raise ValueError("nesterov must be true with muon")
        if (patience := self.early_stopping) and self.val_fraction == 0:
            raise ValueError(f"early_stopping {patience} needs val_fraction above 0, got 0")
        return self

    @property
    def weights_path(self) -> Path:
        """The file that `weights` names, if it is not 'imagenet'; relative to the checkout."""
        return ROOT / os.path.expanduser(self.weights or "")  # which leaves ~nobody as it is

    @property
    def small_side(self) -> int:
        """Side of the images in the first epochs, pixels; 0 where every epoch has full ones."""
        return self.low_resolution if self.low_resolution_epochs else 0

    def fingerprint(self, data_sha256: str = "") -> str:
        """Names this configuration, on this data, in twelve hexadecimal digits.

        Only fields that differ from their defaults count, so a field added later with a
        default that means "as before" leaves every published fingerprint as it is. In return
        a default may never change; a test holds that. A file of weights counts by its content,
        wherever it lies; 'imagenet' is one content, which its loader checks.

        Args:
            data_sha256: `DataInfo.sha256` of the data, or empty for the configuration alone.

        Returns:
            12 hexadecimal digits, the same in every process and on every machine.

        Raises:
            ValueError: `weights` names a file that can not be read.
        """
        fields = self.model_dump(mode="json", exclude_defaults=True, exclude=set(NOT_FINGERPRINTED))
        if self.weights not in (None, "imagenet"):
            try:
                fields["weights"] = hashlib.sha256(self.weights_path.read_bytes()).hexdigest()
            except OSError as error:
                raise ValueError(f"weights: {self.weights_path}: {error.strerror}") from None
        text = json.dumps({"config": fields, "data": data_sha256}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def parse_config(values: Mapping[str, Any]) -> TrainConfig:
    """Builds a configuration, turning every refusal into one readable line.

    Args:
        values: field names and values, for instance read from YAML.

    Raises:
        ValueError: names each bad field, its value and what is allowed.
    """
    try:
        return TrainConfig(**values)
    except ValidationError as error:
        raise ValueError("; ".join(_explain(e) for e in error.errors())) from None


def config_of(values: Mapping[str, Any]) -> TrainConfig:
    """The configuration that stands among other values; raises as `parse_config`."""
    return parse_config({k: v for k, v in values.items() if k in TrainConfig.model_fields})


_repr = reprlib.Repr()  # bounded: a few lines of YAML with aliases stand for gigabytes of text
_repr.maxlevel, _repr.maxstring, _repr.maxother = 2, 80, 80


def _explain(error: Any) -> str:
    name = ".".join(str(part) for part in error["loc"])
    value = _repr.repr(error["input"])
    if error["type"] == "extra_forbidden":
        close = difflib.get_close_matches(name, fields := list(TrainConfig.model_fields), 1)
        hint = "did you mean {}?" if close else "fields are: {}"
        return f"unknown field {name!r} (value {value}); " + hint.format(", ".join(close or fields))
    if not name:  # a rule between fields: its message names them
        return str(error["msg"]).removeprefix("Value error, ")
    return f"{name}: got {value}; {error['msg'][0].lower()}{error['msg'][1:]}"
