"""Plans cover every row, latent and token once, at every size."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from cskv.attention.triton.plan import ACCUMULATOR, MOST_ROWS, Shapes, padded, plan, smaller

SIZES = st.integers(1, 5)
SHAPES = st.builds(
    lambda batch, groups, heads, head_rows, tokens, key_rank, value_rank, rotated, packed: Shapes(
        batch, groups, heads * head_rows, head_rows, tokens, key_rank, value_rank, rotated, packed
    ),
    SIZES, SIZES, SIZES, st.integers(1, 128), st.integers(1, 10**6), st.integers(1, 1024), st.integers(1, 1024),
    st.booleans(), st.booleans(),
)  # fmt: skip


@given(SHAPES, st.sampled_from([1, 2, 132]))
def test_everything_is_covered(shapes: Shapes, multiprocessors: int) -> None:
    made = plan(shapes, multiprocessors)
    while True:
        assert 0 < made.block_rows <= MOST_ROWS
        assert (made.row_blocks - 1) * made.block_rows < shapes.rows <= made.row_blocks * made.block_rows
        assert (made.splits - 1) * made.split_tokens < shapes.tokens <= made.splits * made.split_tokens
        assert made.split_tokens % made.tile == 0
        assert padded(made.block_rows) * made.value_block <= ACCUMULATOR
        less = smaller(made, shapes.tokens)
        if less is None:
            break
        made = less


@given(SHAPES)
def test_blocks_are_whole_kv_heads_where_keys_are_rebuilt(shapes: Shapes) -> None:
    if shapes.head_rows <= MOST_ROWS:
        assert plan(replace(shapes, rotated=True), 132).block_rows % shapes.head_rows == 0


def test_a_long_context_fills_a_device() -> None:
    made = plan(Shapes(1, 1, 32, 4, 32768, 208, 208, rotated=True, packed=False), 132)
    assert (made.block_rows, made.row_blocks) == (32, 1)
    assert 200 <= made.splits <= 264
