"""Files are written whole or not at all, and a damaged one is one clear error."""

from __future__ import annotations

import errno
import os
import stat

import pytest
import torch

from stitchvm.core import ArtefactError, OutputError
from stitchvm.core.files import (
    make_folder,
    read_json,
    read_metadata,
    read_tensors,
    write_atomically,
    write_json,
    write_tensors,
    write_text,
)


def full_disk(path):
    path.write_text("half of")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "result.json"
    write_text(target, "old")
    with pytest.raises(OutputError, match=r"cannot write .*result\.json.*No space left on device.*free some space"):
        write_atomically(target, full_disk)
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_any_failure_leaves_the_old_file(tmp_path):
    target = tmp_path / "result.json"
    write_text(target, "old")

    def broken(path):
        path.write_text("half")
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        write_atomically(target, broken)
    assert target.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_nan_is_not_json(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert not list(tmp_path.iterdir())


def test_a_full_disk_while_writing_tensors_leaves_the_old_ones(tmp_path, monkeypatch):
    import safetensors.torch

    target = tmp_path / "a.safetensors"
    write_tensors(target, {"x": torch.ones(3)})

    def fails(tensors, filename, metadata=None):
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", fails)
    with pytest.raises(OutputError, match="No space left on device"):
        write_tensors(target, {"x": torch.zeros(3)})
    assert torch.equal(read_tensors(target)["x"], torch.ones(3))


def test_an_output_folder_in_the_place_of_a_file_is_refused(tmp_path):
    (tmp_path / "taken").write_text("a file")
    for place in ("taken", "taken/below"):
        with pytest.raises(OutputError, match="taken"):
            make_folder(tmp_path / place)


def test_a_read_only_output_is_refused(tmp_path, monkeypatch):
    """Root may write anywhere, so the refusal itself is played; that a real one arrives is checked for other users."""
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    if os.access(folder, os.W_OK):
        monkeypatch.setattr("pathlib.Path.touch", refuse)
    with pytest.raises(OutputError, match=r"locked.*another output folder"):
        make_folder(folder)
    folder.chmod(stat.S_IRWXU)


def refuse(path, *_args, **_kwargs):
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def test_tensors_and_metadata_come_back(tmp_path):
    shared = torch.arange(6.0).reshape(2, 3)
    write_tensors(tmp_path / "a.safetensors", {"x": shared.T, "y": shared}, {"step": "3"})
    found = read_tensors(tmp_path / "a.safetensors")
    assert torch.equal(found["x"], shared.T) and torch.equal(found["y"], shared)
    assert read_metadata(tmp_path / "a.safetensors") == {"step": "3"}


def test_tensors_may_be_read_by_whom_other_files_may(tmp_path):
    """A value model in a shared folder: its weights like its config."""
    write_text(tmp_path / "config.json", "{}")
    write_tensors(tmp_path / "model.safetensors", {"a": torch.zeros(3)})
    config, weights = ((tmp_path / name).stat().st_mode for name in ("config.json", "model.safetensors"))
    assert weights == config


@pytest.mark.parametrize("keep", [0, 4, 20, -4])
def test_truncated_tensors_are_one_clear_error(tmp_path, keep):
    target = tmp_path / "a.safetensors"
    write_tensors(target, {"x": torch.ones(100)})
    target.write_bytes(target.read_bytes()[:keep])
    for read in (read_tensors, read_metadata):
        with pytest.raises(ArtefactError, match=r"a\.safetensors.*truncated"):
            read(target)


@pytest.mark.parametrize("text", ['{"a": 1', "", "[1, 2]", "\x80"])
def test_damaged_json_is_one_clear_error(tmp_path, text):
    (tmp_path / "a.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ArtefactError, match=r"a\.json"):
        read_json(tmp_path / "a.json")


def test_missing_files_are_named(tmp_path):
    for read in (read_json, read_tensors, read_metadata):
        with pytest.raises(ArtefactError, match="missing' does not exist"):
            read(tmp_path / "missing")
