"""The model card says how latents are stored."""

from __future__ import annotations

from typing import Any

import pytest

from cskv import CSKVConfig
from cskv.adapter.card import model_card


def card(**settings: Any) -> str:
    return model_card(
        {
            "base_model": {"name": "some/model", "model_type": "llama"},
            "compression": CSKVConfig(**settings).to_dict(),
            "ranks": {"0": {"k": 8, "v": 16, "kv_dim": 32}},
            "metrics": {"kl": 0.25},
        }
    )


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "as latents (CSKV"),
        ({"k_bits": 4, "v_bits": 2}, "as latents of 4 and 2 bits (CSKV"),
        ({"mixed_widths": True}, "as latents of 2 to 8 bits (CSKV"),
    ],
)
def test_it_says_in_how_many_bits(settings: dict[str, Any], says: str) -> None:
    assert says in card(**settings)
    assert "base_model: some/model" in card(**settings)
    assert "| kl | 0.25 |" in card(**settings)


def test_it_says_which_tokens_are_exact() -> None:
    assert "The first 4 and the newest 8 to 23 tokens are kept exactly." in card(window=8, group=16, sinks=4)
    assert "The newest 8 to 23 tokens are kept exactly." in card(window=8, group=16, sinks=0)
