"""Static caches of compressed models: the answers of dynamic ones, from memory of fixed size, in one compiled step."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Cache, DynamicCache, StaticCache

import cskv
from cskv import CacheError, CSKVConfig
from cskv.attachment.cache_bytes import allocated_bytes
from cskv.attachment.static_layer import StaticCSKVLayer
from cskv.compression.initialise import initialise
from cskv.models.compat import cache_kwarg
from tests.attachment.test_closed_form import statistics_of
from tests.attachment.test_decode_step import WAITS, Watch
from tests.models.families import FAMILIES, tiny_model, truncated_adapter

ROOT = Path(__file__).resolve().parents[2]
GROUP = 4
SETTINGS: dict[str, dict[str, Any]] = {
    "joint": {},
    "packed": {"k_bits": 4, "v_bits": 4},
    "token-packed": {"k_bits": 4, "v_bits": 8, "group": 1},
    "commuting": {"init": "pca", "key_factors": "commuting"},
    "no-window": {"window": 0, "sinks": 0},
}
PROMPT = torch.randint(3, 96, (3, 14), generator=torch.Generator().manual_seed(4))
PADDED = torch.ones_like(PROMPT)
PADDED[0, :5] = PADDED[2, :12] = 0


@contextmanager
def attached(family: str, name: str) -> Iterator[nn.Module]:
    model = tiny_model(family)
    config = CSKVConfig(0.6, 0.6, **{"window": 6, "group": GROUP, "sinks": 3, **SETTINGS[name]})
    commuting = config.key_factors == "commuting"
    adapter = initialise(model, config, statistics_of(model)) if commuting else truncated_adapter(model, config)
    with cskv.attach(model, adapter):
        yield model


def static(model: nn.Module, length: int = 64) -> StaticCache:
    return StaticCache(config=model.config, max_cache_len=length)


def logits_of(model: nn.Module, cache: Cache, pieces: list[Tensor]) -> Tensor:
    """The logits of the last token of every piece, one forward each."""
    with torch.no_grad():
        outputs = [model(piece, **{cache_kwarg(model): cache}).logits[:, -1] for piece in pieces]
    return torch.stack(outputs)


def generated(model: nn.Module, mask: Tensor, **kwargs: Any) -> Any:
    return model.generate(
        PROMPT.masked_fill(mask == 0, 0),
        attention_mask=mask,
        max_new_tokens=3 * GROUP + 8,
        min_new_tokens=3 * GROUP + 8,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
        **kwargs,
    )


def check_same(ours: Any, theirs: Any) -> None:
    assert torch.equal(ours.sequences, theirs.sequences)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(theirs.logits), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_family_generates_what_it_does_from_a_dynamic_cache(family: str) -> None:
    with attached(family, "packed") as model:
        ours = generated(model, PADDED, cache_implementation="static")
        check_same(ours, generated(model, PADDED))
    cache = ours.get("cache", ours.get("past_key_values"))
    assert any(isinstance(layer, StaticCSKVLayer) for layer in cache.layers)
    assert all(layer.is_compileable for layer in cache.layers)


@pytest.mark.parametrize("mode", [{}, {"num_beams": 2}, {"num_return_sequences": 2, "num_beams": 3}], ids=str)
@pytest.mark.parametrize("name", list(SETTINGS))
def test_every_kind_of_latents_does(name: str, mode: dict[str, int]) -> None:
    with attached("llama", name) as model:
        for mask in (torch.ones_like(PROMPT), PADDED):
            check_same(generated(model, mask, cache_implementation="static", **mode), generated(model, mask, **mode))


@pytest.mark.parametrize("name", list(SETTINGS))
@pytest.mark.parametrize(
    "sizes", [[1] * 40, [3, 1, 1, 1, 1, 9, 1, 1, 30, 1], [2, 2, 5, 33, 1, 1], [30, 1, 2, 3, 4]], ids=str
)
def test_pieces_of_a_prompt_and_turns_read_the_same(name: str, sizes: list[int]) -> None:
    tokens = torch.randint(3, 96, (2, sum(sizes)), generator=torch.Generator().manual_seed(3))
    with attached("qwen2", name) as model:
        expected = logits_of(model, DynamicCache(config=model.config), list(tokens.split(sizes, dim=1)))
        ours = logits_of(model, static(model), list(tokens.split(sizes, dim=1)))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_a_mask_that_hides_tokens_in_the_middle_is_heeded() -> None:
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, 5:9] = 0
    tokens = torch.randint(3, 96, (2, 40), generator=torch.Generator().manual_seed(3))
    logits = []
    with attached("llama", "joint") as model, torch.no_grad():
        for cache in (DynamicCache(config=model.config), static(model)):
            own = {cache_kwarg(model): cache}
            outputs = [model(tokens[:, :20], attention_mask=mask[:, :20], **own)]
            outputs += [model(tokens[:, i : i + 1], attention_mask=mask[:, : i + 1], **own) for i in range(20, 40)]
            logits.append(torch.stack([output.logits[:, -1] for output in outputs]))
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)
    assert (logits[1][-1, 0] - logits_of_unmasked(tokens)[-1, 0]).abs().max() > 1e-2


def logits_of_unmasked(tokens: Tensor) -> Tensor:
    with attached("llama", "joint") as model:
        return logits_of(model, static(model), [tokens[:, :20], *tokens[:, 20:].split(1, dim=1)])


@pytest.mark.parametrize("name", list(SETTINGS))
def test_steps_neither_wait_nor_move_nor_grow(name: str) -> None:
    with attached("llama", name) as model:
        cache = static(model)
        logits_of(model, cache, [PROMPT, PROMPT[:, :1]])
        before, held = addresses(cache), allocated_bytes(cache)
        with Watch() as watch:
            logits_of(model, cache, [PROMPT[:, :1]] * (3 * GROUP + 1))
        assert addresses(cache) == before
        assert allocated_bytes(cache) == held
        assert int(cache.layers[0].clock.sealed[0]) > 3 * GROUP
    assert "mm" in watch.names
    assert not watch.names.intersection(WAITS)


def addresses(cache: StaticCache) -> list[tuple[int, torch.Size]]:
    layers = [layer for layer in cache.layers if isinstance(layer, StaticCSKVLayer)]
    clock, table = layers[0].clock, layers[0].table
    parts = [*(tensor for layer in layers for tensor in layer.store.tensors()), clock.columns, clock.padding]
    parts += [clock.place, clock.slot, clock.sealed, clock.token, clock.exists]
    parts += [] if table is None else [table.cos, table.sin]
    return [(part.data_ptr(), part.shape) for part in parts]


def test_a_full_cache_is_refused_in_one_line() -> None:
    with attached("llama", "joint") as model:
        with pytest.raises(CacheError, match="holds 13 tokens, and 14 are to be cached; make it with a larger max_cac"):
            logits_of(model, static(model, 13), [PROMPT])
        cache = static(model, 15)
        logits_of(model, cache, [PROMPT, PROMPT[:, :1]])
        with pytest.raises(CacheError, match="holds 15 tokens, and 16"):
            logits_of(model, cache, [PROMPT[:, :1]])


def test_what_a_static_cache_cannot_do_is_refused() -> None:
    with attached("llama", "joint") as model:
        cache = static(model)
        logits_of(model, cache, [PROMPT])
        with pytest.raises(CacheError, match="holds 3 rows, and the forward has 2"):
            logits_of(model, cache, [PROMPT[:2, :1]])
        with pytest.raises(CacheError, match="cannot be cropped"):
            cache.crop(-1)
        with pytest.raises(CacheError, match="gradients cannot flow"):
            model(PROMPT, **{cache_kwarg(model): static(model)})
        with pytest.raises(CacheError, match="mask of 15 tokens"), torch.no_grad():
            model(
                PROMPT[:, :1], attention_mask=torch.ones(3, 1, 1, 15, dtype=torch.bool), **{cache_kwarg(model): cache}
            )
        with pytest.raises(CacheError, match=r"position embeddings of 3 rows"), torch.no_grad():
            model(PROMPT[:, :1], position_ids=torch.full((3, 1), 14), **{cache_kwarg(model): cache})
    with pytest.raises(CacheError, match="without its compressor"):
        logits_of(model, cache, [PROMPT[:, :1]])
    with (
        cskv.attach(model, truncated_adapter(model, CSKVConfig()), attention="rebuild"),
        pytest.raises(CacheError, match="a static cache needs attention on latents"),
    ):
        logits_of(model, static(model), [PROMPT])


def test_a_static_cache_that_was_filled_before_attaching_is_refused() -> None:
    model = tiny_model("llama")
    cache = static(model)
    logits_of(model, cache, [PROMPT])
    with cskv.attach(model, truncated_adapter(model, CSKVConfig())), pytest.raises(CacheError, match="14 tokens that"):
        logits_of(model, cache, [PROMPT[:, :1]])


def test_a_reset_cache_is_used_again() -> None:
    with attached("llama", "packed") as model:
        cache = static(model)
        logits_of(model, cache, [PROMPT.flip(1), *[PROMPT[:, :1]] * 20])
        before = addresses(cache)
        cache.reset()
        pieces = [PROMPT, *PROMPT.split(1, dim=1)]
        ours = logits_of(model, cache, pieces)
        torch.testing.assert_close(ours, logits_of(model, DynamicCache(config=model.config), pieces))
        assert addresses(cache) == before


def test_the_report_counts_every_byte() -> None:
    with attached("llama", "packed") as model:
        cache, dynamic = static(model), DynamicCache(config=model.config)
        for each in (cache, dynamic):
            logits_of(model, each, [PROMPT, *[PROMPT[:, :1]] * 20])
        report, expected = cskv.cache_report(cache, model), cskv.cache_report(dynamic, model)
    assert (report.tokens, report.batch) == (34, 3)
    assert report.total_bytes == allocated_bytes(cache)
    for name in ("payload_bytes", "scale_bytes", "minimum_bytes", "uncompressed_bytes"):
        assert getattr(report, name) == getattr(expected, name) > 0, name


def test_smollm2_writes_the_same_words() -> None:
    folder = ROOT / "models" / "smollm2"
    if not folder.exists():
        pytest.skip("no models/smollm2")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = CSKVConfig(0.8, 0.8, window=16, group=16, sinks=4, k_bits=8, v_bits=8)
    prompt = torch.randint(3, 40000, (2, 60), generator=torch.Generator().manual_seed(7))
    tokens = torch.randint(3, 40000, (40, 2, 1), generator=torch.Generator().manual_seed(8))
    with cskv.attach(model, truncated_adapter(model, config)):
        expected = logits_of(model, DynamicCache(config=model.config), [prompt, *tokens])
        ours = logits_of(model, static(model, 128), [prompt, *tokens])
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Any]:
    """What a program without shape checks, which cannot be traced, says of compiled steps."""
    program = [sys.executable, "-W", "ignore", "-m", "tests.attachment.static_program"]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", list(SETTINGS))
def test_all_steps_are_one_graph(outcomes: dict[str, Any], name: str, backend: str) -> None:
    outcome = outcomes[f"{name}-{backend}"]
    assert (outcome["graphs"], outcome["breaks"]) == (1, 0)
    assert outcome["error"] < 1e-4
    assert outcome["sealed"] > 2 * GROUP


def test_generate_compiles_once(outcomes: dict[str, Any]) -> None:
    """Two answers, over three groups each."""
    assert outcomes["generate"] == {"graphs": 1, "breaks": 0, "same": True}


def test_packing_is_not_fused(outcomes: dict[str, Any]) -> None:
    """A compiler that fused it would leave out its roundings to 16 bits: other codes."""
    assert outcomes["operations"] == ["cskv.quantise.default"]
