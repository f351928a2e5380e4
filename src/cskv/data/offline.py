"""A text corpus that every CPython carries: the language reference topics and the standard library's sources.

It needs no network. One document is one topic or one source file; a hash of the document's name decides whether it is
for training or held out, so that the split is the same everywhere. Topics quote one another, therefore none of them is
held out: the held-out part consists of library sources only.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

Split = Literal["train", "heldout"]

HELDOUT_ONE_IN = 20
SKIPPED_FOLDERS = {
    *("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_bundled"),
    *("encodings", "pydoc_data"),  # generated character tables, and the topics, which are read as topics
}


def documents(split: Split) -> Iterator[tuple[str, str]]:
    """Yield the (name, text) documents of one split, in a fixed order."""
    if split not in ("train", "heldout"):
        raise ValueError(f"split must be 'train' or 'heldout', got {split!r}")
    if split == "train":
        from pydoc_data.topics import topics

        yield from ((f"topics/{name}", topics[name]) for name in sorted(topics))
    paths = {f"stdlib/{path.relative_to(root()).as_posix()}": path for path in root().rglob("*.py")}
    for name in sorted(paths):
        parts = Path(name).parts[1:]
        skipped = not SKIPPED_FOLDERS.isdisjoint(parts) or parts[0].startswith("_sysconfigdata")
        if not skipped and _split_of(name) == split and (text := _read_utf8(paths[name])):
            yield name, text


def root() -> Path:
    """Return the folder of the standard library's sources."""
    return Path(sysconfig.get_path("stdlib"))


def _split_of(name: str) -> Split:
    digest = hashlib.sha256(name.encode("utf-8")).digest()
    return "heldout" if int.from_bytes(digest[:8], "big") % HELDOUT_ONE_IN == 0 else "train"


def _read_utf8(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return None
