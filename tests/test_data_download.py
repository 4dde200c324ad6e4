"""Finding CIFAR-10, and its download from servers that fail in every way."""

import hashlib
import itertools
import os
import re
import socket
import tarfile
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_data_sources import write_official, write_parquet
from torchvision.datasets import CIFAR10

from cifar_lib import data_download
from cifar_lib.data_download import ARCHIVE, DownloadError, download_cifar10, find_or_download
from cifar_lib.data_sources import find_source

Answer = Callable[[BaseHTTPRequestHandler], None]


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CI", "CIFAR10_DIR", "CIFAR10_DOWNLOAD", "CIFAR10_MIRROR", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    data_download.say_once.cache_clear()
    data_download._download_once.cache_clear()


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A small official archive whose MD5 is put in the place of the true one."""
    return pack(write_official(tmp_path / "original", monkeypatch), monkeypatch)


def pack(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str | None = None) -> bytes:
    path = folder / "packed.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        tar.add(folder / "cifar-10-batches-py", name or "cifar-10-batches-py")
    content = path.read_bytes()
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5)
    return content


class Server(ThreadingHTTPServer):
    """Answers every request by `answer`; `ranges` records what was asked for."""

    daemon_threads = True
    answer: Answer
    ranges: list[str | None]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # noqa: N802
            server.ranges.append(self.headers["Range"])
            server.answer(self)

        def log_message(self, *_: object) -> None:
            pass

    server = Server(("127.0.0.1", 0), Handler)
    server.ranges = []
    monkeypatch.setenv("CIFAR10_MIRROR", f"http://127.0.0.1:{server.server_port}/mirror/")
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def send(
    handler: BaseHTTPRequestHandler, content: bytes, length: int | None = None, status: int = 200
) -> None:
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(content) if length is None else length))
    handler.end_headers()
    handler.wfile.write(content)


def whole(content: bytes) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        assert handler.path == f"/mirror/{ARCHIVE}"
        send(handler, content)

    return answer


def trickle(content: bytes, length: int) -> Answer:
    """Sends the beginning, then nothing for as long as the other side listens."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        send(handler, content, length)
        handler.connection.recv(1)

    return answer


