"""Ranks and widths from one budget, and what they are chosen by."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import cskv
import cskv.compression.budget as budget_module
import cskv.models.probe as probe_module
import cskv.models.survey as survey_module
from cskv import CSKVAdapter, CSKVConfig
from cskv.calibration.statistics import Statistics
from cskv.compression.budget import Allocation, Budget, allocate, allocate_each, bytes_per_token, ratio_of
from cskv.compression.initialise import initialise
from cskv.compression.losses import observe_latents
from cskv.models.compat import output_cache
from cskv.models.sites import find_sites
from cskv.models.survey import survey
from cskv.reading.divergence import Divergence
from tests.attachment.test_closed_form import statistics_of
from tests.compression.conftest import QUICK, Spend, samples
from tests.models.families import tiny_model

CONFIG = CSKVConfig(window=0, group=32, sinks=2)
SETTINGS = {
    "joint": {},
    "one-token groups": {"group": 1},
    "blocks": {"k_block": (2, 2), "v_block": (1, 8)},
    "head groups": {"head_groups": 2},
    "commuting": {"key_factors": "commuting"},
}


def lopsided() -> nn.Module:
    """Layer 1's output projection is almost zero: nothing that its values or queries do matters."""
    model = tiny_model("llama-mha", max_position_embeddings=512)
    model.model.layers[1].self_attn.o_proj.weight.data.mul_(1e-3)
    return model


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return lopsided()


@pytest.fixture(scope="module")
def statistics(model: nn.Module) -> Statistics:
    return statistics_of(model)


@pytest.fixture(scope="module")
def found(model: nn.Module, statistics: Statistics) -> Allocation:
    return allocate(model, CONFIG, statistics, samples(), Budget(ratio=0.1))


def test_several_budgets_are_spent_like_one(model: nn.Module, statistics: Statistics, found: Allocation) -> None:
    budgets = [Budget(ratio=0.3), Budget(ratio=0.1), Budget(max_kl=2 * found.predicted_kl)]
    for budget, ours in zip(budgets, allocate_each(model, CONFIG, statistics, samples(), budgets), strict=True):
        alone = allocate(model, CONFIG, statistics, samples(), budget)
        assert same(ours.adapter, alone.adapter)
        assert (ours.ratio, ours.predicted_kl, ours.measured_kl) == (
            alone.ratio,
            alone.predicted_kl,
            alone.measured_kl,
        )


def ranks_of(adapter: CSKVAdapter) -> dict[int, tuple[int, int]]:
    return {i: (adapter.factors(i).k.rank, adapter.factors(i).v.rank) for i in adapter.layer_indices}


def same(ours: CSKVAdapter, theirs: CSKVAdapter) -> bool:
    tensors = theirs.state_dict()
    return (ours.config, ours.widths) == (theirs.config, theirs.widths) and all(
        torch.equal(tensor, tensors[name]) for name, tensor in ours.state_dict().items()
    )


def test_bits_go_where_they_count(found: Allocation) -> None:
    bits = {part: sum(width * channels for width, channels in runs) for part, runs in found.adapter.widths.items()}
    assert set(bits) == {(0, "k"), (0, "v"), (1, "k"), (1, "v")}
    assert bits[0, "k"] + bits[0, "v"] > 3 * (bits[1, "k"] + bits[1, "v"])
    assert len({width for runs in found.adapter.widths.values() for width, _ in runs}) > 1
    assert found.adapter.config.mixed_widths


def test_on_other_text_mixed_widths_lose_less_than_uniform_ones(
    model: nn.Module, statistics: Statistics, found: Allocation
) -> None:
    """4 bits throughout: in 10 % of 16 * 64 bits are 20 keys of 5 bits, or 16 values and a block's 32 bits."""
    config = replace(CONFIG, k_density=20 / 64, v_density=16 / 64, init="pca", k_bits=4, v_bits=4)
    uniform = initialise(model, config, statistics)
    assert ratio_of(uniform) == (20 * 5 + 16 * 4 + 32) / (2 * 16 * 64)
    assert found.ratio == ratio_of(found.adapter) <= 0.1
    divergence, held_out = Divergence(survey(model)), samples(8)[4:]
    assert divergence.mean(found.adapter, held_out) < 0.8 * divergence.mean(uniform, held_out)


