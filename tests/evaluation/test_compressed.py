"""The same measurements on a model with a compressed cache."""

from __future__ import annotations

import pytest
import torch

import cskv
from cskv.compression.initialise import initialise
from cskv.config import CSKVConfig
from cskv.data.lines import make_case
from cskv.evaluation.cache_size import cache_after_prefill
from cskv.evaluation.perplexity import perplexity
from cskv.evaluation.speed import measure_decode
from cskv.evaluation.tasks import evaluate_cases
from tests.evaluation.support import VOCABULARY, character_tokenizer, tiny_llama


def tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(5))


def adapter(model, density: float, window: int = 0, group: int = 8, sinks: int = 0):
    return initialise(model, CSKVConfig(density, density, window, group, sinks, init="svd"))


def test_full_rank_changes_no_perplexity_and_low_rank_does():
    model, text = tiny_llama(), tokens(2, 50)
    exact = perplexity(model, text, chunk=8)
    with cskv.attach(model, adapter(model, 1.0)):
        assert perplexity(model, text, chunk=8).nll == pytest.approx(exact.nll, rel=1e-5)
    with cskv.attach(model, adapter(model, 0.25)):
        assert abs(perplexity(model, text, chunk=8).nll - exact.nll) > 1e-3


def test_one_forward_hides_the_compression():
    model, text = tiny_llama(), tokens(1, 50)
    exact = perplexity(model, text, chunk=50)
    with cskv.attach(model, adapter(model, 0.25)):
        assert perplexity(model, text, chunk=50).nll == pytest.approx(exact.nll, rel=1e-5)


@pytest.mark.parametrize(("window", "sinks"), [(0, 0), (5, 0), (5, 3)])
def test_chunks_that_begin_at_sealings_equal_token_by_token(window, sinks):
    model, text = tiny_llama(), tokens(2, 60)
    with cskv.attach(model, adapter(model, 0.25, window=window, sinks=sinks)):
        one_by_one = perplexity(model, text, chunk=1, first_chunk=window + 8)
        chunked = perplexity(model, text, chunk=8, first_chunk=sinks + window + 8)
    assert chunked.nll == pytest.approx(one_by_one.nll, rel=1e-5)


def test_cache_bytes_after_a_prefill():
    model, prompt = tiny_llama(), tokens(2, 64)
    exact = cache_after_prefill(model, prompt)
    # 2 layers, keys and values, 2 rows of 64 tokens, 16 channels, 4 bytes
    assert exact.total_bytes == exact.uncompressed_bytes == 2 * 2 * 2 * 64 * 16 * 4
    with cskv.attach(model, adapter(model, 0.25)):
        small = cache_after_prefill(model, prompt)
    assert (small.tokens, small.batch) == (64, 2)
    assert small.uncompressed_bytes == exact.total_bytes
    assert small.payload_bytes == exact.total_bytes // 4
    assert exact.total_bytes // 4 <= small.total_bytes < exact.total_bytes


def test_lines_and_speed_run_through_the_compressed_cache():
    tokenizer = character_tokenizer()
    model = tiny_llama(vocab_size=len(tokenizer))
    cases = [make_case(2, seed).as_case() for seed in range(2)]
    exact = evaluate_cases(model, tokenizer, cases, batch_size=2, max_new_tokens=20)
    with cskv.attach(model, adapter(model, 1.0)):
        full_rank = evaluate_cases(model, tokenizer, cases, batch_size=2, max_new_tokens=20)
        assert measure_decode(model, tokens(1, 20), steps=9, repeats=2).tokens_per_second > 0
    assert [output.output for output in full_rank.outputs] == [output.output for output in exact.outputs]
