"""Texts of the benchmark on real models: samples of a file or a named source."""

from __future__ import annotations

import hashlib
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from cskv.data.samples import TokenSamples
from cskv.data.sources import open_source


class Texts:
    """Samples of texts by name.

    Args:
        tokenizer: of the model.
        tokens: of a sample.
    """

    def __init__(self, tokenizer: Any, tokens: int) -> None:
        self._tokenizer, self._tokens = tokenizer, tokens

    def samples(self, text: str, count: int, *, start: int = 0, heldout: bool = False) -> list[Tensor]:
        """Return samples from an index on, of the held-out part where the text has one."""
        source = open_source(text, "heldout" if heldout else "train")
        found = TokenSamples(source, self._tokenizer, start + count, self._tokens)
        return list(islice(found.starting_at(start), count))

    def slug(self, text: str) -> str:
        """Return a name for files."""
        return "+".join(Path(part).stem for part in text.split("+"))

    def describe(self, text: str | None) -> str | None:
        """Name a text without its folder; of a file, its contents as well."""
        if text is None or not Path(text).is_file():
            return text
        return f"{Path(text).name}, SHA-256 {hashlib.sha256(Path(text).read_bytes()).hexdigest()[:16]}"
