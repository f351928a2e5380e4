from __future__ import annotations

import pytest
import torch

from cskv.models.probe import probe
from cskv.models.recipe import find_pairs
from cskv.models.sites import find_sites
from tests.models.families import tiny_model


@pytest.mark.parametrize(
    ("family", "real", "imaginary", "unrotated"),
    [
        ("llama", list(range(8)), list(range(8, 16)), []),
        ("phi3", list(range(4)), list(range(4, 8)), list(range(8, 16))),
        ("stablelm", list(range(4)), list(range(4, 8)), list(range(8, 16))),
        ("glm4", [0, 2, 4, 6], [1, 3, 5, 7], list(range(8, 16))),
    ],
)
def test_the_pairing_is_read_off_the_rotation(family: str, real: list, imaginary: list, unrotated: list) -> None:
    model = tiny_model(family)
    sites = find_sites(model)
    recipe = probe(model, sites)[sites[0].layer_idx]
    assert recipe.pairs is not None
    assert recipe.pairs.real.tolist() == real
    assert recipe.pairs.imaginary.tolist() == imaginary
    assert recipe.pairs.unrotated.tolist() == unrotated


def test_multiplying_by_a_phase_is_the_models_rotation() -> None:
    model = tiny_model("glm4")
    recipe = probe(model, find_sites(model))[0]
    pairs = recipe.pairs
    keys = torch.randn(1, 2, 5, 16, generator=torch.Generator().manual_seed(0))
    cos, sin = model.model.rotary_emb(keys, torch.arange(3, 8)[None])
    turned = recipe.keys.rotated(keys, cos, sin)
    as_complex = torch.complex(keys[..., pairs.real], keys[..., pairs.imaginary])
    angles = torch.arange(3, 8)[:, None] * model.model.rotary_emb.inv_freq
    expected = as_complex * torch.exp(1j * angles)
    assert torch.allclose(torch.complex(turned[..., pairs.real], turned[..., pairs.imaginary]), expected, atol=1e-4)


def test_a_rotation_of_more_than_pairs_is_refused() -> None:
    from cskv import UnsupportedModelError
    from cskv.models.recipe import Recipe, RopeStyle

    def mix(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return heads * cos + heads.roll(1, -1) * sin + heads.roll(2, -1) * sin

    with pytest.raises(UnsupportedModelError, match="into 2 others"):
        find_pairs(Recipe(8, rope_style=RopeStyle.FULL, rotate=mix), torch.ones(1, 3, 8))
