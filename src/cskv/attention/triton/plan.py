"""Launch configurations of the Triton kernels, from shapes alone, so that a step can be captured in a CUDA graph.

The numbers are reasoned, and held against what the compiler makes of them (`python -m benchmarks.speed resources`), not
measured: tiles of 64 tokens, as Hopper's products have 64 rows; few registers spilled; enough programs for every
multiprocessor.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

MOST_ROWS = 64  # query rows of a program
MOST_COLUMNS = 256  # channels of the keys that a program rebuilds at a time
WIDEST = 256  # latents in a block, where they are too many to be kept
MOST_KEPT = 512  # latents of which a program keeps its part of U, or its sums
ACCUMULATOR = 2**14  # numbers in the sums of a program
PROGRAMS = 2  # per multiprocessor, of kernels that wait for memory
TILE, NARROW_TILE = 64, 16  # tokens, of numbers of 16 and of more bits
LEAST, LEAST_INT8 = 16, 32  # rows, tokens or channels of a product on tensor cores
LEAST_SUMS = 64  # rows of Hopper's
PIECES = 4
PRODUCTS = 2**25  # numbers of the products that wait in memory between two kernels


@dataclass(frozen=True)
class Pieces:
    """How a group's latents are cut for the kernels.

    Attributes:
        sizes: powers of two, one after the other; as many as `PIECES` at most.
        blocks: how many blocks of the first size there are instead, where it is more than 1.
    """

    sizes: tuple[int, ...]
    blocks: int = 1

    @property
    def total(self) -> int:
        """Latents, padding included, that are in use at a time."""
        return sum(self.sizes)

    def arguments(self, letter: str) -> dict[str, int]:
        """Return the kernels' constants of these."""
        return {f"{letter}{index}": size for index, size in enumerate((*self.sizes, 0, 0, 0, 0)[:PIECES])}


def cut(rank: int, least: int = LEAST) -> Pieces:
    """Cut channels into powers of two, `least` or more, with as little padding as three allow, or into blocks."""
    if rank > MOST_KEPT:
        return Pieces((WIDEST // 2,), -(-rank // (WIDEST // 2)))
    sizes, rest = list[int](), rank
    while rest > least and len(sizes) < 2:
        sizes.append(1 << (rest.bit_length() - 1))
        rest -= sizes[-1]
    if rest:
        sizes.append(padded(rest, least))
    whole = padded(rank, least)
    return Pieces((whole,)) if sum(sizes) >= whole else Pieces(tuple(sizes))


def whole(rank: int) -> Pieces:
    """Take channels in one piece, or in blocks."""
    if rank > MOST_KEPT:
        return Pieces((WIDEST,), -(-rank // WIDEST))
    return Pieces((padded(rank, LEAST_SUMS),))


def by_planes(plane_bytes: int, planes: int, least: int) -> Pieces:
    """Make a piece, of at least so many channels, of every plane of packed codes."""
    return Pieces((padded(plane_bytes, least),) * planes)


@dataclass(frozen=True)
class Shapes:
    """Problem sizes.

    Attributes:
        batch, groups: sequences, and head groups of the factors.
        rows: query rows of a group, heads times new tokens; those of a kv head are `head_rows`.
        tokens: of the compressed branch, a bound where the device knows the lengths.
        keys, values: how the latents of a group are cut.
        columns: padded channels of a head.
        packed: whether any latents are.
        in_int8: whether keys are rebuilt by 8-bit products.
        itemsize: bytes of a number.
    """

    batch: int
    groups: int
    rows: int
    head_rows: int
    tokens: int
    keys: Pieces
    values: Pieces
    columns: int
    packed: bool
    in_int8: bool = False
    itemsize: int = 2

    @property
    def lines(self) -> int:
        """Query rows of a sequence."""
        return self.groups * self.rows


@dataclass(frozen=True)
class Plan:
    """Launch configuration of one kernel.

    Attributes:
        rows: query rows of a program, of which there are `row_blocks`: per group in `partials`, in `scores` per block
            of `heads` kv heads.
        tile: tokens at a time.
        splits: ranges of tokens.
        warps, stages: Triton's `num_warps`, and how many tiles are in shared memory at a time.
        heads: kv heads of a program of `scores`.
    """

    rows: int
    row_blocks: int
    tile: int
    splits: int
    warps: int
    stages: int
    heads: int = 1


def plan_scores(shapes: Shapes, multiprocessors: int) -> Plan:
    """Plan the products with rebuilt keys: each program keeps U of its heads, so there are few, with many tokens."""
    heads, kv_heads = 1, shapes.lines // shapes.head_rows
    of_group = kv_heads // shapes.groups
    takes_registers = shapes.packed or shapes.in_int8
    most = MOST_COLUMNS // 2 if takes_registers else MOST_COLUMNS
    if shapes.itemsize <= 2 and shapes.keys.blocks == 1:
        heads = max(
            count
            for count in range(1, of_group + 1)
            if of_group % count == 0
            and count & (count - 1) == 0
            and (count == 1 or (count * shapes.columns <= most and count * shapes.head_rows <= MOST_ROWS))
        )
    rows = min(padded(heads * shapes.head_rows), MOST_ROWS)
    row_blocks = -(-heads * shapes.head_rows // rows)
    tile = TILE if shapes.itemsize <= 2 else NARROW_TILE
    programs = shapes.batch * kv_heads // heads * row_blocks
    splits = ranges(shapes.tokens, tile, multiprocessors * (PROGRAMS if shapes.in_int8 else 1) // programs)
    return Plan(rows, row_blocks, tile, splits, 8 if heads * shapes.columns > 128 else 4, 2, heads)


def plan_partials(shapes: Shapes, multiprocessors: int) -> Plan:
    """Plan the sums of value latents."""
    row_blocks = -(-shapes.rows // min(MOST_ROWS, max(LEAST, ACCUMULATOR // shapes.values.total)))
    rows = -(-shapes.rows // row_blocks)
    wide = padded(rows) * shapes.values.total > ACCUMULATOR // 2 or (shapes.packed and shapes.values.total > 64)
    tile = TILE if shapes.itemsize <= 2 else NARROW_TILE
    programs = shapes.batch * shapes.groups * row_blocks * shapes.values.blocks
    splits = ranges(shapes.tokens, tile, PROGRAMS * multiprocessors // programs)
    return Plan(rows, row_blocks, tile, splits, 8 if wide else 4, 2)


def smaller(plan: Plan) -> Plan | None:
    """Return a plan that needs less shared memory; None where there is none."""
    if plan.stages > 1:
        return replace(plan, stages=plan.stages - 1)
    if plan.heads > 1:
        heads = plan.heads // 2
        return replace(plan, heads=heads, rows=max(LEAST, plan.rows // 2))
    if plan.tile > LEAST:
        return replace(plan, tile=plan.tile // 2)
    return None


def ranges(tokens: int, tile: int, most: int) -> int:
    """Count ranges of whole tiles: at most so many, and none of them empty."""
    tiles = -(-tokens // tile)
    return -(-tiles // -(-tiles // max(1, min(most, tiles))))


def padded(size: int, least: int = LEAST) -> int:
    """Return the power of two that a block of a kernel needs for so many."""
    return max(least, 1 << (size - 1).bit_length())
