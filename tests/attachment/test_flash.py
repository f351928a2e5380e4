"""FlashAttention and flex attention: their own function prefills, ours decodes on latents.

No GPU is needed: FlashAttention is played by stand-ins, of transformers' function or of the package beneath it, and
flex attention is not compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, StaticCache

import cskv
from cskv import CSKVConfig
from cskv.errors import CacheError
from cskv.models.compat import cache_kwarg
from tests.attachment.test_generation_modes import MODES, PROMPT, generate
from tests.models.families import FAMILIES, full_rank_adapter, tiny_model, truncated_adapter
from tests.models.flash import KERNELS, packaged, standing_in, uncompiled_flex_attention

FLASH, FLEX = "flash_attention_2", "flex_attention"
SETTINGS = CSKVConfig(0.5, 0.5, window=3, group=4, sinks=2)
USED = [(family, name) for family in ("llama", "qwen2", "gemma2") for name in (FLASH, FLEX)]
USED += [("gpt-oss", KERNELS[0])]  # flex attention has no sinks on a CPU
USED += [("llama", name) for name in ("flash_attention_3", "flash_attention_4", KERNELS[1])]
USED = [(family, name) for family, name in USED if family in FAMILIES]
OF_PACKAGES = [("llama", FLASH), ("llama", "flash_attention_3"), ("qwen2", FLASH), ("gemma2", FLASH)]
SMOLLM2 = Path(__file__).resolve().parents[2] / "models" / "smollm2"
TOKENS = torch.randint(3, 96, (2, 60), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def flash() -> Iterator[list[tuple[int, int]]]:
    """How many queries and keys FlashAttention has been given, from call to call."""
    with standing_in() as calls:
        yield calls.lengths


@pytest.fixture
def flex() -> Iterator[list[tuple[int, int]]]:
    with uncompiled_flex_attention() as lengths:
        yield lengths


def using(family: str, name: str, **changes: Any) -> nn.Module:
    model = tiny_model(family, **changes)
    model.config._attn_implementation = name
    return model


def assisted(model: nn.Module) -> Tensor:
    assistant = tiny_model("llama", num_hidden_layers=1)
    assistant.generation_config.num_assistant_tokens = 5
    assistant.generation_config.assistant_confidence_threshold = 0.0
    config = GenerationConfig(max_new_tokens=14, min_new_tokens=14, pad_token_id=0, do_sample=False)
    given = {"attention_mask": torch.ones_like(PROMPT), "assistant_model": assistant}
    return model.generate(PROMPT, generation_config=config, **given)


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() < 1e-4 * expected.abs().max())


@pytest.mark.parametrize("mode", [*MODES, assisted], ids=lambda mode: mode.__name__)
@pytest.mark.parametrize(("family", "name"), USED)
def test_the_tokens_are_those_of_eager_attention(
    flash: object, flex: object, family: str, name: str, mode: Callable[[nn.Module], Tensor]
) -> None:
    """At half the rank: what is read matters. Every layer of these reads latents, so nobody is warned."""
    found = []
    for implementation in ("eager", name):
        model = using(family, implementation)
        with cskv.attach(model, truncated_adapter(model, SETTINGS)):
            found.append(mode(model))
        assert model.config._attn_implementation == implementation
    assert torch.equal(*found)


@pytest.mark.parametrize("mode", [*MODES, assisted], ids=lambda mode: mode.__name__)
@pytest.mark.parametrize(("family", "name"), OF_PACKAGES)
def test_transformers_own_function_gets_what_it_expects(
    family: str, name: str, mode: Callable[[nn.Module], Tensor]
) -> None:
    """Only the package is played: its name, masks, windows and positions go through transformers' code."""
    found = []
    with packaged() as package:
        for implementation in ("eager", name):
            model = using(family, implementation)
            with cskv.attach(model, truncated_adapter(model, SETTINGS)):
                package.lengths.clear()
                found.append(mode(model))
    assert package.lengths
    assert torch.equal(*found)


@torch.no_grad()
def test_the_package_is_not_called_by_steps() -> None:
    tokens = torch.randint(3, 96, (1, 99), generator=torch.Generator().manual_seed(1))
    expected, cache = tiny_model("llama")(tokens).logits, DynamicCache()
    model, rows = using("llama", FLASH), []
    with packaged() as package, cskv.attach(model, full_rank_adapter(model, CSKVConfig(1.0, 1.0, window=3, group=4))):
        package.lengths.clear()
        for start, stop in ((0, 20), (20, 21), (21, 30), (30, 31), (31, 96), (96, 97), (97, 99)):
            rows.append(model(tokens[:, start:stop], **{cache_kwarg(model): cache, "use_cache": True}).logits)
        assert package.lengths == [(20, 20)] * 2 + [(65, 96)] * 2
    assert close(torch.cat(rows, dim=1), expected)


