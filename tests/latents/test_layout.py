"""Where tokens of padded rows lie, counted by hand."""

from __future__ import annotations

from cskv.latents.layout import Layout, Row


def test_columns_of_both_branches() -> None:
    """Rows of 10 and 6 tokens, two sinks each, four and two of them sealed."""
    layout = Layout((Row(0, 4), Row(4, 2)), 10, 2)
    assert layout.sealed_columns().tolist() == [[2, 3, 4, 5], [6, 7, -1, -1]]
    assert layout.exact_columns().tolist() == [[0, 1, 6, 7, 8, 9], [4, 5, 8, 9, -1, -1]]


def test_a_cut_block_leaves_its_places_empty() -> None:
    """Blocks of four: five sealed tokens were cropped to three, and three more sealed."""
    layout = Layout((Row(1, 5),), 8, 1, align=4).cropped(5)
    assert layout.rows == (Row(1, 3),)
    after, exact, latents = Layout(layout.rows, 8, 1, 4).sealing([3])
    assert after.rows == (Row(1, 6, (3,)),)
    assert after.sealed_columns().tolist() == [[2, 3, 4, -1, -1, -1, -1, 5, 6, 7]]
    assert after.first_place(after.rows[0], 3) == 7  # as token 3 is the last of its block
    assert (exact.tolist(), latents.tolist()) == ([[0]], [[]])


def test_what_is_appended_fills_the_sinks_first() -> None:
    """Three more columns to a row that has one of its two sinks, and to one whose first column is padding."""
    layout = Layout((Row(1), Row(2)), 2, 2)
    after, exact, latents = layout.appended((1, 0), 3, (0, 1))
    assert after == Layout((Row(1), Row(3)), 5, 2)
    assert exact.tolist() == [[0, 1, 2, 3], [2, 3, -1, -1]]
    assert latents.tolist() == [[1, 2], [-1, -1]]
