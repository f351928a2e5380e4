"""Agreement with the uncompressed model, beside what can be computed from two forwards."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math

import pytest
import torch

from cskv.attachment.attach import attachment_of
from cskv.compression.initialise import initialise
from cskv.config import CSKVConfig
from cskv.errors import DataError
from cskv.evaluation import agreement as module
from cskv.evaluation import reference as reference_module
from cskv.evaluation.agreement import agreement
from cskv.evaluation.forward import forward
from cskv.evaluation.perplexity import perplexity
from cskv.evaluation.reference import Reference
from cskv.methods.method import compressed, uncompressed
from tests.evaluation.support import VOCABULARY, tiny_llama


def tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(5))


def method(model, density: float, window: int = 8):
    config = CSKVConfig(density, density, init="svd", window=window, group=8)
    return compressed(initialise(model, config), "SVD")


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_uncompressed_model_agrees_with_itself(batch_size):
    model, text = tiny_llama(), tokens(3, 70)
    found = agreement(model, uncompressed(), text, chunk=8, batch_size=batch_size)
    assert found.tokens == 3 * 69
    assert found.top1 == (1.0,) * 3
    assert max(found.kl) < 1e-6
    assert found.nll == pytest.approx(found.reference_nll, rel=1e-5)
    with torch.no_grad():
        logits = model(text[:, :-1], use_cache=False).logits.flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, text[:, 1:].flatten()).item()
    assert sum(found.nll) / 3 == pytest.approx(expected, rel=1e-5)


def test_full_rank_agrees_and_low_rank_less():
    model, text = tiny_llama(), tokens(2, 100)
    full = agreement(model, method(model, 1.0), text, chunk=8, first_chunk=16)
    low = agreement(model, method(model, 0.25), text, chunk=8, first_chunk=16)
    assert max(full.kl) < 1e-6
    assert full.top1 == (1.0, 1.0)
    assert min(low.kl) > 1e-3
    assert max(low.top1) < 1.0
    assert low.positions[0]["kl"] < 1e-6  # nothing is sealed yet
    assert low.positions[-1]["kl"] > 1e-3


def test_the_perplexity_is_that_of_the_compressed_cache():
    model, text = tiny_llama(), tokens(2, 90)
    ours = method(model, 0.25)
    found = agreement(model, ours, text, chunk=8, first_chunk=16)
    with ours.on(model):
        assert perplexity(model, text, chunk=8, first_chunk=16).nll == pytest.approx(sum(found.nll) / 2, rel=1e-6)


def test_the_uncompressed_model_reads_a_text_once_for_all_methods(monkeypatch):
    model, text = tiny_llama(), tokens(3, 90)
    reference, read = Reference(model), []
    plain = reference._read
    monkeypatch.setattr(reference, "_read", lambda rows: read.append(len(rows)) or plain(rows))
    methods = [method(model, 0.25), dataclasses.replace(method(model, 0.5), pads=False), uncompressed()]
    found = [agreement(model, own, text, reference=reference, batch_size=2) for own in methods]
    assert read == [2, 1]
    assert found == [agreement(model, own, text, batch_size=2) for own in methods]
    monkeypatch.setattr(reference_module, "HELD", 1)  # nothing is kept, and nothing changes
    assert agreement(model, methods[0], text, reference=reference, batch_size=1) == agreement(model, methods[0], text)


def test_a_long_reference_is_read_through_a_cache(monkeypatch):
    model, text = tiny_llama(), tokens(2, 90)
    whole = Reference(model).states(text)
    monkeypatch.setattr(reference_module, "WHOLE", 32)
    torch.testing.assert_close(Reference(model).states(text), whole)


def test_kl_and_top1_are_those_of_the_definition():
    """A prefix of 40 tokens, then one token at a time, against log-softmaxes made here."""
    model, text = tiny_llama(), tokens(1, 44)
    ours = method(model, 0.25, window=0)
    found = agreement(model, ours, text, chunk=1, prefix=40)
    with torch.no_grad():
        exact = model(text[:, :-1], use_cache=False).logits[0, 39:].log_softmax(-1)
        with ours.on(model):
            logits, cache = forward(model, text[:, :40])
            rows = [logits[0, -1], *(forward(model, text[:, i : i + 1], cache)[0][0, -1] for i in range(40, 43))]
    seen = torch.stack(rows).log_softmax(-1)
    kl = (exact.exp() * (exact - seen)).sum(-1)
    assert found.tokens == 4
    assert found.kl[0] == pytest.approx(kl.mean().item(), rel=1e-4)
    assert found.kl[0] > 1e-4
    assert found.top1[0] == pytest.approx((exact.argmax(-1) == seen.argmax(-1)).float().mean().item())
    assert found.nll[0] == pytest.approx(-seen.gather(-1, text[0, 40:, None]).mean().item(), rel=1e-4)
    assert [(p["start"], p["stop"]) for p in found.positions] == [(39, 40), (40, 41), (41, 42), (42, 43)]


@pytest.mark.parametrize("chunk", [None, 8])
def test_the_method_is_off_the_model_when_reading_is_broken_off(chunk):
    model = tiny_llama()

    def stop(_tokens: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        agreement(model, method(model, 0.25), tokens(1, 60), chunk=chunk, on_tokens=stop)
    assert caught.tb is not None  # frames are still alive
    assert attachment_of(model) is None
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_figures_are_json_with_intervals_over_texts():
    model, text = tiny_llama(), tokens(4, 60)
    figures = agreement(model, method(model, 0.25), text, chunk=8).to_dict()
    json.dumps(figures, allow_nan=False)
    low, high = figures["perplexity_interval"]
    assert low < figures["perplexity"] < high
    assert figures["perplexity"] == pytest.approx(math.exp(figures["nll"]))
    low, high = figures["nll_increase_interval"]
    assert low < figures["nll_increase"] < high
    increase = math.log(figures["perplexity"] / figures["reference_perplexity"])
    assert figures["nll_increase"] == pytest.approx(increase)
    assert figures["kl_interval"][0] < figures["kl"] < figures["kl_interval"][1]
    assert agreement(model, uncompressed(), text[:1], chunk=8).to_dict()["perplexity_interval"] is None


def test_positions_cover_all_predictions_once():
    model = tiny_llama()
    positions = agreement(model, uncompressed(), tokens(1, 100), chunk=8).positions
    assert len(positions) == module.STRETCHES
    assert positions[0]["start"] == 0
    assert positions[-1]["stop"] == 99
    assert all(a["stop"] == b["start"] for a, b in itertools.pairwise(positions))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"chunk": 0}, "chunk is 0; expected at least 1"),
        ({"prefix": -1}, "prefix is -1; expected at least 0"),
        ({"prefix": 30}, "expected at least one of more than 30 tokens"),
    ],
)
def test_mistakes_are_said(changes, complaint):
    with pytest.raises(DataError, match=complaint):
        agreement(tiny_llama(), uncompressed(), tokens(1, 30), **changes)


def test_logits_that_are_not_finite_are_refused():
    model = tiny_llama()
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(DataError, match="not finite"):
        agreement(model, uncompressed(), tokens(1, 30))
