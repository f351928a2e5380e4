"""Keys whose latents leave a constant out, as rotated biases are: every backend against keys made by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cskv.attention import attend
from cskv.attention.attend import attention
from cskv.attention.inputs import AttentionInputs, KeyOffset, split_heads
from cskv.attention.reference import over
from tests.attention.problems import Problem
from tests.interpreter import mend_interpreter

PROBLEM = Problem(batch=2, sealed=150, rotary=None, new=2, bias=True)


def with_offset(rotary: int, plain: bool = True, mask: str | None = None) -> tuple[AttentionInputs, Tensor, Tensor]:
    """What attention is given; and keys and values, with the constant rotated as a position's angles say."""
    rotation = replace(PROBLEM, rotary=rotary).rope(torch.float32)
    assert rotation is not None
    assert rotation.cos is not None
    constant = 3 * PROBLEM.draw(PROBLEM.kv_heads * PROBLEM.head_dim)
    inputs = PROBLEM.inputs(PROBLEM.logits(mask=mask))
    offset = KeyOffset(replace(rotation, is_plain=plain), constant)
    factors, view = inputs.factors, inputs.view
    assert view.k is not None
    assert view.v is not None
    keys = split_heads(factors.k.expand(view.k.read()), PROBLEM.head_dim)
    for token in range(PROBLEM.sealed):
        for channel in range(rotary // 2):
            angle = torch.tensor(token * 10000 ** (-2 * channel / rotary))
            pairs = constant.view(-1, PROBLEM.head_dim)[:, [channel, channel + rotary // 2]]
            turn = torch.stack([torch.stack([angle.cos(), angle.sin()]), torch.stack([-angle.sin(), angle.cos()])])
            keys[:, :, token, [channel, channel + rotary // 2]] += pairs @ turn
    keys[..., rotary:] += constant.view(-1, 1, PROBLEM.head_dim)[..., rotary:]
    values = split_heads(factors.v.expand(view.v.read()), PROBLEM.head_dim)
    all_keys, all_values = torch.cat([keys, view.keys], dim=2), torch.cat([values, view.values], dim=2)
    return replace(inputs, key_offset=offset), all_keys, all_values


@pytest.mark.parametrize("backend", ["reference", "torch", "auto", "triton"])
@pytest.mark.parametrize(("rotary", "plain"), [(16, True), (8, True), (8, False)])
@pytest.mark.parametrize("mask", [None, "bool", "additive"])
def test_the_constant_turns_with_its_token(
    backend: str, rotary: int, plain: bool, mask: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
        mend_interpreter()
    if backend == "auto" and not plain:
        pytest.skip("the CPU kernels refuse other rotations, and torch does them")
    monkeypatch.setattr(attend, "SCORES", 1)  # tiles of 64 tokens
    inputs, keys, values = with_offset(rotary, plain, mask)
    expected = over(PROBLEM.query(), keys, values, inputs.logits)
    assert torch.allclose(attention(PROBLEM.query(), inputs, backend=backend), expected, atol=3e-5)
    without = attention(PROBLEM.query(), replace(inputs, key_offset=None), backend=backend)
    assert not torch.allclose(without, expected, atol=1e-2)
