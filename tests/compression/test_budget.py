"""Ranks and widths from one budget of bytes, and what they are chosen by."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from cskv.compression.sensitivity import Allocation, deal, halves, sensitivities
from torch import Tensor, nn

import cskv
import cskv.models.probe as probe_module
import cskv.models.survey as survey_module
from cskv import ConfigError, CSKVAdapter, CSKVConfig, DataError
from cskv.calibration.calibrate import calibrate
from cskv.compression.budget import allocate_ranks, allocate_widths, observe_latents, ratio_of
from cskv.compression.initialise import initialise
from cskv.models.compat import output_cache
from cskv.models.sites import find_sites
from cskv.models.survey import survey
from cskv.reading.divergence import Divergence
from tests.attachment.test_closed_form import statistics_of
from tests.models.families import tiny_model, truncated_adapter

CONFIG = CSKVConfig(window=0, group=32, init="pca", mixed_widths=True)


def samples(number: int = 4, length: int = 160) -> list[Tensor]:
    return list(torch.randint(3, 96, (number, length), generator=torch.Generator().manual_seed(2)))


def lopsided() -> nn.Module:
    """Layer 1's output projection is almost zero: nothing that its values or queries do matters."""
    model = tiny_model("llama-mha", max_position_embeddings=512)
    model.model.layers[1].self_attn.o_proj.weight.data.mul_(1e-3)
    return model


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return lopsided()


@pytest.fixture(scope="module")
def found(model: nn.Module) -> Allocation:
    return allocate_widths(model, CONFIG, statistics_of(model), samples(), 0.1)


def test_bits_go_where_they_count(model: nn.Module, found: Allocation) -> None:
    bits = {part: sum(width * channels for width, channels in runs) for part, runs in found.adapter.widths.items()}
    assert set(bits) == {(0, "k"), (0, "v"), (1, "k"), (1, "v")}
    assert bits[0, "k"] + bits[0, "v"] > 3 * (bits[1, "k"] + bits[1, "v"])
    assert len({width for runs in found.adapter.widths.values() for width, _ in runs}) > 1
    assert found.sensitivity[0, "v"] > 100 * found.sensitivity[1, "v"]
    assert found.allocated_kl < found.uniform_kl
    assert not found.is_uniform
    assert found.adapter.config.mixed_widths


def test_on_other_text_mixed_widths_lose_less_than_uniform_ones(model: nn.Module, found: Allocation) -> None:
    """4 bits throughout: in 10 % of 16 * 64 bits are 20 keys of 5 bits, or 16 values and a block's 32 bits."""
    config = CSKVConfig(20 / 64, 16 / 64, window=0, group=32, init="pca", k_bits=4, v_bits=4)
    uniform = initialise(model, config, statistics_of(model))
    assert ratio_of(uniform) == (20 * 5 + 16 * 4 + 32) / (2 * 16 * 64)
    assert ratio_of(found.adapter) <= 0.1
    divergence, held_out = Divergence(survey(model)), samples(8)[4:]
    assert divergence.mean(found.adapter, held_out) < 0.8 * divergence.mean(uniform, held_out)
    assert found.uniform_kl == pytest.approx(divergence.mean(uniform, samples()[2:]))
    assert found.allocated_kl == pytest.approx(divergence.mean(found.adapter, samples()[2:]))


@pytest.mark.parametrize("target", [0.08, 0.3])
@pytest.mark.parametrize("changes", [{}, {"init": "weighted-pca"}, {"group": 1}, {"k_block": (8, 2)}])
def test_the_ratio_is_kept_and_used(target: float, changes: dict) -> None:
    model = tiny_model("qwen2")
    found = allocate_widths(model, replace(CONFIG, **changes), statistics_of(model), samples(2, 40), target)
    assert 0.8 * target < ratio_of(found.adapter) <= target
    assert found.is_uniform == (not found.adapter.config.mixed_widths)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ratio_is_that_of_the_bytes_held(found: Allocation, dtype: torch.dtype) -> None:
    """Of sealed tokens in full groups, beside the 2 bytes of every one of their key and value channels."""
    model = lopsided().to(dtype)
    prompt = torch.randint(3, 96, (2, 320), generator=torch.Generator().manual_seed(7))
    with cskv.attach(model, found.adapter), torch.no_grad():
        report = cskv.cache_report(output_cache(model(prompt, use_cache=True)), model)
    held = report.payload_bytes + report.scale_bytes + report.minimum_bytes
    assert held == pytest.approx(ratio_of(found.adapter) * 2 * 320 * 2 * 2 * 64 * 2, rel=1e-12)
    assert report.window_bytes == 0


