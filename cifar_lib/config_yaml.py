"""YAML files that hold one mapping: parameters, sweeps, presets, the configuration of a run."""

from pathlib import Path
from typing import Any

import yaml

# What PyYAML raises on bad text, some of it by accident: on a date that there is not, `!!bool x`, …
BROKEN_YAML = (
    yaml.YAMLError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML lets the last of two equal keys win in silence; here that is an error."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node, seen = super().compose_mapping_node(anchor), set[Any]()
        for key_node, _ in node.value:  # before `<<` fills in what a mapping's own keys replace
            key = "<<" if key_node.value == "<<" else self.construct_object(key_node, deep=True)
            if key in seen:
                raise ValueError(f"line {key_node.start_mark.line + 1}: duplicate key {key!r}")
            seen.add(key)
        return node


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Reads a YAML file that holds one mapping, refusing duplicate keys.

    Raises:
        ValueError: the file is missing, is not YAML, is not a mapping or repeats a key.
    """
    path = Path(path)
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)  # noqa: S506
    except (*BROKEN_YAML, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        raise ValueError(f"{path}: {reason}") from None
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ValueError(f"{path}: expected a mapping of names to values")
    return values
