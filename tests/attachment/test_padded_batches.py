"""A row of a batch that is padded on the left is answered as it is alone, at any rank: its groups are its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig

import cskv
from cskv import CSKVConfig
from cskv.attachment import order
from cskv.compression.initialise import initialise
from cskv.models.compat import cache_kwarg, output_cache
from tests.attachment.test_closed_form import statistics_of
from tests.attachment.test_decode_step import WAITS, Watch
from tests.interpreter import mend_interpreter
from tests.models.families import full_rank_adapter, tiny_model, truncated_adapter

LENGTHS = (30, 22, 9, 29)
STEPS = 14
TEXT = torch.randint(3, 96, (len(LENGTHS), 30 + STEPS), generator=torch.Generator().manual_seed(6))
SETTINGS = {
    "joint": CSKVConfig(0.25, 0.25, window=3, group=4, sinks=4),
    "no sinks": CSKVConfig(0.25, 0.25, window=0, group=4, sinks=0),
    "more sinks than tokens": CSKVConfig(0.25, 0.25, window=0, group=2, sinks=24),
    "token by token": CSKVConfig(0.25, 0.25, window=0, group=1, sinks=1),
    "commuting": CSKVConfig(0.5, 0.25, window=3, group=4, sinks=4, init="pca", key_factors="commuting"),
    "packed": CSKVConfig(0.5, 0.5, window=3, group=4, sinks=4, k_bits=4, v_bits=4),
    "packed, no sinks": CSKVConfig(0.5, 0.5, window=3, group=4, k_bits=4, v_bits=4, v_block=(4, 4)),
}


def padded(rows: list[int], steps: int) -> tuple[Tensor, Tensor]:
    """The texts of some rows up to a step, padded on the left, and their mask."""
    length = max(LENGTHS[row] for row in rows) + steps
    tokens, mask = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length, dtype=torch.long)
    for index, row in enumerate(rows):
        own = LENGTHS[row] + steps
        tokens[index, length - own :], mask[index, length - own :] = TEXT[row, :own], 1
    return tokens, mask


@torch.no_grad()
def decoded(model: nn.Module, rows: list[int], pieces: tuple[int, ...] = (), steps: int = STEPS) -> Tensor:
    """Logits, (rows, steps, vocabulary), of the tokens behind each prompt; prompts are read in such pieces."""
    tokens, mask = padded(rows, steps)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache, found, start = DynamicCache(config=model.config), [], 0
    prompt = tokens.shape[1] - steps
    for piece in (*pieces, prompt - sum(pieces), *(1,) * steps):
        stop = start + piece
        given = {"attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop]}
        logits = model(tokens[:, start:stop], **given, **{cache_kwarg(model): cache}).logits
        found.append(logits[:, -1])
        start = stop
    return torch.stack(found[len(pieces) + 1 :], dim=1)


def adapter_of(model: nn.Module, settings: CSKVConfig) -> cskv.CSKVAdapter:
    if settings.key_factors == "commuting":
        return initialise(model, settings, statistics_of(model))
    return truncated_adapter(model, settings)


def check(together: Tensor, alone: Tensor, settings: CSKVConfig) -> None:
    if settings.is_quantised:  # rounding can move a value to the next code; that is seldom, and no larger than a step
        assert (together - alone).square().mean().sqrt() < 2e-2 * alone.std()
    else:
        assert (together - alone).abs().max() < 1e-4 * alone.abs().max()


@pytest.mark.parametrize("name", list(SETTINGS))
@pytest.mark.parametrize("attention", ["torch", "reference", "rebuild"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_logits_are_those_of_each_row_alone(implementation: str, attention: str, name: str) -> None:
    model = tiny_model("llama", attn_implementation=implementation, num_key_value_heads=4)
    with cskv.attach(model, adapter_of(model, SETTINGS[name]), attention=attention):
        together = decoded(model, [0, 1, 2, 3])
        for row in range(len(LENGTHS)):
            check(together[row], decoded(model, [row])[0], SETTINGS[name])


@pytest.mark.parametrize("name", ["joint", "commuting", "packed"])
def test_kernels_agree(name: str) -> None:
    pytest.importorskip("triton")
    mend_interpreter()
    model = tiny_model("llama", num_key_value_heads=4, num_hidden_layers=1)
    with cskv.attach(model, adapter_of(model, SETTINGS[name]), attention="triton"):
        together = decoded(model, [1, 2], steps=3)
    with cskv.attach(model, adapter_of(model, SETTINGS[name]), attention="torch"):
        for index, row in enumerate((1, 2)):
            check(together[index], decoded(model, [row], steps=3)[0], SETTINGS[name])


@pytest.mark.parametrize("family", ["llama-dynamic-rope", "qwen3", "gemma2", "phi3"])
def test_so_it_is_in_other_families(family: str) -> None:
    model = tiny_model(family)
    with cskv.attach(model, truncated_adapter(model, SETTINGS["joint"])):
        together = decoded(model, [0, 1, 2, 3])
        if family == "llama-dynamic-rope":  # whose frequencies follow the longest row
            assert together.isfinite().all()
            return
        for row in range(len(LENGTHS)):
            check(together[row], decoded(model, [row])[0], SETTINGS["joint"])


@pytest.mark.parametrize("pieces", [(8, 8), (1, 2), (21, 8)])
def test_a_prompt_in_pieces_may_begin_with_pieces_of_padding_alone(pieces: tuple[int, ...]) -> None:
    """The row of 9 tokens begins in the second or third piece of a batch of 30 columns."""
    model = tiny_model("llama")
    with cskv.attach(model, truncated_adapter(model, SETTINGS["joint"])):
        together = decoded(model, [0, 2], pieces)
        for index, row in enumerate((0, 2)):
            first = LENGTHS[row] - 30  # so that its own pieces are cut where those of the batch are
            cuts = [first + sum(pieces[: i + 1]) for i in range(len(pieces))]
            own = [max(0, cut) for cut in cuts]
            alone = tuple(stop - start for start, stop in zip([0, *own], own) if stop > start)
            check(together[index], decoded(model, [row], alone)[0], SETTINGS["joint"])


@pytest.mark.parametrize("name", ["joint", "no sinks", "packed"])
def test_generated_tokens_are_those_of_each_row_alone(name: str) -> None:
    model = tiny_model("llama")
    settings = GenerationConfig(max_new_tokens=STEPS, min_new_tokens=STEPS, pad_token_id=0, do_sample=False)
    with cskv.attach(model, truncated_adapter(model, SETTINGS[name])):
        for beams in (1, 3):
            settings.num_beams = beams
            tokens, mask = padded([0, 1, 2], 0)
            together = model.generate(tokens, attention_mask=mask, generation_config=settings)[:, -STEPS:]
            for row in range(3):
                tokens, mask = padded([row], 0)
                alone = model.generate(tokens, attention_mask=mask, generation_config=settings)[0, -STEPS:]
                assert torch.equal(together[row], alone), (row, beams)


@pytest.mark.parametrize("name", ["joint", "packed"])
@torch.no_grad()
def test_a_crop_leaves_each_row_as_alone(name: str) -> None:
    """Into sealed blocks, too: the blocks that follow are those of the row alone."""
    model = tiny_model("llama")

    def cropped(rows: list[int], crop: int) -> Tensor:
        tokens, mask = padded(rows, STEPS)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        cache = output_cache(model(tokens, attention_mask=mask, position_ids=positions, use_cache=True))
        cache.crop(-crop)
        found = []
        for column in range(tokens.shape[1] - crop, tokens.shape[1]):
            given = {"attention_mask": mask[:, : column + 1], "position_ids": positions[:, column : column + 1]}
            found.append(model(tokens[:, column : column + 1], **given, **{cache_kwarg(model): cache}).logits[:, -1])
        return torch.stack(found, dim=1)

    with cskv.attach(model, truncated_adapter(model, SETTINGS[name])):
        for crop in (9, 21):
            together = cropped([0, 1, 2], crop)
            for row in range(3):
                check(together[row], cropped([row], crop)[0], SETTINGS[name])


def test_full_rank_changes_nothing_whatever_the_padding() -> None:
    model = tiny_model("llama")
    expected = decoded(model, [0, 1, 2, 3])
    for settings in (CSKVConfig(1.0, 1.0, window=0, group=4, sinks=4), CSKVConfig(1.0, 1.0, window=3, group=1)):
        for attention in ("torch", "rebuild"):
            with cskv.attach(model, full_rank_adapter(model, settings), attention=attention):
                found = decoded(model, [0, 1, 2, 3])
            assert (found - expected).abs().max() < 1e-3 * expected.abs().max()


@torch.no_grad()
def test_what_layers_share_is_made_once_and_no_step_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding is read off the first mask alone, once; every later mask is put in order once, for all layers."""
    model = tiny_model("llama", attn_implementation="eager")  # sdpa's masks ask the device whether they are needed
    tokens, mask = padded([0, 1, 2], STEPS)
    calls = {"leading_padding": 0, "_ordered": 0}

    def counted(owner: object, name: str) -> None:
        function = getattr(owner, name)

        def count(*args: Any) -> Any:
            calls[name] += 1
            return function(*args)

        monkeypatch.setattr(owner, name, count)

    counted(order, "leading_padding")
    counted(order.Orders, "_ordered")
    with cskv.attach(model, truncated_adapter(model, SETTINGS["joint"])):
        cache = output_cache(model(tokens[:, :30], attention_mask=mask[:, :30], use_cache=True))
        assert calls == {"leading_padding": 1, "_ordered": 0}
        with Watch() as watch:
            for t in range(30, 30 + STEPS):  # in which every row seals
                positions = mask[:, : t + 1].cumsum(-1)[:, -1:] - 1
                given = {"attention_mask": mask[:, : t + 1], "position_ids": positions}
                model(tokens[:, t : t + 1], **given, **{cache_kwarg(model): cache})
    assert calls == {"leading_padding": 1, "_ordered": STEPS}
    assert "gather" in watch.names
    assert not watch.names.intersection(WAITS)
