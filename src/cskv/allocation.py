"""Ranks for every layer's keys and values from one budget, by measured sensitivity.

A projection's eigenvalues tell what each further latent saves of its own reconstruction loss. How much a unit of that
loss costs the model differs by layer, and between keys and values. It is measured: each projection alone is compressed
at the uniform rank, and the KL divergence of the model's predictions is divided by the loss. With the losses in that
one unit the largest eigenvalues are kept, wherever they are. The result is compared with the uniform ranks on samples
that were not used, and the better one is kept: the first order can fail, as losses do interact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from jaxtyping import Int
from torch import Tensor, nn

from cskv.adapter import CSKVAdapter
from cskv.config import CSKVConfig
from cskv.divergence import Divergence
from cskv.errors import ConfigError
from cskv.factorization.allocation import allocate
from cskv.initialisation import Ranks, initialise, part_spectra
from cskv.models.sites import find_sites
from cskv.sensitivity import Progress, halves, sensitivities, tempered
from cskv.statistics import Statistics


@dataclass(frozen=True)
class Allocation:
    """What was found.

    Attributes:
        adapter: with the better ranks.
        ranks: layer index -> (key rank, value rank).
        sensitivity: (layer index, "k" or "v") -> nats of KL per unit of reconstruction loss.
        uniform_kl, allocated_kl: of uniform and of allocated ranks on the samples kept aside, in nats per token.
    """

    adapter: CSKVAdapter
    ranks: Ranks
    sensitivity: Mapping[tuple[int, str], float]
    uniform_kl: float
    allocated_kl: float

    @property
    def is_uniform(self) -> bool:
        """Whether uniform ranks were the better ones."""
        return self.uniform_kl <= self.allocated_kl


def allocate_ranks(
    model: nn.Module,
    config: CSKVConfig,
    statistics: Statistics,
    samples: Sequence[Int[Tensor, " tokens"]],
    target_ratio: float,
    progress: Progress | None = None,
) -> Allocation:
    """Choose the ranks for a cache of `target_ratio` of the uncompressed channels, and factorise with them.

    Args:
        model: the base model, with its language-model head.
        config: a PCA init; its densities are replaced.
        statistics: of the model, with covariances.
        samples: token samples without padding, at least two; the second half is kept aside for the comparison.
        target_ratio: latents kept as a share of all key and value channels, in (0, 1].
        progress: called with (projections measured, projections in all).

    Raises:
        ConfigError: the init is not PCA, or the ratio is out of range.
        DataError: fewer than two samples.
    """
    if "pca" not in config.init:
        raise ConfigError(
            f"ranks are allocated by eigenvalues, init is {config.init!r}; expected 'pca' or 'weighted-pca'"
        )
    seen, aside = halves(samples)
    config = replace(config, k_density=target_ratio, v_density=target_ratio)
    uniform = initialise(model, config, statistics)
    spectra = part_spectra(model, config, statistics)
    divergence = Divergence(model)
    losses = {
        (index, kind): float(spectrum[getattr(uniform.factors(index), kind).rank :].sum())
        for (index, kind), spectrum in spectra.items()
    }
    sensitivity = sensitivities(divergence, uniform, losses, seen, progress)
    exact = divergence.exact(aside)
    uniform_kl = divergence.mean(uniform, aside, exact=exact)
    allocated, allocated_kl = uniform, float("inf")
    for weights in tempered(sensitivity):
        tried = initialise(model, config, statistics, _allocated(model, config, spectra, weights, target_ratio))
        kl = divergence.mean(tried, aside, exact=exact)
        allocated, allocated_kl = (tried, kl) if kl < allocated_kl else (allocated, allocated_kl)
    best = uniform if uniform_kl <= allocated_kl else allocated
    chosen = {i: (best.factors(i).k.rank, best.factors(i).v.rank) for i in best.layer_indices}
    return Allocation(best, chosen, sensitivity, uniform_kl, allocated_kl)


def _allocated(
    model: nn.Module,
    config: CSKVConfig,
    spectra: Mapping[tuple[int, str], Tensor],
    sensitivity: Mapping[tuple[int, str], float],
    target_ratio: float,
) -> Ranks:
    step = 2 if config.key_factors == "commuting" else config.head_groups
    channels = sum(2 * site.kv_dim for site in find_sites(model))
    weighted = {part: spectrum * sensitivity[part] for part, spectrum in spectra.items()}
    ranks = allocate(weighted, int(target_ratio * channels + 0.5), step)
    layers = sorted({layer for layer, _ in ranks})
    return {layer: (ranks[layer, "k"], ranks[layer, "v"]) for layer in layers}