def test_what_is_kept_are_centred_principal_components(model: nn.Module, found: Allocation) -> None:
    calibrated = torch.randint(3, 96, (6, 40), generator=torch.Generator().manual_seed(5))  # as in `statistics_of`
    full = initialise(model, CSKVConfig(1.0, 1.0, init="pca"), statistics_of(model))
    seen: dict[tuple[int, str], list[Tensor]] = {}
    for part, latents in observe_latents(survey(model), found.adapter, list(calibrated)):
        seen.setdefault(part, []).append(latents[0])
    for (index, kind), latents in seen.items():
        ours, components = (getattr(adapter.factors(index), kind) for adapter in (found.adapter, full))
        assert torch.cat(latents).mean(0).abs().max() < 1e-4 * torch.cat(latents).std()
        matches = torch.isclose(ours.down[:, None], components.down, atol=1e-5).all(-1)
        assert matches.sum(1).tolist() == [1] * ours.rank


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_latents_of_layer_inputs_are_observed(dtype: torch.dtype) -> None:
    model = tiny_model("qwen2").train()
    adapter = initialise(model, CSKVConfig(0.25, 0.5, init="pca", k_bits=4), statistics_of(model.eval()))
    model.to(dtype).train()
    texts = [samples(1, length)[0] for length in (7, 12)]
    seen = list(observe_latents(survey(model), adapter, texts))
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


def test_a_sensitivity_is_the_divergence_of_one_part_per_loss() -> None:
    model = tiny_model("llama")
    adapter = truncated_adapter(model, CSKVConfig(0.25, 0.25, window=0, group=4))
    divergence, texts = Divergence(survey(model)), samples(2, 40)
    seen: list[tuple[int, int]] = []
    losses = {(0, "k"): 2.0, (1, "v"): 0.5, (1, "k"): 0.0}
    found = sensitivities(divergence, adapter, losses, texts, lambda done, total: seen.append((done, total)))
    for part in ((0, "k"), (1, "v")):
        alone = divergence.mean(adapter, texts, only=frozenset({part}))
        assert alone > 1e-3
        assert found[part] == pytest.approx(alone / losses[part])
    assert found[1, "k"] == 0.0
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_the_best_power_of_the_sensitivities_is_kept() -> None:
    """Of four adapters that are made, by sensitivities down to none, the one of least divergence."""
    model = lopsided()
    uniform, *others = (
        truncated_adapter(model, CSKVConfig(d, d, window=0, group=8)) for d in (0.3, 0.2, 0.1, 0.5, 0.4)
    )
    losses = {(layer, kind): 2.0 for layer in (0, 1) for kind in ("k", "v")}
    weights, made = [], iter(others)

    def make(weighted: dict) -> cskv.CSKVAdapter:
        weights.append(weighted)
        return next(made)

    found = deal(Divergence(survey(model)), uniform, losses, make, samples())
    assert found.adapter is others[2]
    assert found.allocated_kl < found.uniform_kl
    for power, weighted in zip((1.0, 0.5, 0.25, 0.0), weights, strict=True):
        assert weighted == {part: value**power for part, value in found.sensitivity.items()}
    made = iter([others[0], others[1]] * 2)
    worse = deal(Divergence(survey(model)), uniform, losses, make, samples())
    assert worse.is_uniform
    assert worse.adapter is uniform
    made = iter([others[0], others[1]] * 2)
    alone = deal(Divergence(survey(model)), uniform, losses, make, samples(), uniform_fits=False)
    assert alone.uniform_kl is None
    assert any(alone.adapter is other for other in others[:2])


@pytest.mark.parametrize(("number", "first"), [(2, 1), (3, 2), (4, 2), (5, 3)])
def test_the_second_half_is_kept_aside(number: int, first: int) -> None:
    texts = samples(number, 4)
    seen, aside = halves(texts)
    assert len(seen) == first
    assert all(a is b for a, b in zip([*seen, *aside], texts, strict=True))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"init": "svd"}, "widths are chosen for PCA latents, init is 'svd'; give 'pca' or 'weighted-pca'"),
        ({"init": "asvd"}, "init is 'asvd'"),
        ({"key_factors": "commuting"}, "joint factors of one head group, got commuting keys and 1 head groups"),
        ({"head_groups": 2}, "got joint keys and 2 head groups; give --k-bits and --v-bits instead"),
    ],
)
def test_settings_that_do_not_go_with_mixed_widths_are_refused(model: nn.Module, changes: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        allocate_widths(model, replace(CONFIG, **changes), statistics_of(model), samples(), 0.1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.0, 1.5, float("nan")])
def test_a_ratio_out_of_range_is_refused(model: nn.Module, ratio: float) -> None:
    with pytest.raises(ConfigError, match=r"expected a share of the uncompressed bytes in \(0, 1\)"):
        allocate_widths(model, CONFIG, statistics_of(model), samples(), ratio)


