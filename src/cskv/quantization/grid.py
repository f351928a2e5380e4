"""The grid on which latents are stored: blocks of tokens by channels, each with a minimum and a step of its own.

A block's values x become codes q = round((x - minimum) / scale), 0 to 2**bits - 1, and are read as minimum + scale * q.
The minimum is that of the block and not clamped, so that values that share a sign keep all levels. Both are stored in
bfloat16, which has the range of fp32: the minimum is rounded down and the scale up, so that no value lies outside.

KIVI's layout (arXiv 2402.02750) is keys in blocks of (group, 1), "per channel", and values in blocks of (1, 32), "per
token". A block of (1, rank) is one grid for a whole token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import BFloat16, Float, UInt8
from torch import Tensor

from cskv.config import CSKVConfig
from cskv.errors import ConfigError
from cskv.quantization.packing import WIDTHS, pack, row_bytes, unpack
from cskv.scratch import Scratch

PARAMETER_DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Grid:
    """The widths and blocks in which the latents of one projection are stored.

    Attributes:
        widths: runs of (bits, channels), in the order of the latents. No block crosses a run.
        block_tokens, block_channels: the size of a block. The last of a run, and of the tokens, may be smaller.
        runs: (bits, channels, payload bytes) of every run, the last two as slices.
        rank: latents per token, the sum of the runs' channels.
        row_bytes: bytes of one token's codes.
        channel_blocks: blocks side by side along the channels.

    Raises:
        ConfigError: a width or a size is out of range.
    """

    widths: tuple[tuple[int, int], ...]
    block_tokens: int
    block_channels: int
    # Derived once: every read asks for them, in every layer and step.
    runs: tuple[tuple[int, slice, slice], ...] = field(init=False, repr=False, compare=False)
    rank: int = field(init=False, repr=False, compare=False)
    row_bytes: int = field(init=False, repr=False, compare=False)
    channel_blocks: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.widths or any(bits not in WIDTHS or channels < 1 for bits, channels in self.widths):
            raise ConfigError(f"widths are {self.widths!r}; expected runs of (1 to 8 bits, at least 1 channel)")
        if self.block_tokens < 1 or self.block_channels < 1:
            raise ConfigError(f"a block is {self.block_tokens} x {self.block_channels}; expected at least 1 x 1")
        runs, channel, byte, blocks = [], 0, 0, 0
        for bits, channels in self.widths:
            runs.append((bits, slice(channel, channel + channels), slice(byte, byte + row_bytes(channels, bits))))
            channel, byte = runs[-1][1].stop, runs[-1][2].stop
            blocks += -(-channels // self.block_channels)
        derived = {"runs": tuple(runs), "rank": channel, "row_bytes": byte, "channel_blocks": blocks}
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    @classmethod
    def uniform(cls, rank: int, bits: int, block: tuple[int, int]) -> Grid:
        """Make a grid of one width for all latents, in blocks of (tokens, channels)."""
        return cls(((bits, rank),), *block)

    @classmethod
    def from_config(
        cls, config: CSKVConfig, kind: str, rank: int, widths: tuple[tuple[int, int], ...] | None
    ) -> Grid | None:
        """Make the grid of `rank` latents of keys ("k") or values ("v"); None where they stay in the model's dtype.

        `widths` are the layer's own, used where the settings mix them.
        """
        if config.mixed_widths and widths is not None:
            return cls(widths, *config.block(kind))
        bits = config.bits(kind)
        return None if bits == 16 else cls.uniform(rank, bits, config.block(kind))

    @property
    def bits_per_latent(self) -> float:
        """Bits of codes, minima and scales, per latent of full blocks."""
        parameters = 2 * 8 * PARAMETER_DTYPE.itemsize * self.channel_blocks / self.block_tokens
        return (8 * self.row_bytes + parameters) / self.rank

    @property
    def block_of(self) -> tuple[int, ...]:
        """The channel block of every channel."""
        blocks: list[int] = []
        for _, channels in self.widths:
            first = blocks[-1] + 1 if blocks else 0
            blocks += [first + channel // self.block_channels for channel in range(channels)]
        return tuple(blocks)


class Quantised(NamedTuple):
    """Latents on their grid: the packed codes of tokens, and the scale and the minimum of every block."""

    payload: UInt8[Tensor, "batch tokens bytes"]
    scales: BFloat16[Tensor, "batch token_blocks channel_blocks"]
    minima: BFloat16[Tensor, "batch token_blocks channel_blocks"]


def quantise(latents: Float[Tensor, "batch tokens rank"], grid: Grid) -> Quantised:
    """Put latents on the grid. The first token begins a block; the last block may be short.

    Args:
        latents: any floating dtype; computed in fp32.
        grid: of the same rank.
    """
    payload, scales, minima = [], [], []
    for bits, channels, _ in grid.runs:
        blocks = to_blocks(latents[..., channels].float(), grid)
        scale, minimum = block_parameters(blocks, 2**bits - 1)
        codes = from_blocks(block_codes(blocks, scale, minimum, 2**bits - 1), grid, latents[..., channels].shape)
        payload.append(pack(codes.to(torch.uint8), bits))
        scales.append(scale)
        minima.append(minimum)
    return Quantised(torch.cat(payload, dim=-1), torch.cat(scales, dim=-1), torch.cat(minima, dim=-1))


def dequantise(
    payload: UInt8[Tensor, "batch tokens bytes"],
    scales: BFloat16[Tensor, "batch token_blocks channel_blocks"],
    minima: BFloat16[Tensor, "batch token_blocks channel_blocks"],
    grid: Grid,
    token_block: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    scratch: Scratch | None = None,
) -> Float[Tensor, "batch tokens rank"]:
    """Read latents from the grid: minimum + scale * code in fp32, rounded once to `dtype`.

    Args:
        payload, scales, minima: as `quantise` gave them, or rows of them.
        grid: the same.
        token_block: (tokens,) the row of `scales` and `minima` that holds for each token; None counts blocks of
            `grid.block_tokens` from the first token on.
        dtype: any floating dtype.
        scratch: for the result and all intermediates; the result is valid until the scratch is used again.
    """
    scratch = Scratch() if scratch is None else scratch
    # In bfloat16, codes and parameters are exact and addcmul computes in fp32 inside: the same result from half the
    # bytes.
    computed = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    batch, tokens, _ = payload.shape
    codes = scratch.take("codes", (batch, tokens, grid.rank), torch.uint8, payload.device)
    for bits, channels, own in grid.runs:
        unpack(payload[..., own], bits, codes[..., channels])
    values = scratch.take("values", codes.shape, computed, payload.device).copy_(codes)
    rows = grid.block_tokens  # that share parameters
    if token_block is not None or tokens % rows:
        token_block = torch.arange(tokens, device=payload.device) // rows if token_block is None else token_block
        scales, minima, rows = scales[:, token_block], minima[:, token_block], 1
    scales, minima = scales[:, : tokens // rows], minima[:, : tokens // rows]
    if grid.channel_blocks == grid.rank:
        scale, minimum = scales.to(computed), minima.to(computed)
    else:
        shape = (*scales.shape[:2], grid.rank)
        scale = _by_channel(scales, grid, scratch.take("scale", shape, computed, scales.device))
        minimum = _by_channel(minima, grid, scratch.take("minimum", shape, computed, minima.device))
    blocks = values.view(batch, tokens // rows, rows, grid.rank)
    torch.addcmul(minimum[:, :, None], blocks, scale[:, :, None], out=blocks)
    return values.to(dtype)


def _by_channel(parameters: Tensor, grid: Grid, out: Tensor) -> Tensor:
    """Repeat the parameters of channel blocks, (batch, rows, channel_blocks), for every channel of each."""
    size, block = grid.block_channels, 0
    for _, channels, _ in grid.runs:
        whole, rest = divmod(channels.stop - channels.start, size)
        own = out[..., channels]
        if whole:
            own[..., : whole * size].unflatten(-1, (whole, size)).copy_(parameters[..., block : block + whole, None])
        if rest:
            own[..., whole * size :] = parameters[..., block + whole, None]
        block += whole + bool(rest)
    return out


def to_blocks(values: Float[Tensor, "batch tokens channels"], grid: Grid) -> Float[Tensor, "batch rows columns block"]:
    """Lay the values of every block side by side. Short blocks are padded with their last token and channel."""
    rows, columns = (-(-values.shape[i] // size) for i, size in ((1, grid.block_tokens), (2, grid.block_channels)))
    values = _repeat_last(values, 1, rows * grid.block_tokens)
    values = _repeat_last(values, 2, columns * grid.block_channels)
    blocks = values.unflatten(2, (columns, grid.block_channels)).unflatten(1, (rows, grid.block_tokens))
    return blocks.transpose(2, 3).flatten(3)


def from_blocks(blocks: Tensor, grid: Grid, shape: torch.Size) -> Tensor:
    """Undo `to_blocks`, for values of this shape."""
    values = blocks.unflatten(3, (grid.block_tokens, grid.block_channels)).transpose(2, 3).flatten(3).flatten(1, 2)
    return values[:, : shape[1], : shape[2]]


def block_parameters(
    blocks: Float[Tensor, "batch rows columns block"], levels: int
) -> tuple[BFloat16[Tensor, "batch rows columns"], BFloat16[Tensor, "batch rows columns"]]:
    """Return the scale and the minimum of every block as they are stored: no value lies outside their range."""
    minimum = _rounded(blocks.amin(-1), up=False)
    spread = blocks.amax(-1) - minimum.float()
    # By a tensor: on a GPU, torch multiplies by the inverse of a number instead, and the bits differ from a CPU's.
    scale = _rounded(spread / torch.full_like(spread, levels), up=True)
    return scale, minimum


def block_codes(
    blocks: Float[Tensor, "batch rows columns block"],
    scale: BFloat16[Tensor, "batch rows columns"],
    minimum: BFloat16[Tensor, "batch rows columns"],
    levels: int,
) -> Float[Tensor, "batch rows columns block"]:
    """Return the code of every value, a whole number. A block without spread has codes 0."""
    step = scale.float()[..., None]
    codes = ((blocks - minimum.float()[..., None]) / torch.where(step > 0, step, torch.ones_like(step))).round()
    return codes.clamp(0, levels)


def _rounded(values: Tensor, *, up: bool) -> Tensor:
    """Round to the parameters' dtype in one direction."""
    rounded = values.to(PARAMETER_DTYPE)
    limit = torch.full_like(rounded, float("inf") if up else -float("inf"))
    missed = rounded.float() < values if up else rounded.float() > values
    return torch.where(missed, torch.nextafter(rounded, limit), rounded)


def _repeat_last(values: Tensor, dim: int, size: int) -> Tensor:
    missing = size - values.shape[dim]
    if not missing:
        return values
    last = values.narrow(dim, values.shape[dim] - 1, 1)
    return torch.cat([values, last.expand(*(missing if i == dim else -1 for i in range(values.ndim)))], dim)
