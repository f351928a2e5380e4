"""How long a method's greedy text is the uncompressed model's, beside texts generated token by token."""

from __future__ import annotations

import dataclasses
import json
from contextlib import contextmanager

import pytest
import torch

from cskv.compression.initialise import initialise
from cskv.config import CSKVConfig
from cskv.errors import DataError
from cskv.evaluation.agreement import bootstrap_interval
from cskv.evaluation.departure import Departures, decoded, departures, reference_texts
from cskv.evaluation.wilson import wilson_interval
from cskv.methods.method import Method, compressed, uncompressed
from tests.evaluation.support import VOCABULARY, character_tokenizer, tiny_llama

NEW = 24


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def prompts():
    return torch.randint(1, VOCABULARY, (3, 30), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def reference(model, prompts):
    return reference_texts(model, prompts, NEW, batch_size=3)


def low_rank(model, density: float = 0.25) -> Method:
    config = CSKVConfig(density, density, init="svd", window=4, group=4, sinks=0)
    return compressed(initialise(model, config), "SVD")


def greedy(model, row: torch.Tensor, count: int, forbidden: int | None = None) -> list[int]:
    """Choose the likeliest token again and again, from forwards without any cache."""
    ids = row.tolist()
    for _ in range(count):
        with torch.no_grad():
            logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
        if forbidden is not None:
            logits[forbidden] = -torch.inf
        ids.append(int(logits.argmax()))
    return ids[len(row) :]


def test_the_reference_is_the_models_own_greedy_text(model, prompts, reference):
    assert reference.shape == (3, NEW)
    assert reference.tolist() == [greedy(model, row, NEW) for row in prompts]


def test_end_of_sequence_is_never_chosen(prompts):
    model = tiny_llama()
    first = greedy(model, prompts[0], 1)[0]
    model.generation_config.eos_token_id = [first]
    made = reference_texts(model, prompts[:1], 5)
    assert made[0].tolist() == greedy(model, prompts[0], 5, forbidden=first)
    assert first not in made


def test_the_uncompressed_cache_never_departs(model, prompts, reference):
    found = departures(model, uncompressed(), prompts, reference, batch_size=2)
    assert found.equal == (NEW,) * 3
    assert found.to_dict()["still_equal"] == 1.0


@pytest.mark.parametrize("batch_size", [1, 3])
def test_equal_tokens_are_those_before_the_first_that_differs(model, prompts, reference, batch_size):
    method, counted = low_rank(model), []
    found = departures(model, method, prompts, reference, batch_size=batch_size, on_tokens=counted.append)
    with method.on(model):
        own = [
            model.generate(row[None], max_new_tokens=NEW, do_sample=False, pad_token_id=0)[0, 30:].tolist()
            for row in prompts
        ]
    expected = [
        next((i for i, (a, b) in enumerate(zip(text, row)) if a != b), NEW)
        for text, row in zip(own, reference.tolist())
    ]
    assert list(found.equal) == expected
    assert min(expected) < NEW  # a quarter of the channels is not enough here
    assert all(text.tolist() == whole[: len(text)] for text, whole in zip(found.texts, own))
    assert sum(counted) == sum(map(len, found.texts))


def test_a_batch_ends_where_all_of_its_texts_have_departed(model, prompts, reference):
    wrong = reference.clone()
    for row, place in enumerate((3, 20, 0)):
        wrong[row, place] = (wrong[row, place] + 1) % VOCABULARY
    found = departures(model, uncompressed(), prompts, wrong, batch_size=3)
    assert found.equal == (3, 20, 0)  # what is equal again after a departure does not count
    assert {len(text) for text in found.texts} == {21}


def test_every_batch_gets_a_cache_of_the_methods(model, prompts, reference):
    from transformers import DynamicCache

    made = []

    @contextmanager
    def on(_model):
        yield lambda: made.append(DynamicCache()) or made[-1]

    found = departures(model, Method("peer", 0.5, on), prompts, reference, batch_size=2)
    assert found.equal == (NEW,) * 3
    assert [cache.get_seq_length() for cache in made] == [30 + NEW - 1] * 2


def test_means_medians_and_intervals():
    facts = Departures(8, (8, 1, 3, 8), ()).to_dict()
    assert (facts["n"], facts["mean_equal"], facts["median_equal"], facts["still_equal"]) == (4, 5.0, 5.5, 0.5)
    assert facts["mean_equal_interval"] == list(bootstrap_interval((8, 1, 3, 8)))
    assert facts["still_equal_interval"] == list(wilson_interval(2, 4))
    assert Departures(8, (8,), ()).to_dict()["mean_equal_interval"] is None
    json.dumps(facts, allow_nan=False)


def test_both_texts_can_be_read_side_by_side():
    tokenizer = character_tokenizer()
    ids = {name: torch.tensor(tokenizer(name)["input_ids"]) for name in ("abcdef", "abx")}
    found = Departures(6, (2,), (ids["abx"],))
    assert decoded(tokenizer, found, ids["abcdef"][None]) == [{"equal": 2, "output": "abx", "reference": "abc"}]


@pytest.mark.parametrize(("changes", "complaint"), [({"generated": 0}, "generated is 0"), ({"batch_size": 0}, "batch")])
def test_numbers_below_one_are_refused(model, prompts, changes, complaint):
    with pytest.raises(DataError, match=complaint):
        reference_texts(model, prompts, **({"generated": 2} | changes))


def test_methods_stay_off_the_model_afterwards(model, prompts, reference):
    departures(model, low_rank(model), prompts[:1], reference[:1])
    again = departures(model, dataclasses.replace(uncompressed(), name="again"), prompts[:1], reference[:1])
    assert again.equal == (NEW,)