def test_too_little_is_refused(model: nn.Module) -> None:
    with pytest.raises(ConfigError, match="no choice of widths takes 0.004 of the bytes; raise the target ratio"):
        allocate_widths(model, CONFIG, statistics_of(model), samples(), 0.004)
    for number in (0, 1):
        with pytest.raises(DataError, match=f"at least 2 samples, got {number}; give more text"):
            allocate_widths(model, CONFIG, statistics_of(model), samples(2)[:number], 0.1)
    with pytest.raises(DataError, match="lack"):
        allocate_widths(model, CONFIG, calibrate(model, samples(2, 40), covariance=False), samples(), 0.1)


RANKED = CSKVConfig(0.25, 0.25, window=0, group=2, init="pca")


def ranks_of(adapter: CSKVAdapter) -> dict[int, tuple[int, int]]:
    return {i: (adapter.factors(i).k.rank, adapter.factors(i).v.rank) for i in adapter.layer_indices}


def test_ranks_go_where_they_count() -> None:
    """Layer 1's output projection is almost zero: nothing that its values or queries do matters."""
    model = tiny_model("llama-mha", max_position_embeddings=512)
    model.model.layers[1].self_attn.o_proj.weight.data.mul_(1e-3)
    seen: list[tuple[int, int]] = []
    found = allocate_ranks(
        model,
        RANKED,
        statistics_of(model),
        samples(4, 300),
        0.25,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert sum(k + v for k, v in ranks_of(found.adapter).values()) == 0.25 * 4 * 64
    assert sum(ranks_of(found.adapter)[0]) > 3 * sum(ranks_of(found.adapter)[1])
    assert found.allocated_kl < found.uniform_kl
    assert not found.is_uniform
    assert seen == [(i, 4) for i in (1, 2, 3, 4)]
    held_out = samples(8, 300)[4:]
    uniform = initialise(model, RANKED, statistics_of(model))
    divergence = Divergence(survey(model))
    assert divergence.mean(found.adapter, held_out) < divergence.mean(uniform, held_out)


@pytest.mark.parametrize("settings", [{"head_groups": 2}, {"key_factors": "commuting"}])
def test_ranks_respect_groups_and_pairs(settings: dict) -> None:
    model = tiny_model("llama-mha", max_position_embeddings=512)
    config = CSKVConfig(window=0, group=2, init="weighted-pca", **settings)
    found = allocate_ranks(model, config, statistics_of(model), samples(2, 300), 0.3)
    assert all(rank % 2 == 0 for pair in ranks_of(found.adapter).values() for rank in pair)
    assert sum(k + v for k, v in ranks_of(found.adapter).values()) <= 0.3 * 4 * 64


def test_allocation_says_what_it_needs() -> None:
    model = tiny_model("llama")
    with pytest.raises(ConfigError, match="init is 'svd'; expected 'pca' or 'weighted-pca'"):
        allocate_ranks(model, CSKVConfig(init="svd"), statistics_of(model), samples(4, 300), 0.2)
    with pytest.raises(DataError, match="at least 2 samples, got 1"):
        allocate_ranks(model, RANKED, statistics_of(model), samples(1, 300), 0.2)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"init": "weighted-pca", "k_bits": 4},
        {"head_groups": 2},
        {"key_factors": "commuting", "init": "weighted-pca"},
    ],
)
def test_slices_are_what_factorising_at_their_ranks_gives(settings: dict) -> None:
    model = tiny_model("qwen2")
    statistics, x = statistics_of(model), torch.randn(9, 64)
    config = replace(RANKED, **settings)
    found = allocate_ranks(model, config, statistics, samples(2, 40), 0.4).adapter
    made = initialise(model, found.config, statistics, ranks_of(found))
    for index in found.layer_indices:
        for kind in ("k", "v"):
            ours, theirs = (getattr(adapter.factors(index), kind) for adapter in (found, made))
            read = x[:, : ours.hidden_size]
            expected = theirs.expand(theirs.latents(read))
            assert (ours.expand(ours.latents(read)) - expected).abs().max() < 1e-5 * expected.abs().max()
            assert (ours.down_bias is None) == (theirs.down_bias is None)


def test_a_model_is_probed_once_and_each_projection_factorised_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    statistics = statistics_of(model)
    counted: Counter[str] = Counter()

    def count(owner: object, name: str) -> None:
        plain = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: counted.update([name]) or plain(*args, **kwargs))

    for owner in (probe_module, survey_module):
        count(owner, "probe")
    count(torch.linalg, "eigh")
    for allocate, config in ((allocate_ranks, RANKED), (allocate_widths, CONFIG)):
        counted.clear()
        allocate(model, config, statistics, samples(2, 40), 0.25)
        assert counted["probe"] == 1
        # Of every projection its covariance and the identity that stands for its gain.
        assert counted["eigh"] <= 2 * 4
