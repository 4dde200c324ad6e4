"""The command line: `python -m cifar_lib COMMAND`; each command has `--help`."""

import logging
import os
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from cifar_lib.files import shown, with_remedy
from cifar_lib.launch import restart_with_allocator
from cifar_lib.train_stop import listening

app = typer.Typer(
    name="cifar_lib",
    help="CIFAR-10 training, measured: run the study, or one training, evaluation or prediction.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

A_RUN = "A run's folder, runs/EXPERIMENT/SEED-FINGERPRINT"
OwnRun = Annotated[Path, typer.Argument(help=f"{A_RUN}.")]
RunFolder = Annotated[Path, typer.Argument(help=f"{A_RUN}, or: shipped.")]
Preset = Annotated[
    str, typer.Option(help="A preset in params/study.yaml: quick, full, imagenet or gpu.")
]
Only = Annotated[str, typer.Option(help="Glob over NOTEBOOK/EXPERIMENT, for instance '02*/*'.")]
Seeds = Annotated[
    int | None, typer.Option(min=1, max=10_000, help="Seeds 0..N-1 instead of the file's.")
]
Force = Annotated[bool, typer.Option("--force", help="Run again what is up to date.")]


@app.command()
def study(
    preset: Preset = "quick",
    only: Only = "*",
    seeds: Seeds = None,
    force: Force = False,
    engine: Annotated[
        str, typer.Option(help="Who trains what is missing: local (this machine) or ray.")
    ] = "local",
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Runs at a time on a machine; they share its cores and GPUs."),
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster: auto or HOST:PORT; without, Ray starts here.")
    ] = None,
) -> None:
    """Execute a preset's notebooks with papermill and put their reports into reports/PRESET."""
    from cifar_lib import index, study

    for name in ("papermill", "asyncio"):  # a stopped kernel is no fault; others are raised
        logging.getLogger(name).setLevel(logging.CRITICAL)
    failed = study.study(preset, only, seeds, force, engine=engine, jobs=jobs, address=address)
    if preset == "full":
        for path in index.write_generated():
            typer.echo(f"updated {shown(path)}")
    else:
        typer.echo(f"index: {shown(index.write_preset_index(preset))}")
    if failed:
        raise typer.Exit(1)


@app.command()
def train(
    params: Annotated[Path, typer.Argument(help="A parameter file, such as params/02_speed/….")],
    parameter: Annotated[
        list[str] | None,
        typer.Option("-p", "--parameter", help="NAME=VALUE over the file's; may be repeated."),
    ] = None,
    seeds: Annotated[
        list[int] | None, typer.Option("--seed", min=0, help="May be repeated.")
    ] = None,
    force: Force = False,
) -> None:
    """Train the configuration of a parameter file; a finished run is not repeated.

    Several processes train one run together under torchrun, on as many GPUs or on the cores of
    a CPU: `torchrun --nproc_per_node=2 --shutdown-timeout=3600 -m cifar_lib train PARAMS`, with
    seconds enough for the epoch that Ctrl-C lets end, 30 by itself. batch_size stays the images
    of a step; each process takes its share, and batch norm sees that share. It must divide
    evenly. The first process writes and prints. A run may go on with another number of
    processes. OMP_NUM_THREADS above 1 sets the threads of each; else the cores are divided.
    """
    from cifar_lib import distributed
    from cifar_lib.config import TrainConfig, parse_config
    from cifar_lib.config_yaml import BROKEN_YAML, read_yaml
    from cifar_lib.study import runs
    from cifar_lib.study_sweep import REPORT_ONLY

    with distributed.joined():
        values = {k: v for k, v in read_yaml(params).items() if k not in REPORT_ONLY}
        if {"base", "variants", "grid"} & values.keys():
            raise ValueError(
                f"{params}: a sweep; list it in params/study.yaml if it is not, then: "
                f"python -m cifar_lib study --preset full --only '*/{params.stem}'"
            )
        for assignment in parameter or []:
            name, equals, text = assignment.partition("=")
            if not equals:
                raise ValueError(f"-p {assignment!r}: expected NAME=VALUE")
            try:
                values[name] = yaml.safe_load(text)
            except BROKEN_YAML:
                raise ValueError(f"-p {assignment[:80]!r}: the value is not YAML") from None
        config: TrainConfig = parse_config(values)
        finished = runs(config, seeds or [0], experiment=params.stem, force=force)
        for run in finished if distributed.rank() == 0 else []:
            _print_result(run.summary["result"], shown(run.path))


@app.command()
def evaluate(run: RunFolder) -> None:
    """Evaluate a finished run's weights on the test set again, from its saved weights."""
    from cifar_lib.predict import find_run
    from cifar_lib.predict_stage import evaluate_run

    found = find_run(run)
    _print_result(evaluate_run(found), shown(found.path))


@app.command()
def compare(
    run: OwnRun,
    report: Annotated[str, typer.Argument(help="A published stage, NOTEBOOK/EXPERIMENT.")],
) -> None:
    """Say whether a run beats a published report, image by image of the same test set."""
    from cifar_lib.predict import find_run
    from cifar_lib.predict_stage import compare_with_report

    table = compare_with_report(find_run(run), report)
    typer.echo(table.to_string(index=False, float_format=lambda x: f"{x:.4g}"))
    typer.echo("Percent of the test images; 95 % interval (bootstrap), p (McNemar): of these runs,")
    typer.echo("not of their recipes, which take several seeds. Choose on validation, look once.")


