"""The cache of 8-bit floats."""

from __future__ import annotations

import pytest
import torch

from cskv.evaluation.cache_size import cache_after_prefill
from cskv.methods.fp8 import Fp8Layer, fp8
from tests.evaluation.support import tiny_llama


def test_numbers_are_held_in_one_byte_and_given_as_they_are_held():
    layer = Fp8Layer()
    # Between 256 and 448 float8_e4m3 counts in steps of 32; between 1 and 2 in eighths.
    first = torch.tensor([300.0, 1.3, -1e6, 0.0]).reshape(1, 1, 1, 4)
    keys, values = layer.update(first, -first)
    assert keys.flatten().tolist() == [288.0, 1.25, -448.0, 0.0]
    assert values.flatten().tolist() == [-288.0, -1.25, 448.0, 0.0]
    keys, _ = layer.update(first / 2, first)
    assert keys[0, 0, 1].tolist() == [144.0, 0.625, -448.0, 0.0]
    assert keys.dtype == torch.float32
    assert layer.keys.dtype == torch.float8_e4m3fn


def test_it_takes_half_the_bytes_of_a_16_bit_cache():
    model = tiny_llama().bfloat16()
    prompt = torch.arange(20)[None]
    with fp8().on(model) as new_cache:
        report = cache_after_prefill(model, prompt, new_cache=new_cache)
    assert report.ratio == pytest.approx(0.5)
