from __future__ import annotations

import math

import pytest
import torch

from cskv.errors import DataError
from cskv.evaluation.perplexity import perplexity, token_sequences
from tests.evaluation.support import VOCABULARY, character_tokenizer, tiny_llama


def random_tokens(rows: int, tokens: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def test_a_uniform_model_is_as_perplexed_as_its_vocabulary_is_large():
    model = tiny_llama()
    model.lm_head.weight.data.zero_()
    result = perplexity(model, random_tokens(2, 33), chunk=8)
    assert result.ppl == pytest.approx(VOCABULARY, rel=1e-6)
    assert result.nll == pytest.approx(math.log(VOCABULARY), rel=1e-6)
    assert result.tokens == 2 * 32


@pytest.mark.parametrize(("chunk", "first", "batch"), [(8, None, 1), (7, 3, 2), (1, 1, 3), (100, None, 2), (5, 100, 1)])
def test_chunks_through_an_exact_cache_give_the_one_forward_answer(chunk, first, batch):
    model, tokens = tiny_llama(), random_tokens(3, 30)
    with torch.no_grad():
        logits = model(input_ids=tokens).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()
    result = perplexity(model, tokens, chunk=chunk, first_chunk=first, batch_size=batch)
    assert result.nll == pytest.approx(expected, rel=1e-5)
    assert result.tokens == 3 * 29


def test_no_forward_sees_more_tokens_than_a_chunk():
    model, seen = tiny_llama(), []
    model.model.register_forward_pre_hook(
        lambda _m, _a, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    perplexity(model, random_tokens(1, 20), chunk=8, first_chunk=3)
    assert seen == [(1, 3), (1, 8), (1, 8)]


def test_progress_counts_every_fed_token_and_the_mode_comes_back():
    model, fed = tiny_llama().train(), []
    perplexity(model, random_tokens(2, 17), chunk=8, on_tokens=fed.append)
    assert sum(fed) == 2 * 16
    assert model.training


@pytest.mark.parametrize(
    ("shape", "kwargs", "message"),
    [
        ((2, 1), {}, "at least 2"),
        ((0, 9), {}, "at least 1"),
        ((1, 9), {"chunk": 0}, "chunk is 0"),
        ((1, 9), {"first_chunk": 0}, "first_chunk is 0"),
        ((1, 9), {"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_what_cannot_be_measured_is_refused(shape, kwargs, message):
    with pytest.raises(DataError, match=message):
        perplexity(tiny_llama(), torch.zeros(shape, dtype=torch.long), **kwargs)


def test_logits_that_are_not_finite_are_refused():
    model = tiny_llama()
    model.lm_head.weight.data.fill_(math.nan)
    with pytest.raises(DataError, match="not finite"):
        perplexity(model, random_tokens(1, 9))


def test_token_sequences_take_the_head_of_each_long_enough_text():
    tokenizer = character_tokenizer()
    sequences = token_sequences(tokenizer, ["abcdef", "ab", "uvwxyz", "never read"], length=4, count=2)
    assert [tokenizer.decode(row) for row in sequences] == ["abcd", "uvwx"]


def test_too_few_long_texts_are_refused():
    with pytest.raises(DataError, match="only 1 texts have 4 tokens; expected 2"):
        token_sequences(character_tokenizer(), ["abcdef", "ab"], length=4, count=2)
