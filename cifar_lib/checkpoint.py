"""The whole training state to disk and back, atomically, with a checksum and behind a lock."""

import hashlib
import io
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from cifar_lib.files import shown, sync_folder, write_atomic
from cifar_lib.results import WEIGHTS

LAST, PREVIOUS = "last.pt", "previous.pt"
DIGEST_BYTES = 32

logger = logging.getLogger(__name__)


@contextmanager
def hold(run_dir: Path) -> Iterator[None]:
    """Keeps a run's folder from all other processes; makes it if it is not there.

    Raises:
        ValueError: another process trains that run.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    try:
        held = FileLock(run_dir / ".lock", timeout=0).acquire()
    except Timeout:
        raise ValueError(f"{run_dir}: another process is training this run") from None
    with held:
        yield


def has_state(run_dir: Path) -> bool:
    """Whether a run was begun here: a training state lies in its folder."""
    return any((run_dir / name).is_file() for name in (LAST, PREVIOUS))


def save_checkpoint(run_dir: Path, state: dict[str, Any]) -> None:
    """Saves a training state as `last.pt`, keeping the one before as `previous.pt`.

    Args:
        run_dir: the run's folder.
        state: tensors, plain numbers and strings in dicts and lists; nothing else, so that it
            loads without unpickling code.

    Raises:
        OSError: the disk is full or not writable; the states saved before stay as they were.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.write(hashlib.sha256(buffer.getbuffer()).digest())
    pending = run_dir / "pending.pt"
    write_atomic(pending, buffer.getbuffer())
    if (run_dir / LAST).exists():
        os.replace(run_dir / LAST, run_dir / PREVIOUS)
    os.replace(pending, run_dir / LAST)
    sync_folder(run_dir)


def load_checkpoint(run_dir: Path) -> dict[str, Any] | None:
    """Loads the newest whole training state of a run.

    Returns:
        The state, on the CPU; None when there is none. A torn or altered file is named in a
        warning, removed, and the one before it is used.

    Raises:
        ValueError: a file is whole but no training state; nothing in it was run.
    """
    states = _states(run_dir)
    for path in states:
        if (payload := _whole(path)) is not None:
            state = _parse(payload, path)
            if path.name == PREVIOUS:  # a torn one before it would be moved over it by a save
                (run_dir / LAST).unlink(missing_ok=True)
            return state
        instead = "starting again" if path == states[-1] else "using the state before it"
        logger.warning("%s is torn or altered (checksum differs); %s", shown(path), instead)
    return None


def _states(run_dir: Path) -> list[Path]:
    """The training states in a folder, newest first."""
    return [run_dir / name for name in (LAST, PREVIOUS) if (run_dir / name).exists()]


def _whole(path: Path) -> bytes | None:
    """What a training state holds, or None if its checksum differs."""
    content = path.read_bytes()
    payload, digest = content[:-DIGEST_BYTES], content[-DIGEST_BYTES:]
    return payload if hashlib.sha256(payload).digest() == digest else None


def _parse(payload: bytes, path: Path) -> dict[str, Any]:
    """Reads tensors, numbers and strings; a checksum is no signature, so nothing else."""
    try:
        state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except Exception as error:  # a foreign file makes the unpickler raise nearly anything
        state = type(error).__name__
    if not isinstance(state, dict):
        raise ValueError(
            f"{shown(path)}: not a training state, nothing in it was run ({str(state)[:80]}); "
            "remove it to go on from the state before, or to start again"
        )
    return state


def set_aside(run_dir: Path, key: str) -> Path:
    """Moves the state that `load_checkpoint` reads, and the weights beside it, out of the way.

    Args:
        run_dir: the run's folder.
        key: of the code and data that they are of.

    Returns:
        The folder that holds them now, until `take_back`.
    """
    aside = _aside(run_dir, key)
    aside.mkdir(exist_ok=True)
    newest = next(path for path in _states(run_dir) if _whole(path) is not None)
    for path in _states(run_dir):  # killed half-way, the next start goes on with this
        if path != newest:
            path.unlink()
    if (run_dir / WEIGHTS).exists():
        os.replace(run_dir / WEIGHTS, aside / WEIGHTS)
    os.replace(newest, aside / LAST)
    return aside


def take_back(run_dir: Path, key: str) -> bool:
    """Moves what was set aside under a key back into a run's folder; says whether there was any."""
    aside = _aside(run_dir, key)
    if not (aside / LAST).exists():
        return False
    for name in (WEIGHTS, LAST):
        if (aside / name).exists():
            os.replace(aside / name, run_dir / name)
    aside.rmdir()
    return True


def _aside(run_dir: Path, key: str) -> Path:
    return run_dir / f"other-{hashlib.sha256(key.encode()).hexdigest()[:8]}"


def remove_checkpoints(run_dir: Path) -> None:
    """Removes the training state of a run, for instance to start it again."""
    for name in (LAST, PREVIOUS, "pending.pt"):
        (run_dir / name).unlink(missing_ok=True)
