"""Text as the compressed cache sees it: perplexity, and agreement with the uncompressed model position by position.

Both models read the same text teacher-forced, in the same pieces, each through its own cache: a position reads what is
older than its piece from the cache, and its own piece exactly (see `cskv.evaluation.forward`). As much text as `HELD`
bytes of log-probabilities cover is read without the method and then with it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from cskv.errors import DataError
from cskv.evaluation.forward import Piece, check_least, pieces, read
from cskv.methods.method import Method
from cskv.models.evaluation_mode import evaluation_mode

HELD = 2**30  # bytes of the uncompressed model's log-probabilities
STRETCHES = 16
RESAMPLES = 2000


@dataclass(frozen=True)
class Agreement:
    """A method's reading of texts, beside the uncompressed model.

    Attributes:
        tokens: predicted tokens, of all texts.
        nll: negative log-likelihood, nats per token, of each text.
        reference_nll: the same of the uncompressed model.
        kl: KL divergence of the method's next-token distribution from the uncompressed one, nats per token, of each.
        top1: share of positions at which both have the same most likely token, of each.
        positions: top1 and kl over stretches of positions, of all texts.
    """

    tokens: int
    nll: tuple[float, ...]
    reference_nll: tuple[float, ...]
    kl: tuple[float, ...]
    top1: tuple[float, ...]
    positions: tuple[dict[str, float], ...]

    def to_dict(self) -> dict[str, Any]:
        """Return means and their 95 % intervals over texts (null of a single text) as JSON-ready values."""
        nll = bootstrap_interval(self.nll)
        figures: dict[str, Any] = {
            "tokens": self.tokens,
            "nll": fmean(self.nll),
            "perplexity": math.exp(fmean(self.nll)),
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
    check_least(1, chunk=chunk, first_chunk=first, batch_size=batch_size)
    check_least(0, prefix=prefix)
    if sequences.ndim != 2 or sequences.shape[0] < 1 or sequences.shape[1] < max(2, prefix + 1):
        raise DataError(
            f"token sequences have shape {tuple(sequences.shape)}; expected at least one of more than {prefix} tokens"
        )
    parts = pieces(sequences.shape[1] - 1, first, chunk, prefix)  # the last token is only a target
    figures = torch.zeros(4, sequences.shape[0], sequences.shape[1] - 1, dtype=torch.float64)
    with evaluation_mode(model):
        for start in range(0, sequences.shape[0], batch_size):
            batch = slice(start, start + batch_size)
            _read(model, method, sequences[batch], parts, prefix, figures[:, batch], on_tokens)
    return _summary(figures[..., max(0, prefix - 1) :], max(0, prefix - 1))


def _read(
    model: PreTrainedModel,
    method: Method,
    rows: Int[Tensor, "batch tokens"],
    parts: Sequence[Piece],
    prefix: int,
    figures: Float[Tensor, "4 batch positions"],
    on_tokens: Callable[[int], None] | None,
) -> None:
    """Fill in a batch's (nll, reference nll, KL, top-1) of every position."""
    plain, ours = read(model, rows, parts, skipped=prefix), None
    while expected := list(_held(plain)):
        with method.on(model) as new_cache:
            if ours is None:
                ours = read(model, rows, parts, None if new_cache is None else new_cache(), skipped=prefix)
            for reference, ((start, stop), logits) in zip(expected, ours):
                kept = stop - logits.shape[1]
                found = logits.float().log_softmax(-1)
                targets = rows[:, kept + 1 : stop + 1, None].to(found.device)
                measured = (
                    -found.gather(-1, targets)[..., 0],
                    -reference.gather(-1, targets)[..., 0],
                    (reference.exp() * (reference - found)).sum(-1),
                    (found.argmax(-1) == reference.argmax(-1)).float(),
                )
                figures[..., kept:stop] = torch.stack(measured)
                if on_tokens is not None:
                    on_tokens((stop - start) * rows.shape[0])


def _held(pieces_read: Iterable[tuple[Piece, Tensor]]) -> Iterator[Float[Tensor, "batch kept vocabulary"]]:
    """Yield the log-probabilities of the next pieces, until they take `HELD` bytes."""
    held = 0
    for _, logits in pieces_read:
        yield (found := logits.float().log_softmax(-1))
        held += found.nbytes
        if held >= HELD:
            return


def _summary(figures: Float[Tensor, "4 texts positions"], first: int) -> Agreement:
    """Return means of every text, and over stretches of positions; the first one is `first`."""
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


def bootstrap_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95 % interval of a mean by the percentile bootstrap (B. Efron, Annals of Statistics 1979).

    The same values always give the same interval; fewer than two give None.
    """
    if len(values) < 2:
        return None
    drawn = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    means = np.asarray(values, dtype=np.float64)[drawn].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
