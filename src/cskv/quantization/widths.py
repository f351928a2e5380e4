"""A width for every latent channel from one budget of bits: reverse water-filling on measured losses.

For a Gaussian source the best widths are max(0, 1/2 log2(variance / D)): the same loss D in every channel that is kept,
and none kept that varies less. Real latents on real grids are near that but not it, so the loss of every channel at
every width is measured, and the sum of losses is minimised under a sum of bits: of all channels' next wider widths the
one that saves most per bit is taken, again and again, until the bits are spent. With the choices 0 and 16 that is a
choice of ranks: the largest eigenvalues are kept, wherever they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cskv.errors import ConfigError
from cskv.quantization.fake import read_back
from cskv.quantization.grid import PARAMETER_DTYPE, Grid

Key = TypeVar("Key")
CHOICES = (0, 2, 3, 4, 5, 6, 7, 8)  # 0 drops the channel
RANKS = (0, 16)  # the choices where no latent is quantised


@dataclass(frozen=True)
class Losses:
    """What every channel of a projection loses at every width.

    Attributes:
        table: in one unit for all projections.
        choices: the widths in bits that the columns stand for, from 0 up.
        block: (tokens, channels) that share a minimum and a scale, whose bits count.
        step: neighbours that get the same width (latents of head groups, pairs of commuting keys).
    """

    table: Float[Tensor, "rank choices"]
    choices: tuple[int, ...]
    block: tuple[int, int] = (1, 1)
    step: int = 1

    def of(self, widths: Int[Tensor, " rank"]) -> float:
        """Sum the losses at given widths."""
        columns = torch.searchsorted(torch.tensor(self.choices), widths)
        return float(self.table.gather(1, columns[:, None]).sum())

    def costs(self) -> Float[Tensor, " choices"]:
        """Count the bits per token of a channel at every width, its share of a block's minimum and scale included."""
        parameters = 2 * 8 * PARAMETER_DTYPE.itemsize / (self.block[0] * self.block[1])
        bits = [width + parameters if 0 < width < 16 else width for width in self.choices]
        return torch.tensor(bits, dtype=torch.float64)


def width_errors(
    latents: Float[Tensor, "batch tokens rank"], block: tuple[int, int], choices: Sequence[int] = CHOICES
) -> Float[Tensor, "rank choices"]:
    """Measure the mean squared error of every channel at every width; at width 0 its mean square.

    Args:
        latents: centred ones; a channel that is dropped is read as 0.
        block: (tokens, channels), as the latents will be stored; neighbours share a block.
        choices: widths in bits.
    """
    rank = latents.shape[-1]
    columns = []
    for bits in choices:
        read = read_back(latents, Grid.uniform(rank, bits, block)) if bits else torch.zeros_like(latents)
        columns.append((read - latents).double().square().mean((0, 1)))
    return torch.stack(columns, dim=1)


def choose_widths(losses: Mapping[Key, Losses], budget: float) -> dict[Key, Int[Tensor, " rank"]]:
    """Choose the widths of least loss within a budget.

    Args:
        losses: of every projection, in one unit.
        budget: bits per token, all projections together.

    Returns:
        bits per channel, 0 where it is dropped. Every projection keeps at least one step.

    Raises:
        ConfigError: the budget does not give every projection a step of the least width.
    """
    by_key = {key: _widenings(own.table, own.step, own.step * own.costs()) for key, own in losses.items()}
    savings, costs = (torch.cat([found[i].flatten() for found in by_key.values()]) for i in (0, 1))
    if (least := float(costs[savings.isposinf()].sum())) > budget:
        raise ConfigError(
            f"a budget of {budget:.0f} bits per token does not keep a latent of each of {len(losses)} projections, "
            f"which takes {least:.0f}; raise it"
        )
    order = savings.argsort(descending=True, stable=True)
    order = order[savings[order] >= 0]
    taken = torch.zeros(len(savings), dtype=torch.bool)
    taken[order[costs[order].cumsum(0) <= budget]] = True
    widths, start = {}, 0
    for key, (saving, _, to) in by_key.items():
        own = taken[start : start + saving.numel()].view_as(saving)
        chosen = torch.tensor(losses[key].choices)[torch.where(own, to, 0).amax(0)]
        widths[key] = chosen.repeat_interleave(losses[key].step)
        start += saving.numel()
    return widths


def runs_of(widths: Int[Tensor, " rank"]) -> tuple[Int[Tensor, " kept"], tuple[tuple[int, int], ...]]:
    """Return the channels that are kept, widest first and otherwise in their order, and their (bits, channels) runs."""
    order = widths.argsort(descending=True, stable=True)
    order = order[widths[order] > 0]
    return order, tuple((bits, len(list(run))) for bits, run in groupby(widths[order].tolist()))


def _widenings(errors: Tensor, step: int, costs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Find the widths worth having, from 0 up: those on the lower convex hull of every channel's errors over costs.

    Returns:
        error saved per bit, bits, and the index of the new width, each (widenings, channels). The saving falls along
        the first dimension, is negative where nothing is left to gain, and infinite for the first of the best channel,
        which is kept in any case.
    """
    # Of each step of neighbours; channels beyond the last whole step are never kept.
    errors = errors.double()[: len(errors) // step * step].unflatten(0, (-1, step)).sum(1)
    at = torch.zeros(len(errors), 1, dtype=torch.long)
    steps = []
    for _ in costs[1:]:
        more = costs - costs[at]
        saved = (errors.gather(1, at) - errors) / more
        saving, to = torch.where(more > 0, saved, -torch.inf).max(1, keepdim=True)
        steps.append((saving, more.gather(1, to), to))
        at = to
    savings, bits, to = (torch.stack(column)[..., 0] for column in zip(*steps, strict=True))
    savings = savings.cummin(0).values  # rounding aside it falls already
    savings[0, savings[0].argmax()] = torch.inf
    return savings, bits, to
