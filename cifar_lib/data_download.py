"""Where CIFAR-10 is looked for, and its download: resumable, MD5-checked, bounded in time.

It is looked for in `data_dir` if given, else in the folders of `$CIFAR10_DIR`, then downloaded
into the first of them; relative paths count from the checkout. A `data_dir` that holds nothing
is an error: a mistyped path must not fill up with a download.

`auto` takes digits only where CIFAR-10 can not be had, says so, and tries the network once a
process. `CIFAR10_DOWNLOAD=0` forbids every download: whoever starts processes sets it for them
after a try of its own. Where `CI` is set, `auto` does not download.
"""

import functools
import hashlib
import http.client
import os
import queue
import shutil
import sys
import tarfile
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from filelock import FileLock
from tqdm.auto import tqdm

from cifar_lib.config import ROOT
from cifar_lib.data_sources import DOWNLOAD_COMMAND, LAYOUTS, OFFICIAL_FOLDER, Source, find_source

# $CIFAR10_DIR when it is not set; the second is a copy that several checkouts share.
SEARCHED = ["data/cifar10", "../shared/data/cifar10"]
ARCHIVE = "cifar-10-python.tar.gz"
TIMEOUT_S = 10.0  # a host that does not answer, or falls silent, for so long is given up
PROBE_S = 5.0  # before this, a rate says little
AUTO_LIMIT_S = 300.0  # auto does not wait longer for a download


class DownloadError(ValueError):
    """CIFAR-10 could not be downloaded; the message says why, in one line."""


def find_or_download(data_dir: str | None, stand_in: bool) -> Source | None:
    """Finds CIFAR-10, and downloads it when it is nowhere.

    Args:
        data_dir: the one folder to look in; None is those of `$CIFAR10_DIR`, then the network.
        stand_in: where it can not be had, say so and return None (`auto`).

    Raises:
        ValueError: there only in part, or can not be had and `stand_in` is False.
    """
    listed = [name for name in os.environ.get("CIFAR10_DIR", "").split(os.pathsep) if name]
    names = [data_dir] if data_dir else listed or SEARCHED
    folders = [Path(os.path.normpath(ROOT / os.path.expanduser(name))) for name in names]
    for folder in folders:
        if source := find_source(folder):
            return source
        if (folder / ARCHIVE).is_file():  # laid there by hand: no network
            download_cifar10(folder)
            return find_source(folder)
    looked = f"CIFAR-10 was not found in {', '.join(map(str, folders))} (looked for {LAYOUTS})"
    if data_dir:
        raise ValueError(f"{looked}; correct data_dir, or leave it out to download")
    in_ci = os.environ.get("CI", "").lower() not in ("", "0", "false")
    if os.environ.get("CIFAR10_DOWNLOAD") == "0" or (stand_in and in_ci):
        failure = "downloading is switched off (by CIFAR10_DOWNLOAD=0, or by CI for auto)"
    else:
        failure = (_download_once if stand_in else _download)(folders[0], stand_in)
    if not failure and (source := find_source(folders[0])):
        return source
    if not stand_in:
        raise ValueError(
            f"{looked}; {failure}; set CIFAR10_DIR to its folder or CIFAR10_MIRROR to another "
            f"address, or run `{DOWNLOAD_COMMAND}`"
        )
    say_once(
        f"dataset auto: {looked}; {failure}. Taking digits, a stand-in whose numbers say nothing "
        f"about CIFAR-10. This gets the data: {DOWNLOAD_COMMAND}"
    )
    return None


@functools.cache
def say_once(text: str) -> None:
    """Prints a line to stderr, the same line once a process."""
    print(text, file=sys.stderr, flush=True)


def _download(folder: Path, bounded: bool) -> str:
    try:
        download_cifar10(folder, AUTO_LIMIT_S if bounded else None)
    except DownloadError as error:
        return str(error)
    return ""


_download_once = functools.cache(_download)


