"""Adapters in closed form, on every family: nothing lost at full rank, and the least loss below it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import cskv
from cskv import CSKVConfig, UnsupportedModelError
from cskv.calibration.calibrate import calibrate
from cskv.calibration.statistics import Statistics
from cskv.compression.initialise import initialise
from cskv.models.compat import output_cache
from cskv.models.sites import find_sites
from tests.models.families import FAMILIES, tiny_model

KINDS = {
    "fisher": {},
    "fisher-grouped": {"head_groups": 2},
    "fisher-commuting": {"key_factors": "commuting"},
    "pca": {"init": "pca"},
    "weighted": {"init": "weighted-pca"},
    "grouped": {"init": "pca", "head_groups": 2},
    "commuting": {"init": "pca", "key_factors": "commuting"},
    "weighted-commuting": {"init": "weighted-pca", "key_factors": "commuting"},
}


def statistics_of(model: nn.Module) -> Statistics:
    samples = torch.randint(3, 96, (6, 40), generator=torch.Generator().manual_seed(5))
    return calibrate(model, list(samples), CSKVConfig(window=0, group=4, sinks=0))


def greedy(model: nn.Module) -> torch.Tensor:
    prompt = torch.randint(3, 96, (2, 30), generator=torch.Generator().manual_seed(4))
    return model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=12,
        min_new_tokens=12,
        do_sample=False,
        pad_token_id=0,
    )


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("family", list(FAMILIES))
def test_full_rank_changes_no_token(family: str, kind: str) -> None:
    expected = greedy(tiny_model(family))
    model = tiny_model(family)
    config = CSKVConfig(1.0, 1.0, window=0, group=4, **KINDS[kind])
    statistics = statistics_of(model)
    if kind.endswith("commuting") and family in ("smollm3", "cohere2"):
        with pytest.raises(UnsupportedModelError, match="its keys are not rotated"):  # layers without RoPE
            initialise(model, config, statistics)
        return
    with cskv.attach(model, initialise(model, config, statistics)):
        assert torch.equal(greedy(model), expected)


def test_commuting_keys_store_no_positions() -> None:
    model = tiny_model("llama-mha")
    config = CSKVConfig(0.5, 0.5, window=0, group=4, sinks=4, init="pca", key_factors="commuting")
    with cskv.attach(model, initialise(model, config, statistics_of(model))), torch.no_grad():
        report = cskv.cache_report(output_cache(model(torch.arange(3, 47)[None], use_cache=True)), model)
    assert report.position_bytes == 0
    assert report.payload_bytes == 40 * (32 + 32) * 2 * 4


@pytest.mark.parametrize("family", ["llama-mha", "qwen2", "qwen3"])
def test_the_reconstruction_loss_is_ordered(family: str) -> None:
    """PCA <= ASVD and SVD, PCA <= grouped PCA, on the text that was calibrated on."""
    model = tiny_model(family)
    statistics = statistics_of(model)

    def losses(**settings: object) -> dict[tuple[int, str], float]:
        adapter = initialise(model, CSKVConfig(0.25, 0.25, **settings), statistics)
        return {
            (site.layer_idx, kind): _loss(
                statistics, site.layer_idx, kind, getattr(adapter.factors(site.layer_idx), kind), projection
            )
            for site in find_sites(model)
            for kind, projection in (("k", site.k), ("v", site.v))
        }

    best = losses(init="pca")
    for rival in (
        losses(init="svd"),
        losses(init="asvd"),
        losses(init="pca", head_groups=2),
        losses(init="weighted-pca"),
    ):
        assert all(best[key] <= rival[key] * (1 + 1e-5) for key in best)


def _loss(statistics, layer_idx, kind, factors, projection) -> float:
    """E||y - y^||^2 from the calibrated moments. Every method's down is a map A of the weight, so y^ is affine in y."""
    weight = projection.weight.detach().double()
    bias = torch.zeros(weight.shape[0]).double() if projection.bias is None else projection.bias.detach().double()
    mean, moment = statistics.get(layer_idx, f"{kind}.mean"), statistics.get(layer_idx, f"{kind}.moment")
    down, up = factors.down.detach().double(), _dense_up(factors).detach().double()
    solved = torch.linalg.lstsq(weight.T, down.T).solution.T
    matrix = torch.eye(len(mean)).double() - up @ solved
    offset = (factors.bias.detach().double() if factors.bias is not None else 0) - up @ solved @ bias
    spread = matrix @ (moment - torch.outer(mean, mean)) @ matrix.T
    return float(spread.trace() + (matrix @ mean - offset).square().sum())


def _dense_up(factors: cskv.Factors) -> torch.Tensor:
    return torch.block_diag(*factors.up.chunk(factors.groups))


def test_init_names_what_it_needs() -> None:
    model = tiny_model("llama")
    with pytest.raises(cskv.DataError, match="init 'pca' needs calibration statistics"):
        initialise(model, CSKVConfig(init="pca"))
    lean = calibrate(model, [torch.arange(3, 40)], covariance=False)
    with pytest.raises(cskv.DataError, match=r"layer 0 .*lack k\.mean"):
        initialise(model, CSKVConfig(init="pca"), lean)
    with pytest.raises(cskv.ConfigError, match="3 head groups do not divide 2 kv heads"):
        initialise(model, CSKVConfig(init="pca", head_groups=3), statistics_of(model))
