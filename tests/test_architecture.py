"""The rooms of cifar_lib: each imports only from rooms above it and is read in one sitting."""

import ast
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from cifar_lib.execution import TRAINING_ROOMS

LIBRARY = Path(__file__).resolve().parents[1] / "cifar_lib"
FILES = sorted(LIBRARY.rglob("*.py"))
# From the ground up. A room split by idea keeps its name in front: data.py, data_download.py.
ROOMS = [
    "__init__",
    "config",
    "files",
    "launch",
    "execution",
    "distributed",
    "data",
    "augment",
    "fast",
    "models",
    "optim",
    "evaluate",
    "results",
    "checkpoint",
    "train",
    "predict",
    "plots",
    "reports",
    "index",
    "study",
    "__main__",
]
LINES_OF_A_FILE = 300
CODE_LINES_OF_THE_LIBRARY = 4980  # `fast_products` and `fast_subnormals` are measured to pay


def room_of(module: str) -> str:
    """`cifar_lib.data_download` is in the room data, `cifar_lib.models.vgg` in models."""
    _, _, inside = module.partition(".")
    name = inside.partition(".")[0] or "__init__"
    room = name if name in ROOMS else name.partition("_")[0]
    assert room in ROOMS, f"{module} is in no room: add it to the table, or to a room"
    return room


def imports(path: Path, source: str) -> Iterator[str]:
    """The modules of cifar_lib that a file imports, anywhere in it."""
    package = ["cifar_lib", *path.relative_to(LIBRARY).parent.parts]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] == "cifar_lib")
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *filter(None, [node.module])])
            if module == "cifar_lib":  # `from cifar_lib import x` names a module, or __version__
                names = [a.name for a in node.names]
                yield from (f"cifar_lib.{n}" for n in names if not n.startswith("__"))
            elif module.startswith("cifar_lib."):
                yield module


def module_of(path: Path) -> str:
    return ".".join(["cifar_lib", *path.relative_to(LIBRARY).with_suffix("").parts])


def from_below(path: Path, source: str) -> list[str]:
    """The imports that go against the order of the rooms."""
    height = ROOMS.index(room_of(module_of(path)))
    return [m for m in imports(path, source) if ROOMS.index(room_of(m)) > height]


def test_the_code_of_a_run_is_all_that_training_imports() -> None:
    needed, left = set(), ["cifar_lib.train"]
    while left:
        path = LIBRARY.parent / (left.pop().replace(".", "/") + ".py")
        path = path if path.is_file() else path.with_suffix("") / "__init__.py"
        if path.is_file() and path not in needed:
            needed.add(path)
            left += imports(path, path.read_text(encoding="utf-8"))
    hashed = {path for pattern in TRAINING_ROOMS for path in LIBRARY.glob(pattern)}
    assert {path.stem for path in needed - hashed} == {"files"}


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_a_room_imports_only_from_rooms_above_it(path: Path) -> None:
    assert from_below(path, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "line",
    [
        "import cifar_lib.train",
        "from cifar_lib import train",
        "from cifar_lib.train import train",
        "from . import train",
        "from .train import train",
        "def f():\n    from cifar_lib.train import train",
    ],
)
def test_every_way_to_import_is_seen(line: str) -> None:
    assert from_below(LIBRARY / "config.py", line) == ["cifar_lib.train"]
    assert from_below(LIBRARY / "study.py", line) == []


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_a_file_is_read_in_one_sitting(path: Path) -> None:
    assert lines(path) <= LINES_OF_A_FILE, "split it by idea"


def test_the_library_stays_small() -> None:
    count = sum(map(code_lines, FILES))
    assert count <= CODE_LINES_OF_THE_LIBRARY, "remove what no longer wins, or say why it may grow"


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def code_lines(path: Path) -> int:
    """Logical lines of code: however the formatter wraps them, and no docstring or comment."""
    count, docstring, empty = 0, False, True
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline)
    for token in tokens:
        if token.type == tokenize.NEWLINE:
            count += not docstring
            empty = True
        elif empty and token.type not in (
            tokenize.COMMENT,
            tokenize.NL,
            tokenize.INDENT,
            tokenize.DEDENT,
        ):
            docstring, empty = token.type == tokenize.STRING, False
    return count


def test_docstrings_comments_and_wrapping_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_text(
        '"""Doc.\n\nMore.\n"""\n\n# why\nx = (\n    1,\n)\n\n\ndef f():\n    """Doc."""\n'
    )
    assert code_lines(path) == 2
