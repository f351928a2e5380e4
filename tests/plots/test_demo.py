from __future__ import annotations

import pytest

from cskv.errors import DataError
from cskv.plots import plot_demo, plot_spectra
from cskv.plots.style import side_by_side
from tests.plots.support import PNG

pytest.importorskip("matplotlib")


def demo_row(name: str, size: float, accuracy: float, perplexity: float) -> dict:
    return {
        "name": name,
        "bytes_per_token": size,
        "accuracy": accuracy,
        "low": max(0.0, accuracy - 0.1),
        "high": min(1.0, accuracy + 0.1),
        "perplexity": perplexity,
        "num_lines": 200,
    }


def test_the_demo_figure_is_drawn(tmp_path):
    rows = [demo_row("uncompressed", 6144, 0.98, 6.0), demo_row("80 % SVD", 1229, 0.0, 900.0)]
    assert plot_demo(rows, tmp_path / "demo.png").read_bytes().startswith(PNG)


def test_nothing_to_draw_is_refused(tmp_path):
    for draw in (plot_demo, plot_spectra):
        with pytest.raises(DataError, match="at least one"):
            draw([], tmp_path / "empty.png")


def test_points_at_one_place_are_set_side_by_side_around_it():
    assert side_by_side([100.0, 20.0, 20.0, 20.0], 2.0) == pytest.approx([100.0, 18.0, 20.0, 22.0])