@app.command()
def export(
    run: OwnRun,
    to: Annotated[Path | None, typer.Option(help="Another folder than cifar_lib/shipped.")] = None,
) -> None:
    """Make a finished run the model that comes with the project: half precision, with its card."""
    from cifar_lib.predict import SHIPPED
    from cifar_lib.predict_export import export_run
    from cifar_lib.results import load_run

    typer.echo(f"wrote {shown(export_run(load_run(run), to or SHIPPED).path)}")


@app.command()
def predict(
    run: RunFolder,
    images: Annotated[list[Path], typer.Argument(help="Pictures, or folders of them.")],
    form: Annotated[
        str, typer.Option("--format", help="table, csv (pictures alone) or json (all).")
    ] = "table",
    top: Annotated[int, typer.Option(min=1, help="How many classes a picture.")] = 5,
) -> None:
    """Say what is on pictures of any size; folders named by class are scored too."""
    import torch

    from cifar_lib import predict as room

    if form not in room.FORMATS:
        raise ValueError(f"--format: got {form!r}; allowed are {', '.join(room.FORMATS)}")
    finished = room.find_run(run)
    names = finished.summary["class_names"]
    readable, pictures, failed = [], [], False
    found = room.find_images(images, names)
    # Files given by name need no label; folders between class folders were meant to have one.
    strays = sorted(
        {
            Path(os.path.abspath(f)).parent.name
            for f, label in found
            if not label and f not in images
        }
    )
    if any(label for _, label in found) and strays:
        typer.echo(
            f"not scored: {', '.join(strays)} name no class; classes are {', '.join(names)}",
            err=True,
        )
    for file, label in found:
        try:
            pictures.append(room.read_image(file))
            readable.append((file, label))
        except ValueError as error:
            told = str(error).replace("\n", "\\n")  # of a picture's name
            typer.echo(f"error: {told}", err=True)
            failed = True
    if pictures:
        logits = room.predictor(finished, tta=True)(torch.stack(pictures))
        probabilities = logits.softmax(1)
        frame = room.predictions_frame(readable, probabilities, names, top)
        typer.echo(room.render(frame, room.score(readable, probabilities, names), form))
    if failed:
        raise typer.Exit(1)


@app.command()
def data(
    dataset: Annotated[str, typer.Option(help="auto, cifar10 or digits.")] = "auto",
    data_dir: Annotated[str | None, typer.Option(help="Folder that holds CIFAR-10.")] = None,
    download: Annotated[
        bool, typer.Option("--download", help="Bring CIFAR-10 here if it is not, however long.")
    ] = False,
) -> None:
    """Say which data a run would use, where it comes from, and its checksum."""
    from cifar_lib.config import parse_config
    from cifar_lib.data import load_splits

    if download and dataset not in ("auto", "cifar10"):
        raise ValueError(f"--download: brings cifar10, and --dataset is {dataset}; leave one out")
    dataset = "cifar10" if download else dataset
    splits = load_splits(parse_config({"dataset": dataset, "data_dir": data_dir}))
    for name, value in asdict(splits.info).items():
        typer.echo(f"{name}: {value}")
    typer.echo(f"classes: {', '.join(splits.train.class_names)}")


@app.command()
def report(
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit status 1 when a file drifted.")
    ] = False,
) -> None:
    """Write the generated texts (README table, reports/README.md, notebooks' answers)."""
    from cifar_lib import index

    paths = index.drifted_files() if check else index.write_generated()
    for path in paths:
        typer.echo(f"{'drifted' if check else 'updated'}: {shown(path)}")
    if check and paths:
        raise typer.Exit(1)


_FULL = re.compile("out of memory|can(.t|not) allocate memory|not enough memory|bad_alloc", re.I)
_SMALLER = "give this less at a time (of a training: batch_size, micro_batch_size, eval_batch_size)"
_GOES_ON = "stopped; the same command goes on after what is finished"
_FORCED = "stopped; --force would begin anew: leave it out, of a study delete the old reports first"

# Typer carries a click of its own and exports only this subclass of its UsageError.
_USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]


def _print_result(result: dict[str, Any], where: str) -> None:
    told = "".join(
        f"{key} {100 * result[key]:.2f} %, "
        for key in ("val_accuracy", "test_accuracy", "test_accuracy_tta")
        if result.get(key) is not None
    )
    typer.echo(f"seed {result['seed']}, {told}test_loss {result['test_loss']:.4f}  {where}")


def main() -> None:
    """Runs the command line; a caller's mistake is one line on stderr and exit status 2."""
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal lacks letters for
        if stream is not None:  # closed by whoever started it
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    if len(sys.argv) == 1:
        sys.argv.append("--help")
    try:
        with listening():
            status = app(standalone_mode=False)
    except _USAGE_ERROR as error:
        print(f"error: {error.format_message()}", file=sys.stderr)  # type: ignore[attr-defined]
        sys.exit(2)
    except typer.Abort:
        sys.exit(130)
    except SystemExit as stop:  # by a signal
        if stop.code in (130, 143) and os.environ.get("RANK", "0") == "0":
            print(_FORCED if "--force" in sys.argv else _GOES_ON, file=sys.stderr)
        sys.exit(stop.code)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (OSError, FloatingPointError) as error:
        print(f"error: {with_remedy(error)}", file=sys.stderr)
        sys.exit(1)
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or _FULL.search(str(error))):
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        print(f"error: out of memory: {reason}; {_SMALLER}", file=sys.stderr)
        sys.exit(1)
    sys.exit(status if isinstance(status, int) else 0)


if __name__ == "__main__":
    restart_with_allocator()
    main()
