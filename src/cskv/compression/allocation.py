"""Ranks for every layer's keys and values from one budget, by measured sensitivity.

A projection's eigenvalues tell what each further latent saves of its own reconstruction loss. With the losses in one
unit (`sensitivity`) the largest eigenvalues are kept, wherever they are. The result is compared with the uniform
ranks on samples that were not used, and the better one is kept: the first order can fail, as losses do interact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from jaxtyping import Int
from torch import Tensor, nn

from cskv.adapter.adapter import CSKVAdapter
from cskv.calibration.statistics import Statistics
from cskv.compression.initialise import Ranks, initialise, part_spectra
from cskv.compression.reading import Part
from cskv.compression.sensitivity import Allocation, Progress, deal
from cskv.config import CSKVConfig
from cskv.errors import ConfigError
from cskv.factorization.allocation import allocate
from cskv.models.sites import find_sites


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
    config = replace(config, k_density=target_ratio, v_density=target_ratio)
    uniform = initialise(model, config, statistics)
    spectra = part_spectra(model, config, statistics)
    losses = {
        (index, kind): float(spectrum[getattr(uniform.factors(index), kind).rank :].sum())
        for (index, kind), spectrum in spectra.items()
    }

    def make(weights: Mapping[Part, float]) -> CSKVAdapter:
        weighted = {part: spectrum * weights[part] for part, spectrum in spectra.items()}
        return initialise(model, config, statistics, _ranks(model, config, weighted, target_ratio))

    return deal(model, uniform, losses, make, samples, progress=progress)


def _ranks(model: nn.Module, config: CSKVConfig, spectra: Mapping[Part, Tensor], target_ratio: float) -> Ranks:
    """The ranks that keep the largest eigenvalues within the budget, wherever they are."""
    step = 2 if config.key_factors == "commuting" else config.head_groups
    channels = sum(2 * site.kv_dim for site in find_sites(model))
    ranks = allocate(spectra, int(target_ratio * channels + 0.5), step)
    return {layer: (ranks[layer, "k"], ranks[layer, "v"]) for layer in sorted({layer for layer, _ in ranks})}
