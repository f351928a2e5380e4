from __future__ import annotations

import errno
import os
import stat
import sys

import pytest
import torch
from safetensors.torch import load_file

from cskv import CSKVError
from cskv.files import tensors_writer, text_writer, write_atomically, write_folder, write_text, write_together
from tests.disk import disk_full


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old")

    def fail(file) -> None:
        file.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_folders_are_made_and_the_file_is_readable_by_others(tmp_path) -> None:
    path = tmp_path / "a" / "b.txt"
    write_text(path, "ä")
    assert path.read_bytes() == "ä".encode()
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_tensors_are_written_whatever_their_layout(tmp_path) -> None:
    tensor = torch.arange(6.0).reshape(2, 3).T
    write_atomically(tmp_path / "t.safetensors", tensors_writer({"x": tensor}, {"made": "by hand"}))
    assert torch.equal(load_file(tmp_path / "t.safetensors")["x"], tensor)


def test_a_folder_that_cannot_be_made_is_one_clear_line(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CSKVError, match=r"cannot write .*choose a writable folder"):
        write_text(tmp_path / "file" / "x.txt", "")


def test_a_folder_is_whole_or_absent(tmp_path) -> None:
    def fill(folder) -> None:
        (folder / "below").mkdir()
        (folder / "below" / "file").write_text("new")

    def fail(folder) -> None:
        fill(folder)
        raise KeyboardInterrupt

    path = tmp_path / "a" / "folder"
    with pytest.raises(KeyboardInterrupt):
        write_folder(path, fail)
    assert os.listdir(tmp_path / "a") == []
    write_folder(path, fill)
    assert (path / "below" / "file").read_text() == "new"
    assert os.listdir(tmp_path / "a") == ["folder"]


def test_a_folder_is_replaced_only_when_asked_and_comes_back_when_that_fails(tmp_path, monkeypatch) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").write_text("")
    with pytest.raises(CSKVError, match="cannot write .*choose a writable folder"):
        write_folder(path, lambda folder: (folder / "new").touch())
    assert os.listdir(path) == ["old"]

    real = os.rename

    def rename(source, target) -> None:
        if os.path.basename(source) == "new":
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        patch.setattr("cskv.files._exchanged", lambda *_: False)
        with pytest.raises(KeyboardInterrupt):
            write_folder(path, lambda folder: (folder / "new").touch(), replace=True)
    assert os.listdir(path) == ["old"]
    write_folder(path, lambda folder: (folder / "new").touch(), replace=True)
    assert os.listdir(path) == ["new"]
    assert os.listdir(tmp_path) == ["folder"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems take two steps")
def test_a_folder_is_replaced_in_one_step(tmp_path, monkeypatch) -> None:
    """Or a kill between two steps would leave none."""
    path = tmp_path / "folder"
    write_folder(path, lambda folder: (folder / "old").touch())
    monkeypatch.setattr(os, "rename", None)
    write_folder(path, lambda folder: (folder / "new").touch(), replace=True)
    assert os.listdir(path) == ["new"]
    assert os.listdir(tmp_path) == ["folder"]


def test_files_that_belong_together_are_written_before_any_is_replaced(tmp_path, monkeypatch) -> None:
    def files(text: str) -> dict:
        return {"b": text_writer(text), "a": text_writer(text)}

    folder = tmp_path / "folder"
    write_together(folder, files("old"))
    with monkeypatch.context() as patch:
        disk_full(patch, ".a.")
        with pytest.raises(CSKVError, match=f"cannot write {folder}: No space left on device; free some space there"):
            write_together(folder, files("new"))
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"a": "old", "b": "old"}
    write_together(folder, files("new"))
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"a": "new", "b": "new"}


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.EDQUOT, "free some space there, or choose another folder"),
        (errno.EROFS, "choose a writable folder"),
        (errno.EACCES, "choose a writable folder"),
    ],
)
def test_what_the_system_refuses_is_one_line_with_what_to_do(tmp_path, number: int, advice: str) -> None:
    def fail(_path) -> None:
        raise OSError(number, os.strerror(number))

    for write in (write_atomically, write_folder):
        with pytest.raises(CSKVError) as caught:
            write(tmp_path / "new", fail)
        assert str(caught.value) == f"cannot write {tmp_path / 'new'}: {os.strerror(number)}; {advice}"
        assert os.listdir(tmp_path) == []


def test_safetensors_says_in_its_own_way_that_the_disk_is_full(tmp_path, monkeypatch) -> None:
    disk_full(monkeypatch, "t.safetensors")
    with pytest.raises(CSKVError, match="No space left on device.*free some space there") as caught:
        write_atomically(tmp_path / "t.safetensors", tensors_writer({"x": torch.zeros(3)}))
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []
