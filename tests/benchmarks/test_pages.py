"""Tables for a page and for the terminal, and what stands between a page's markers."""

from __future__ import annotations

from benchmarks.pages import Table, command, fill_page


def test_a_table_on_a_page_and_on_a_terminal(capsys):
    table = Table("Title", ("a", "b"), [("x", "1")])
    assert table.markdown() == "**Title**\n\n| a | b |\n|---|---|\n| x | 1 |"
    assert Table("", ("a",), []).markdown() == "| a |\n|---|"
    table.print()
    assert "Title" in capsys.readouterr().out


def test_a_block_is_filled_and_what_is_around_it_stays(tmp_path):
    page = tmp_path / "page.md"
    blocks = "<!-- measured: benchmarks/quality/report.py {0} -->\nold {0}\n<!-- end of {0} -->\n"
    page.write_text(f"before\n{blocks.format('one')}between\n{blocks.format('two')}after\n")
    fill_page(page, "quality/report", "new", "more", block="two")
    assert page.read_text() == (
        f"before\n{blocks.format('one')}between\n"
        "<!-- measured: benchmarks/quality/report.py two -->\n\nnew\n\nmore\n\n<!-- end of two -->\nafter\n"
    )


def test_what_runs_a_benchmark():
    assert command("speed/decode") == "python -m benchmarks.speed decode"
