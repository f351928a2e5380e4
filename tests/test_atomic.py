from __future__ import annotations

import os
import stat

import pytest
import torch
from safetensors.torch import load_file

from cskv import CSKVError
from cskv.atomic import write_atomically, write_tensors, write_text


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
    write_tensors(tmp_path / "t.safetensors", {"x": tensor}, {"made": "by hand"})
    assert torch.equal(load_file(tmp_path / "t.safetensors")["x"], tensor)


def test_a_folder_that_cannot_be_made_is_one_clear_line(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CSKVError, match=r"cannot write .*choose a writable folder"):
        write_text(tmp_path / "file" / "x.txt", "")
