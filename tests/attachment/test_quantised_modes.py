"""Packed latents in every way of generating, against a cache that keeps the read-back values as floats."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import cskv
from cskv import CSKVConfig
from cskv.cache.latents import PlainStore
from cskv.models.compat import output_cache
from cskv.models.survey import survey
from cskv.quantization.fake import read_back
from cskv.quantization.grid import Grid
from cskv.reading.compressed import compressed_reading
from tests.attachment.test_cache_bytes import storages
from tests.attachment.test_generation_modes import MODES, PROMPT
from tests.models.families import tiny_model, truncated_adapter
from tests.reading.test_compressed import TOKENS, decoded

SETTINGS = {
    "KIVI, window": CSKVConfig(0.5, 0.5, window=3, group=4, k_bits=4, v_bits=4),
    "KIVI, no window": CSKVConfig(0.5, 0.5, window=0, group=1, k_bits=4, v_bits=8),
    "2-D blocks": CSKVConfig(0.5, 0.25, window=0, group=4, k_bits=3, v_bits=2, k_block=(2, 4), v_block=(4, 3)),
    "keys only": CSKVConfig(0.5, 0.5, window=0, group=4, k_bits=2),
}


class ReadBackLatents(PlainStore):
    """What is packed, kept as the floats that it is read as."""

    def __init__(self, grid: Grid | None, capacity: int = 0) -> None:
        super().__init__(capacity)
        self._grid = grid

    def append(self, latents: Tensor) -> None:
        size = 1 if self._grid is None else self._grid.block_tokens
        head = -self.length % size
        for part in (latents[:, :head], latents[:, head:]):
            if part.shape[1]:
                super().append(read_back(part, self._grid))


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.__name__)
@pytest.mark.parametrize("name", list(SETTINGS))
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_every_mode_reads_what_was_packed(
    family: str, name: str, mode: Callable[[nn.Module], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(family)
    with cskv.attach(model, truncated_adapter(model, SETTINGS[name])):
        packed = mode(model)
        monkeypatch.setattr("cskv.cache.bibranch.latent_store", ReadBackLatents)
        assert torch.equal(mode(model), packed)


@pytest.mark.parametrize("name", list(SETTINGS))
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_a_whole_text_is_read_as_it_is_decoded(family: str, name: str) -> None:
    model = tiny_model(family)
    adapter = truncated_adapter(model, SETTINGS[name])
    expected = decoded(model, adapter)
    with compressed_reading(survey(model), adapter), torch.no_grad():
        got = model(TOKENS, use_cache=False).logits
    # Rounding can move a value to the next code; that is seldom, and no larger than a step.
    assert (got - expected).square().mean().sqrt() < 2e-2 * expected.std()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_tensors(dtype: torch.dtype) -> None:
    model = tiny_model("llama").float()
    adapter = truncated_adapter(model, CSKVConfig(0.5, 0.5, window=0, group=32, k_bits=4, v_bits=4))
    model.to(dtype)
    with cskv.attach(model, adapter), torch.no_grad():
        cache = output_cache(model(torch.randint(3, 96, (2, 320)), use_cache=True))
    report = cskv.cache_report(cache, model)
    layers, rank = 2, adapter.factors(0).k.rank
    assert report.payload_bytes == 2 * 320 * layers * 2 * rank // 2  # batch, tokens, layers, K and V, 4 bits each
    assert report.scale_bytes == report.minimum_bytes
    assert report.scale_bytes == 2 * layers * 2 * (320 // 32 * rank + 320 * -(-rank // 32))
    assert report.total_bytes == sum(storages(cache).values())


def test_a_cache_of_other_widths_is_refused() -> None:
    from transformers import DynamicCache

    from cskv.models.compat import cache_kwarg

    model = tiny_model("llama")
    cache = {cache_kwarg(model): DynamicCache(config=model.config)}
    for bits in (4, 8):
        adapter = truncated_adapter(model, CSKVConfig(0.5, 0.5, k_bits=bits, v_bits=bits))
        with cskv.attach(model, adapter), torch.no_grad():
            if bits == 4:
                model(PROMPT, **cache)
            else:
                with pytest.raises(cskv.CacheError, match="another compressor"):
                    model(PROMPT, **cache)
