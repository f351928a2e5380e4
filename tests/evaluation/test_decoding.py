"""Both protocols give the tokens of a token-by-token greedy decode, batched or not."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload

import cskv
from cskv.compression.initialise import initialise
from cskv.config import CSKVConfig
from cskv.data.cases import Case
from cskv.errors import DataError
from cskv.evaluation.decoding import CONTEXT_FIRST, PROTOCOLS, answer
from cskv.evaluation.forward import forward
from cskv.evaluation.speed import measure_decode
from tests.evaluation.support import character_tokenizer, parrot, tiny_llama

TOKENIZER = character_tokenizer()
SIZE = len(TOKENIZER)
CONTEXTS = ["a short one. ", "somewhat longer than the first, it is. ", "x" * 70]
QUESTIONS = ["what was it?", "which is it?", "and then who"]
NEW = 8


def adapter(model, density: float, window: int = 4):
    return initialise(model, CSKVConfig(density, density, init="svd", window=window, group=8, sinks=0))


def by_hand(model, context: str, question: str) -> str:
    """Greedy decoding by forwards over the whole sequence, without any cache."""
    ids = TOKENIZER(context + question)["input_ids"]
    new: list[int] = []
    with torch.no_grad():
        for _ in range(NEW):
            new.append(int(model(torch.tensor([ids + new]), use_cache=False).logits[0, -1].argmax()))
    return TOKENIZER.decode(new, skip_special_tokens=True)


@pytest.fixture(scope="module")
def model():
    return tiny_llama(vocab_size=SIZE)


@pytest.mark.parametrize("rows", [[0], [1], [0, 1, 2]])
def test_both_protocols_decode_greedily(model, rows):
    contexts, questions = [CONTEXTS[i] for i in rows], [QUESTIONS[i] for i in rows]
    expected = [by_hand(model, *pair) for pair in zip(contexts, questions, strict=True)]
    for protocol in PROTOCOLS:
        made = answer(model, TOKENIZER, contexts, questions, NEW, protocol=protocol)
        assert made.texts == expected
        assert made.prompt_tokens == sum(map(len, contexts + questions))
        assert made.decode_tokens == len(rows) * (NEW - 1)


def test_at_full_rank_the_compressed_cache_answers_as_the_exact_one(model):
    asked = (TOKENIZER, CONTEXTS, QUESTIONS, NEW)
    expected = answer(model, *asked, protocol=CONTEXT_FIRST).texts
    with cskv.attach(model, adapter(model, 1.0)):
        assert answer(model, *asked, protocol=CONTEXT_FIRST).texts == expected


def test_the_question_reads_a_compressed_context_only_after_it(model):
    """The first token is exact where the question is in the prefill, and not where the context came first."""
    asked = (TOKENIZER, CONTEXTS[2:], QUESTIONS[2:], 1)
    exact = by_hand(model, CONTEXTS[2], QUESTIONS[2])
    with cskv.attach(model, adapter(model, 0.1, window=0)):
        inside = answer(model, *asked).texts
        after = answer(model, *asked, protocol=CONTEXT_FIRST).texts
        by_chunk = _first_token_in_two_forwards(model, CONTEXTS[2], QUESTIONS[2])
    assert inside == [exact[:1]]
    assert after == [by_chunk]


def _first_token_in_two_forwards(model, context: str, question: str) -> str:
    first, second = (torch.tensor([TOKENIZER(text)["input_ids"]]) for text in (context, question))
    _, cache = forward(model, first)
    return TOKENIZER.decode([int(forward(model, second, cache)[0][0, -1].argmax())])


def test_a_row_ends_at_the_line_after_a_number_where_that_is_wanted():
    replies = {TOKENIZER(question[-1])["input_ids"][0]: TOKENIZER("12\n34")["input_ids"] for question in QUESTIONS[:1]}
    model = parrot(SIZE, replies)
    asked = (CONTEXTS[:1], QUESTIONS[:1], 20)
    ending = Case("niah-single", 1, "", "", ("12",)).is_over
    assert answer(model, TOKENIZER, *asked, protocol=CONTEXT_FIRST, endings=[ending]).texts == ["12\n"]
    assert answer(model, TOKENIZER, *asked, protocol=CONTEXT_FIRST).texts == ["12\n34"]


def test_questions_of_different_lengths_are_not_one_batch(model):
    with pytest.raises(DataError, match=r"questions have \[3, 12\] tokens"):
        answer(model, TOKENIZER, CONTEXTS[:2], [QUESTIONS[0], "ab?"], NEW, protocol=CONTEXT_FIRST)


# Releases of transformers up to 5.2 or so take the meta device of an offloaded model for where it computes.
@pytest.mark.filterwarnings("ignore:You are calling .generate:UserWarning")
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_an_offloaded_model_answers_as_it_does_at_home(protocol):
    model = tiny_llama(vocab_size=SIZE)
    asked = (TOKENIZER, CONTEXTS, QUESTIONS, NEW)
    expected = answer(model, *asked, protocol=protocol).texts
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.device.type == "meta"
    assert answer(model, *asked, protocol=protocol).texts == expected
    assert measure_decode(model, torch.ones(1, 4, dtype=torch.long), steps=1, repeats=1).prompt_tokens == 4
