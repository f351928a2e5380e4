"""What an attention function heeds is found by trying it."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from cskv.models import logits
from cskv.models.attention_interface import Switch
from cskv.models.probe import probe
from cskv.models.sites import find_sites
from tests.models.families import tiny_model


def heedless(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
    """Like sdpa in releases before it refused soft-capping."""
    kwargs.pop("softcap", None)
    return sdpa_attention_forward(module, query, key, value, mask, **kwargs)


def doubling(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
    output, weights = sdpa_attention_forward(module, query, key, value, mask, **kwargs)
    return 2 * output, weights


@pytest.fixture
def restored():
    original = AttentionInterface._global_mapping["sdpa"]
    yield
    AttentionInterface.register("sdpa", original)


@pytest.mark.parametrize(
    ("function", "ignored", "why"),
    [(heedless, {"softcap"}, None), (doubling, set(), "does more than is understood")],
)
def test_what_sdpa_heeds(restored, function, ignored: set[str], why: str | None) -> None:
    model = tiny_model("gemma2" if function is heedless else "llama")
    AttentionInterface.register("sdpa", function)
    model.config._attn_implementation = "sdpa"
    for recipe in probe(model, find_sites(model)).values():
        assert recipe.attention.ignored == ignored
        assert (why or "None") in str(recipe.attention.why_rebuild)
    assert model.config._attn_implementation == "sdpa"


def test_eager_soft_capping_and_sinks_are_heeded() -> None:
    for family in ("gemma2", "gpt-oss"):
        model = tiny_model(family)
        model.set_attn_implementation("eager")
        for recipe in probe(model, find_sites(model)).values():
            assert recipe.attention == logits.Understanding()


def test_a_switch_leaves_what_somebody_else_set() -> None:
    model = tiny_model("llama")
    switch = Switch([model.model.layers[0].self_attn], "someones", heedless)
    assert model.config._attn_implementation == "someones"
    model.config._attn_implementation = "eager"
    switch.back()
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("family", "plain", "normalised"),
    [
        ("llama", True, False),
        ("phi3", True, False),
        ("stablelm", True, False),
        ("glm4", False, False),
        ("qwen3", True, True),
        ("gemma3", True, True),
        ("olmo2", False, False),
    ],
)
def test_what_kernels_can_do_to_rebuilt_keys_is_known(family: str, plain: bool, normalised: bool) -> None:
    """GLM4 rotates neighbouring channels, and OLMo2 normalises across heads."""
    model = tiny_model(family)
    for recipe in probe(model, find_sites(model)).values():
        assert recipe.plain_rope == plain
        assert (recipe.key_norm is not None) == normalised
