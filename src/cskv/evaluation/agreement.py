"""Text as the compressed cache is read: perplexity, and agreement with the uncompressed model position by position.

A position reads the sinks and the window exactly and what is older from latents, as in token-by-token decoding. That is
had in one of two ways, with equal results:

    whole     in one forward that is told by a mask which tokens every position reads compressed (`cskv.reading`):
              methods that can, on texts that are not too long
    pieces    through the cache itself, teacher-forced (`cskv.evaluation.forward`): all others

The uncompressed model's predictions are those of one forward over a text (`cskv.evaluation.reference`). In 16 bits
another order of sums changes them: the KL of the uncompressed cache, read in pieces, is what rounding alone does.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from cskv.errors import DataError
from cskv.evaluation.forward import Piece, check_least, clock, pieces, read
from cskv.evaluation.reference import WHOLE, Reference
from cskv.methods.method import Method
from cskv.models.evaluation_mode import evaluation_mode
from cskv.models.placement import device_of

NUMBERS = 2**22  # logits of a forward over a whole text that exist at the same time
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
        reading: "whole" or "pieces" (see above).
        seconds: that the method took, on the wall; the uncompressed model's predictions beside it do not count.
    """

    tokens: int
    nll: tuple[float, ...]
    reference_nll: tuple[float, ...]
    kl: tuple[float, ...]
    top1: tuple[float, ...]
    positions: tuple[dict[str, float], ...]
    reading: str = field(compare=False)
    seconds: float = field(compare=False)

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
        increases = [ours - theirs for ours, theirs in zip(self.nll, self.reference_nll, strict=True)]
        interval = bootstrap_interval(increases)
        figures |= {"nll_increase": fmean(increases), "nll_increase_interval": interval and list(interval)}
        for name in ("top1", "kl"):
            values = getattr(self, name)
            interval = bootstrap_interval(values)
            figures |= {name: fmean(values), f"{name}_interval": interval and list(interval)}
        return figures | {"positions": list(self.positions), "reading": self.reading}


@torch.no_grad()
def agreement(
    model: PreTrainedModel,
    method: Method,
    sequences: Int[Tensor, "sequences tokens"],
    *,
    reference: Reference | None = None,
    chunk: int | None = None,
    first_chunk: int | None = None,
    prefix: int = 0,
    batch_size: int = 1,
    on_tokens: Callable[[int], None] | None = None,
) -> Agreement:
    """Read texts with a method, beside the model without one.

    Args:
        model: the bare model.
        method: what its cache is compressed by.
        sequences: token ids, each row a text of its own.
        reference: of the model, when several methods are measured on the same texts.
        chunk: tokens per forward through the cache after the first; None leaves it to the method, which may need no
            cache.
        first_chunk: tokens of the first forward; `chunk` when None.
        prefix: tokens that are prefilled in one forward before the first chunk, and not scored.
        batch_size: rows read together.
        on_tokens: called with the number of tokens just read (rows times tokens), for a progress bar.

    Raises:
        DataError: no token to predict, a number out of range, or logits that are not finite.
    """
    if sequences.ndim != 2 or sequences.shape[0] < 1 or sequences.shape[1] < max(2, prefix + 1):
        raise DataError(
            f"token sequences have shape {tuple(sequences.shape)}; expected at least one of more than {prefix} tokens"
        )
    check_least(0, prefix=prefix)
    length = sequences.shape[1] - 1  # the last token is only a target
    reference = reference or Reference(model)
    whole = chunk is None and method.whole is not None and reference.reads_whole and length <= WHOLE
    if chunk is None:
        chunk, first_chunk = method.piece, _to_sealing(method, prefix)
    first = chunk if first_chunk is None else first_chunk
    check_least(1, chunk=chunk, first_chunk=first, batch_size=batch_size)
    parts = pieces(length, first, chunk, prefix)
    figures = torch.zeros(4, sequences.shape[0], length, dtype=torch.float64)
    seconds = 0.0
    with evaluation_mode(model):
        for rows, own in zip(sequences.split(batch_size), figures.split(batch_size, dim=1), strict=True):
            exact = reference.states(rows[:, :-1])
            if whole:
                found = _whole(reference, method, rows[:, :-1], prefix)
            else:
                found = _pieces(model, method, rows, parts, prefix)
            with closing(found):  # whatever happens, the method is taken off the model
                for took, (start, stop), logits in _timed(found, device_of(model)):
                    kept = stop - logits.shape[1]
                    expected = reference.logits(exact[:, kept:stop])
                    own[..., kept:stop] = _compared(logits, expected, rows[:, kept + 1 : stop + 1])
                    seconds += took
                    if on_tokens is not None:
                        on_tokens((stop - start) * rows.shape[0])
    reading = "whole" if whole else "pieces"
    return _summary(figures[..., max(0, prefix - 1) :], max(0, prefix - 1), reading, seconds)


