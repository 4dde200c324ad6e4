"""The allocator's settings reach a training, and nothing breaks where there are none to make."""

import json
import os
import subprocess
import sys

import pytest

from cifar_lib import launch


@pytest.fixture
def glibc(monkeypatch):
    monkeypatch.setattr(launch.platform, "libc_ver", lambda: ("glibc", "2.36"))


def test_settings_are_made_for_glibc_alone(glibc, monkeypatch):
    assert launch.allocator_settings({}) == launch.GLIBC
    monkeypatch.setattr(launch.platform, "libc_ver", lambda: ("", ""))
    assert launch.allocator_settings({}) == {}


@pytest.mark.parametrize("name", ["LD_PRELOAD", "MALLOC_ARENA_MAX", "MALLOC_TOP_PAD_"])
def test_what_a_user_chose_is_left_to_him(glibc, name):
    assert launch.allocator_settings({name: "x"}) == {}


@pytest.mark.skipif(launch.platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_a_command_starts_again_with_them_and_only_once(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\nif 'cifar_lib' in sys.orig_argv:\n"
        "    print(os.getpid(), os.environ.get('MALLOC_TOP_PAD_'), file=sys.stderr)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD" and "MALLOC" not in k}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-W", "error::SyntaxWarning", "-m", "cifar_lib", "train", "--help"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "Usage" in done.stdout
    first, second = (line.split() for line in done.stderr.splitlines())
    assert first[0] == second[0]  # the same process
    assert (first[1], second[1]) == ("None", launch.GLIBC["MALLOC_TOP_PAD_"])


def test_torch_is_not_loaded_before_a_command_starts_again():
    """Loading it takes seconds: the first start would do it for nothing."""
    program = "import sys, cifar_lib.__main__; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "typer" in done.stdout.split() and "torch" not in done.stdout.split()


@pytest.mark.skipif(launch.platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_a_large_block_is_kept_for_the_next_step():
    program = (
        "import resource, torch\n"
        "for _ in range(12):\n"  # glibc places the first ones side by side
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    torch.ones(16 * 2**20)\n"  # 64 MiB
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"
    )
    clean = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD" and "MALLOC" not in k}
    settings = launch.allocator_settings(clean)
    done = subprocess.run(
        [sys.executable, "-c", program], env=clean | settings, stdout=subprocess.PIPE, check=True
    )
    assert int(done.stdout) < 1000  # page faults; 16,384 where the block is new


def test_the_kernel_gets_them(glibc, tmp_path):
    path = tmp_path / "share/jupyter/kernels/python3/kernel.json"
    with pytest.raises(ValueError, match="install ipykernel"):
        launch.write_kernel_specification(tmp_path)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"argv": ["python"], "env": {"A": "1"}}))
    for _ in range(2):
        assert launch.write_kernel_specification(tmp_path) == path
        written = json.loads(path.read_text())
        assert written == {"argv": ["python"], "env": {"A": "1", **launch.GLIBC}}


def test_a_full_disk_leaves_the_kernel_as_it_was(glibc, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "share/jupyter/kernels/python3/kernel.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"argv": []}')
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        launch.write_kernel_specification(tmp_path)
    assert path.read_text() == '{"argv": []}' and len(list(path.parent.iterdir())) == 1