@pytest.mark.parametrize("number", [2, 3])
def test_what_is_predicted_and_measured_are_divergences_on_either_half(spend: Spend, number: int) -> None:
    model, texts = spend.model, samples(number, 40)  # type: ignore[attr-defined]
    found = allocate(model, QUICK, statistics_of(model), texts, Budget(ratio=0.2))
    divergence, first = Divergence(survey(model)), (number + 1) // 2
    assert found.predicted_kl == pytest.approx(divergence.mean(found.adapter, texts[:first]))
    assert found.measured_kl == pytest.approx(divergence.mean(found.adapter, texts[first:]))
    assert found.predicted_kl != found.measured_kl


@pytest.mark.parametrize("kind", list(SETTINGS))
@settings(max_examples=6)
@given(ratio=st.floats(0.08, 1.0))
def test_no_ratio_is_exceeded_and_most_of_it_used(spend: Spend, kind: str, ratio: float) -> None:
    found = spend(SETTINGS[kind], ratio=ratio)
    assert 0.8 * ratio < found.ratio <= ratio
    assert found.ratio == ratio_of(found.adapter)


@settings(max_examples=6)
@given(ratio=st.floats(0.08, 1.0))
def test_of_ranks_alone_no_latent_more_would_fit(spend: Spend, ratio: float) -> None:
    found = spend(ranks_only=True, ratio=ratio)
    assert not found.adapter.widths
    assert not found.adapter.config.is_quantised
    assert sum(k + v for k, v in ranks_of(found.adapter).values()) == int(ratio * 4 * 32)


@pytest.mark.parametrize("kind", list(SETTINGS))
def test_larger_budgets_lose_less_down_to_nothing(spend: Spend, kind: str) -> None:
    losses = [spend(SETTINGS[kind], ratio=ratio).predicted_kl for ratio in (0.1, 0.2, 0.35, 0.6, 1.0)]
    assert all(more < less for less, more in pairwise(losses))
    assert losses[0] > 1e-2
    assert abs(losses[-1]) < 1e-5


def test_near_the_whole_cache_projections_stay_in_16_bits(spend: Spend, tmp_path: Path) -> None:
    """Grids end at 8 bits: what is left goes to whole projections, one after another, until nothing is packed."""
    model, number = spend.model, []  # type: ignore[attr-defined]
    for ratio in (0.6, 0.8, 1.0):
        found = spend({"group": 32}, ratio=ratio)
        number.append(len(found.adapter.widths))
        assert all(rank == 32 for pair in ranks_of(found.adapter).values() for rank in pair)
        assert found.adapter.config.mixed_widths == bool(found.adapter.widths)
        found.adapter.save_pretrained(tmp_path / str(ratio))
        loaded = CSKVAdapter.from_pretrained(tmp_path / str(ratio))
        assert same(loaded, found.adapter)
        prompt = torch.cat(samples(2, 97)).view(2, 97)
        with cskv.attach(model, loaded), torch.no_grad():
            report = cskv.cache_report(output_cache(model(prompt, use_cache=True)), model)
        held = report.payload_bytes + report.scale_bytes + report.minimum_bytes
        plain = sum(4 - 2 for part in ((0, "k"), (0, "v"), (1, "k"), (1, "v")) if part not in loaded.widths) * 32
        assert held == pytest.approx((found.ratio * 2 * 2 * 32 * 2 + plain) * 2 * 96)  # 16 bits are this model's fp32
    assert number[0] > number[1] > number[2] == 0


def test_bytes_are_the_ratio_in_other_words(spend: Spend) -> None:
    by_ratio = spend(ratio=0.25)
    assert bytes_per_token(by_ratio.adapter, torch.bfloat16)[0] == 2 * 2 * 32 * 2
    by_bytes = spend(bytes_per_token=0.25 * 2 * 2 * 32 * 2)
    assert same(by_bytes.adapter, by_ratio.adapter)
    assert bytes_per_token(by_bytes.adapter, torch.bfloat16)[1] <= 64
    assert spend(bytes_per_token=1e9).ratio == 1.0  # there is no more to spend