def _to_sealing(method: Method, prefix: int) -> int:
    """Return the tokens of the first piece after a prefix, so that the others begin where groups are sealed."""
    return (method.first_piece - prefix - 1) % method.piece + 1 if prefix else method.first_piece


def _whole(
    reference: Reference, method: Method, rows: Int[Tensor, "batch tokens"], prefix: int
) -> Generator[tuple[Piece, Tensor]]:
    """Yield the logits of a few positions after another, from one forward; of a prefix those of its last token."""
    decoder: Any = reference.surveyed.model.base_model
    with method.whole(reference.surveyed, prefix):  # type: ignore[misc]
        states = decoder(input_ids=rows.to(device_of(decoder)), use_cache=False)[0]
    if prefix:
        yield (0, prefix), reference.logits(states[:, prefix - 1 : prefix])
    vocabulary = decoder.get_input_embeddings().weight.shape[0]
    step = max(1, NUMBERS // (vocabulary * rows.shape[0]))
    for start in range(prefix, rows.shape[1], step):
        part = states[:, start : start + step]
        yield (start, start + part.shape[1]), reference.logits(part)


def _pieces(
    model: PreTrainedModel, method: Method, rows: Int[Tensor, "batch tokens"], parts: Sequence[Piece], prefix: int
) -> Generator[tuple[Piece, Tensor]]:
    """Yield the logits of each piece that goes through the method's cache."""
    with method.on(model) as new_cache:
        yield from read(model, rows, parts, None if new_cache is None else new_cache(), skipped=prefix)


def _timed(found: Iterable[tuple[Piece, Tensor]], device: torch.device) -> Iterator[tuple[float, Piece, Tensor]]:
    """Yield what is found, after the seconds that it took to find."""
    iterator = iter(found)
    while True:
        began = clock(device)
        item = next(iterator, None)
        if item is None:
            return
        yield clock(device) - began, *item


def _compared(
    logits: Float[Tensor, "batch some vocabulary"],
    reference: Float[Tensor, "batch some vocabulary"],
    targets: Int[Tensor, "batch some"],
) -> Float[Tensor, "4 batch some"]:
    """Return (nll, reference nll, KL, top-1) of every position."""
    found, expected = logits.float().log_softmax(-1), reference.log_softmax(-1)
    targets = targets[..., None].to(found.device)
    measured = (
        -found.gather(-1, targets)[..., 0],
        -expected.gather(-1, targets)[..., 0],
        torch.linalg.vecdot(expected.exp(), expected - found).clamp(min=0),  # sums of equal numbers may fall below
        (logits.argmax(-1) == reference.argmax(-1)).float(),
    )
    return torch.stack(measured)


def _summary(figures: Float[Tensor, "4 texts positions"], first: int, reading: str, seconds: float) -> Agreement:
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
    return Agreement(texts * length, nll, reference, kl, top1, positions, reading, seconds)


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
