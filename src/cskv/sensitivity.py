"""What a unit of a projection's reconstruction loss costs the model, by measurement.

Losses of different layers, and of keys and values, are in different units: how much an error changes the model's
predictions differs. Each projection alone is compressed, and the KL divergence of the predictions is divided by its
loss. Multiplied by these, all losses are in one unit.

That is a first-order view, from a point where the losses are small. A projection that hardly matters there may matter
once nearly all of it is gone, so budgets are dealt out by tempered sensitivities as well, s^t with t below 1, and the
predictions on text that was not used decide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from jaxtyping import Int
from torch import Tensor

from cskv.adapter import CSKVAdapter
from cskv.divergence import Divergence
from cskv.errors import DataError

Part = tuple[int, str]  # layer index, "k" or "v"
Progress = Callable[[int, int], None]
TEMPERS = (1.0, 0.5, 0.25, 0.0)  # powers of the sensitivities that are tried; 0 counts all losses alike


def sensitivities(
    divergence: Divergence,
    adapter: CSKVAdapter,
    losses: Mapping[Part, float],
    samples: Sequence[Int[Tensor, " tokens"]],
    progress: Progress | None = None,
) -> dict[Part, float]:
    """Nats of KL per token and unit of loss, for every projection.

    Args:
        divergence: of the base model.
        adapter: lossy enough for a KL that can be measured.
        losses: its reconstruction losses.
        samples: token ids without padding.
        progress: called with (projections measured, projections in all).
    """
    found, exact = {}, divergence.exact(samples)
    for done, (part, loss) in enumerate(losses.items(), start=1):
        kl = divergence.mean(adapter, samples, only=frozenset({part}), exact=exact)
        found[part] = max(kl, 0.0) / loss if loss > 0 else 0.0
        if progress is not None:
            progress(done, len(losses))
    return found


def tempered(sensitivity: Mapping[Part, float]) -> Iterator[dict[Part, float]]:
    """The sensitivities to the powers that are tried."""
    for power in TEMPERS:
        yield {part: value**power for part, value in sensitivity.items()}


def halves(samples: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Samples to measure on and samples to compare on. Halves, since sources may alternate between kinds of text.

    Raises:
        DataError: fewer than two samples.
    """
    if len(samples) < 2:
        raise DataError(f"dealing out a budget needs at least 2 samples, got {len(samples)}; give more text")
    middle = (len(samples) + 1) // 2
    return samples[:middle], samples[middle:]
