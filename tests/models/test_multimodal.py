"""Models that see as well: whose layers are compressed, and the positions of an image's tokens."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import cskv
from cskv.models.cos_sin import FixedCosSin, StoredCosSin
from cskv.models.survey import survey
from tests.models.families import SHAPE, full_rank_adapter

IMAGE, START, END = 90, 88, 89
VISION: dict[str, Any] = {"depth": 1, "num_heads": 2, "intermediate_size": 32, "patch_size": 4, "hidden_size": 32}
SIGLIP = {key: VISION[key] for key in ("hidden_size", "intermediate_size", "patch_size")} | {
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
}
# Positions of three axes for the 8 pairs of a head.
AXES = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": 91,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
MODELS: dict[str, dict[str, Any]] = {
    "Qwen3VL": {
        "text_config": SHAPE | {"rope_parameters": AXES | {"mrope_interleaved": True}},
        "vision_config": VISION
        | {"out_hidden_size": 64, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]},
        **QWEN_TOKENS,
    },
    "Qwen2_5_VL": {
        "text_config": SHAPE | {"rope_parameters": AXES},
        "vision_config": VISION | {"out_hidden_size": 64, "fullatt_block_indexes": [0]},
        **QWEN_TOKENS,
    },
    "Gemma3": {
        "text_config": SHAPE | {"num_hidden_layers": 6, "sliding_window": 12, "query_pre_attn_scalar": 16},
        "vision_config": SIGLIP,
    },
    "Llava": {
        "text_config": SHAPE | {"model_type": "llama"},
        "vision_config": SIGLIP | {"model_type": "clip_vision_model"},
    },
    "Gemma4": {
        "text_config": SHAPE
        | {
            "num_hidden_layers": 6,
            "sliding_window": 12,
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 96,
            "global_head_dim": 16,
        },
        # Its tower's attention has layer indices and key and value projections too.
        "vision_config": SIGLIP | {"num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 6},
    },
}


def seeing(name: str) -> nn.Module:
    if not hasattr(transformers, f"{name}Config"):
        pytest.skip(f"this release of transformers has no {name}")
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**MODELS[name])
    model = transformers.AutoModelForImageTextToText.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.2 + (parameter.ndim == 1)
    return model


def with_image(model: nn.Module) -> dict[str, Tensor]:
    """Words, an image of 64 patches that are 16 tokens, and words."""
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(5, 85, (22,), generator=generator)
    ids = torch.cat([words[:6], torch.tensor([START, *[IMAGE] * 16, END]), words[6:]])[None]
    pixels = torch.randn(64, 96, generator=generator)
    inputs = only_text(ids) | {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 8, 8]])}
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:  # older releases ask for none
        inputs["mm_token_type_ids"] = (ids == IMAGE).int()
    return inputs


def only_text(ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def generated(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[list[int], Tensor]:
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    output = model.generate(**inputs, **settings, output_logits=True, return_dict_in_generate=True)
    return output.sequences[0, -12:].tolist(), torch.cat(output.logits)


@pytest.mark.parametrize("attention", ["auto", "rebuild"])
@pytest.mark.parametrize("name", ["Qwen3VL", "Qwen2_5_VL"])
def test_tokens_of_an_image_keep_their_own_positions(name: str, attention: str) -> None:
    model = seeing(name)
    adapter = full_rank_adapter(model, cskv.CSKVConfig(1.0, 1.0, window=0, group=4))
    inputs = {"image": with_image(model), "text": only_text(torch.arange(5, 35)[None])}
    bare = {kind: generated(model, given) for kind, given in inputs.items()}
    with cskv.attach(model, adapter, attention=attention):
        for kind, given in inputs.items():
            tokens, logits = generated(model, given)
            assert tokens == bare[kind][0]
            torch.testing.assert_close(logits, bare[kind][1], rtol=0, atol=1e-4 * float(logits.abs().max()))


@pytest.mark.parametrize(
    ("name", "layers", "cos_sin"),
    [
        ("Qwen3VL", [0, 1], StoredCosSin),
        ("Gemma3", [5], FixedCosSin),
        ("Gemma4", [5], FixedCosSin),
        ("Llava", [0, 1], FixedCosSin),
    ],
)
def test_the_layers_of_the_language_model_are_found(name: str, layers: list[int], cos_sin: type) -> None:
    found = survey(seeing(name))
    assert [site.layer_idx for site in found.sites] == layers
    assert all("language_model" in site.name for site in found.sites)
    assert all(isinstance(recipe.rope, cos_sin) for recipe in found.recipes.values())
