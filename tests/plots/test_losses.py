from __future__ import annotations

import json

import pytest

from cskv.errors import DataError
from cskv.plots import plot_training
from cskv.plots.losses import smoothed
from tests.plots.support import PNG

pytest.importorskip("matplotlib")


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


def test_the_moving_mean_is_centred():
    means = smoothed([0.0, 3.0, 0.0] + [6.0] * 37)  # half a width of 1
    assert means[:4] == [1.5, 1.0, 3.0, 4.0]
    assert means[-1] == 6.0
    assert smoothed([3.0, 5.0]) == [3.0, 5.0]