@pytest.mark.parametrize(("limit", "ranks_only"), [(0.3, False), (0.02, False), (0.3, True)])
def test_the_smallest_cache_of_a_divergence(spend: Spend, limit: float, ranks_only: bool) -> None:
    found = spend(max_kl=limit, ranks_only=ranks_only)
    assert found.predicted_kl <= limit
    assert found.ratio == ratio_of(found.adapter) < 1
    if found.predicted_kl < 0.95 * limit:  # the search ended on a step of the losses
        assert spend(ratio=0.97 * found.ratio, ranks_only=ranks_only).predicted_kl > limit
    assert spend(ratio=0.8 * found.ratio, ranks_only=ranks_only).predicted_kl > limit


def test_a_divergence_that_hardly_any_latent_is_needed_for(spend: Spend) -> None:
    """Blocks cost what no single latent fills: budgets are tried that keep none of some projection."""
    found = spend({"v_block": (1, 32)}, max_kl=50.0)
    assert all(rank >= 1 for pair in ranks_of(found.adapter).values() for rank in pair)
    assert found.predicted_kl < 50
    assert found.ratio < 0.15


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ratio_is_that_of_the_bytes_held(found: Allocation, dtype: torch.dtype) -> None:
    """Of sealed tokens in full groups, beside the 2 bytes of every one of their key and value channels."""
    model = lopsided().to(dtype)
    prompt = torch.randint(3, 96, (2, 322), generator=torch.Generator().manual_seed(7))
    with cskv.attach(model, found.adapter), torch.no_grad():
        report = cskv.cache_report(output_cache(model(prompt, use_cache=True)), model)
    held = report.payload_bytes + report.scale_bytes + report.minimum_bytes
    assert held == pytest.approx(found.ratio * 2 * 320 * 2 * 2 * 64 * 2, rel=1e-12)


