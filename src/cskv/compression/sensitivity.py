"""One budget over all projections, dealt out by what a unit of each one's loss costs the model, as measured.

Losses of different layers, and of keys and values, are in different units: how much an error changes the model's
predictions differs. Each projection alone is compressed, and the KL divergence of the predictions is divided by its
loss. Multiplied by these, all losses are in one unit.

That is a first-order view, from a point where the losses are small. A projection that hardly matters there may matter
once nearly all of it is gone, so budgets are dealt out by tempered sensitivities as well, s^t with t below 1, and the
predictions on text that was not used decide.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from jaxtyping import Int
from torch import Tensor

from cskv.adapter.adapter import CSKVAdapter
from cskv.compression.divergence import Divergence
from cskv.compression.reading import Part
from cskv.errors import DataError

Make = Callable[[Mapping[Part, float]], CSKVAdapter]
OnMeasured = Callable[[int, int], None]  # (projections measured, projections in all)
TEMPERS = (1.0, 0.5, 0.25, 0.0)  # powers of the sensitivities that are tried; 0 counts all losses alike


@dataclass(frozen=True)
class Allocation:
    """The result of dealing a budget out.

    Attributes:
        adapter: the one that is kept.
        sensitivity: (layer index, "k" or "v") -> nats of KL per unit of reconstruction loss.
        uniform_kl, allocated_kl: of the uniform and of the best allocated adapter on the samples kept aside, in nats
            per token. The former is None where the budget holds no uniform adapter.
    """

    adapter: CSKVAdapter
    sensitivity: Mapping[Part, float]
    uniform_kl: float | None
    allocated_kl: float

    @property
    def is_uniform(self) -> bool:
        """True if the uniform adapter was the better one."""
        return self.uniform_kl is not None and self.uniform_kl <= self.allocated_kl


def deal(
    divergence: Divergence,
    uniform: CSKVAdapter,
    losses: Mapping[Part, float],
    make: Make,
    samples: Sequence[Int[Tensor, " tokens"]],
    *,
    uniform_fits: bool = True,
    progress: OnMeasured | None = None,
) -> Allocation:
    """Make an adapter from the sensitivities and from each of their powers, and keep the best one.

    Args:
        divergence: of the base model.
        uniform: the adapter at which sensitivities are measured, and that the others are compared with.
        losses: its reconstruction loss of every projection.
        make: an adapter within the budget, from a weight for the losses of every projection.
        samples: see `halves`: sensitivities are measured on the first half, adapters compared on the second.
        uniform_fits: whether `uniform` is within the budget itself.
        progress: called with (projections measured, projections in all).

    Raises:
        DataError: fewer than two samples.
    """
    seen, aside = halves(samples)
    sensitivity = sensitivities(divergence, uniform, losses, seen, progress)
    exact = divergence.exact(aside)

    def kl(adapter: CSKVAdapter) -> float:
        return divergence.mean(adapter, aside, exact=exact)

    uniform_kl = kl(uniform) if uniform_fits else None
    best, least = uniform, float("inf")
    for power in TEMPERS:
        tried = make({part: value**power for part, value in sensitivity.items()})
        if (own := kl(tried)) < least:
            best, least = tried, own
    found = Allocation(best, sensitivity, uniform_kl, least)
    return replace(found, adapter=uniform) if found.is_uniform else found


def sensitivities(
    divergence: Divergence,
    adapter: CSKVAdapter,
    losses: Mapping[Part, float],
    samples: Sequence[Int[Tensor, " tokens"]],
    progress: OnMeasured | None = None,
) -> dict[Part, float]:
    """Measure the nats of KL per token and unit of loss, for every projection.

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


def halves(samples: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Split samples into those to measure on and those to compare on.

    Each is a whole half, since sources may alternate between kinds of text.

    Raises:
        DataError: fewer than two samples.
    """
    if len(samples) < 2:
        raise DataError(f"dealing out a budget needs at least 2 samples, got {len(samples)}; give more text")
    middle = (len(samples) + 1) // 2
    return samples[:middle], samples[middle:]
