from __future__ import annotations

import pytest
import torch

from cskv.attachment.attach import attachment_of
from cskv.compression.initialise import initialise
from cskv.config import CSKVConfig
from cskv.errors import CSKVError
from cskv.evaluation.cache_size import cache_after_prefill
from cskv.methods.method import compressed, uncompressed
from cskv.methods.specification import method_of
from tests.evaluation.support import VOCABULARY, tiny_llama

PROMPT = torch.randint(0, VOCABULARY, (1, 64), generator=torch.Generator().manual_seed(0))


def test_the_uncompressed_method_leaves_the_model_alone():
    model, method = tiny_llama(), uncompressed()
    with method.on(model) as new_cache:
        assert new_cache is None
        assert attachment_of(model) is None
    assert (method.label, method.budget) == ("uncompressed", None)


def test_a_compressor_is_on_the_model_for_the_time_of_the_block():
    model = tiny_llama()
    method = compressed(initialise(model, CSKVConfig(0.25, 0.25, init="svd", window=4, group=8)), "mine", source="a")
    with method.on(model):
        assert attachment_of(model) is not None
        assert cache_after_prefill(model, PROMPT).ratio < 0.5
    assert attachment_of(model) is None
    assert method.label == "mine 25 %"
    assert (method.first_piece, method.piece) == (4 + 12, 8)
    assert method.facts["settings"]["window"] == 4
    assert method.facts["source"] == "a"
    assert method.facts["ratio"] == pytest.approx(0.25)


def test_adapters_are_told_apart_by_their_weights():
    facts = [method_of("svd@0.5", tiny_llama(seed), None, 4, 8).facts["fingerprint"] for seed in (0, 0, 1)]
    assert facts[0] == facts[1] != facts[2]


def test_a_budget_counts_bits():
    model = tiny_llama()
    config = CSKVConfig(0.5, 0.5, init="svd", window=0, group=32, k_bits=8, v_bits=8)
    method = compressed(initialise(model, config), "8 bits")
    # 8 of 16 channels of 2 bytes. Keys: a byte each, minima and scales of 2 + 2 bytes for 32 tokens; values: for one.
    keys, values = (8 + 8 * 4 / 32) / 32, (8 + 4) / 32
    assert method.budget == pytest.approx((keys + values) / 2)


def test_untrained_factors_need_what_their_init_needs():
    assert method_of("svd@0.25", tiny_llama(), None, 4, 8).label == "SVD 25 %"
    with pytest.raises(CSKVError, match="needs calibration statistics"):
        method_of("asvd@0.25", tiny_llama(), None, 4, 8)
