"""An untrained compressor: every layer's factors from its weights and its calibration statistics."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cskv.adapter.adapter import CSKVAdapter
from cskv.calibration.statistics import Statistics
from cskv.config import CSKVConfig
from cskv.errors import AdapterError, ConfigError, CSKVError, DataError, UnsupportedModelError
from cskv.factorization.basis import centred, hadamard_blocks, rotated
from cskv.factorization.commuting import commuting_components, commuting_part
from cskv.factorization.components import Components
from cskv.factorization.factors import Factors, LayerFactors
from cskv.factorization.pca import principal_components
from cskv.factorization.svd import asvd_factors, svd_factors
from cskv.factorization.weighting import before_norm, fisher_gain, key_gain, mixed_moments, shrunk, value_gain
from cskv.models.probe import SiteRecipe
from cskv.models.sites import AttentionSite
from cskv.models.survey import Survey, survey

Ranks = Mapping[int, tuple[int, int]]
Part = tuple[int, str]  # layer index, "k" or "v"


def initialise(
    model: nn.Module, config: CSKVConfig, statistics: Statistics | None = None, ranks: Ranks | None = None
) -> CSKVAdapter:
    """Factorise every key and value projection of a model at the settings' densities.

    Args:
        model: the base model; its weights are only read.
        config: densities, init, key factors, head groups.
        statistics: of this model; needed for all but "svd".
        ranks: layer index -> (key rank, value rank), in place of the densities.

    Returns:
        An adapter with fp32 factors on the weights' devices.

    Raises:
        DataError: an init without its statistics, or a weight that is not finite; the message names the layer.
        AdapterError: the statistics belong to another model.
        ConfigError: a rank rounds to zero, the head groups do not divide the kv heads, or widths are to be mixed.
        UnsupportedModelError: the model has no layer that can be compressed, or a weight is offloaded.
    """
    if config.mixed_widths:
        raise ConfigError("mixed widths are chosen together with ranks; use cskv.compression.budget.allocate")
    return Factorisation(survey(model), config, statistics).adapter(ranks)


class Factorisation:
    """Makes the factors of a model, for settings and statistics.

    Args:
        surveyed: the base model.
        config, statistics: as for `initialise`.
        shrinkage: of Fisher information towards its diagonal, in [0, 1].

    Raises:
        DataError: an init without its statistics.
        AdapterError: the statistics belong to another model.
    """

    def __init__(
        self, surveyed: Survey, config: CSKVConfig, statistics: Statistics | None, shrinkage: float = 0.0
    ) -> None:
        if config.init != "svd":
            if statistics is None:
                raise DataError(
                    f"init {config.init!r} needs calibration statistics, got none; calibrate first, or choose init "
                    "'svd'"
                )
            statistics.check_fits(surveyed)
        recipes = surveyed.recipes if "pca" in config.init else {}
        self._surveyed, self._config = surveyed, config
        self._layers = [
            _Layer(site, config, statistics, recipes.get(site.layer_idx), shrinkage) for site in surveyed.sites
        ]

    def components(self) -> dict[Part, Components]:
        """Find the components of every projection, for a PCA init: memory is that of full-rank factors."""
        found: dict[Part, Components] = {}
        for layer in self._layers:
            with layer.named():
                found |= {(layer.site.layer_idx, kind): layer.components(kind) for kind in ("k", "v")}
        return found

    def adapter(self, ranks: Ranks | None = None, components: Mapping[Part, Components] | None = None) -> CSKVAdapter:
        """Make the adapter of given ranks, or of the settings' densities.

        Args:
            ranks: as for `initialise`.
            components: of every projection, from which factors are cut; None finds each when it is needed.
        """
        layers, components = {}, components or {}
        for layer in self._layers:
            index = layer.site.layer_idx
            with layer.named():
                pair = zip(("k", "v"), layer.uniform_ranks() if ranks is None else ranks[index], strict=True)
                layers[index] = LayerFactors(
                    **{kind: layer.factors(kind, rank, components.get((index, kind))) for kind, rank in pair}
                )
        return CSKVAdapter(self._config, layers, self._surveyed.base)


@torch.no_grad()
def in_few_bits(adapter: CSKVAdapter, config: CSKVConfig, statistics: Statistics | None = None) -> CSKVAdapter:
    """Put the latents of an adapter, trained or not, in few bits (post-training quantisation).

    Args:
        adapter: of 16-bit latents; stays as it is.
        config: bits, blocks, window, group and sinks are taken from it, all else from the adapter.
        statistics: of the base model, to centre latents; without them their mean stays.

    Raises:
        ConfigError: the adapter's latents are in few bits already, or `config` mixes widths.
        AdapterError: the statistics belong to another model.
    """
    if adapter.config.is_quantised or config.mixed_widths:
        raise ConfigError(
            f"widths can be given to an adapter of 16-bit latents, and one for keys and one for values; got "
            f"{adapter.config.k_bits} and {adapter.config.v_bits} bits, mixed_widths {config.mixed_widths}"
        )
    if statistics is not None and sorted(statistics.layers) != adapter.layer_indices:
        raise AdapterError(f"the statistics have layers {sorted(statistics.layers)}, not {adapter.layer_indices}")
    taken = {
        name: getattr(config, name) for name in ("k_bits", "v_bits", "k_block", "v_block", "window", "group", "sinks")
    }
    changed = dataclasses.replace(adapter.config, **taken)
    layers = {}
    for index in adapter.layer_indices:
        mean, pair = None if statistics is None else statistics.get(index, "input.mean"), adapter.factors(index)
        layers[index] = LayerFactors(
            _conditioned(pair.k.clone(), changed, "k", mean), _conditioned(pair.v.clone(), changed, "v", mean)
        )
    return CSKVAdapter(changed, layers, adapter.base)


@dataclass(frozen=True)
class _Layer:
    """One layer's factors. `recipe` is there for PCA only."""

    site: AttentionSite
    config: CSKVConfig
    statistics: Statistics | None
    recipe: SiteRecipe | None
    shrinkage: float

    @contextmanager
    def named(self) -> Iterator[None]:
        """Let errors name the layer."""
        try:
            yield
        except CSKVError as error:
            raise type(error)(f"layer {self.site.layer_idx} ({self.site.name}): {error}") from error

    def uniform_ranks(self) -> tuple[int, int]:
        return self.config.k_rank(self.site.kv_dim), self.config.v_rank(self.site.kv_dim)

    def factors(self, kind: str, rank: int, components: Components | None) -> Factors:
        """Make the factors of a rank, cut from the components where the init is PCA."""
        if "pca" in self.config.init:
            factors = (components or self.components(kind)).truncated(rank)
        else:
            per_group = rank // self.config.head_groups
            factors = Factors.grouped([self._svd(weight, bias, per_group) for _, weight, bias in self._groups(kind)])
        few = self.config.bits(kind) < 16 and self.statistics is not None
        return _conditioned(factors, self.config, kind, self._statistic("input.mean") if few else None)

    def components(self, kind: str) -> Components:
        found = self._components(kind)
        return found.evened() if self.config.init == "fisher-pca" else found

    def _components(self, kind: str) -> Components:
        if kind == "k" and self.config.key_factors == "commuting":
            return self._commuting_components()
        (mean, moment), gain = self._moments(kind), self._gain(kind)

        def part(rows: slice, weight: Tensor, bias: Tensor | None) -> Components:
            own = None if gain is None else gain[rows, rows]
            return principal_components(weight, mean[rows], moment[rows, rows], bias=bias, gain=own)

        return Components.grouped([part(*group) for group in self._groups(kind)])

    def _groups(self, kind: str) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """Yield the channels of every head group, their weight and their bias."""
        projection, groups = getattr(self.site, kind), self.config.head_groups
        if self.site.num_kv_heads % groups:
            raise ConfigError(f"{groups} head groups do not divide {self.site.num_kv_heads} kv heads")
        weight, bias, size = projection.weight, projection.bias, projection.kv_dim // groups
        if weight.is_meta:
            raise UnsupportedModelError("the weight is offloaded; load the model onto CPU or GPU to factorise it")
        for start in range(0, projection.kv_dim, size):
            rows = slice(start, start + size)
            yield rows, weight[rows], None if bias is None else bias[rows]

    def _svd(self, weight: Tensor, bias: Tensor | None, rank: int) -> Factors:
        if self.config.init == "svd":
            return svd_factors(weight, rank, bias)
        mean_abs = self._statistic("input.mean_abs").to(weight.device)
        return asvd_factors(weight, mean_abs, rank, alpha=self.config.asvd_alpha, bias=bias)

    def _commuting_components(self) -> Components:
        if self.recipe is None or self.recipe.pairs is None:
            raise UnsupportedModelError(
                "its keys are not rotated: commuting factors are for keys with RoPE; use joint ones"
            )
        pairs, kind = self.recipe.pairs, self.statistics.key_kind(self.site.layer_idx)  # type: ignore[union-attr]
        gain = None
        if self.config.init == "fisher-pca":
            gain = fisher_gain(commuting_part(self._fisher(kind), pairs))
        elif self.config.init == "weighted-pca":
            gain = torch.diag(self._key_gain())
        mean, moment = self._moments(kind)
        # Left out of the latents only where there is a bias: that takes the positions of old tokens, and a bias can be
        # far larger than all else.
        return commuting_components(moment, pairs, gain, None if self.site.k.bias is None else mean).to(
            self.site.k.device
        )

    def _fisher(self, kind: str) -> Tensor:
        return shrunk(self._statistic(f"{kind}.fisher"), self.shrinkage)

    def _moments(self, kind: str) -> tuple[Tensor, Tensor]:
        """Return the mean and the second moment whose principal components are taken."""
        names = ["mean", "moment"]
        if self.config.init == "fisher-pca":
            names += ["coherent_mean", "coherent_moment"]
        found = [self._statistic(f"{kind}.{name}") for name in names]
        return mixed_moments(*found) if len(found) == 4 else (found[0], found[1])

    def _gain(self, kind: str) -> Tensor | None:
        if self.config.init == "fisher-pca":
            return fisher_gain(self._fisher(kind))
        if self.config.init != "weighted-pca":
            return None
        if kind == "v":
            weight = self.site.output_weight
            if weight is None:
                raise UnsupportedModelError("its output projection was not found, which weighted PCA needs; use 'pca'")
            return value_gain(weight, self.site.num_kv_heads, self.site.head_dim)
        gain = self._key_gain()
        if self.recipe is not None and self.recipe.keys.norm is not None:
            gain = before_norm(gain, self._statistic("k.moment"), self._statistic("key.moment"))
        return torch.diag(gain)

    def _key_gain(self) -> Tensor:
        pairs = None if self.recipe is None else self.recipe.pairs
        return key_gain(self._statistic("query.energy"), pairs, self.site.head_dim)

    def _statistic(self, name: str) -> Tensor:
        return self.statistics.get(self.site.layer_idx, name)  # type: ignore[union-attr]


def _conditioned(factors: Factors, config: CSKVConfig, kind: str, input_mean: Tensor | None) -> Factors:
    """Change to a basis that suits few bits, where few are spent: centred, rotated so that channels vary alike.

    Commuting keys stay as they are: a rotation would mix frequencies.
    """
    if config.bits(kind) == 16 or (kind == "k" and config.key_factors == "commuting"):
        return factors
    if input_mean is not None:
        factors = centred(factors, factors.latents(input_mean.to(factors.down)))
    return rotated(factors, hadamard_blocks(factors.rank // factors.groups).to(factors.down))
