"""Files that are whole or not there: atomic writes and content hashes."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from cifar_lib.config import ROOT

_FREE = "free some space and start again"
_REMEDIES = {
    errno.ENOSPC: _FREE,
    errno.EDQUOT: _FREE,
    errno.EFBIG: "raise the limit on a file's size (ulimit -f) and start again",
    errno.EROFS: "make it writable and start again",
    errno.EACCES: "allow access to it and start again",
}


def shown(path: Path) -> str:
    """A path as messages show it: from the checkout where it lies inside."""
    path = path.resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def writable(name: str | Path) -> str:
    """A file's name or path, which need not be UTF-8, as text that can be written down."""
    return str(name).encode(errors="backslashreplace").decode()


@contextlib.contextmanager
def notebook_named(path: Path) -> Iterator[None]:
    """Names the notebook in whatever its readers raise, and what to do.

    Raises:
        ValueError: in place of it, one line.
    """
    try:
        yield
    except Exception as error:  # on what is no notebook nbformat has many
        reason = str(error).partition("\n")[0][:100]
        raise ValueError(f"{shown(path)}: no notebook ({reason}); restore it") from None


def inside(root: Path, folder: str, field: str) -> Path:
    """The path of a folder that a parameter names from `root`, or absolute anywhere.

    Raises:
        ValueError: a relative path leads out of `root`; names the field.
    """
    path = Path(os.path.normpath(root / folder))
    if not path.is_relative_to(root) and not Path(folder).is_absolute():
        raise ValueError(
            f"{field}: got {folder!r}, which leads out of {root.name}/; "
            "allowed are paths inside it and absolute ones"
        )
    return path


def plain_name(name: str, field: str) -> str:
    """Returns a name that becomes a file's or a folder's, refusing what would be another place.

    Raises:
        ValueError: it is empty, hidden or holds a separator; names the field.
    """
    if not name or name.startswith(".") or {"/", os.sep, "\0"} & set(name):
        raise ValueError(f"{field}: got {name!r}; allowed is a name without / and leading dot")
    return name


def with_remedy(error: Exception, path: Path | None = None) -> Exception:
    """The same error; one of the system's says which path and, where known, what to do."""
    if not isinstance(error, OSError):
        return error
    # By its text as well: several errors of a copied folder come as one, without a number.
    found = (r for n, r in _REMEDIES.items() if n == error.errno or os.strerror(n) in str(error))
    remedy = next(found, None)
    where = path or error.filename
    if not (remedy or where) or (remedy and remedy in str(error)):
        return error
    if error.errno is None:
        return OSError(f"{error}; {remedy}") if remedy else error
    said = f"{error.strerror}; {remedy}" if remedy else error.strerror
    return OSError(error.errno, said, str(where) if where else None)


def write_atomic(path: Path, content: bytes | memoryview) -> None:
    """Writes a file so that a reader sees the old content or the new, never a part.

    Temporary file in the same folder, fsync, rename; the folder is synced too, so that the
    rename itself survives a power cut.

    Args:
        path: where to; missing parent folders are made.
        content: all of it.

    Raises:
        OSError: as the system says (disk full, no permission), with the path and what to do;
            the temporary file is removed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):  # what happened before it is what counts
                temporary.unlink(missing_ok=True)
    except OSError as error:
        raise with_remedy(error, path) from None
    sync_folder(path.parent)


def beside(folder: Path, name: str) -> Path:
    """The hidden folder `.FOLDER.NAME` next to a folder, where its next or last content lies."""
    return folder.with_name(f".{folder.name}.{name}")


def replace_folder(new: Path, folder: Path) -> None:
    """Renames a folder to another's name; the old one is gone only when the new one is there.

    Args:
        new: on the same disk.
        folder: what it becomes; may be missing. Between the two renames the old one is
            `beside(folder, "old")`.
    """
    old = beside(folder, "old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
    os.replace(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Makes renames in a folder durable, where the system can (not on Windows)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON atomically: two spaces, a final newline, NaN refused."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomic(path, (text + "\n").encode())


def hash_files(paths: Iterable[Path]) -> str:
    """SHA-256 (64 hexadecimal digits) over the names and contents of files, in name order."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        content = path.read_bytes()
        digest.update(f"{path.name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()
