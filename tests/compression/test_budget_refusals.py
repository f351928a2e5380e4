"""What a budget cannot be, or cannot be spent on, is said in one line."""

from __future__ import annotations

import pytest

from cskv import ConfigError, DataError
from cskv.calibration.calibrate import calibrate
from cskv.compression.budget import Budget, allocate
from tests.attachment.test_closed_form import statistics_of
from tests.compression.conftest import QUICK, Spend, samples
from tests.models.families import tiny_model


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "got none: give one"),
        ({"ratio": 0.2, "max_kl": 0.1}, r"got \{'ratio': 0.2, 'max_kl': 0.1\}: give one"),
        ({"ratio": 0.0}, r"ratio is 0.0; expected a share of the uncompressed bytes in \(0, 1\]"),
        ({"ratio": -0.1}, "ratio is -0.1"),
        ({"ratio": 1.5}, "ratio is 1.5"),
        ({"ratio": float("nan")}, "ratio is nan"),
        ({"ratio": "0.2"}, "ratio is '0.2'"),
        ({"ratio": True}, "ratio is True"),
        ({"bytes_per_token": 0}, "bytes_per_token is 0; expected a number above 0"),
        ({"bytes_per_token": float("inf")}, "bytes_per_token is inf"),
        ({"max_kl": -1e-3}, "max_kl is -0.001; expected a number above 0"),
    ],
)
def test_a_budget_that_is_none_is_refused(given: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        Budget(**given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"init": "svd"}, "init is 'svd'; expected 'fisher-pca'"),
        ({"init": "weighted-pca"}, "init is 'weighted-pca'; expected 'fisher-pca'"),
        ({"k_bits": 4}, "a budget chooses the widths of latents; got k_bits 4, v_bits 16"),
        ({"mixed_widths": True}, "mixed_widths True: give one of them"),
        ({"head_groups": 3}, "3 head groups do not divide 2 kv heads"),
    ],
)
def test_settings_that_do_not_go_with_a_budget_are_refused(spend: Spend, changes: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        spend(changes, ratio=0.2)
    assert "\n" not in str(caught.value)


def test_too_little_is_refused(spend: Spend) -> None:
    with pytest.raises(ConfigError, match="no choice of widths takes 0.004 of the bytes; raise the budget"):
        spend(ratio=0.004)
    model = spend.model  # type: ignore[attr-defined]
    known, budget = statistics_of(model), Budget(max_kl=0.1)
    for number in (0, 1):
        with pytest.raises(DataError, match=f"at least 2 samples, got {number}; give more text"):
            allocate(model, QUICK, known, samples(2)[:number], budget)
    # Of shorter ones nothing is ever read from latents: they would diverge by nothing, whatever is dropped.
    with pytest.raises(DataError, match="a sample of 5 tokens has none .* at least 6 tokens, or a smaller window"):
        allocate(model, QUICK, known, [*samples(1, 40), *samples(1, 5)], budget)
    for lean in ({"covariance": False}, {"fisher": False}):
        with pytest.raises(DataError, match=r"layer 0 .*lack k\..*; calibrate again with"):
            allocate(model, QUICK, calibrate(model, samples(2, 40), QUICK, **lean), samples(2, 40), budget)


def test_a_divergence_that_no_cache_reaches_is_refused() -> None:
    model = tiny_model("llama").bfloat16()  # whose own rounding is more than this
    with pytest.raises(ConfigError, match=r"even all latents at full width diverge by .* nats per token; allow more"):
        allocate(model, QUICK, statistics_of(model), samples(2, 40), Budget(max_kl=1e-12))
