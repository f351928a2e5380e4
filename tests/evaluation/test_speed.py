from __future__ import annotations

import pytest
import torch

from cskv.errors import DataError
from cskv.evaluation import speed
from cskv.evaluation.speed import measure_decode
from tests.evaluation.support import tiny_llama


def test_every_repeat_decodes_its_steps_after_the_prompt():
    model, seen = tiny_llama(), []
    model.model.register_forward_pre_hook(lambda _m, _a, kw: seen.append(kw["input_ids"].shape), with_kwargs=True)
    result = measure_decode(model, torch.ones(2, 20, dtype=torch.long), steps=3, repeats=4, warmup=2)
    assert seen == [(2, 8), (2, 20), *[(2, 1)] * (2 + 3 * 4)]
    assert (result.prompt_tokens, result.batch, result.steps, result.repeats) == (20, 2, 3, 4)
    assert 0 < result.low <= result.tokens_per_second <= result.high


def test_tokens_per_second_is_the_median_over_rows_and_steps(monkeypatch):
    # Clock readings: prefill 0 -> 1 s, warm-up 1 -> 2 s, then stretches of 1, 4 and 2 s.
    readings = iter([0.0, 1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 7.0, 7.0, 9.0])
    monkeypatch.setattr(speed, "clock", lambda device: next(readings))
    result = measure_decode(tiny_llama(), torch.ones(2, 4, dtype=torch.long), steps=8, repeats=3, warmup=1)
    assert (result.low, result.tokens_per_second, result.high) == (4.0, 8.0, 16.0)
    assert result.prefill_seconds == 1.0


@pytest.mark.parametrize("kwargs", [{"steps": 0}, {"repeats": 0}, {"warmup": -1}])
def test_nothing_to_time_is_refused(kwargs):
    with pytest.raises(DataError, match="expected at least"):
        measure_decode(tiny_llama(), torch.ones(1, 4, dtype=torch.long), **kwargs)


def test_an_empty_prompt_is_refused():
    with pytest.raises(DataError, match="expected at least one row"):
        measure_decode(tiny_llama(), torch.ones(1, 0, dtype=torch.long))
