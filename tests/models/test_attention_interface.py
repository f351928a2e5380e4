"""Functions of ours beside those of transformers, whose names it reads things from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.utils.generic import is_flash_attention_requested

from cskv.models.attention_interface import Switch, implementation_of, name_of, stands_beside
from tests.models.families import tiny_model
from tests.models.flash import KERNELS, standing_in


@pytest.mark.parametrize("name", ["sdpa", "eager", "flex_attention", "flash_attention_2", *KERNELS])
def test_a_name_looks_as_the_one_beside_it_does(name: str) -> None:
    ours = name_of("cskv", name)
    assert is_flash_attention_requested(requested_attention_implementation=ours) == ("flash" in name)
    assert "sdpa" not in ours
    assert "/" not in ours  # a kernel of the hub


def test_a_function_knows_beside_which_it_stands() -> None:
    model = tiny_model("llama")
    module = model.model.layers[0].self_attn
    for prefix in ("someones", "others"):
        Switch([module], prefix, lambda original, *args, **kwargs: original(*args, **kwargs))
    assert implementation_of(module) == "sdpa"
    assert stands_beside("someones", "someones") == "sdpa"
    assert stands_beside("others", model.config._attn_implementation) == "someones"
    assert stands_beside("someones", model.config._attn_implementation) is None
    assert stands_beside("someones", "sdpa") is None


@torch.no_grad()
def test_flash_attention_is_called_by_its_own_name() -> None:
    """It loads its package by the name in the module's config: the stand-in refuses any other."""
    tokens, seen = torch.tensor([[5, 9, 33, 71]]), []

    def function(original: Any, module: nn.Module, *args: Tensor, **kwargs: Any) -> Any:
        seen.append(module.config._attn_implementation)
        return original(module, *args, **kwargs)

    with standing_in() as calls:
        for name in ("flash_attention_2", KERNELS[0]):
            model = tiny_model("llama")
            expected = model(tokens).logits
            model.config._attn_implementation = name
            switch = Switch([model.model.layers[0].self_attn], "named", function)
            assert (model(tokens).logits - expected).abs().max() < 1e-4
            assert seen[-1] == name_of("named", name)
            switch.back()
            assert model.config._attn_implementation == name
    assert len(calls.lengths) == 4


def test_a_config_that_takes_some_names_only_is_switched_too() -> None:
    """GPT-OSS of older releases refuses FlashAttention but for one kernel."""
    model = tiny_model("llama")

    class Picky(type(model.config)):  # type: ignore[misc]
        def __setattr__(self, key: str, value: Any) -> None:
            if key.startswith("_attn_implementation") and value and "flash" in value and value != KERNELS[0]:
                raise ValueError(f"{value} is not supported")
            super().__setattr__(key, value)

    with standing_in():
        model.config.__class__ = Picky
        model.config._attn_implementation = KERNELS[0]
        switch = Switch([model.model.layers[0].self_attn], "picked", lambda original, *args, **kwargs: None)
        assert model.config._attn_implementation == name_of("picked", KERNELS[0])
        switch.back()
        assert model.config._attn_implementation == KERNELS[0]
