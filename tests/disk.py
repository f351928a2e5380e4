"""A disk that is full for files of one name, as the system and safetensors would say it."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from safetensors import SafetensorError


def disk_full(patch: pytest.MonkeyPatch, name: str) -> None:
    """Half of each file of that name, hidden or not, can be written."""
    write_text, save_file = Path.write_text, safetensors.torch.save_file

    def writing(path: Path, text: str, *args: Any, **kwargs: Any) -> int:
        if name not in path.name:
            return write_text(path, text, *args, **kwargs)
        write_text(path, text[: len(text) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    def saving(tensors: Any, file: Path, *args: Any, **kwargs: Any) -> None:
        save_file(tensors, file, *args, **kwargs)
        if name in file.name:
            os.truncate(file, 20)
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    patch.setattr(Path, "write_text", writing)
    patch.setattr(safetensors.torch, "save_file", saving)
