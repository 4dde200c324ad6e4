"""Experiments: read from params/ and checked, all of them, before anything runs."""

import ast
import fnmatch
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import papermill
from pydantic import Field, TypeAdapter, ValidationError

from cifar_lib.config import ROOT, TrainConfig, config_of
from cifar_lib.config_yaml import read_yaml
from cifar_lib.files import inside, notebook_named, plain_name, shown
from cifar_lib.study_runs import check_seeds
from cifar_lib.study_sweep import read_sweep, search_of
from cifar_lib.train import check_runnable

# What is allowed for that which reports take beside the configuration, by its type in the notebook.
REPORTED: dict[str, TypeAdapter[Any]] = {
    "str": TypeAdapter(str),
    "Optional[int]": TypeAdapter(Annotated[int, Field(ge=1)] | None),
    "Optional[float]": TypeAdapter(Annotated[float, Field(ge=0, le=1)] | None),
}
# What the runner itself tells a notebook, beside the parameters of the file.
RUNNER_PARAMETERS = ("experiment", "preset", "report_dir", "seeds")


@dataclass(frozen=True)
class Experiment:
    """One execution of one notebook: what `params/study.yaml` and a parameter file say.

    A notebook with a parameter `sweep` gets the path of its file there, which is a sweep file;
    its `seeds` are then empty, or stand for every variant instead of the file's.
    """

    preset: str
    notebook: str
    name: str
    parameters: dict[str, Any]
    seeds: list[int] = field(default_factory=lambda: [0])
    minutes_per_seed: float = 1.0

    @property
    def label(self) -> str:
        """`notebook/experiment`, what `--only` matches."""
        return f"{self.notebook}/{self.name}"

    @property
    def source(self) -> Path:
        """The notebook that is executed."""
        return ROOT / "notebooks" / f"{self.notebook}.ipynb"

    @property
    def destination(self) -> Path:
        """The report's folder."""
        return ROOT / "reports" / self.preset / self.notebook / self.name

    @property
    def config(self) -> TrainConfig:
        """The configuration among the parameters."""
        return config_of(self.parameters)

    @property
    def runs(self) -> list[tuple[str, TrainConfig, int]]:
        """Name, configuration and seed of every run; none where nothing is trained."""
        if "sweep" in self.parameters:
            search = search_of(self.parameters["sweep"])
            pairs = list(search.pairs) if search else []
            pairs += read_sweep(self.parameters["sweep"], self.seeds).pairs
            return [(f"{self.name}/{v}", config, seed) for v, config, seed in pairs]
        if "epochs" not in self.parameters:
            return []
        return [(self.name, self.config, seed) for seed in self.seeds]

    @property
    def datasets(self) -> set[str]:
        """The data sets that it asks for; none where it only reads reports."""
        own = {self.config.dataset} if "dataset" in self.parameters else set()
        return own | {config.dataset for _, config, _ in self.runs}

    @property
    def minutes(self) -> float:
        """Expected time on two cores, minutes."""
        return self.minutes_per_seed * max(1, len(self.runs))


def papermill_path(path: Path) -> str:
    """A path as papermill takes it, which fills braces in one with parameters."""
    return str(path).replace("{", "{{").replace("}", "}}")


def notebook_parameters(notebook: Path) -> dict[str, Any]:
    """The names and defaults in a notebook's `parameters` cell, as papermill reads them."""
    with notebook_named(notebook):
        found: dict[str, Any] = papermill.inspect_notebook(papermill_path(notebook))
    return found


def load_preset(preset: str, only: str = "*", n_seeds: int | None = None) -> list[Experiment]:
    """Reads and checks every experiment of a preset that is asked for, before anything runs.

    Args:
        preset: a name in `params/study.yaml`.
        only: a glob over `notebook/experiment`.
        n_seeds: seeds 0 .. n_seeds - 1 instead of those in the file.

    Raises:
        ValueError: an unknown preset, a missing file, an unknown, missing or duplicate
            parameter, or a value that TrainConfig refuses; names the file and the parameter.
    """
    presets = read_yaml(ROOT / "params/study.yaml").get("presets")
    if not isinstance(presets, dict) or not all(isinstance(e, list) for e in presets.values()):
        raise ValueError("params/study.yaml: expected `presets:` with a list under each name")
    if preset not in presets:
        raise ValueError(
            f"unknown preset {preset!r}; params/study.yaml has: {', '.join(map(str, presets))}"
        )
    entries = [(_label(preset, entry), entry) for entry in presets[preset]]
    labels = [label for label, _ in entries]
    if len(set(labels)) < len(labels):
        raise ValueError(f"params/study.yaml: preset {preset!r} names an experiment twice")
    asked = [entry for label, entry in entries if fnmatch.fnmatch(label, only)]
    if not asked:
        raise ValueError(f"--only {only!r} matches none of: {', '.join(labels) or 'nothing'}")
    chosen = [_read_experiment(preset, entry) for entry in asked]
    if n_seeds is not None:
        seeds = list(range(n_seeds))
        chosen = [replace(e, seeds=seeds) for e in chosen]
    return chosen


