"""Text as the compressed cache sees it: perplexity, and agreement with the uncompressed model position by position.

Both models read the same text teacher-forced, in the same pieces, each through its own cache: a position reads what is
older than its piece from the cache, and its own piece exactly. In pieces of `config.group` after a first one of
`window + group`, that equals token-by-token decoding (see `cskv.evaluation.perplexity`). Some `SEGMENT` tokens at a
time are read without the method and then with it, so that the logits of one segment and two caches are all that is
held.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache, PreTrainedModel

from cskv.calibration.hooks import evaluation_mode
from cskv.errors import DataError
from cskv.evaluation.bootstrap import bootstrap_interval
from cskv.evaluation.forward import forward
from cskv.methods.method import Method

SEGMENT = 1024
STRETCHES = 16

Piece = tuple[int, int]


@dataclass(frozen=True)
class Agreement:
    """How a method reads texts, beside the uncompressed model.

    Attributes:
        tokens: predicted tokens, of all texts.
        nll: negative log-likelihood, nats per token, of each text.
        reference_nll: the same of the uncompressed model.
        kl: KL divergence of the method's next-token distribution from the uncompressed one, nats per token, of each.
        top1: how often both have the same most likely token, from 0 to 1, of each.
        positions: top1 and kl over stretches of positions, of all texts.
    """

    tokens: int
    nll: tuple[float, ...]
    reference_nll: tuple[float, ...]
    kl: tuple[float, ...]
    top1: tuple[float, ...]
    positions: tuple[dict[str, float], ...]

    @property
    def perplexity(self) -> float:
        """Exp of the mean negative log-likelihood."""
        return math.exp(fmean(self.nll))

    def to_dict(self) -> dict[str, Any]:
        """Means and their 95 % intervals over texts (null of a single text) as JSON-ready values."""
        nll = bootstrap_interval(self.nll)
        figures: dict[str, Any] = {
            "tokens": self.tokens,
            "nll": fmean(self.nll),
            "perplexity": self.perplexity,
            "perplexity_interval": nll and [math.exp(bound) for bound in nll],
            "reference_perplexity": math.exp(fmean(self.reference_nll)),
        }
        for name in ("top1", "kl"):
            values = getattr(self, name)
            interval = bootstrap_interval(values)
            figures |= {name: fmean(values), f"{name}_interval": interval and list(interval)}
        return figures | {"positions": list(self.positions)}


def agreement(
    model: PreTrainedModel,
    method: Method,
    sequences: Int[Tensor, "sequences tokens"],
    *,
    chunk: int = 32,
    first_chunk: int | None = None,
    prefix: int = 0,
    batch_size: int = 1,
    on_tokens: Callable[[int], None] | None = None,
) -> Agreement:
    """Read texts with and without a method.

    Args:
        model: the bare model.
        method: what its cache is compressed by.
        sequences: token ids, each row a text of its own.
        chunk: tokens per forward after the first.
        first_chunk: tokens of the first forward; `chunk` when None.
        prefix: tokens that are prefilled in one forward before the first chunk, and not scored.
        batch_size: rows read together.
        on_tokens: called with the number of tokens just read (rows times tokens), for a progress bar.

    Raises:
        DataError: no token to predict, a number out of range, or logits that are not finite.
    """
    first = chunk if first_chunk is None else first_chunk
    for name, value in (("chunk", chunk), ("first_chunk", first), ("batch_size", batch_size)):
        _check(name, value, 1)
    _check("prefix", prefix, 0)
    if sequences.ndim != 2 or sequences.shape[0] < 1 or sequences.shape[1] < max(2, prefix + 1):
        raise DataError(
            f"token sequences have shape {tuple(sequences.shape)}; expected at least one of more than {prefix} tokens"
        )
    pieces = _pieces(sequences.shape[1], prefix, first, chunk)
    figures = torch.zeros(4, sequences.shape[0], sequences.shape[1] - 1, dtype=torch.float64)
    with evaluation_mode(model):
        for start in range(0, sequences.shape[0], batch_size):
            batch = slice(start, start + batch_size)
            _read(model, method, sequences[batch], pieces, prefix, figures[:, batch], on_tokens)
    return _summary(figures[..., max(0, prefix - 1) :], max(0, prefix - 1))


def _check(name: str, value: int, least: int) -> None:
    if value < least:
        raise DataError(f"{name} is {value}; expected at least {least}")


def _pieces(length: int, prefix: int, first: int, chunk: int) -> list[Piece]:
    """(start, stop) of every forward. The last token is only a target, so it is not fed."""
    bounds = [0, *([prefix] if 0 < prefix < length - 1 else []), *range(prefix + first, length - 1, chunk), length - 1]
    return list(itertools.pairwise(bounds))


def _segments(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Pieces of about `SEGMENT` tokens together."""
    taken: list[Piece] = []
    for piece in pieces:
        taken.append(piece)
        if taken[-1][1] - taken[0][0] >= SEGMENT:
            yield taken
            taken = []
    if taken:
        yield taken


