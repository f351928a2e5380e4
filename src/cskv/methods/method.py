"""One way to keep the cache, to be put on a model for the time of a measurement."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from transformers import Cache, PreTrainedModel

from cskv.adapter.adapter import CSKVAdapter
from cskv.attachment.attach import attach
from cskv.compression.budget import ratio_of
from cskv.fingerprint import fingerprint
from cskv.models.survey import Survey
from cskv.reading.compressed import StoredTokens, compressed_reading

NewCache = Callable[[], Cache]
Scope = AbstractContextManager[NewCache | None]
Whole = Callable[[Survey, int], AbstractContextManager[None]]
PIECE = 32


@dataclass(frozen=True)
class Method:
    """A cache method.

    Attributes:
        name: of its series in tables and figures; methods that differ only in their budget share it.
        budget: the share of the cache that it is meant to keep; None for the uncompressed cache.
        on: puts it on a model, as a context that gives what makes its empty caches, or None for the model's own.
        facts: what it is, JSON-ready.
        pads: rows of different lengths can be read together, padded on the left.
        multiple: prompts are padded to a multiple of so many tokens, for a cache that packs no other number of them.
        streams: it compresses a text as it grows, and not only the prompt.
        first_piece, piece: tokens per forward in which a text is read, so that it is compressed as in decoding.
        whole: puts it on a surveyed model for forwards of whole texts without a cache, whose first tokens, as many as
            it is told, are prefilled (`cskv.reading`); None where only a cache tells what is read.
    """

    name: str
    budget: float | None
    on: Callable[[PreTrainedModel], Scope]
    facts: dict[str, Any] = field(default_factory=dict)
    pads: bool = True
    multiple: int = 1
    streams: bool = True
    first_piece: int = 2 * PIECE
    piece: int = PIECE
    whole: Whole | None = None

    @property
    def label(self) -> str:
        return label(self.name, self.budget)


def label(name: str, budget: float | None) -> str:
    """Return a method's name with its budget, for a person."""
    return name if budget is None else f"{name} {100 * budget:.3g} %"


def uncompressed() -> Method:
    """Return the method that is the model's own cache."""
    return Method("uncompressed", None, lambda _model: nullcontext(), {"kind": "uncompressed"})


def compressed(
    adapter: CSKVAdapter, name: str, budget: float | None = None, *, int8_keys: bool = False, **facts: Any
) -> Method:
    """Return the method that is a CSKV adapter.

    Args:
        adapter: fits the model that is measured.
        name: of its series.
        budget: the share that it is meant to keep; of its channels and bits when None (`ratio_of`).
        int8_keys: as `cskv.attach` takes it. Texts are then read by a cache alone.
        facts: what else is to be remembered of it, JSON-ready.
    """

    @contextmanager
    def on(model: PreTrainedModel) -> Iterator[None]:
        with attach(model, adapter, int8_keys=int8_keys):
            yield None

    def whole(surveyed: Survey, prefilled: int) -> AbstractContextManager[None]:
        adapter.check_fits(surveyed)
        dtype: Any = surveyed.model.dtype
        return compressed_reading(surveyed, StoredTokens(adapter, dtype), prefilled=prefilled)

    config = adapter.config
    known = {
        "kind": "cskv",
        "fingerprint": fingerprint(adapter.state_dict().items()),
        "settings": adapter.describe()["compression"],
        "ratio": ratio_of(adapter),
    }
    return Method(
        name,
        ratio_of(adapter) if budget is None else budget,
        on,
        known | facts,
        first_piece=config.sinks + config.window + config.group,
        piece=config.group,
        whole=None if int8_keys else whole,
    )
