"""A width for every latent channel from one budget of bits: reverse water-filling on measured errors.

For a Gaussian source the best widths are max(0, 1/2 log2(variance / D)): the same error D in every channel that is
kept, and none kept that varies less. Real latents on real grids are near that but not it, so the error of every channel
at every width is measured, and the sum of errors is minimised under a sum of bits: for a price per bit, every channel
takes the width of least error plus price, and the price is raised until the bits fit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cskv.errors import ConfigError
from cskv.quantization.fake import read_back
from cskv.quantization.grid import PARAMETER_DTYPE, Grid

Key = TypeVar("Key")
CHOICES = (0, 2, 3, 4, 5, 6, 8)  # 0 drops the channel
HALVINGS = 60  # of the interval of prices


def width_errors(
    latents: Float[Tensor, "batch tokens rank"], block: tuple[int, int], choices: Sequence[int] = CHOICES
) -> Float[Tensor, "rank choices"]:
    """The mean squared error of every channel at every width; at width 0 its mean square.

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


def choose_widths(
    errors: Mapping[Key, Tensor],
    block: Mapping[Key, tuple[int, int]],
    budget: float,
    choices: Sequence[int] = CHOICES,
) -> dict[Key, Tensor]:
    """The widths of least error within a budget.

    Args:
        errors: of every projection, (its rank, choices), in one unit.
        block: (tokens, channels) of every projection; a minimum and a scale of each block count as bits.
        budget: bits per token, all projections together.
        choices: the widths that the columns of `errors` stand for, from 0 up.

    Returns:
        bits per channel, 0 where it is dropped. Every projection keeps at least one channel.

    Raises:
        ConfigError: the budget does not give every projection a channel of the least width.
    """
    costs = {key: _costs(block[key], choices) for key in errors}
    least = sum(float(cost[1]) for cost in costs.values())
    if budget < least:
        raise ConfigError(
            f"a budget of {budget:.0f} bits per token does not give {len(errors)} projections one channel of "
            f"{choices[1]} bits each ({least:.0f}); raise the target ratio"
        )
    low, high = 0.0, max(float(table.max()) for table in errors.values())
    for _ in range(HALVINGS):
        price = (low + high) / 2
        picked = {key: _picked(table, costs[key], price) for key, table in errors.items()}
        spent = sum(float(costs[key][index].sum()) for key, index in picked.items())
        low, high = (price, high) if spent > budget else (low, price)
    widths = torch.tensor(choices)
    return {key: widths[_picked(table, costs[key], high)] for key, table in errors.items()}


def runs_of(widths: Int[Tensor, " rank"]) -> tuple[Int[Tensor, " kept"], tuple[tuple[int, int], ...]]:
    """The channels that are kept, widest first and otherwise in their order, and their runs of (bits, channels)."""
    order = widths.argsort(descending=True, stable=True)
    order = order[widths[order] > 0]
    return order, tuple((bits, len(list(run))) for bits, run in groupby(widths[order].tolist()))


def _costs(block: tuple[int, int], choices: Sequence[int]) -> Tensor:
    """Bits per token of a channel at every width, its share of a block's minimum and scale included."""
    parameters = 2 * 8 * PARAMETER_DTYPE.itemsize / (block[0] * block[1])
    return torch.tensor([bits + parameters if bits else 0.0 for bits in choices], dtype=torch.float64)


def _picked(errors: Tensor, costs: Tensor, price: float) -> Tensor:
    """For every channel the index of the width of least error plus price; one channel is kept in any case."""
    picked = (errors + price * costs).argmin(1)
    if not picked.any():
        picked[errors[:, 0].argmax()] = 1
    return picked
