"""Files that are either whole or absent: write beside the target, flush to disk, rename."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from cskv.errors import CSKVError


def write_atomically(path: str | Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in place in one step.

    Raises:
        CSKVError: the folder cannot be created or written.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        write(Path(temporary))
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except OSError as error:
        raise CSKVError(f"cannot write {path}: {error.strerror or error}; choose a writable folder") from error
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    write_atomically(path, lambda file: _fill(file, text))


def write_tensors(path: str | Path, tensors: Mapping[str, object], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file of CPU copies of `tensors`, atomically."""
    from safetensors.torch import save_file

    copies = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}  # type: ignore[attr-defined]
    write_atomically(path, lambda file: save_file(copies, file, metadata=dict(metadata or {})))


def _fill(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")