@pytest.mark.parametrize("changes", [{}, {"head_groups": 2}, {"key_factors": "commuting"}])
def test_ranks_cut_the_factors_that_initialising_makes(
    spend: Spend, changes: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget_module, "SHRINKAGES", (0.0,))
    model, x = spend.model, torch.randn(9, 64)  # type: ignore[attr-defined]
    found = spend(changes, ranks_only=True, ratio=0.4).adapter
    made = initialise(model, found.config, statistics_of(model), ranks_of(found))
    assert len(set(ranks_of(found).values())) > 1
    for index in found.layer_indices:
        for kind in ("k", "v"):
            ours, theirs = (getattr(adapter.factors(index), kind) for adapter in (found, made))
            read = x[:, : ours.hidden_size]
            expected = theirs.expand(theirs.latents(read))
            assert (ours.expand(ours.latents(read)) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_every_width_is_of_a_row_of_the_full_factors(
    model: nn.Module, statistics: Statistics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget_module, "SHRINKAGES", (0.0,))
    found = allocate(model, CONFIG, statistics, samples(), Budget(ratio=0.1))
    full = initialise(model, replace(CONFIG, k_density=1.0, v_density=1.0), statistics)
    for index in found.adapter.layer_indices:
        for kind in ("k", "v"):
            ours, components = (getattr(adapter.factors(index), kind) for adapter in (found.adapter, full))
            matches = (ours.down[:, None] == components.down).all(-1)
            assert matches.sum(1).tolist() == [1] * ours.rank
            assert torch.equal(ours.up, components.up[:, matches.int().argmax(1)])


def test_the_shrinkage_that_loses_less_is_kept(spend: Spend, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = {}
    for shrinkage in budget_module.SHRINKAGES:
        with monkeypatch.context() as patch:
            patch.setattr(budget_module, "SHRINKAGES", (shrinkage,))
            alone[shrinkage] = spend(ratio=0.1)
    least = min(alone.values(), key=lambda one: one.predicted_kl)
    assert len({one.predicted_kl for one in alone.values()}) == 2
    assert same(spend(ratio=0.1).adapter, least.adapter)


@pytest.mark.parametrize("ranks_only", [False, True])
def test_work_does_not_grow_with_layers(monkeypatch: pytest.MonkeyPatch, ranks_only: bool) -> None:
    """The model is probed once, and no projection is measured by a forward of its own."""
    counted: Counter[str] = Counter()

    def count(owner: object, name: str) -> None:
        plain = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: counted.update([name]) or plain(*args, **kwargs))

    for owner in (probe_module, survey_module):
        count(owner, "probe")
    count(torch.linalg, "eigh")
    forwards = {}
    for layers in (1, 3):
        model = tiny_model("llama", num_hidden_layers=layers)
        known = statistics_of(model)
        counted.clear()
        hook = model.model.register_forward_hook(lambda *_: counted.update(["forward"]))
        allocate(model, QUICK, known, samples(4, 40), Budget(ratio=0.2), ranks_only=ranks_only)
        hook.remove()
        forwards[layers] = counted["forward"]
        assert counted["probe"] == 1
        # Of every projection and shrinkage Fisher information, gain and covariance; no factors of lower rank anew.
        assert counted["eigh"] == 3 * 2 * layers * len(budget_module.SHRINKAGES)
    assert forwards[1] == forwards[3]


def test_sinks_have_no_say_in_widths(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are never packed: whatever the first token is, and here what comes of it in others is not seen."""
    monkeypatch.setattr(budget_module, "SHRINKAGES", (0.0,))  # which of them is kept, predictions decide
    model = tiny_model("llama", num_hidden_layers=1)
    embeddings = model.model.embed_tokens.weight.data
    embeddings[:, 0] = embeddings[1] = 0
    embeddings[1, 0] = 5.0  # as massive activations are, in a channel of its own
    model.model.layers[0].input_layernorm.weight.data[0] = 50.0
    known, texts = statistics_of(model), samples(2, 40)
    others = [torch.cat([torch.tensor([1]), text[1:]]) for text in texts]
    for sinks, alike in ((1, True), (0, False)):
        config = replace(QUICK, sinks=sinks, group=32)
        found = [allocate(model, config, known, own, Budget(ratio=0.2)).adapter for own in (texts, others)]
        assert same(*found) == alike


def test_progress_says_what_is_done() -> None:
    model, said = tiny_model("llama"), []
    allocate(
        model,
        QUICK,
        statistics_of(model),
        samples(2, 40),
        Budget(max_kl=0.1),
        progress=lambda stage, done, total: said.append((stage, done, total)),
    )
    assert list(dict.fromkeys(stage for stage, _, _ in said)) == [
        "measuring widths",
        "searching the ratio",
        "measuring the divergence",
    ]
    assert [done for stage, done, total in said if stage == "measuring widths" and total == 4] == 2 * [1, 2, 3, 4]
    assert all(0 <= done <= total for _, done, total in said)
    assert said[-1] == ("measuring the divergence", 1, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_latents_of_layer_inputs_are_observed(dtype: torch.dtype) -> None:
    model = tiny_model("qwen2").train()
    config = CSKVConfig(0.25, 0.5, init="pca", k_bits=4)
    adapter = initialise(model, config, statistics_of(model.eval()))
    factors = {(i, kind): getattr(adapter.factors(i), kind) for i in (0, 1) for kind in ("k", "v")}
    model.to(dtype).train()
    texts = [samples(1, length)[0] for length in (7, 12)]
    seen = list(observe_latents(survey(model), factors, texts))
    assert model.training
    model.eval()
    assert [part for part, _ in seen] == [(i, kind) for _ in texts for i in (0, 1) for kind in ("k", "v")]
    found = iter(seen)
    for text in texts:
        with torch.no_grad():
            hidden = model(text[None], output_hidden_states=True).hidden_states
        for site, h, layer in zip(find_sites(model), hidden, model.model.layers):
            x = layer.input_layernorm(h).float()
            for kind in ("k", "v"):
                _, latents = next(found)
                assert latents.dtype == torch.float32
                assert not latents.requires_grad
                assert torch.equal(latents, getattr(adapter.factors(site.layer_idx), kind).latents(x))
