"""Files and folders that are either whole or absent: write beside the target, flush to disk, rename."""

from __future__ import annotations

import os
import shutil
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


def write_folder(path: str | Path, fill: Callable[[Path], None], *, replace: bool = False) -> None:
    """Let `fill` write into an empty folder beside `path`, then put that in place in one step.

    Args:
        path: absent or an empty folder, or with `replace` any folder: it is deleted at the end, if all went well.
        fill: writes the files, given the folder.
        replace: whether there may be files already.

    Raises:
        CSKVError: the folder cannot be written, or is not empty.
    """
    path = Path(path).resolve()  # a rename would replace a link, not the folder that it leads to
    room = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        room = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        new = room / "new"
        new.mkdir()
        fill(new)
        for file in new.rglob("*"):
            if file.is_file():
                with open(file, "rb") as written:
                    os.fsync(written.fileno())
        _swap(new, path, room / "old" if replace else None)
    except OSError as error:
        raise CSKVError(f"cannot write {path}: {error}; choose a writable folder") from error
    finally:
        if room is not None:
            shutil.rmtree(room, ignore_errors=True)


def _swap(new: Path, path: Path, old: Path | None) -> None:
    """Put a folder in place; what was there goes to `old` and comes back if that fails."""
    try:
        if old is not None and path.exists():
            os.rename(path, old)
        os.rename(new, path)
    except BaseException:
        if old is not None and old.exists() and not path.exists():
            os.rename(old, path)
        raise


def _fill(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")