def _read(
    model: PreTrainedModel,
    method: Method,
    rows: Int[Tensor, "batch tokens"],
    pieces: Sequence[Piece],
    prefix: int,
    figures: Float[Tensor, "4 batch positions"],
    on_tokens: Callable[[int], None] | None,
) -> None:
    """Fill in a batch's (nll, reference nll, KL, top-1) of every position."""
    plain: Cache | None = None
    cache: Cache | None = None
    for segment in _segments(pieces):
        expected = []
        for piece in segment:
            logits, plain = _log_probabilities(model, rows, piece, plain, prefix)
            expected.append(logits)
        with method.on(model) as new_cache:
            if cache is None and new_cache is not None:
                cache = new_cache()
            for piece, reference in zip(segment, expected, strict=True):
                found, cache = _log_probabilities(model, rows, piece, cache, prefix)
                start = piece[1] - found.shape[1]
                figures[..., start : piece[1]] = _figures(rows[:, start + 1 : piece[1] + 1], found, reference)
                if on_tokens is not None:
                    on_tokens((piece[1] - piece[0]) * rows.shape[0])


def _log_probabilities(
    model: PreTrainedModel, rows: Int[Tensor, "batch tokens"], piece: Piece, cache: Cache | None, prefix: int
) -> tuple[Float[Tensor, "batch kept vocabulary"], Cache]:
    """Of the piece's positions; of a prefix only its last one."""
    start, stop = piece
    logits, cache = forward(model, rows[:, start:stop], cache, last_only=0 < stop <= prefix, seen=start)
    return logits.float().log_softmax(-1), cache


def _figures(
    targets: Int[Tensor, "batch kept"],
    found: Float[Tensor, "batch kept vocabulary"],
    reference: Float[Tensor, "batch kept vocabulary"],
) -> Float[Tensor, "4 batch kept"]:
    """Nll, reference nll, KL and top-1 of every position, from log-probabilities."""
    index = targets[..., None].to(found.device)
    figures = (
        -found.gather(-1, index)[..., 0],
        -reference.gather(-1, index)[..., 0],
        (reference.exp() * (reference - found)).sum(-1),
        (found.argmax(-1) == reference.argmax(-1)).float(),
    )
    return torch.stack(figures).double().cpu()


def _summary(figures: Float[Tensor, "4 texts positions"], first: int) -> Agreement:
    """Means of every text, and over stretches of positions; the first one is `first`."""
    _, texts, length = figures.shape
    if not bool(figures.isfinite().all()):
        raise DataError("log-likelihoods of the text are not finite: the model's logits are not")
    edges = sorted({round(index * length / STRETCHES) for index in range(STRETCHES + 1)})
    positions = tuple(
        {
            "start": first + start,
            "stop": first + stop,
            "kl": figures[2, :, start:stop].mean().item(),
            "top1": figures[3, :, start:stop].mean().item(),
        }
        for start, stop in itertools.pairwise(edges)
    )
    nll, reference, kl, top1 = (tuple(row.mean(-1).tolist()) for row in figures)
    return Agreement(texts * length, nll, reference, kl, top1, positions)
