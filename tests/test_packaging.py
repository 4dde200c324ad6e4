"""One environment, said in four files: pyproject.toml, the lock, environment.yml, the Makefile."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import cifar_lib

ROOT = Path(__file__).resolve().parents[1]
TABLES = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = TABLES["project"]
RANGES = [
    Requirement(line) for line in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]
]
LOCK = [
    Requirement(line)
    for line in (ROOT / "requirements.lock").read_text().splitlines()
    if line and not line.startswith("#")
]
# The build backend is in the lock, so that installing the package fetches nothing.
BUILD = [Requirement(line) for line in TABLES["build-system"]["requires"]]
MACHINES = {
    "x86_64 Linux": {"sys_platform": "linux", "platform_machine": "x86_64"},
    "aarch64 Linux": {"sys_platform": "linux", "platform_machine": "aarch64"},
    "Apple": {"sys_platform": "darwin", "platform_machine": "arm64"},
    "Windows": {"sys_platform": "win32", "platform_machine": "AMD64"},
}
TARGETS = "study test test-long full lab report bench refresh lock clean help".split()


def pins(**machine: str) -> dict[str, str]:
    """Name to version, as pip reads the lock on such a machine; on this one by default."""
    chosen = [r for r in LOCK if r.marker is None or r.marker.evaluate(machine)]
    versions: dict[str, str] = {
        canonicalize_name(r.name): str(r.specifier).removeprefix("==") for r in chosen
    }
    assert len(versions) == len(chosen), "a package is pinned twice"
    return versions


def needed() -> set[str]:
    """Every package that the declared dependencies lead to, on this machine."""
    seen: set[tuple[str, str]] = set()  # a package and the extra of it that is asked for
    todo = [(canonicalize_name(r.name), "") for r in (*RANGES, *BUILD)]
    while todo:
        name, extra = todo.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        for requirement in map(Requirement, importlib.metadata.requires(name) or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                wanted = ("", *requirement.extras)
                todo += [(canonicalize_name(requirement.name), e) for e in wanted]
    return {name for name, _ in seen}


def test_every_line_of_the_lock_is_one_exact_version() -> None:
    for requirement in LOCK:
        assert re.fullmatch(r"==[\w.!+]+", str(requirement.specifier)), requirement
        assert requirement.url is None, requirement


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
def test_declared_ranges_hold_their_pins(machine: dict[str, str]) -> None:
    locked = pins(**machine)
    for requirement in (*RANGES, *BUILD):
        version = locked[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} but pinned {version}"


def test_the_cuda_build_is_for_x86_64_linux_alone() -> None:
    torch = {name: pins(**machine)["torch"] for name, machine in MACHINES.items()}
    assert torch.pop("aarch64 Linux") == "2.9.1"
    assert len(set(torch.values())) == 1
    cuda = re.compile(r"nvidia-|cuda-|triton")
    with_cuda = [name for name, m in MACHINES.items() if any(map(cuda.match, pins(**m)))]
    assert with_cuda == ["x86_64 Linux"]


@pytest.mark.skipif(
    sys.platform != "linux" or sys.version_info[:2] != (3, 11),
    reason="the lock is complete for Linux with Python 3.11; pip adds what others need",
)
def test_lock_names_what_is_needed_and_nothing_else() -> None:
    assert set(pins()) == needed()


def test_installed_versions_are_the_locked_ones() -> None:
    locked = pins()
    installed = {name: importlib.metadata.version(name) for name in locked}
    assert installed == locked


def test_every_pin_admits_the_oldest_python() -> None:
    oldest = PROJECT["requires-python"].removeprefix(">=") + ".0"
    for name in pins():  # a patch release matters: some distributions stay at 3.11.2 for years
        admitted = importlib.metadata.metadata(name).json.get("requires_python", "")
        assert SpecifierSet(str(admitted)).contains(oldest), f"{name} needs Python {admitted}"


def test_every_import_is_declared() -> None:
    extras = [r for lines in PROJECT["optional-dependencies"].values() for r in lines]
    declared = {canonicalize_name(Requirement(r).name) for r in PROJECT["dependencies"] + extras}
    providers = importlib.metadata.packages_distributions()
    folders = [ROOT / name for name in ("cifar_lib", "tests", "benchmarks")]
    local = {"cifar_lib"} | {path.stem for folder in folders[1:] for path in folder.glob("*.py")}
    for path in (path for folder in folders for path in folder.rglob("*.py")):
        for module in imported(path) - set(sys.stdlib_module_names) - local:
            names = {canonicalize_name(name) for name in providers.get(module, [module])}
            assert names & declared, f"{path.relative_to(ROOT)} imports undeclared {module}"


def imported(path: Path) -> set[str]:
    """Top-level names of the modules a file imports."""

    def names() -> Iterator[str]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                yield node.module

    return {name.partition(".")[0] for name in names()}


def test_environment_yml_installs_the_lock_and_a_fitting_python() -> None:
    dependencies = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    *conda, pip = dependencies
    assert pip == {"pip": ["-r requirements.lock", "-e ."]}
    assert "pip" in conda
    (python,) = (line.removeprefix("python=") for line in conda if line.startswith("python="))
    assert SpecifierSet(PROJECT["requires-python"]).contains(python)
    # every other conda package would be a second opinion on a version
    assert len(conda) == 2


def test_version_is_said_once_in_the_package() -> None:
    assert "version" not in PROJECT
    assert TABLES["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "cifar_lib.__version__"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", cifar_lib.__version__)


# --- the Makefile ---------------------------------------------------------------------------

needs_make = pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs make as a user would, not as a part of the make that runs these tests."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    return subprocess.run(
        ["make", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=30
    )


@needs_make
def test_make_alone_lists_every_target() -> None:
    listed = [line.split()[1] for line in make().stdout.splitlines()]
    assert sorted(listed) == sorted(TARGETS)


@needs_make
@pytest.mark.parametrize("target", sorted(set(TARGETS) - {"help", "clean"}))
def test_each_target_first_sets_up_the_environment(target: str, tmp_path: Path) -> None:
    commands = make("--dry-run", f"VENV={tmp_path}/venv", target).stdout
    assert "--requirement requirements.lock" in commands


@needs_make
def test_python_that_is_too_old_is_refused_in_one_line(tmp_path: Path) -> None:
    done = make(f"VENV={tmp_path}/venv", "PYTHON=false", f"{tmp_path}/venv/.installed")
    assert done.returncode
    message, makes_own = done.stderr.splitlines()
    assert "Python 3.11 or newer is needed" in message
    assert "Error 1" in makes_own


@needs_make
@pytest.mark.parametrize("harm", ["", "its Python is gone", "it was moved here"])
def test_an_environment_that_runs_no_more_is_made_anew(harm: str, tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    target = "/gone/python3" if harm == "its Python is gone" else sys.executable
    (venv / "bin/python").symlink_to(target)
    home = "/elsewhere/venv" if harm == "it was moved here" else venv
    (venv / "pyvenv.cfg").write_text(f"command = python3 -m venv --clear {home}\n")
    (venv / ".installed").touch()
    commands = make("--dry-run", f"VENV={venv}", "report").stdout
    assert ("--requirement requirements.lock" in commands) == bool(harm)


@needs_make
@pytest.mark.parametrize("fails", ["--requirement", "--editable", " check"])
def test_an_install_that_failed_is_not_taken_for_a_whole_one(fails: str, tmp_path: Path) -> None:
    python = tmp_path / "venv/bin/python"
    python.parent.mkdir(parents=True)
    stamp = tmp_path / "venv/.installed"
    half_written = tmp_path / "venv/lib/thing-1.0.dist-info"
    half_written.mkdir(parents=True)
    (half_written / "METADATA").touch()
    for script, whole in ((f'[[ "$*" != *"{fails}"* ]]', False), ("true", True)):
        python.write_text(f"#!/usr/bin/env bash\n{script}\n")
        python.chmod(0o755)
        done = make(f"VENV={tmp_path}/venv", str(stamp))
        assert (done.returncode == 0, stamp.exists()) == (whole, whole), done.stderr
    assert not half_written.exists()
