"""`AutoModelForCausalLM.from_pretrained(adapter folder)` gives the base model with its compressor attached."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

import cskv
from cskv import AdapterError, CSKVConfig
from cskv.attachment.attach import attachment_of
from cskv.models.compat import output_cache
from tests.models.families import tiny_model, truncated_adapter


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    tiny_model("llama").save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    truncated_adapter(model, CSKVConfig(0.5, 0.5)).save_pretrained(adapter)
    return base, adapter


def test_the_base_model_comes_back_compressed(folders: tuple[Path, Path]) -> None:
    base, adapter = folders
    model = AutoModelForCausalLM.from_pretrained(adapter, dtype=torch.bfloat16)
    assert type(model) is LlamaForCausalLM
    assert model.dtype == torch.bfloat16
    assert attachment_of(model) is not None
    tokens = torch.arange(3, 93)[None]
    with torch.no_grad():
        report = cskv.cache_report(output_cache(model(tokens, use_cache=True)), model)
    assert report.payload_bytes == 32 * 2 * 16 * 2 * 2  # one group of tokens is sealed; layers, ranks, bytes
    cskv.detach(model)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    assert torch.equal(model(tokens).logits, plain(tokens).logits)


def test_the_config_says_what_it_is(folders: tuple[Path, Path]) -> None:
    config = AutoConfig.from_pretrained(folders[1])
    assert config.model_type == "cskv"
    assert config.compression["k_density"] == 0.5


def test_an_adapter_without_a_base_name_asks_for_it(tmp_path: Path) -> None:
    truncated_adapter(tiny_model("llama"), CSKVConfig()).save_pretrained(tmp_path / "adapter")
    with pytest.raises(AdapterError, match=r"does not name its base model; give it .* or load it and call"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
