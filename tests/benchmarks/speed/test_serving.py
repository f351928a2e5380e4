"""The parts of the serving benchmark that need no vLLM: engines are stood in for by their answers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.common import Wrong
from benchmarks.speed import serving

CACHES = {"uncompressed, sdpa": "base", "joint": "joint"}


@pytest.fixture
def measure(monkeypatch):
    """Measures prompts of 72 tokens, two of which fit uncompressed, on engines of these log-probabilities."""

    def run(logprobs: dict[str, float]) -> dict:
        asked = []

        class Pool:
            def __init__(self, _workers, _context, _start, arguments):
                self.folder = arguments[0]

            def __enter__(self):
                return self

            def __exit__(self, *_error):
                pass

            def submit(self, function, *of):
                asked.append((self.folder, *of))
                answers = {
                    serving.greedy: lambda tokens: [(5, logprobs[self.folder])] * tokens,
                    serving.pool_tokens: lambda: {"base": 450, "joint": 1600}[self.folder],
                    serving.decode: lambda requests, tokens: [0.5 if self.folder == "base" else 1.0] * 3,
                }
                return SimpleNamespace(result=lambda: answers[function](*of))

        monkeypatch.setattr(serving, "ProcessPoolExecutor", Pool)
        made = {name: Path(folder) for name, folder in CACHES.items()}, {name: [(5, -1.0)] * 2 for name in CACHES}
        return serving.measure(72, 2, lambda: made, per_token=10) | {"asked": asked}

    return run


def test_caches_are_compared_at_equal_batch_and_at_equal_memory(measure):
    row = measure({"base": -1.0, "joint": -1.05})
    assert row["pool_bytes"] == (2 * 200 + 256) * 10
    own = row["methods"]["joint"]
    assert (own["pool_tokens"], own["requests"], own["error"]) == (1600, 7, pytest.approx(0.05))
    assert (own["equal batch"]["median"], own["equal memory"]["median"]) == (2.0, 7.0)
    turns = [call for call in row["asked"] if call[1:] == (2, 72)]
    assert turns == [("base", 2, 72), ("joint", 2, 72)] * serving.ROUNDS + [("base", 2, 72)] * serving.ROUNDS


def test_log_probabilities_that_are_off_are_refused(measure):
    with pytest.raises(Wrong, match=r"joint: log-probabilities are 0\.2 off"):
        measure({"base": -1.0, "joint": -1.2})


def test_log_probabilities_are_compared_until_rounding_parts_the_answers():
    expected = [(5, -1.0), (6, -2.0), (7, -1.0)]
    assert serving.error_of("joint", [(5, -1.02), (6, -2.0), (7, -1.5)], expected) == pytest.approx(0.5)
    assert serving.error_of("joint", [(5, -1.02), (9, -2.01), (3, -4.0)], expected) == pytest.approx(0.02)
    with pytest.raises(Wrong, match="joint: token 9 is chosen first, not 5"):
        serving.error_of("joint", [(9, -1.0), (6, -2.0), (7, -1.0)], expected)
