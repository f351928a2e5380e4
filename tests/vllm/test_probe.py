"""The recipe that is found of a layer's keys. No vLLM is needed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from cskv import UnsupportedModelError
from cskv.models.recipe import NormStyle, RopeStyle
from cskv.vllm.probe import _match, _rotate, _rotate_neighbours

HEADS, HEAD_DIM, TOKENS = 2, 16, 8


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(HEAD_DIM, dtype=torch.bfloat16), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def tables(rotary: int, neighbours: bool) -> tuple[Tensor, Tensor]:
    angle = torch.arange(TOKENS)[:, None] * 10000.0 ** (-torch.arange(rotary // 2) / (rotary // 2))
    angle = angle.repeat_interleave(2, -1) if neighbours else torch.cat([angle, angle], -1)
    return angle.cos().to(torch.bfloat16), angle.sin().to(torch.bfloat16)


@pytest.mark.parametrize("neighbours", [False, True])
@pytest.mark.parametrize("rotary", [8, 16])
@pytest.mark.parametrize("style", [NormStyle.NONE, NormStyle.PER_HEAD])
def test_the_closest_recipe_is_found(style: NormStyle, rotary: int, neighbours: bool) -> None:
    """Heads have nearly the size that the norm gives them, so that no norm is nearly right, and the reverse."""
    layer = nn.Module()
    layer.k_norm, layer.rotary_emb = Norm(), SimpleNamespace(is_neox_style=not neighbours)
    generator = torch.Generator().manual_seed(0)
    heads = torch.randn(TOKENS, HEADS, HEAD_DIM, generator=generator)
    sizes = 1 + 0.02 * (2 * torch.rand(TOKENS, HEADS, 1, generator=generator) - 1)
    heads = (sizes * heads * heads.pow(2).mean(-1, keepdim=True).rsqrt()).to(torch.bfloat16)
    normed = (layer.k_norm(heads) if style is NormStyle.PER_HEAD else heads).transpose(0, 1)[None]
    cos, sin = tables(rotary, neighbours)
    rotate = _rotate_neighbours if neighbours else _rotate
    turned = torch.cat([rotate(normed[..., :rotary], cos[None], sin[None]), normed[..., rotary:]], -1)
    keys = turned.transpose(1, 2).flatten(2)[0]
    found = _match(layer, heads.flatten(1), keys, (cos, sin), HEAD_DIM)
    assert found.norm_style is style
    assert found.rope_style is (RopeStyle.FULL if rotary == HEAD_DIM else RopeStyle.SLICED)
    with pytest.raises(UnsupportedModelError, match="by no known norm and rotation"):
        _match(layer, heads.flatten(1), keys.flip(0), (cos, sin), HEAD_DIM)
