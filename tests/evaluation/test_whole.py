"""Whole texts in one forward: the figures of token-by-token decoding through the cache."""

from __future__ import annotations

import pytest
import torch

from cskv.compression.initialise import initialise
from cskv.config import CSKVConfig
from cskv.errors import AdapterError, UnsupportedModelError
from cskv.evaluation import agreement as module
from cskv.evaluation import reference as reference_module
from cskv.evaluation.agreement import Agreement, agreement
from cskv.evaluation.reference import Reference
from cskv.methods.method import Method, compressed
from tests.attachment.test_closed_form import statistics_of
from tests.evaluation.support import tiny_llama
from tests.models.families import tiny_model

VOCABULARY = 96
TEXT = torch.randint(3, VOCABULARY, (1, 83), generator=torch.Generator().manual_seed(5))
CASES = {  # group, window, sinks, bits, keys
    "groups of one": (1, 0, 0, 16, "joint"),
    "groups of one behind a window and sinks": (1, 8, 4, 16, "joint"),
    "groups of four": (4, 0, 4, 16, "joint"),
    "groups of 32": (32, 8, 0, 16, "joint"),
    "groups of 32 and sinks": (32, 8, 4, 16, "joint"),
    "4 bits": (32, 0, 0, 4, "joint"),
    "4 bits behind sinks": (32, 8, 4, 4, "joint"),
    "4 bits in groups of four": (4, 8, 4, 4, "joint"),
    "4 bits in groups of one": (1, 8, 4, 4, "joint"),
    "commuting keys": (4, 8, 4, 16, "commuting"),
    "commuting keys in groups of one": (1, 0, 4, 16, "commuting"),
    "commuting keys in 4 bits": (32, 0, 4, 4, "commuting"),
}


def llama(seed: int = 0):
    return tiny_llama(seed, VOCABULARY)


def made(model, group: int, window: int, sinks: int, bits: int, keys: str) -> Method:
    packed = {"k_bits": bits, "v_bits": bits, "k_block": (group, 4), "v_block": (1, 4)} if bits < 16 else {}
    config = CSKVConfig(0.5, 0.5, init="pca", window=window, group=group, sinks=sinks, key_factors=keys, **packed)
    return compressed(initialise(model, config, statistics_of(model)), "ours")


def assert_alike(one: Agreement, other: Agreement) -> None:
    assert (one.reading, other.reading) == ("whole", "pieces")
    assert one.kl == pytest.approx(other.kl, rel=1e-3, abs=1e-6)
    assert one.nll == pytest.approx(other.nll, rel=1e-5)
    assert one.top1 == other.top1
    assert one.reference_nll == pytest.approx(other.reference_nll, rel=1e-6)
    assert [part["kl"] for part in one.positions] == pytest.approx(
        [part["kl"] for part in other.positions], rel=2e-3, abs=1e-6
    )


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_whole_text_is_read_as_by_decoding(case):
    model = llama()
    method = made(model, *case)
    found = agreement(model, method, TEXT)
    assert found.kl[0] > 1e-3
    assert_alike(found, agreement(model, method, TEXT, chunk=1))


@pytest.mark.parametrize("case", list(CASES.values())[4:7], ids=list(CASES)[4:7])
def test_pieces_of_a_group_are_read_as_by_decoding_too(case):
    model = llama()
    method = made(model, *case)
    pieces = agreement(model, method, TEXT, chunk=method.piece, first_chunk=method.first_piece)
    assert_alike(agreement(model, method, TEXT), pieces)


@pytest.mark.parametrize("prefix", [3, 40, 82])
def test_a_prefix_is_prefilled_and_reads_all_exactly(prefix):
    model = llama()
    method = made(model, 4, 8, 4, 4, "joint")
    found = agreement(model, method, TEXT, prefix=prefix)
    assert_alike(found, agreement(model, method, TEXT, prefix=prefix, chunk=1))


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma2", "gemma3", "granite"])
def test_families_are_read_so(family):
    model, text = tiny_model(family), TEXT[:, :60]
    config = CSKVConfig(0.5, 0.5, init="svd", window=8, group=4)
    method = compressed(initialise(model, config), "ours")
    assert_alike(agreement(model, method, text), agreement(model, method, text, chunk=1))


def test_latents_are_rounded_as_the_cache_rounds_them():
    """In 16 bits, where factors of 32 would read more than a cache holds."""
    model = llama().to(torch.bfloat16)
    method = made(model, 4, 8, 4, 4, "joint")
    whole, pieces = agreement(model, method, TEXT), agreement(model, method, TEXT, chunk=1)
    assert whole.kl == pytest.approx(pieces.kl, rel=0.2)


def test_few_logits_at_a_time_and_batches_change_nothing(monkeypatch):
    model = llama()
    method, texts = made(model, 4, 8, 4, 4, "joint"), torch.cat([TEXT, TEXT.flip(1), TEXT])
    found = agreement(model, method, texts, batch_size=2)
    monkeypatch.setattr(module, "NUMBERS", 5 * VOCABULARY)
    told: list[int] = []
    again = agreement(model, method, texts, batch_size=1, on_tokens=told.append)
    assert again.kl == pytest.approx(found.kl, rel=1e-4)
    assert max(told) == 5
    assert sum(told) == 3 * 82
    assert 0 < again.seconds < 60


def test_texts_that_are_too_long_go_through_the_cache(monkeypatch):
    model = llama()
    method = made(model, 4, 8, 4, 16, "joint")
    whole = agreement(model, method, TEXT)
    monkeypatch.setattr(module, "WHOLE", 50)
    assert_alike(whole, agreement(model, method, TEXT))


def test_models_whose_attention_or_head_is_not_understood_are_read_through_the_cache(monkeypatch):
    model = llama()
    method = made(model, 4, 8, 4, 16, "joint")
    whole = agreement(model, method, TEXT)

    def refuse(*_: object) -> None:
        raise UnsupportedModelError("not understood")

    with monkeypatch.context() as patch:
        patch.setattr(reference_module, "check_readable", refuse)
        assert_alike(whole, agreement(model, method, TEXT))
    monkeypatch.setattr(reference_module, "Head", refuse)
    assert Reference(model).head is None
    assert_alike(whole, agreement(model, method, TEXT))


def test_an_adapter_of_another_model_is_refused():
    with pytest.raises(AdapterError, match="the adapter was made for"):
        agreement(llama(1), made(llama(), 4, 8, 4, 16, "joint"), TEXT)
