"""What is known of a model, and when it cannot be."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import cskv
from cskv.calibration.calibrate import calibrate
from cskv.models.survey import survey
from tests.models.families import tiny_model


class Hook:
    """The hook of an attached compressor, as far as a survey can see it."""

    attachment = None

    def __call__(self, module: nn.Module, args: tuple) -> None:
        return None


def test_a_survey_knows_the_model() -> None:
    model = tiny_model("gemma3")
    found = survey(model)
    assert found.model is model
    assert (found.base.num_layers, found.base.hidden_size) == (6, 64)
    assert [site.layer_idx for site in found.sites] == sorted(found.recipes) == [5]


def test_an_attached_model_is_refused_in_one_line() -> None:
    model = tiny_model("llama")
    handle = model.model.layers[1].self_attn.register_forward_pre_hook(Hook())
    for use in (survey, lambda bare: calibrate(bare, [torch.arange(3, 9)])):
        for part in (model, model.model):
            with pytest.raises(cskv.CSKVError, match=r"a compressor is attached to this model; call cskv\.detach"):
                use(part)
    handle.remove()
    assert len(survey(model).sites) == 2


def test_autocast_and_inference_mode_around_a_survey_change_nothing() -> None:
    expected = survey(tiny_model("qwen3")).recipes
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        found = survey(tiny_model("qwen3")).recipes
    for index, recipe in expected.items():
        assert not found[index].key_norm.weight.is_inference()
        assert torch.equal(found[index].key_norm.weight, recipe.key_norm.weight)
        assert found[index].keys.norm_style is recipe.keys.norm_style
        assert found[index].attention == recipe.attention