def test_static_caches_are_refused(flash: object, flex: object) -> None:
    for name in (FLASH, FLEX):
        model = using("llama", name)
        cache = StaticCache(config=model.config, max_cache_len=64)
        with cskv.attach(model, truncated_adapter(model, SETTINGS)):
            with pytest.raises(CacheError, match="a static cache needs .* use the default dynamic cache") as caught:
                model(TOKENS[:1, :20], **{cache_kwarg(model): cache, "use_cache": True})
            assert "\n" not in str(caught.value)


@torch.no_grad()
@pytest.mark.parametrize("name", [FLASH, FLEX])
def test_steps_do_not_rebuild_and_long_pieces_do(
    flash: list[tuple[int, int]], flex: list[tuple[int, int]], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two layers: the model's own function gets the prefill, and a later piece of 65 tokens with all keys."""
    model = using("llama", name)
    expected, cache = tiny_model("llama"), DynamicCache()
    lengths, rebuilds = flash if name == FLASH else flex, []
    rebuilt = cskv.attachment.step.Step.rebuilt
    monkeypatch.setattr(cskv.attachment.step.Step, "rebuilt", lambda step: rebuilds.append(1) or rebuilt(step))
    with cskv.attach(model, full_rank_adapter(model, CSKVConfig(1.0, 1.0, window=3, group=4))):
        lengths.clear()
        text = torch.randint(3, 96, (1, 99), generator=torch.Generator().manual_seed(1))
        rows = []
        for start, stop in ((0, 20), (20, 21), (21, 30), (30, 31), (31, 96), (96, 97), (97, 99)):
            given = {cache_kwarg(model): cache, "use_cache": True}
            rows.append(model(text[:, start:stop], **given).logits)
        assert lengths == [(20, 20)] * 2 + [(65, 96)] * 2
        assert len(rebuilds) == 2
        assert close(torch.cat(rows, dim=1), expected(text).logits)


@torch.no_grad()
def test_where_it_is_asked_for_every_step_rebuilds(flash: list[tuple[int, int]]) -> None:
    """Guards the test above: the stand-in's calls show it."""
    model = using("llama", FLASH)
    with cskv.attach(model, truncated_adapter(model, SETTINGS), attention="rebuild"):
        flash.clear()
        generate(model, PROMPT, do_sample=False)
    assert [keys for queries, keys in flash if queries == 1] == [24 + step for step in range(13) for _ in range(2)]


@torch.no_grad()
@pytest.mark.parametrize("name", [FLASH, FLEX])
def test_padding_between_turns_is_hidden(flash: object, flex: object, name: str) -> None:
    """The second turn of a batch is padded too: in the middle of a row, where no cache looks for padding."""
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[1, :5] = mask[0, 30:37] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    found = []
    for implementation in ("eager", name):
        model, rows, cache = using("llama", implementation), [], DynamicCache()
        with cskv.attach(model, truncated_adapter(model, SETTINGS)):
            for start, stop in ((0, 30), (30, 50), *((t, t + 1) for t in range(50, 60))):
                given = {"attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop]}
                given |= {cache_kwarg(model): cache, "use_cache": True}
                rows.append(model(TOKENS[:, start:stop], **given).logits)
        found.append(torch.cat(rows, dim=1)[mask.bool()])
    assert close(*found)


@torch.no_grad()
@pytest.mark.parametrize("name", [FLASH, FLEX])
@pytest.mark.parametrize("crop", [2, 13, 30])
def test_a_crop_is_read_likewise(flash: object, flex: object, name: str, crop: int) -> None:
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[1, :7] = 0
    found = []
    for implementation in ("eager", name):
        model, rows, cache = using("llama", implementation), [], DynamicCache()
        with cskv.attach(model, truncated_adapter(model, SETTINGS)):
            for start, stop in ((0, 40), (40, 44), (44 - crop, 46 - crop), (46 - crop, 47 - crop)):
                cache.crop(start)
                given = {"attention_mask": mask[:, :stop], cache_kwarg(model): cache, "use_cache": True}
                rows.append(model(TOKENS[:, start:stop], **given).logits[:, -1])
        found.append(torch.stack(rows))
    assert close(*found)


@torch.no_grad()
@pytest.mark.parametrize("padding", [0, 6])
def test_a_window_that_only_the_function_is_told_is_kept_to(flash: object, padding: int) -> None:
    """Eager attention has it in its mask. No layer slides by the config when the compressor is attached."""
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[1, :padding] = 0
    found = []
    for implementation, window in (("eager", 12), (FLASH, 12), (FLASH, None)):
        model, rows, cache = using("mistral", implementation), [], DynamicCache()
        with cskv.attach(model, truncated_adapter(model, SETTINGS)):
            model.config.sliding_window = window
            for start, stop in ((0, 30), (30, 35), (35, 36), (36, 37)):
                given = {"attention_mask": mask[:, :stop], cache_kwarg(model): cache, "use_cache": True}
                rows.append(model(TOKENS[:, start:stop], **given).logits[:, -1])
        found.append(torch.stack(rows))
    assert close(found[1], found[0])
    assert not close(found[2], found[0])


@pytest.mark.parametrize("lengths", [False, True], ids=["positions", "lengths"])
def test_packed_texts_are_for_the_models_own_function_and_no_cache(flash: object, lengths: bool) -> None:
    model = using("llama", FLASH)
    positions = torch.cat([torch.arange(12), torch.arange(18)])[None]
    given: dict[str, Any] = {"position_ids": positions}
    if lengths:
        starts = torch.tensor([0, 12, 30], dtype=torch.int32)
        given = {"position_ids": torch.arange(30)[None], "cu_seq_lens_q": starts, "cu_seq_lens_k": starts}
        given |= {"max_length_q": 18, "max_length_k": 18}
    with torch.no_grad():
        expected = model(TOKENS[:1, :30], use_cache=False, **given).logits
        if not lengths:
            assert close(expected[:, 12:], model(TOKENS[:1, 12:30], use_cache=False).logits)
        with cskv.attach(model, truncated_adapter(model, SETTINGS)):
            assert torch.equal(model(TOKENS[:1, :30], use_cache=False, **given).logits, expected)
            with pytest.raises(CacheError, match="several texts are packed in a row .* pass use_cache=False") as caught:
                model(TOKENS[:1, :30], use_cache=True, **given)
    assert "\n" not in str(caught.value)


def test_gradients_of_queries_go_through_rebuilt_keys(flash: list[tuple[int, int]]) -> None:
    """As of a LoRA on q_proj alone: keys need no gradient, so old ones may be latents."""
    found = []
    for implementation in ("eager", FLASH):
        model, cache = using("llama", implementation), DynamicCache()
        model.requires_grad_(False)
        weight = model.model.layers[1].self_attn.q_proj.weight.requires_grad_(True)
        with cskv.attach(model, truncated_adapter(model, SETTINGS)):
            mask = torch.ones(2, 24, dtype=torch.long)
            mask[1, :4] = 0
            given = {cache_kwarg(model): cache, "use_cache": True}
            with torch.no_grad():
                model(TOKENS[:, :20], attention_mask=mask[:, :20], **given)
            model(TOKENS[:, 20:24], attention_mask=mask, **given).logits.square().sum().backward()
        found.append(weight.grad)
    assert flash[-1] == (4, 24)
    assert close(*found)


def test_a_function_that_is_told_more_than_we_know_keeps_rebuilding() -> None:
    """Whoever registers one under such a name; it is found by trying, as that of sdpa is."""
    with standing_in() as calls:
        plain = calls.function

        def doubled(*args: Any, **kwargs: Any) -> Any:
            output, weights = plain(*args, **kwargs)
            return 2 * output, weights

        calls.function = doubled
        model = using("llama", FLASH)
        with pytest.warns(UserWarning, match="its attention function does more than is understood"):
            attachment = cskv.attach(model, truncated_adapter(model, SETTINGS))
        with attachment:
            assert model.config._attn_implementation == FLASH
            calls.lengths.clear()
            generate(model, PROMPT, do_sample=False)
    assert calls.lengths[-1] == (1, 36)


@torch.no_grad()
@pytest.mark.skipif(not hasattr(transformers, "Gemma4TextConfig"), reason="this release of transformers has no Gemma4")
@pytest.mark.parametrize("name", ["sdpa", FLASH, FLEX])
def test_layers_that_read_others_keys_see_what_they_would(flash: object, flex: object, name: str) -> None:
    """Gemma4 runs these layers for the last tokens alone where masks can be cut, which it tells by the name."""
    model = using("gemma4-shared", name, num_hidden_layers=18)
    tokens = TOKENS[:1, :27]
    expected = tiny_model("gemma4-shared", num_hidden_layers=18)(tokens, use_cache=True).logits[:, -5:]
    with pytest.warns(UserWarning, match="old keys and values of"):
        attachment = cskv.attach(model, full_rank_adapter(model, CSKVConfig(1.0, 1.0, window=3, group=4)))
    with attachment:
        assert close(model(tokens, use_cache=True, logits_to_keep=5).logits, expected)


@torch.no_grad()
@pytest.mark.skipif(not (SMOLLM2 / "model.safetensors").exists(), reason="models/smollm2 is not there")
def test_smollm2_writes_what_it_writes_with_sdpa(flash: list[tuple[int, int]]) -> None:
    from cskv.compression.initialise import initialise

    tokenizer = transformers.AutoTokenizer.from_pretrained(SMOLLM2)
    model = AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32).eval()
    adapter = initialise(model, CSKVConfig(0.75, 0.75, window=16, group=16, sinks=4, init="svd"))
    prompts = [
        "The first ten prime numbers are 2, 3, 5, 7, 11,",
        "Water boils at one hundred degrees, and ice melts at",
    ]
    given = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    found = []
    for name in ("sdpa", FLASH):
        model.config._attn_implementation = name
        with cskv.attach(model, adapter):
            flash.clear()
            found.append(model.generate(**given, max_new_tokens=40, do_sample=False))
    assert torch.equal(*found)
    length = given["input_ids"].shape[1]
    assert flash[:30] == [(length, length)] * 30
    assert all(queries == 1 and keys <= length + 20 for queries, keys in flash[30:])  # before anything is sealed
