"""What the machine offers a run: device, precision, and the facts that go on record."""

import ast
import functools
import hashlib
import os
import platform
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

from cifar_lib.config import TrainConfig

_PACKAGE = Path(__file__).resolve().parent  # not of the checkout: it may be installed alone

# The rooms that decide what a run computes; plots, reports and the command line do not.
TRAINING_ROOMS = (
    "config*.py",
    "data*.py",
    "augment*.py",
    "fast*.py",
    "models/*.py",
    "optim*.py",
    "execution.py",
    "distributed.py",
    "evaluate.py",
    "results.py",
    "checkpoint.py",
    "train*.py",
)


@dataclass(frozen=True)
class Execution:
    """Where and in which number format a run computes."""

    device: torch.device
    dtype: torch.dtype

    @property
    def precision(self) -> str:
        """fp32, bf16 or fp16."""
        return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[self.dtype]

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """What autocast lowers to; None in fp32."""
        return None if self.dtype == torch.float32 else self.dtype

    def autocast(self) -> torch.autocast:
        """The autocast context of this precision; does nothing in fp32."""
        dtype = self.autocast_dtype
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)

    def synchronize(self) -> None:
        """Waits for the device; a clock read afterwards has seen all work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()


def choose_execution(config: TrainConfig) -> Execution:
    """Chooses device and precision for a configuration on this machine.

    Args:
        config: device and precision, each a name or `auto`.

    Returns:
        auto takes CUDA, then Apple's MPS, then the CPU; and bf16 where the device computes in
        it (a CPU with AMX or AVX512-bf16, a GPU of compute capability 8 or more), else fp32.

    Raises:
        ValueError: the device or the precision asked for is not to be had here.
    """
    present = {"cpu": True, "cuda": torch.cuda.is_available()}
    present["mps"] = torch.backends.mps.is_available()
    name = config.device
    if name == "auto":
        name = "cuda" if present["cuda"] else "mps" if present["mps"] else "cpu"
    if not present[name]:
        raise ValueError(f"device: got {name!r}, which this machine does not have; use auto or cpu")
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if _computes_in_bf16(name) else "fp32"
    if precision == "fp16" and name == "cpu":
        raise ValueError("precision: got 'fp16' on a CPU; use auto, fp32 or bf16")
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    return Execution(torch.device(name), dtypes[precision])


def choose_evaluation(config: TrainConfig) -> Execution:
    """As `choose_execution`, but takes what there is where the training's choice is missing.

    Another device keeps the precision, if it has it.
    """
    for update in ({}, {"device": "auto"}):
        with suppress(ValueError):
            return choose_execution(config.model_copy(update=update))
    return choose_execution(config.model_copy(update={"device": "auto", "precision": "auto"}))


def prepare_device(execution: Execution, deterministic: bool) -> None:
    """Sets what PyTorch keeps a process: deterministic algorithms, or the fastest ones on CUDA."""
    torch.use_deterministic_algorithms(deterministic)
    if execution.device.type == "cuda":
        # What deterministic algorithms ask of cuBLAS; PyTorch reads it once, at its first call,
        # and a later run in this process may ask for them.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = not deterministic
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in fp32


def _computes_in_bf16(device: str) -> bool:
    if device == "cpu":
        return bool({"amx_bf16", "avx512_bf16"} & cpu_flags())
    if device == "cuda":
        return torch.cuda.get_device_capability() >= (8, 0)
    return False


def cpu_flags() -> set[str]:
    """What the processor can do, as Linux names it; empty elsewhere."""
    return set(_cpu_fact("flags").split())


def _cpu_fact(key: str) -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    facts = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in facts if name.strip() == key), "")


def describe_hardware(execution: Execution) -> dict[str, Any]:
    """The hardware record of a summary: device, its name, threads, precision, vector units.

    fp32 on CUDA is tf32 where the device has it: `prepare_device` lets products use it.
    """
    device, precision = execution.device.type, execution.precision
    if device == "cuda":
        if precision == "fp32" and _computes_in_bf16(device):  # Ampere brought both
            precision = "tf32"
        name = torch.cuda.get_device_name(execution.device)
    else:
        name = _cpu_fact("model name") or platform.processor() or platform.machine()
    units = filter(cpu_flags().__contains__, ("amx_bf16", "avx512_bf16", "avx512f", "avx2"))
    return {
        "device": device,
        "name": name,
        "threads": torch.get_num_threads(),
        "precision": precision,
        "vector_unit": next(units, None) if device == "cpu" else None,
    }


def describe_environment() -> dict[str, str]:
    """Versions that a result may depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": version("torchvision"),
        "platform": f"{platform.system()} {platform.machine()}",
    }


@functools.cache  # of the code that this process runs, not of what is edited meanwhile
def training_code_sha256() -> str:
    """SHA-256 over the rooms that decide what a run computes, 64 hexadecimal digits.

    Of their code, not of its wording: comments, docstrings and line breaks do not count, and
    every Python version gives the same.
    """
    digest = hashlib.sha256()
    for path in sorted(path for pattern in TRAINING_ROOMS for path in _PACKAGE.glob(pattern)):
        tree = _Wordless().visit(ast.parse(path.read_bytes()))
        digest.update(f"{path.name}\0{_text_of(tree)}\0".encode())
    return digest.hexdigest()


class _Wordless(ast.NodeTransformer):
    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        return None if isinstance(node.value, ast.Constant) else node


def _text_of(node: Any) -> str:
    """A syntax tree as text, without the empty fields, which differ between Python versions."""
    if isinstance(node, ast.AST):
        fields = [(name, value) for name, value in ast.iter_fields(node) if value not in (None, [])]
        return f"{type(node).__name__}({', '.join(f'{n}={_text_of(v)}' for n, v in fields)})"
    return f"[{', '.join(map(_text_of, node))}]" if isinstance(node, list) else repr(node)


@functools.cache
def git_commit() -> str | None:
    """The library's commit, with `-dirty` when it differs; None outside git, as where installed."""
    home = _PACKAGE.parent

    def git(*words: str) -> str:
        return subprocess.run(  # noqa: S603
            ["git", "-C", str(home), *words],  # noqa: S607
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"GIT_CEILING_DIRECTORIES": str(home.parent)},  # no other's commit
        ).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        changed = git("status", "--porcelain", "-uno", "--", "cifar_lib")
        return commit + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


UNITS = (("s", 1), ("min", 60), ("h", 3600))


def duration(seconds: float, _position: object = None) -> str:
    """Writes a duration in the unit that reads best; formats an axis too."""
    name, size = max((u for u in UNITS if seconds >= u[1]), key=lambda u: u[1], default=UNITS[0])
    return f"{seconds / size:.3g} {name}"


class OtherLoad:
    """How much of the machine other processes took: a time is a run's own up to `NEGLIGIBLE`."""

    NEGLIGIBLE = 0.05

    def __init__(self) -> None:
        self.began = self._now()

    def share(self, processes: int = 1) -> float:
        """Busy time of other processes since the start, as a share of all cores, 0..1.

        Args:
            processes: that work on the run on this machine, each about as much as this one.
        """
        busy, own, wall = (b - a for a, b in zip(self.began, self._now(), strict=True))
        return max(0.0, busy - own * processes) / max(1e-9, wall * (psutil.cpu_count() or 1))

    @staticmethod
    def _now() -> tuple[float, float, float]:
        machine = psutil.cpu_times()
        idle = machine.idle + getattr(machine, "iowait", 0.0)
        own = psutil.Process().cpu_times()[:4]  # and of its children that ended
        return sum(machine[:8]) - idle, sum(own), time.perf_counter()
