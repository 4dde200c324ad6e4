"""A training state is whole or the one before it is used."""

import logging

import pytest
import torch

from cifar_lib.checkpoint import (
    load_checkpoint,
    remove_checkpoints,
    save_checkpoint,
    set_aside,
    take_back,
)


def state(epoch: int) -> dict:
    return {"epoch": epoch, "history": [{"loss": 0.1}], "model": {"w": torch.arange(1000.0)}}


def test_what_is_saved_is_loaded(tmp_path):
    save_checkpoint(tmp_path, state(1))
    loaded = load_checkpoint(tmp_path)
    assert loaded["epoch"] == 1 and loaded["history"] == [{"loss": 0.1}]
    assert torch.equal(loaded["model"]["w"], torch.arange(1000.0))


def test_the_state_before_is_kept(tmp_path):
    for epoch in (1, 2, 3):
        save_checkpoint(tmp_path, state(epoch))
    assert load_checkpoint(tmp_path)["epoch"] == 3
    (tmp_path / "last.pt").unlink()
    assert load_checkpoint(tmp_path)["epoch"] == 2
    assert {path.name for path in tmp_path.iterdir()} == {"previous.pt"}


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_a_damaged_state_is_named_and_the_one_before_it_used(tmp_path, caplog, damage):
    save_checkpoint(tmp_path, state(1))
    save_checkpoint(tmp_path, state(2))
    content = bytearray((tmp_path / "last.pt").read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    (tmp_path / "last.pt").write_bytes(
        {"cut": content[:-100], "flip": content, "empty": b""}[damage]
    )
    with caplog.at_level(logging.WARNING):
        assert load_checkpoint(tmp_path)["epoch"] == 1
    assert "last.pt" in caplog.text and "checksum" in caplog.text
    save_checkpoint(tmp_path, state(3))
    (tmp_path / "last.pt").write_bytes(b"")
    assert load_checkpoint(tmp_path)["epoch"] == 1  # not lost to the torn one at the next save


def test_where_every_state_is_torn_the_last_warning_says_what_follows(tmp_path, caplog):
    save_checkpoint(tmp_path, state(1))
    save_checkpoint(tmp_path, state(2))
    for name in ("last.pt", "previous.pt"):
        (tmp_path / name).write_bytes(b"")
    assert load_checkpoint(tmp_path) is None
    first, second = [record.getMessage() for record in caplog.records]
    assert first.endswith("using the state before it") and second.endswith("starting again")


def test_what_is_set_aside_is_the_state_that_was_read(tmp_path):
    for epoch in (1, 2):
        save_checkpoint(tmp_path, {"epoch": epoch})
    (tmp_path / "last.pt").write_bytes(b"torn")
    (tmp_path / "best.safetensors").write_bytes(b"weights")
    kept = set_aside(tmp_path, "a key")
    assert [path.name for path in tmp_path.iterdir()] == [kept.name]
    assert not take_back(tmp_path, "another key")
    assert take_back(tmp_path, "a key") and not kept.exists()
    assert load_checkpoint(tmp_path) == {"epoch": 1}
    assert (tmp_path / "best.safetensors").read_bytes() == b"weights"


def test_nothing_to_load_is_none(tmp_path):
    assert load_checkpoint(tmp_path) is None
    save_checkpoint(tmp_path, state(1))
    remove_checkpoints(tmp_path)
    assert load_checkpoint(tmp_path) is None


def test_a_write_that_fails_leaves_the_last_state(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, state(1))

    def full(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cifar_lib.files.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(tmp_path, state(2))
    monkeypatch.undo()
    assert load_checkpoint(tmp_path)["epoch"] == 1
    assert {path.name for path in tmp_path.iterdir()} == {"last.pt"}