def _label(preset: str, entry: Any) -> str:
    """The label of an entry in study.yaml that has what an experiment needs; refuses others."""
    known = {"notebook", "params", "seeds", "minutes_per_seed"}
    if (
        not isinstance(entry, dict)
        or not {"notebook", "params"} <= entry.keys() <= known
        or not all(isinstance(entry[key], str) for key in ("notebook", "params"))
    ):
        raise ValueError(
            f"params/study.yaml, preset {preset!r}: got {entry!r}; an experiment has "
            f"notebook, params and optionally seeds, minutes_per_seed"
        )
    return f"{entry['notebook']}/{Path(entry['params']).stem}"


def _read_experiment(preset: str, entry: dict[str, Any]) -> Experiment:
    seeds = check_seeds(entry.get("seeds", [0]), entry["params"])
    minutes = entry.get("minutes_per_seed", 1.0)
    if type(minutes) not in (int, float) or not 0 < minutes < math.inf:
        raise ValueError(f"{entry['params']}: minutes_per_seed: got {minutes!r}; allowed is > 0")
    path = inside(ROOT / "params", entry["params"], "params")
    experiment = Experiment(
        plain_name(preset, "preset"),
        plain_name(entry["notebook"], "notebook"),
        plain_name(path.stem, "params"),
        {},
        seeds,
        minutes,
    )
    if not experiment.source.is_file():
        raise ValueError(f"params/study.yaml: no notebook {experiment.source.relative_to(ROOT)}")
    if "sweep" in notebook_parameters(experiment.source):
        if "seeds" in entry:
            raise ValueError(f"params/study.yaml: {entry['params']} is a sweep and has its seeds")
        read_sweep(path)
        return replace(experiment, parameters={"sweep": shown(path)}, seeds=[])
    parameters = read_yaml(path)
    check_parameters(parameters, experiment.source, shown(path))
    return replace(experiment, parameters=parameters)


def check_parameters(parameters: dict[str, Any], notebook: Path, where: str | Path) -> None:
    """Refuses parameters that a notebook does not have, and files that leave its smoke setting on.

    A notebook's own defaults make it a smoke run of seconds. Where such a default is not that
    of TrainConfig, a parameter file has to say what it wants; what it leaves out is TrainConfig's.
    A notebook that trains takes every field of TrainConfig, among its parameters or not.

    Raises:
        ValueError: names the file, the parameter and what the notebook accepts.
    """
    accepted, fields = notebook_parameters(notebook), TrainConfig.model_fields
    allowed = {*accepted, *(fields if "epochs" in accepted else ())} - set(RUNNER_PARAMETERS)
    if unknown := sorted(set(parameters) - allowed):
        raise ValueError(
            f"{where}: unknown parameter {', '.join(map(repr, unknown))}; "
            f"{notebook.name} accepts: {', '.join(sorted(allowed))}"
        )
    smoke = [name for name, value in accepted.items() if name in fields and _differs(name, value)]
    missing = [name for name in ["question", *smoke] if name in accepted and name not in parameters]
    if missing:
        raise ValueError(
            f"{where}: missing parameter {', '.join(map(repr, missing))}; "
            f"{notebook.name} has a smoke setting there"
        )
    for name in set(parameters) - set(fields):
        rule = REPORTED.get(accepted[name]["inferred_type_name"], TypeAdapter(Any))
        try:
            rule.validate_python(parameters[name], strict=True)
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise ValueError(f"{where}: {name}: got {parameters[name]!r}; {reason}") from None
    try:
        config = config_of(parameters)
        if "model" in parameters:
            check_runnable(config)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _differs(name: str, parameter: dict[str, Any]) -> bool:
    smoke = ast.literal_eval(str(parameter["default"]))
    return bool(smoke != TrainConfig.model_fields[name].default)
