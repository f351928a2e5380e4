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
Document = tuple[str, str]

HELDOUT_ONE_IN = 20
SKIPPED_FOLDERS = frozenset(
    {
        "test",
        "tests",
        "idle_test",
        "site-packages",
        "dist-packages",
        "__pycache__",
        "_bundled",
        "encodings",  # generated character tables
        "pydoc_data",  # the topics, which are read as topics
    }
)


def split_of(name: str) -> Split:
    """The split to which the document of this name belongs."""
    if name.startswith("topics/"):
        return "train"
    digest = hashlib.sha256(name.encode("utf-8")).digest()
    return "heldout" if int.from_bytes(digest[:8], "big") % HELDOUT_ONE_IN == 0 else "train"


def documents(split: Split) -> Iterator[Document]:
    """The (name, text) documents of one split, in a fixed order."""
    if split not in ("train", "heldout"):
        raise ValueError(f"split must be 'train' or 'heldout', got {split!r}")
    for name, text in _all_documents():
        if split_of(name) == split:
            yield name, text


def _all_documents() -> Iterator[Document]:
    yield from _topics()
    yield from _library_sources(Path(sysconfig.get_path("stdlib")))


def _topics() -> Iterator[Document]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield f"topics/{name}", topics[name]


def _library_sources(root: Path) -> Iterator[Document]:
    paths = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    for name in sorted(paths):
        if SKIPPED_FOLDERS.isdisjoint(Path(name).parts) and not name.startswith("_sysconfigdata"):
            text = _read_utf8(paths[name])
            if text:
                yield f"stdlib/{name}", text


def _read_utf8(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return None
