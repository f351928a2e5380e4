"""Presses of kvpress. Most tests need it, and with it an older transformers: `make test-kvpress` runs them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
import types
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch

from cskv.errors import CSKVError
from cskv.evaluation.agreement import agreement
from cskv.evaluation.cache_size import cache_after_prefill
from cskv.evaluation.decoding import CONTEXT_FIRST, answer
from cskv.methods.press import press
from tests.evaluation.support import VOCABULARY, character_tokenizer, tiny_llama

with_kvpress = pytest.mark.skipif(importlib.util.find_spec("kvpress") is None, reason="kvpress is not installed")
PROMPT = torch.randint(0, VOCABULARY, (1, 96), generator=torch.Generator().manual_seed(0))


def test_a_missing_kvpress_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "kvpress", None)
    with pytest.raises(CSKVError, match="need kvpress, which cannot be imported .*; it takes transformers below 5.3"):
        press("streaming", 0.5)


@pytest.fixture
def stand_in(monkeypatch):
    """A module with kvpress's interface, to test how presses are made and put on where kvpress is missing."""

    @dataclass
    class StreamingLLMPress:
        compression_ratio: float = 0.0
        used = []  # noqa: RUF012 (a log, no field)

        @contextmanager
        def __call__(self, model):
            self.used.append((self.compression_ratio, model.config._attn_implementation))
            yield

    @dataclass
    class ObservedAttentionPress(StreamingLLMPress):
        pass

    @dataclass
    class OddPress:
        window: int = 3

    kinds = {kind.__name__: kind for kind in (StreamingLLMPress, ObservedAttentionPress, OddPress)}
    monkeypatch.setitem(sys.modules, "kvpress", types.SimpleNamespace(**kinds))
    monkeypatch.setattr(importlib.metadata, "version", lambda _name: "9.9")
    return StreamingLLMPress


def test_a_press_keeps_its_share_and_observed_attention_gets_eager_attention(stand_in):
    model = tiny_llama()
    before = model.config._attn_implementation
    for name, title in (("streaming", "StreamingLLM 25 %"), ("h2o", "H2O-like 25 %")):
        method = press(name, 0.25)
        assert method.label == title
        assert (method.pads, method.streams) == (False, False)
        with method.on(model):
            pass
    assert stand_in.used == [(0.75, before), (0.75, "eager")]
    assert model.config._attn_implementation == before


@pytest.mark.parametrize(
    ("name", "budget", "complaint"),
    [
        ("streaming", 1.0, "is to keep 1.0 of the tokens"),
        ("streaming", 0.0, "is to keep 0.0"),
        ("OddPress", 0.5, "kvpress 9.9 has no press 'OddPress' that takes a compression ratio"),
        ("NoPress", 0.5, "has no press 'NoPress'"),
    ],
)
def test_presses_that_cannot_be_are_refused(stand_in, name, budget, complaint):
    with pytest.raises(CSKVError, match=complaint):
        press(name, budget)


@with_kvpress
@pytest.mark.parametrize("name", ["streaming", "h2o", "SnapKVPress"])
def test_tokens_are_really_dropped(name):
    model = tiny_llama()
    with press(name, 0.5).on(model):
        assert (
            cache_after_prefill(model, PROMPT).total_bytes * 2 == cache_after_prefill(tiny_llama(), PROMPT).total_bytes
        )
    assert cache_after_prefill(model, PROMPT).total_bytes == cache_after_prefill(tiny_llama(), PROMPT).total_bytes


@with_kvpress
def test_a_press_that_drops_almost_nothing_answers_as_the_model_and_reads_right_positions():
    tokenizer = character_tokenizer()
    model = tiny_llama(vocab_size=len(tokenizer))
    context, question = "some text to be read before " * 4, "and then?"
    asked = (tokenizer, [context], [question], 8)
    exact = answer(model, *asked).texts
    kept = press("streaming", 0.995)  # int(113 * 0.995) = 112 of 113 tokens
    with kept.on(model):
        assert answer(model, *asked, protocol=CONTEXT_FIRST).texts == exact


@with_kvpress
def test_a_text_is_continued_after_a_pressed_prefix():
    model, text = tiny_llama(), torch.randint(0, VOCABULARY, (2, 80), generator=torch.Generator().manual_seed(1))
    found = agreement(model, press("streaming", 0.25), text, chunk=8, prefix=64)
    assert found.tokens == 2 * 16
    assert min(found.kl) > 1e-4
