"""What may be committed: nothing large, no data, no private path, notebooks that nbval compares."""

import ast
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Weights that are published with the project, by path: those that `export` writes.
SHIPPED = {"cifar_lib/shipped/best.safetensors"}
DATA = set(
    ".pt .pth .ckpt .safetensors .onnx .pb .h5 .parquet .arrow .feather .npy .npz .pkl .pickle"
    " .zip .tar .gz .tgz .bz2 .xz .zst .7z".split()
)
# A home or a checkout on one machine; a path in an address (https://host/home/) is none.
PRIVATE_PATH = re.compile(r"(?<![\w.~}-])/(home|root|work|Users)/")
NOT_OURS = {"runs", "data", "build", "dist", "__pycache__"}


def project_files() -> list[Path]:
    """Every file that is tracked, or would be after `git add .`."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # an unpacked archive, or no git here
        return sorted(walk(ROOT))
    paths = (ROOT / os.fsdecode(name) for name in listed.stdout.split(b"\0") if name)
    return sorted(path for path in paths if path.is_file())


def walk(folder: Path) -> list[Path]:
    found: list[Path] = []
    for path in folder.iterdir():
        hidden = path.name.startswith(".") and path.name not in {".ci", ".github"}
        if path.is_dir() and not hidden and path.name not in NOT_OURS:
            found += walk(path) if not path.name.endswith(".egg-info") else []
        elif path.is_file() and not hidden:
            found.append(path)
    return found


FILES = project_files()
NOTEBOOKS: list[Any] = sorted((ROOT / "notebooks").glob("*.ipynb")) or [
    pytest.param(None, marks=pytest.mark.skip(reason="notebooks/ has no notebook"))
]
each_notebook = pytest.mark.parametrize(
    "path", NOTEBOOKS, ids=lambda path: path.stem if path else "none"
)


def shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_the_project_is_seen() -> None:
    assert {"pyproject.toml", "tests/test_hygiene.py"} <= set(map(shown, FILES))
    assert {"pyproject.toml", "tests/test_hygiene.py"} <= set(map(shown, walk(ROOT)))


def test_no_file_is_large() -> None:
    limits = {".ipynb": 1_000_000}  # a larger notebook is not shown where the code is browsed
    large = [p for p in FILES if p.stat().st_size > limits.get(p.suffix, 2_000_000)]
    assert [*map(shown, large)] == []


def test_no_data_and_no_checkpoint() -> None:
    data = {shown(p) for p in FILES if p.suffix.lower() in DATA or p.name.startswith("data_batch")}
    assert data - SHIPPED == set()


def test_no_path_of_one_machine() -> None:
    private = []
    for path in FILES:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a picture
            continue
        found = PRIVATE_PATH.search(text)
        private += [f"{shown(path)}: {text[found.start() :][:40]!r}"] if found else []
    assert private == []


def test_every_relative_link_leads_somewhere() -> None:
    broken = []
    for path in (path for path in FILES if path.suffix == ".md"):
        for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
            target, _, heading = link.partition("#")
            there = path.parent / target if target else path
            if "://" in link or (there.exists() and not heading):
                continue
            headings = re.findall(r"^#+ (.+)$", there.read_text(), re.M) if there.is_file() else []
            if heading not in {h.lower().replace(" ", "-") for h in headings}:
                broken.append(f"{shown(path)}: {link}")
    assert broken == []


# --- notebooks ------------------------------------------------------------------------------


def cells(path: Path, kind: str | None = None) -> list[dict[str, Any]]:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return [c for c in notebook["cells"] if kind in (None, c["cell_type"])]


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def tags(cell: dict[str, Any]) -> set[str]:
    return set(cell["metadata"].get("tags", []))


def is_compared(cell: dict[str, Any]) -> bool:
    """Whether nbval holds text of this cell's outputs against a new execution."""
    marks = {"NBVAL_IGNORE_OUTPUT", "NBVAL_SKIP"}
    comments = {line.strip().lstrip("#").strip() for line in source(cell).splitlines()}
    if comments & marks or tags(cell) & {m.lower().replace("_", "-") for m in marks}:
        return False
    texts = [
        "".join(output.get("text") or output.get("data", {}).get("text/plain", ""))
        for output in cell["outputs"]
    ]
    # a figure's only text is its size, which says nothing about what it shows
    return cell["execution_count"] is not None and any(t and "<Chart" not in t for t in texts)


@each_notebook
def test_notebook_runs_on_the_kernel_python3(path: Path) -> None:
    metadata = json.loads(path.read_text(encoding="utf-8"))["metadata"]
    assert metadata["kernelspec"]["name"] == "python3"
    assert set(metadata) <= {"kernelspec", "language_info"}, "volatile metadata: make refresh"


@each_notebook
def test_notebook_has_its_order(path: Path) -> None:
    first, *_ = cells(path)
    assert first["cell_type"] == "markdown" and source(first).startswith("# ")
    assert sum("parameters" in tags(c) for c in cells(path, "code")) == 1
    headings = [ln for c in cells(path, "markdown") for ln in source(c).splitlines()]
    assert "## Checks" in headings


@each_notebook
def test_notebook_defines_no_function_and_no_class(path: Path) -> None:
    for cell in cells(path, "code"):
        lines = [ln for ln in source(cell).splitlines() if not ln.lstrip().startswith(("%", "!"))]
        nodes = list(ast.walk(ast.parse("\n".join(lines))))
        defined = [n for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)]
        assert not defined, f"{defined[0].name}: the library does the work"


@each_notebook
def test_notebook_outputs_are_compared(path: Path) -> None:
    code = [cell for cell in cells(path, "code") if source(cell)]
    for cell in code:
        start = source(cell).splitlines()[0]
        # nbval skips a cell without a count in silence
        assert cell["execution_count"] is not None, f"not executed, make refresh: {start}"
        # a closing semicolon silences the value in Jupyter and papermill, but not under nbval
        assert not source(cell).rstrip().endswith(";"), f"use `_ = …` instead: {start}"
        kinds = {output.get("name") or output["output_type"] for output in cell["outputs"]}
        assert not kinds & {"stderr", "error"}, start
    compared = [cell for cell in code if is_compared(cell)]
    assert len(compared) >= 3, f"{len(compared)} compared cells"