def left_behind(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {".download.lock"}


def test_download(server: Server, archive: bytes, tmp_path: Path) -> None:
    server.answer = whole(archive)
    download_cifar10(tmp_path / "new" / "folder")
    assert find_source(tmp_path / "new" / "folder") is not None
    assert left_behind(tmp_path / "new" / "folder") == {"cifar-10-batches-py"}
    download_cifar10(tmp_path / "new" / "folder")  # is there: not asked for again
    assert server.ranges == [None]


def test_lost_connection_goes_on_where_it_stopped(
    server: Server, archive: bytes, tmp_path: Path
) -> None:
    server.answer = lambda handler: send(handler, archive[:1000], len(archive))
    with pytest.raises(DownloadError, match=f"lost with {len(archive) - 1000:,} bytes"):
        download_cifar10(tmp_path / "data")
    assert find_source(tmp_path / "data") is None
    assert left_behind(tmp_path / "data") == {f"{ARCHIVE}.part"}
    server.answer = lambda handler: send(handler, archive[1000:], status=206)
    download_cifar10(tmp_path / "data")
    assert server.ranges == [None, "bytes=1000-"]
    assert left_behind(tmp_path / "data") == {"cifar-10-batches-py"}


def test_a_server_without_ranges_sends_all_of_it_again(
    server: Server, archive: bytes, tmp_path: Path
) -> None:
    (tmp_path / f"{ARCHIVE}.part").write_bytes(b"an older beginning")
    server.answer = whole(archive)
    download_cifar10(tmp_path)
    assert find_source(tmp_path) is not None


def test_a_part_that_is_already_whole(server: Server, archive: bytes, tmp_path: Path) -> None:
    (tmp_path / f"{ARCHIVE}.part").write_bytes(archive)
    server.answer = lambda handler: send(handler, b"", status=416)
    download_cifar10(tmp_path)
    assert find_source(tmp_path) is not None


def test_wrong_md5_is_removed(server: Server, archive: bytes, tmp_path: Path) -> None:
    server.answer = whole(archive[:-1] + b"?")
    with pytest.raises(DownloadError, match="damaged, its MD5 is .* instead of") as error:
        download_cifar10(tmp_path / "data")
    assert "\n" not in str(error.value)
    assert left_behind(tmp_path / "data") == set()


def test_http_error(server: Server, archive: bytes, tmp_path: Path) -> None:
    server.answer = lambda handler: send(handler, b"", status=404)
    with pytest.raises(DownloadError, match="HTTP Error 404"):
        download_cifar10(tmp_path)


def test_a_silent_server_is_given_up(
    server: Server, archive: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_download, "TIMEOUT_S", 0.2)
    server.answer = trickle(archive[:100], len(archive))
    with pytest.raises(DownloadError, match="timed out"):
        download_cifar10(tmp_path)


def test_a_host_that_never_answers_is_given_up(
    archive: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_download, "TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as never_accepts:
        port = never_accepts.getsockname()[1]
        monkeypatch.setenv("CIFAR10_MIRROR", f"http://127.0.0.1:{port}")
        with pytest.raises(DownloadError, match="no answer within 0.2 s|timed out"):
            download_cifar10(tmp_path)


def test_a_name_that_is_looked_up_for_ever_is_given_up(
    archive: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = threading.Event()
    monkeypatch.setattr(data_download, "TIMEOUT_S", 0.2)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: done.wait(30))
    try:
        with pytest.raises(DownloadError, match="no answer within 0.2 s"):
            download_cifar10(tmp_path)
    finally:
        done.set()


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.mark.parametrize("stand_in", [True, False])
def test_auto_gives_up_a_slow_download(
    server: Server,
    archive: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stand_in: bool,
) -> None:
    clock = itertools.count(0, 10)  # each look is ten seconds after the one before
    monkeypatch.setattr(data_download, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setenv("CIFAR10_DIR", str(tmp_path))
    monkeypatch.setattr(data_download, "TIMEOUT_S", 0.2)
    server.answer = trickle(archive[:100], 10**6)
    if stand_in:  # judged by what has come, not when a whole piece has
        assert find_or_download(None, stand_in) is None
        says = "would take [0-9]+ minutes at .* MB/s, over 5. Taking digits.*cifar_lib data"
        assert re.search(says, capsys.readouterr().err)
    else:
        with pytest.raises(ValueError, match="timed out"):
            find_or_download(None, stand_in)
    assert (tmp_path / f"{ARCHIVE}.part").stat().st_size == 100  # to go on from


@pytest.mark.parametrize("mirror", ["ftp://host", "file:///etc", "/data"])
def test_other_addresses_are_refused(
    mirror: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CIFAR10_MIRROR", mirror)
    with pytest.raises(DownloadError, match=f"CIFAR10_MIRROR '{mirror}' must be an http"):
        download_cifar10(tmp_path)


@pytest.mark.parametrize("address", ["http://[bad", "http://127.0.0.1:1/ü", "http://a..b"])
def test_auto_does_without_an_address_that_is_none(
    address: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("CIFAR10_MIRROR", address)
    monkeypatch.setenv("CIFAR10_DIR", str(tmp_path))
    assert find_or_download(None, stand_in=True) is None
    assert f"{address}/{ARCHIVE} into {tmp_path}: " in capsys.readouterr().err


def test_auto_does_without_a_server_whose_length_is_no_number(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "abc")
        handler.end_headers()

    server.answer = answer
    monkeypatch.setenv("CIFAR10_DIR", str(tmp_path))
    assert find_or_download(None, stand_in=True) is None


def test_folders_are_searched_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    monkeypatch.setenv("CIFAR10_DIR", f"{first}{os.pathsep}{second}")
    write_parquet(second, {"train": [], "test": []})
    found = find_or_download(None, stand_in=False)
    assert found is not None and found.folder == second
    write_parquet(first, {"train": [], "test": []})
    found = find_or_download(None, stand_in=True)
    assert found is not None and found.folder == first
    found = find_or_download(str(second), stand_in=True)
    assert found is not None and found.folder == second


def test_relative_folders_count_from_the_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_download, "ROOT", tmp_path / "checkout")
    write_parquet(tmp_path / "shared" / "data" / "cifar10", {"train": [], "test": []})
    found = find_or_download(None, stand_in=False)
    assert found is not None and found.folder == tmp_path / "shared" / "data" / "cifar10"
    write_parquet(tmp_path / "checkout" / "mine", {"train": [], "test": []})
    found = find_or_download("mine", stand_in=False)
    assert found is not None and found.folder == tmp_path / "checkout" / "mine"


@pytest.mark.parametrize("stand_in", [True, False])
def test_an_empty_data_dir_is_an_error_not_a_download(
    server: Server, tmp_path: Path, stand_in: bool
) -> None:
    says = f"not found in {tmp_path} .looked for cifar-10-batches-py.*correct data_dir"
    with pytest.raises(ValueError, match=says) as error:
        find_or_download(str(tmp_path), stand_in)
    assert "\n" not in str(error.value) and server.ranges == []


def test_half_a_data_set_is_an_error_under_auto_too(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_parquet(tmp_path / "half", {"train": []})
    write_parquet(tmp_path / "whole", {"train": [], "test": []})
    monkeypatch.setenv("CIFAR10_DIR", f"{tmp_path / 'half'}{os.pathsep}{tmp_path / 'whole'}")
    with pytest.raises(ValueError, match="beside the other part"):
        find_or_download(None, stand_in=True)


@pytest.mark.parametrize("stand_in", [True, False])
def test_what_is_nowhere_is_downloaded_into_the_first_folder(
    server: Server, archive: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stand_in: bool
) -> None:
    server.answer = whole(archive)
    monkeypatch.setenv("CIFAR10_DIR", f"{tmp_path / 'a'}{os.pathsep}{tmp_path / 'b'}")
    found = find_or_download(None, stand_in)
    assert found is not None and found.folder == tmp_path / "a" / "cifar-10-batches-py"


@pytest.mark.parametrize("filters", [True, False])  # Python has them from 3.11.4 on
def test_an_archive_laid_there_by_hand_is_unpacked(
    server: Server,
    archive: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    filters: bool,
) -> None:
    if not filters:
        unpack = tarfile.TarFile.extractall
        monkeypatch.setattr(tarfile.TarFile, "extractall", lambda self, path: unpack(self, path))
        monkeypatch.delattr(tarfile, "data_filter")
    (tmp_path / ARCHIVE).write_bytes(archive[:-1])
    with pytest.raises(ValueError, match=f"{ARCHIVE}: incomplete or damaged.*delete it"):
        find_or_download(str(tmp_path), stand_in=True)
    (tmp_path / ARCHIVE).write_bytes(archive)
    (tmp_path / ".unpack-killed").mkdir()  # by an unpacking that was
    found = find_or_download(str(tmp_path), stand_in=False)
    assert found is not None and found.layout == "official"
    assert left_behind(tmp_path) == {"original", ARCHIVE, "cifar-10-batches-py"}
    assert server.ranges == []


def test_an_archive_that_cannot_be_unpacked_is_named_not_the_network(
    archive: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / ARCHIVE).write_bytes(archive)
    monkeypatch.setattr(tarfile.TarFile, "extractall", full)
    with pytest.raises(ValueError, match=f"^{tmp_path / ARCHIVE} into {tmp_path}: .*No space left"):
        find_or_download(str(tmp_path), stand_in=True)


def test_unreachable_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CIFAR10_MIRROR", f"http://127.0.0.1:{closed_port()}")
    monkeypatch.setenv("CIFAR10_DIR", str(tmp_path))
    with pytest.raises(ValueError, match="not found in .*refused.*CIFAR10_MIRROR.*--download"):
        find_or_download(None, stand_in=False)
    capsys.readouterr()
    for _ in range(3):
        assert find_or_download(None, stand_in=True) is None
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in lines] == ["downloading", "dataset"]  # once a process
    assert re.search("refused.*digits, a stand-in.*python -m cifar_lib data --download$", lines[1])


@pytest.mark.parametrize(("name", "value"), [("CIFAR10_DOWNLOAD", "0"), ("CI", "true")])
def test_switched_off(
    server: Server,
    archive: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    value: str,
) -> None:
    server.answer = whole(archive)
    monkeypatch.setenv("CIFAR10_DIR", str(tmp_path))
    monkeypatch.setenv(name, value)
    assert find_or_download(None, stand_in=True) is None
    assert server.ranges == []
    if name == "CI":  # what is asked for by name is fetched there too
        assert find_or_download(None, stand_in=False) is not None
    else:
        with pytest.raises(ValueError, match="switched off"):
            find_or_download(None, stand_in=False)
