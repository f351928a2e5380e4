"""Plans cover every row, latent and token once, at every size."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cskv.attention.triton.plan import (
    ACCUMULATOR,
    MOST_COLUMNS,
    MOST_ROWS,
    PIECES,
    Pieces,
    Shapes,
    by_planes,
    cut,
    padded,
    plan_partials,
    plan_scores,
    ranges,
    smaller,
    whole,
)

SIZES = st.integers(1, 5)
SHAPES = st.fixed_dictionaries({
    "batch": SIZES, "groups": SIZES, "heads": SIZES, "head_rows": st.integers(1, 128), "tokens": st.integers(1, 10**6),
    "key_rank": st.integers(1, 1024), "value_rank": st.integers(1, 1024), "columns": st.sampled_from([32, 128, 256]),
    "packed": st.booleans(), "itemsize": st.sampled_from([2, 4]),
})  # fmt: skip


def shapes_of(heads: int, key_rank: int, value_rank: int, **sizes: int) -> Shapes:
    cuts = {"keys": cut(key_rank), "values": whole(value_rank)}
    return Shapes(rows=heads * sizes["head_rows"], **cuts, **sizes)  # type: ignore[arg-type]


@given(SHAPES, st.sampled_from([1, 2, 132]))
def test_sums_cover_every_row_and_token(sizes: dict, multiprocessors: int) -> None:
    shapes = shapes_of(**sizes)
    made = plan_partials(shapes, multiprocessors)
    while made is not None:
        assert 0 < made.rows <= MOST_ROWS
        assert (made.row_blocks - 1) * made.rows < shapes.rows <= made.row_blocks * made.rows
        assert 1 <= made.splits <= max(1, -(-shapes.tokens // 16))
        assert padded(made.rows) * shapes.values.total <= ACCUMULATOR
        made = smaller(made)  # type: ignore[assignment]


@given(SHAPES, st.sampled_from([1, 2, 132]))
def test_products_cover_every_row_of_whole_heads(sizes: dict, multiprocessors: int) -> None:
    shapes = shapes_of(**sizes)
    made = plan_scores(shapes, multiprocessors)
    of_group = shapes.rows // shapes.head_rows
    while made is not None:
        assert of_group % made.heads == 0
        assert made.heads == 1 or made.heads * shapes.columns <= MOST_COLUMNS
        assert made.row_blocks * made.rows >= made.heads * shapes.head_rows
        assert made.rows == padded(made.rows) <= MOST_ROWS
        made = smaller(made)  # type: ignore[assignment]


@given(st.integers(1, 2000))
def test_pieces_hold_every_latent(rank: int) -> None:
    for made in (cut(rank), whole(rank)):
        assert made.total * made.blocks >= rank
        assert len(made.sizes) <= PIECES
        assert all(size == padded(size) for size in made.sizes)
        assert made.blocks == 1 or len(made.sizes) == 1


def test_pieces_leave_out_what_a_power_of_two_would_add() -> None:
    assert cut(208) == Pieces((128, 64, 16))  # and not 256
    assert cut(52) == Pieces((64,))  # 32 + 16 + 16 are as many
    assert cut(1024) == Pieces((128,), 8)
    assert whole(208) == Pieces((256,))
    assert by_planes(104, 2, 64) == Pieces((128, 128))
    assert by_planes(12, 2, 32) == Pieces((32, 32))  # 8-bit products take no fewer


@given(st.integers(1, 10**6), st.sampled_from([16, 64]), st.integers(0, 500))
def test_ranges_of_whole_tiles_are_never_empty(tokens: int, tile: int, most: int) -> None:
    found = ranges(tokens, tile, most)
    tiles = -(-tokens // tile)
    each = -(-tiles // found) * tile
    assert 1 <= found <= max(1, most)
    assert (found - 1) * each < tokens <= found * each


def test_a_long_context_fills_a_device() -> None:
    shapes = Shapes(1, 1, 32, 4, 65536, cut(208), whole(208), 128, packed=False)
    assert plan_scores(shapes, 132).heads == 2
    assert plan_scores(shapes, 132).splits == 32  # four blocks of heads: 128 programs
    assert plan_partials(shapes, 132).splits == 256
