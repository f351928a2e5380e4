"""What every latent of every projection loses at every width, in nats per token, and the adapters that follow from it.

All adapters are slices of the same full-rank factors. See `cskv.compression.budget`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cskv.adapter.adapter import CSKVAdapter
from cskv.calibration.hooks import Teacher
from cskv.calibration.statistics import Statistics
from cskv.compression.initialise import Factorisation, Part
from cskv.config import CSKVConfig
from cskv.errors import ConfigError
from cskv.factorization.basis import ordered
from cskv.factorization.factors import Factors, LayerFactors
from cskv.models.evaluation_mode import evaluation_mode
from cskv.models.survey import Survey
from cskv.quantization.grid import Grid
from cskv.quantization.widths import CHOICES, RANKS, Losses, choose_widths, runs_of, width_errors

BITS_16 = 16  # of a key or value channel of the uncompressed cache
ROUNDS = 12  # of finding the bits at which codes that do not fill their last byte take no more than the ratio
OnProgress = Callable[[str, int, int], None]  # (stage, done, in all)


class LossTable:
    """What every latent of every projection loses at every width, and the adapters that follow from it.

    Args:
        surveyed: the base model.
        config, statistics, ranks_only: as for `allocate`.
        shrinkage: of Fisher information towards its diagonal.
    """

    def __init__(
        self, surveyed: Survey, config: CSKVConfig, statistics: Statistics, ranks_only: bool, shrinkage: float
    ) -> None:
        self._surveyed = surveyed
        plain = replace(config, k_density=1.0, v_density=1.0)
        self._config = replace(plain, mixed_widths=True)
        self._components = Factorisation(surveyed, plain, statistics, shrinkage).components()
        grouped = config.head_groups > 1
        self._plain = {
            part
            for part in self._components
            if ranks_only or grouped or (part[1] == "k" and config.key_factors == "commuting")
        }
        self._losses = {part: self._of_ranks(part) for part in self._components}

    @cached_property
    def uncompressed_bytes(self) -> float:
        """Bytes of a token's keys and values in 16 bits, over all layers."""
        return sum(own.factors.kv_dim for own in self._components.values()) * BITS_16 / 8

    @cached_property
    def least_ratio(self) -> float:
        """The least ratio that keeps a latent of every projection."""
        bits = sum(own.step * float(own.costs()[1]) for own in self._losses.values())
        return min(1.0, 1.05 * bits / (8 * self.uncompressed_bytes))

    def measure(self, samples: Sequence[Int[Tensor, " tokens"]], say: OnProgress) -> None:
        """Measure the squared errors of latents in few bits; the gain makes them nats."""
        factors = {part: own.factors for part, own in self._components.items() if part not in self._plain}
        if not factors:
            return
        errors: dict[Part, Tensor] = {}
        sinks, stage = self._config.sinks, "measuring widths"
        for done, (part, latents) in enumerate(observe_latents(self._surveyed, factors, samples)):
            own = width_errors(latents[:, sinks:], self._config.block(part[1])).cpu() / len(samples)
            errors[part] = errors[part] + own if part in errors else own
            say(stage, done + 1, len(factors) * len(samples))
        for part, table in errors.items():
            table *= self._components[part].unit
            table[:, 0] = self._components[part].spectrum
            self._losses[part] = Losses(table, CHOICES, self._config.block(part[1]))

    def adapter(self, ratio: float) -> CSKVAdapter:
        """Make the adapter of least loss whose bytes are within the ratio.

        Raises:
            ConfigError: the ratio keeps no latent of some projection.
        """
        limit = ratio * 8 * self.uncompressed_bytes
        low, high, kept = 0.0, 2 * limit, None
        for _ in range(ROUNDS):  # codes that do not fill their last byte take more than their bits
            bits = (low + high) / 2
            try:
                tried = choose_widths(self._losses, bits)
            except ConfigError:
                low = bits
                continue
            if sum(self._bits(part, widths) for part, widths in tried.items()) <= limit:
                kept, low = tried, bits
            else:
                high = bits
        if kept is None:
            raise ConfigError(f"no choice of widths takes {ratio:.3g} of the bytes; raise the budget")
        return self._cut(self._promoted(kept, limit))

    def _promoted(self, widths: Mapping[Part, Tensor], limit: float) -> dict[Part, Tensor]:
        """Spend what is left where all is as wide as grids go: whole projections in 16 bits, since grids end at 8."""
        found = dict(widths)
        left = limit - sum(self._bits(part, own) for part, own in found.items())
        packed = [part for part in found if part not in self._plain and int(found[part].min()) == max(CHOICES)]
        for part in sorted(packed, key=lambda part: self._losses[part].of(found[part]), reverse=True):
            wide = torch.full_like(found[part], BITS_16)
            more = self._bits(part, wide) - self._bits(part, found[part])
            if more <= left:
                found[part], left = wide, left - more
        return found

    def _cut(self, widths: Mapping[Part, Tensor]) -> CSKVAdapter:
        """Cut factors of these widths out of the full-rank ones."""
        cut, runs = {}, {}
        for part, own in widths.items():
            components = self._components[part]
            if part in self._plain or int(own.max()) == BITS_16:
                cut[part] = components.truncated(int(own.count_nonzero())).clone()
                continue
            kept, runs[part] = runs_of(own)
            cut[part] = ordered(components.factors, kept.to(components.factors.down.device)).clone()
        layers = {index: LayerFactors(cut[index, "k"], cut[index, "v"]) for index, kind in cut if kind == "k"}
        k_density, v_density = (
            sum(getattr(own, kind).rank for own in layers.values())
            / sum(getattr(own, kind).kv_dim for own in layers.values())
            for kind in ("k", "v")
        )
        config = replace(self._config, k_density=k_density, v_density=v_density, mixed_widths=bool(runs))
        return CSKVAdapter(config, layers, self._surveyed.base, widths=runs)

    def _of_ranks(self, part: Part) -> Losses:
        """Return the losses of a projection whose latents are dropped or stay in 16 bits."""
        spectrum = self._components[part].spectrum
        commuting = part[1] == "k" and self._config.key_factors == "commuting"
        step = 2 if commuting else self._config.head_groups
        return Losses(torch.stack([spectrum, torch.zeros_like(spectrum)], 1), RANKS, step=step)

    def _bits(self, part: Part, widths: Tensor) -> float:
        """Count the bits per token of a projection's latents as they are stored."""
        if part in self._plain or int(widths.max()) == BITS_16:
            return float(BITS_16 * widths.count_nonzero())
        grid = Grid(runs_of(widths)[1], *self._config.block(part[1]))
        return grid.rank * grid.bits_per_latent


def observe_latents(
    surveyed: Survey, factors: Mapping[Part, Factors], samples: Sequence[Int[Tensor, " tokens"]]
) -> Iterator[tuple[Part, Float[Tensor, "1 tokens rank"]]]:
    """Yield the latents of keys and values, one sample and one projection at a time, in fp32.

    Args:
        surveyed: the base model, nothing attached.
        factors: of the projections to observe, which read the layer's input.
        samples: token ids without padding.
    """
    teacher = Teacher(surveyed.model, surveyed.sites)
    with torch.no_grad(), evaluation_mode(surveyed.model), teacher.watching():
        for sample in samples:
            seen = teacher.observe(sample[None])
            for part, own in factors.items():
                x = seen[part[0]].x
                yield part, own.to(x.device, torch.float32).latents(x.float())
