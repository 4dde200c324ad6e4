"""What a sweep of choices asks: its default, what each name claims, the role of each field.

`07_choices` reads it so. Roles after Google's Deep Learning Tuning Playbook, "Identifying
scientific, nuisance, and fixed hyperparameters".
"""

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pandas as pd

from cifar_lib.config import TrainConfig
from cifar_lib.study_sweep import Sweep, text_of

BELONGS = {
    "optimizer": {"optimizer", "learning_rate", "momentum", "nesterov", "weight_decay"},
    "schedule": {"schedule", "step_epochs", "gamma", "warmup_epochs"},
}
"""What may change with a field, as a learning rate with its optimiser."""


@dataclass(frozen=True)
class Choices:
    """A sweep's variants against its default, which is the first where none is called so."""

    base: str
    default: TrainConfig
    changes: dict[str, dict[str, Any]]
    """By the variant's name the fields in which it differs, with its values."""
    asked: list[str]
    """The fields that names claim to change, in their order."""

    @property
    def told(self) -> str:
        """The default's values of what is asked, in words."""
        values = ((field, getattr(self.default, field)) for field in self.asked)
        own = ((k, "the model's own" if v is None else text_of(v)) for k, v in values)
        return f"{self.base}: " + ", ".join(f"{k} {v}" for k, v in own)


def choices_of(sweep: Sweep) -> Choices:
    """Finds the default of a sweep, and what each variant changes of it.

    Args:
        sweep: variants named `FIELD=VALUE` by the one thing they change; where none is called
            `default`, as in a grid, by several, with commas between.

    Raises:
        ValueError: a variant holds no images out, or its name is not what it changes; names it.
    """
    base = "default" if "default" in sweep.variants else next(iter(sweep.variants))
    default = sweep.variants[base]
    changes, asked = {}, []
    for name, config in sweep.variants.items():
        if not config.val_fraction:
            raise ValueError(
                f"{sweep.name}, variant {name!r}: val_fraction: got 0; choices are made on "
                "validation, so hold some out"
            )
        before = default.model_dump()
        changes[name] = {k: v for k, v in config.model_dump().items() if v != before[k]}
        if name == "default":
            continue
        parts = [part.partition("=")[::2] for part in name.split(",")]
        fields = [field for field, _ in parts]
        named = all(_says(text, getattr(config, field, None)) for field, text in parts)
        allowed = set().union(*(BELONGS.get(field, {field}) for field in fields))
        alone = len(fields) == 1 or base != "default"
        if not named or not alone or not set(changes[name]) <= allowed:
            raise ValueError(
                f"{sweep.name}, variant {name!r}: changes {', '.join(changes[name]) or 'nothing'}; "
                "allowed is a name FIELD=VALUE that says so"
            )
        asked += fields
    return Choices(base, default, changes, list(dict.fromkeys(asked)))


def _says(text: str, value: Any) -> bool:
    """Whether a name's text is a field's value; a number in any spelling, as a file may have it."""
    if isinstance(value, float):
        with suppress(ValueError):
            return float(text) == value
    return text == text_of(value)


def roles(choices: Choices, search: Sweep | None = None) -> pd.DataFrame:
    """Which hyperparameters are asked about, which chosen anew for each side, which the same.

    Args:
        choices: as `choices_of` returns it.
        search: the sweep that nuisance parameters were chosen in, if there was one.

    Returns:
        By hyperparameter the default's value and its role: scientific, nuisance or fixed. Of what
        is the same for all variants only what the sweep file names.
    """
    varied = {field for change in choices.changes.values() for field in change}
    tried = [config.model_dump() for config in search.variants.values()] if search else []
    alike = [(c, d) for c in tried for d in tried if c["optimizer"] == d["optimizer"]]
    tuned = {field for c, d in alike for field in c if c[field] != d[field]}
    sides = [choices.default.optimizer, *(c.get("optimizer") for c in choices.changes.values())]
    searched = dict.fromkeys(c["optimizer"] for c in tried)
    given = dict.fromkeys(side for side in sides if side and side not in searched)
    how = ", ".join([*searched, *(f"given for {side}" for side in given)])
    rows = []
    for field, value in choices.default.model_dump().items():
        owner = next((name for name, members in BELONGS.items() if field in members), field)
        if field in choices.asked:
            rows.append((field, value, "scientific"))
        elif field in tuned:
            rows.append((field, value, f"nuisance: searched for {how}"))
        elif field in varied:
            rows.append((field, value, f"fixed, one value for each {owner}"))
        elif field in choices.default.model_fields_set:
            rows.append((field, value, "fixed"))
    rows.append(("seed", "any", "nuisance: initial weights, order of the images"))
    table = pd.DataFrame(rows, columns=["hyperparameter", "default", "role"])
    return table.set_index("hyperparameter")