def download_cifar10(folder: Path, limit_s: float | None = None) -> None:
    """Brings CIFAR-10's official batches into a folder, from its archive there or the network.

    What arrives lies in `<archive>.part` until its MD5 is right, then is unpacked and moved
    into place whole. An interrupted download goes on where it stopped. Processes that want
    the same folder wait for each other. `$CIFAR10_MIRROR` names another base address.

    Args:
        folder: made when missing; gets `cifar-10-batches-py`.
        limit_s: give up when the download would take longer, seconds; None is never.

    Raises:
        DownloadError: host not reachable, too slow, connection lost, wrong MD5, disk full.

    Source: address and MD5 are torchvision's (torchvision.datasets.CIFAR10).
    """
    from torchvision.datasets import CIFAR10  # slow to import, and rarely needed

    mirror = os.environ.get("CIFAR10_MIRROR")
    url = f"{mirror.rstrip('/')}/{ARCHIVE}" if mirror else CIFAR10.url
    if not url.startswith(("http://", "https://")):
        raise DownloadError(f"CIFAR10_MIRROR {mirror!r} must be an http:// or https:// address")
    archive, part = folder / ARCHIVE, folder / f"{ARCHIVE}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".download.lock", timeout=-1 if limit_s is None else limit_s):
            if (folder / OFFICIAL_FOLDER).exists():
                return  # another process was quicker
            if archive.is_file():
                return _unpack(archive, CIFAR10.tgz_md5)
            print(f"downloading {url} into {folder}", file=sys.stderr, flush=True)
            fetch(url, part, limit_s)
            try:
                _unpack(part, CIFAR10.tgz_md5)
            except DownloadError:
                part.unlink()  # wrong bytes must not be gone on from
                raise
            part.unlink()
    except DownloadError:
        raise
    # ValueError: an address or a header that is none.
    except (OSError, ValueError, http.client.HTTPException, tarfile.TarError) as error:
        origin = archive if archive.is_file() else url
        raise DownloadError(f"{origin} into {folder}: {' '.join(str(error).split())}") from None


def fetch(url: str, part: Path, limit_s: float | None) -> None:
    """Downloads a file, going on from what `part` already holds.

    Args:
        url: https address.
        part: where to; its folder is there.
        limit_s: as `download_cifar10` takes it.

    Raises:
        DownloadError: too slow, or the connection was lost.
        OSError: the host does not answer, or the disk is full.
    """
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})  # noqa: S310
    try:
        response = _open(request)
    except urllib.error.HTTPError as error:
        error.close()
        if have and error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return  # nothing is left to come; the MD5 tells whether it is good
        raise
    with response:
        if response.status != http.HTTPStatus.PARTIAL_CONTENT:
            have = 0  # a server without ranges sends all of it again
        length = response.headers["Content-Length"]
        left = int(length) if length else 0
        bar = tqdm(total=have + left or None, initial=have, unit="B", unit_scale=True, disable=None)
        with bar, open(part, "ab" if have else "wb") as file:
            start, received = time.monotonic(), 0
            while piece := response.read1(1 << 20):  # read() would wait for all of it
                file.write(piece)
                bar.update(len(piece))
                received += len(piece)
                left -= len(piece)
                elapsed_s = time.monotonic() - start
                expected_s = elapsed_s + max(left, 0) * elapsed_s / received
                if limit_s is not None and elapsed_s > PROBE_S and expected_s > limit_s:
                    raise DownloadError(
                        f"the download would take {expected_s / 60:.0f} minutes at "
                        f"{received / elapsed_s / 1e6:.2g} MB/s, over {limit_s / 60:.2g}"
                    )
    if left > 0:
        raise DownloadError(f"{url}: the connection was lost with {left:,} bytes still to come")


def _open(request: urllib.request.Request) -> Any:
    # Looking up a name knows no timeout, and a host may have several addresses, each with its
    # own: only a thread that is left behind keeps the bound.
    answers: queue.Queue[Any] = queue.Queue()

    def attempt() -> None:
        try:
            answers.put(urllib.request.urlopen(request, timeout=TIMEOUT_S))  # noqa: S310
        except Exception as error:
            answers.put(error)

    threading.Thread(target=attempt, daemon=True).start()
    try:
        answer = answers.get(timeout=TIMEOUT_S)
    except queue.Empty:
        raise TimeoutError(f"no answer within {TIMEOUT_S:g} s") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _unpack(archive: Path, md5: str) -> None:
    with open(archive, "rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if found != md5:
        raise DownloadError(
            f"{archive}: incomplete or damaged, its MD5 is {found} instead of {md5}; "
            f"delete it if it is still there and run `{DOWNLOAD_COMMAND}`"
        )
    for killed in archive.parent.glob(".unpack-*"):  # nobody else unpacks: the caller has the lock
        shutil.rmtree(killed, ignore_errors=True)
    # Unpacked aside and moved whole: an interrupted unpacking leaves nothing to be found.
    with tempfile.TemporaryDirectory(dir=archive.parent, prefix=".unpack-") as scratch:
        with tarfile.open(archive) as tar:
            # Python before 3.11.4 has no filters; what is unpacked was just seen to be whole.
            tar.extraction_filter = getattr(tarfile, "data_filter", lambda member, path: member)
            tar.extractall(scratch)  # noqa: S202
        os.replace(Path(scratch) / OFFICIAL_FOLDER, archive.parent / OFFICIAL_FOLDER)
