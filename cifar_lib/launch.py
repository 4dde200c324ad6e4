"""The allocator's settings: read when an interpreter starts, so set before it does.

PyTorch asks for the same large blocks every step. As it stands glibc gives them back to the kernel
and asks anew, and clearing fresh pages then costs time: `benchmarks/allocator.py` says how much.
Kept blocks cost little but memory that was needed anyway.
"""

import json
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path

GLIBC = {
    "MALLOC_MMAP_MAX_": "0",  # no block, however large, comes straight from the kernel, each anew
    "MALLOC_TRIM_THRESHOLD_": str(8 * 2**30),  # free memory to keep at the top of the heap
    "MALLOC_TOP_PAD_": str(256 * 2**20),  # memory to ask for at once
}


def allocator_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """Says which variables to set for a fast allocator; none where glibc is not the allocator.

    Args:
        environment: as it is; whatever a user has set himself is left to him.

    Returns:
        Names and values, empty outside glibc, under another preloaded allocator, or when any of
        glibc's own settings is there already.
    """
    chosen = "LD_PRELOAD" in environment or any(n.startswith("MALLOC_") for n in environment)
    if platform.libc_ver()[0] != "glibc" or chosen:
        return {}
    return dict(GLIBC)


def restart_with_allocator() -> None:
    """Starts this command again, in the same process, with the allocator's settings.

    Does nothing where there are none to make; the second start finds them made.
    """
    if settings := allocator_settings(os.environ):
        command = [sys.executable, *sys.orig_argv[1:]]  # with `-W error` and the like
        os.execve(sys.executable, command, {**os.environ, **settings})  # noqa: S606


def write_kernel_specification(prefix: Path) -> Path:
    """Gives the Jupyter kernel `python3` of an environment the allocator's settings.

    Args:
        prefix: of the environment, such as `.venv`; holds share/jupyter/kernels/python3 if
            ipykernel is installed there.

    Returns:
        The file written.

    Raises:
        ValueError: there is no such kernel.
    """
    from cifar_lib.files import write_json  # not before the restart, which it would slow down

    path = prefix / "share/jupyter/kernels/python3/kernel.json"
    if not path.exists():
        raise ValueError(f"{path}: no such kernel; install ipykernel first")
    specification = json.loads(path.read_text(encoding="utf-8"))
    specification["env"] = specification.get("env", {}) | allocator_settings({})
    write_json(path, specification)
    return path


if __name__ == "__main__":  # `python -m cifar_lib.launch`, by `make`
    write_kernel_specification(Path(sys.prefix))
