from __future__ import annotations

import json

import pytest

from cskv.errors import DataError
from cskv.evaluation.spectra import Spectrum
from cskv.plots import _dodged, _smoothed, plot_demo, plot_spectra, plot_training

pytest.importorskip("matplotlib")

PNG = b"\x89PNG\r\n\x1a\n"


def decay(layers: int, sources: tuple[str, ...]) -> list[Spectrum]:
    return [
        Spectrum(layer, projection, source, tuple(0.9 ** (i * (1 + layer)) for i in range(16)))
        for layer in range(layers)
        for projection in "kv"
        for source in sources
    ]


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


@pytest.mark.parametrize(
    ("layers", "sources"), [(3, ("weight", "calibrated")), (12, ("calibrated",)), (1, ("weight",))]
)
def test_spectra_are_drawn(tmp_path, layers, sources):
    path = plot_spectra(decay(layers, sources), tmp_path / "spectra.png")
    assert path.read_bytes().startswith(PNG)
    assert [file.name for file in tmp_path.iterdir()] == ["spectra.png"]


def test_training_logs_are_drawn_and_rows_without_a_loss_passed_over(tmp_path):
    log = tmp_path / "train.jsonl"
    rows = [{"step": step, "loss": 1 / step} for step in range(1, 50)]
    log.write_text("\n".join(map(json.dumps, [{"event": "start"}, *rows])) + "\n")
    assert plot_training(log, tmp_path / "loss.png").read_bytes().startswith(PNG)
    assert plot_training([log, log], tmp_path / "two.pdf", ["a", "b"]).read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize("content", ["", "{}\n", "not json\n", '{"loss": 1}\n', '{"step": 1, "loss": "x"}\n'])
def test_a_log_without_losses_is_refused(tmp_path, content):
    log = tmp_path / "log.jsonl"
    log.write_text(content)
    with pytest.raises(DataError, match="expected JSON lines"):
        plot_training(log, tmp_path / "loss.png")


def test_a_missing_log_is_refused(tmp_path):
    with pytest.raises(DataError, match="cannot read the training log"):
        plot_training(tmp_path / "absent.jsonl", tmp_path / "loss.png")


def test_the_demo_figure_is_drawn(tmp_path):
    rows = [demo_row("uncompressed", 6144, 0.98, 6.0), demo_row("80 % SVD", 1229, 0.0, 900.0)]
    assert plot_demo(rows, tmp_path / "demo.png").read_bytes().startswith(PNG)


def test_nothing_to_draw_is_refused(tmp_path):
    for draw in (plot_demo, plot_spectra):
        with pytest.raises(DataError, match="at least one"):
            draw([], tmp_path / "empty.png")


def test_an_unknown_image_format_is_refused_and_leaves_no_file(tmp_path):
    with pytest.raises(DataError, match="no image format"):
        plot_spectra(decay(1, ("weight",)), tmp_path / "spectra.docx")
    assert not list(tmp_path.iterdir())


def test_points_at_one_place_are_set_side_by_side_around_it():
    assert _dodged([100.0, 20.0, 20.0, 20.0]) == pytest.approx([100.0, 18.0, 20.0, 22.0])


def test_the_moving_mean_is_centred():
    smoothed = _smoothed([0.0, 3.0, 0.0] + [6.0] * 37)  # half a width of 1
    assert smoothed[:4] == [1.5, 1.0, 3.0, 4.0]
    assert smoothed[-1] == 6.0
    assert _smoothed([3.0, 5.0]) == [3.0, 5.0]
