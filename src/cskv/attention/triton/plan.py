"""Launch configurations of the Triton kernels, from shapes alone, so that a step can be captured in a CUDA graph.

The numbers are reasoned, not measured: enough programs for every multiprocessor to hold two, tiles that fit in shared
memory twice (one is loaded as the other is used), accumulators of at most 64 registers a thread.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

MOST_ROWS = 64  # of a program
MOST_KEY_BLOCK = 256
MOST_VALUE_BLOCK = 512
ACCUMULATOR = 2**14  # numbers in the sums of a program
WIDE_TILE = 2**13  # numbers in a tile of latents from which on 8 warps share it
PROGRAMS = 2  # per multiprocessor
LEAST = 16  # rows, tokens or channels of a product on tensor cores


@dataclass(frozen=True)
class Shapes:
    """Problem sizes.

    Attributes:
        batch, groups: sequences, and head groups of the factors.
        rows: query rows of a group, heads times new tokens; those of a kv head are `head_rows`.
        tokens: of the compressed branch.
        key_rank, value_rank: of one group.
        rotated: whether keys are rebuilt.
        packed: whether any latents are.
        itemsize: bytes of a number.
    """

    batch: int
    groups: int
    rows: int
    head_rows: int
    tokens: int
    key_rank: int
    value_rank: int
    rotated: bool
    packed: bool
    itemsize: int = 2


@dataclass(frozen=True)
class Plan:
    """Launch configuration.

    Attributes:
        block_rows: query rows of a program, of which there are `row_blocks` per group.
        tile: tokens at a time.
        key_block, value_block: latents at a time.
        splits: ranges of tokens, of `split_tokens` each.
        warps, stages: Triton's `num_warps` and `num_stages`.
    """

    block_rows: int
    row_blocks: int
    tile: int
    key_block: int
    value_block: int
    splits: int
    split_tokens: int
    warps: int
    stages: int


def plan(shapes: Shapes, multiprocessors: int) -> Plan:
    """Return a plan for a device with as many multiprocessors."""
    tile = 32 if (shapes.packed and not shapes.rotated) or shapes.itemsize > 2 else 64
    tiles = -(-shapes.tokens // tile)
    block_rows = _block_rows(shapes)
    if shapes.rotated:  # short contexts: heads, which are rebuilt one after another, to programs of their own
        while block_rows > shapes.head_rows and (
            shapes.batch * shapes.groups * -(-shapes.rows // block_rows) * tiles < multiprocessors
        ):
            block_rows = -(-block_rows // shapes.head_rows // 2) * shapes.head_rows
    value_block = min(padded(shapes.value_rank), MOST_VALUE_BLOCK, ACCUMULATOR // padded(block_rows))
    key_block = min(padded(shapes.key_rank), MOST_KEY_BLOCK)
    row_blocks = -(-shapes.rows // block_rows)
    wide = shapes.rotated or tile * max(key_block, value_block) >= WIDE_TILE
    of_a_split = shapes.batch * shapes.groups * row_blocks * -(-shapes.value_rank // value_block)
    whole = Plan(block_rows, row_blocks, tile, key_block, value_block, 1, tiles * tile, 8 if wide else 4, 2)
    return split(whole, shapes.tokens, -(-PROGRAMS * multiprocessors // of_a_split))


def smaller(plan: Plan, tokens: int) -> Plan | None:
    """Return a plan that needs less shared memory; None where there is none."""
    if plan.stages > 1:
        return replace(plan, stages=plan.stages - 1)
    if plan.tile > LEAST:
        return split(replace(plan, tile=plan.tile // 2), tokens, plan.splits)
    return None


def split(plan: Plan, tokens: int, splits: int) -> Plan:
    """Split the tokens into at most `splits` ranges of whole tiles, none of them empty."""
    tiles = -(-tokens // plan.tile)
    of_each = -(-tiles // max(1, min(splits, tiles)))
    return replace(plan, splits=-(-tiles // of_each), split_tokens=of_each * plan.tile)


def padded(size: int) -> int:
    """Return the power of two that a block of a kernel needs for so many."""
    return max(LEAST, 1 << (size - 1).bit_length())


def _block_rows(shapes: Shapes) -> int:
    """Count the rows of a program: even blocks, and whole kv heads where keys are rebuilt and one fits."""
    unit = shapes.head_rows if shapes.rotated and shapes.head_rows <= MOST_ROWS else 1
    units, most = shapes.rows // unit, MOST_ROWS // unit
    return -(-units // -(-units // most)) * unit
