"""A text source over texts that are in memory."""

from __future__ import annotations

from collections.abc import Iterable

from cskv.data.sources import TextSource


def texts_source(texts: Iterable[str], *, separate: bool = True) -> TextSource:
    kept = list(texts)
    return TextSource("texts", lambda _seed: iter(kept), separate)
