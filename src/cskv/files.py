"""Files and folders that are either whole or absent: write beside the target, flush to disk, rename."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError

from cskv.errors import CSKVError

Write = Callable[[Path], object]


def write_together(folder: str | Path, files: Mapping[str, Write]) -> None:
    """Write all files of a folder beside their targets, then put one after another in place, in their order.

    A full disk, a missing permission or an error of a writer is met before any target is touched.

    Args:
        folder: made if absent.
        files: name -> what writes it, given the path of a file that does not exist.

    Raises:
        CSKVError: the folder cannot be made or written.
    """
    folder = Path(folder)
    with writing_to(folder / next(iter(files)) if len(files) == 1 else folder), contextlib.ExitStack() as leftovers:
        folder.mkdir(parents=True, exist_ok=True)
        written = {}
        for name, write in files.items():
            temporary = folder / f".{name}.{secrets.token_hex(4)}"
            leftovers.callback(temporary.unlink, missing_ok=True)
            write(temporary)
            _flush(temporary)
            written[temporary] = folder / name
        for temporary, path in written.items():
            os.replace(temporary, path)


def write_atomically(path: str | Path, write: Write) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in place in one step.

    Raises:
        CSKVError: the folder cannot be created or written.
    """
    path = Path(path)
    write_together(path.parent, {path.name: write})


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    write_atomically(path, text_writer(text))


def text_writer(text: str) -> Write:
    """Return what writes `text` as UTF-8, for `write_together`."""
    return lambda file: file.write_text(text, encoding="utf-8")


def tensors_writer(tensors: Mapping[str, object], metadata: Mapping[str, str] | None = None) -> Write:
    """Return what writes a safetensors file of CPU copies of `tensors`, for `write_together`."""
    from safetensors.torch import save_file

    copies = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}  # type: ignore[attr-defined]
    return lambda file: save_file(copies, file, metadata=dict(metadata or {}))


def write_folder(path: str | Path, fill: Write, *, replace: bool = False) -> None:
    """Let `fill` write into an empty folder beside `path`, then put that in place in one step.

    Args:
        path: absent or an empty folder, or with `replace` any folder: it is deleted at the end, if all went well.
        fill: writes the files, given the folder.
        replace: whether there may be files already.

    Raises:
        CSKVError: the folder cannot be written, or is not empty.
    """
    path = Path(path).resolve()  # a rename would replace a link, not the folder that it leads to
    with writing_to(path), contextlib.ExitStack() as leftovers:
        path.parent.mkdir(parents=True, exist_ok=True)
        room = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        leftovers.callback(shutil.rmtree, room, ignore_errors=True)
        new = room / "new"
        new.mkdir()
        fill(new)
        for file in (*new.rglob("*"), new):
            _flush(file)
        _swap(new, path, room / "old" if replace else None)
        _flush(path.parent)


def _swap(new: Path, path: Path, old: Path | None) -> None:
    """Put a folder in place. What was there is exchanged for it in one step.

    Where the system cannot do that it goes to `old` first, and comes back if the second step fails; killed in between,
    it is still there.
    """
    if old is None or not path.exists():
        os.rename(new, path)
    elif not _exchanged(new, path):
        try:
            os.rename(path, old)
            os.rename(new, path)
        except BaseException:
            if old.exists() and not path.exists():
                os.rename(old, path)
            raise


def _exchanged(new: Path, path: Path) -> bool:
    """Swap two folders by Linux's renameat2; False where the system or the file system has none."""
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    return renameat2(here, os.fsencode(new), here, os.fsencode(path), exchange) == 0


def _flush(path: Path) -> None:
    """Make a file, or the names in a folder, last through a power cut; folders only where the system can do that."""
    with contextlib.suppress(*([OSError] if path.is_dir() else [])):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """Turn what the system and safetensors raise, each in its own way, into one line: the reason, and what to do.

    Raises:
        CSKVError: the block failed to write.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        full = re.search("space|quota", reason, re.IGNORECASE)
        advice = "free some space there, or choose another folder" if full else "choose a writable folder"
        raise CSKVError(f"cannot write {path}: {reason}; {advice}") from error
