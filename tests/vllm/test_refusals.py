"""What is not served is refused in one line, before anything is loaded; and what tensor parallelism may cost."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cskv import AdapterError, ConfigError, CSKVConfig, UnsupportedModelError
from cskv.errors import CSKVError
from cskv.vllm import refusals
from cskv.vllm.refusals import check
from cskv.vllm.served import Served, find_served
from tests.vllm.adapters import save, served, vllm_config

WINDOW = CSKVConfig(window=8, group=4, sinks=0)
NO_RING = CSKVConfig(window=0, group=1, sinks=0)
RANKS = [(4, 4), (4, 4)]


@pytest.fixture(autouse=True)
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is logged as a warning."""
    lines: list[str] = []
    monkeypatch.setattr(refusals.logger, "warning", lambda text, *of: lines.append(text % of))
    return lines


@pytest.fixture
def adapter(tmp_path: Path) -> Served:
    """A real one: its files are looked at last."""
    return made(tmp_path, WINDOW)


def made(folder: Path, config: CSKVConfig, ranks: list[tuple[int, int]] = RANKS) -> Served:
    save(folder / "cskv", config, ranks)
    return find_served(str(folder), None, SimpleNamespace(cskv={"adapter": "cskv"}))


def refused(kind: type[CSKVError], adapter: Served, config: Any) -> str:
    with pytest.raises(kind) as caught:
        check(adapter, config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_fits_is_served(adapter: Served) -> None:
    check(adapter, vllm_config())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({"model_type": "qwen2"}, "made for someone/base with model_type llama, this model has qwen2: serve the base"),
        ({"hidden_size": 64}, "with hidden_size 24, this model has 64"),
        ({"num_hidden_layers": 3}, "with num_layers 2, this model has 3"),
        ({"num_key_value_heads": 2}, "layer 0 has 32 channels, this model 16; serve the base model that it names"),
        ({"head_dim": 16}, "layer 0 has 32 channels, this model 64"),
        ({"num_key_value_heads": None}, "layer 0 has 32 channels, this model 64"),  # as many as of queries
        ({"head_dim": None}, "layer 0 has 32 channels, this model 12"),  # 4 heads of 24 / 8
    ],
)
def test_another_model_is_refused(adapter: Served, text: dict[str, Any], message: str) -> None:
    assert message in refused(AdapterError, adapter, vllm_config(text=text))


def test_layers_that_are_not_compressed_are_named(adapter: Served) -> None:
    base = adapter.settings.base
    larger = adapter.settings._replace(base=base.__class__(base.name, base.model_type, base.hidden_size, 4))
    message = refused(UnsupportedModelError, Served(adapter.folder, larger), vllm_config(layers=4))
    assert message == (
        "the adapter leaves layers [2, 3] uncompressed, and a mixture is not served; compress every layer"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"speculative_config": object()},
            "with speculative decoding: tokens that are taken back may be sealed already",
        ),
        ({"lora_config": object()}, "with LoRA: latents are those of the base model's projections"),
        ({"kv_transfer_config": object()}, "with a KV connector: moving its pages has not been tried"),
        (
            {"cache": {"cache_dtype": "fp8"}},
            "with kv_cache_dtype 'fp8': bits per latent are the adapter's; leave it at 'auto'",
        ),
        (
            {"parallel": {"decode_context_parallel_size": 2}},
            "with decode_context_parallel_size 2: a request's pages are not split over ranks",
        ),
        (
            {"parallel": {"prefill_context_parallel_size": 4}},
            "with prefill_context_parallel_size 4: a request's pages are not split over ranks",
        ),
        (
            {"scheduler_config": SimpleNamespace(disable_hybrid_kv_cache_manager=True)},
            "with exact tokens and without the hybrid KV cache manager; leave that on, or serve with window 0, group 1 "
            "and sinks 0",
        ),
    ],
)
def test_options_that_do_not_go_with_it_are_refused(adapter: Served, options: dict[str, Any], message: str) -> None:
    assert refused(ConfigError, adapter, vllm_config(**options)) == f"a compressed cache cannot be served {message}"


def test_without_exact_tokens_any_cache_manager_will_do(tmp_path: Path) -> None:
    options = {"scheduler_config": SimpleNamespace(disable_hybrid_kv_cache_manager=True)}
    check(made(tmp_path, NO_RING), vllm_config(**options))


def test_commuting_keys_have_all_heads_mixed(tmp_path: Path) -> None:
    config = CSKVConfig(window=8, group=4, key_factors="commuting")
    message = refused(ConfigError, served(config, RANKS), vllm_config(parallel={"tensor_parallel_size": 2}))
    assert message == (
        "a compressed cache cannot be served with commuting key factors on 2 tensor-parallel ranks: they mix all kv "
        "heads, and a rank has only its own; use one rank, pipeline parallelism, or joint factors"
    )
    check(made(tmp_path, config), vllm_config())


def test_weights_are_looked_at_before_the_model_is_loaded(adapter: Served) -> None:
    weights = adapter.folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "is truncated or corrupted" in refused(AdapterError, adapter, vllm_config())
    weights.unlink()
    assert "is missing; the adapter folder is incomplete" in refused(AdapterError, adapter, vllm_config())


@pytest.mark.parametrize(
    ("config", "exact"),
    [
        (WINDOW, "the newest 8 to 11"),
        (CSKVConfig(window=0, group=2, sinks=0), "the newest 0 to 1"),
        (CSKVConfig(window=0, group=1, sinks=4), "the first 4"),
        (CSKVConfig(window=8, group=4, sinks=4), "the first 4 and the newest 8 to 11"),
    ],
)
def test_with_exact_tokens_prefixes_are_not_cached(
    tmp_path: Path, said: list[str], config: CSKVConfig, exact: str
) -> None:
    server = vllm_config()
    check(made(tmp_path, config), server)
    assert not server.cache_config.enable_prefix_caching
    assert said == [
        f"prefix caching is switched off: {exact} tokens of a request are kept exactly, and a shared prefix has only "
        "latents; serve with window 0, group 1 and sinks 0 to have prefix caching"
    ]


def test_without_exact_tokens_prefixes_are_cached(tmp_path: Path, said: list[str]) -> None:
    server = vllm_config()
    check(made(tmp_path, NO_RING), server)
    assert (server.cache_config.enable_prefix_caching, said) == (True, [])


def test_prefix_caching_that_is_off_is_not_spoken_of(adapter: Served, said: list[str]) -> None:
    server = vllm_config(cache={"enable_prefix_caching": False})
    check(adapter, server)
    assert (server.cache_config.enable_prefix_caching, said) == (False, [])


def on_ranks(ranks: int, **options: Any) -> Any:
    return vllm_config(parallel={"tensor_parallel_size": ranks}, cache={"enable_prefix_caching": False}, **options)


# A rank's uncompressed cache is 2 * 4 heads * 8 = 64 numbers of a token and layer on one rank, 32 on two, 16 on four.
# Latents of all heads are on every rank.
@pytest.mark.parametrize(
    ("rank", "ranks", "times"),
    [
        (9, 4, "1.12"),  # 18 latents for 16 numbers
        (12, 4, "1.50"),
        (32, 2, "2.00"),
        (17, 2, "1.06"),
    ],
)
def test_ranks_that_repeat_more_than_they_save_are_refused(tmp_path: Path, rank: int, ranks: int, times: str) -> None:
    message = refused(ConfigError, made(tmp_path, WINDOW, [(rank, rank)] * 2), on_ranks(ranks))
    assert message == (
        f"on {ranks} tensor-parallel ranks the latents, which every rank repeats, take {times} times the bytes of the "
        "uncompressed cache; train factors per head group (--head-groups, a multiple of the ranks), or use pipeline "
        "parallelism"
    )


@pytest.mark.parametrize(
    ("rank", "ranks", "here", "alone"),
    [
        (8, 2, "2.0", "4.0"),
        (4, 4, "2.0", "8.0"),
        (15, 2, "1.1", "2.1"),
        (16, 2, "1.0", "2.0"),  # nothing is gained, and nothing lost
    ],
)
def test_ranks_that_take_much_of_the_saving_are_warned_of(
    tmp_path: Path, said: list[str], rank: int, ranks: int, here: str, alone: str
) -> None:
    check(made(tmp_path, WINDOW, [(rank, rank)] * 2), on_ranks(ranks))
    assert len(said) == 1
    assert said[0].startswith(
        f"on {ranks} tensor-parallel ranks, which repeat the latents, the cache is {here} times smaller, not {alone}; "
    )


@pytest.mark.parametrize("ranks", [2, 4])
def test_factors_of_head_groups_lose_nothing(tmp_path: Path, said: list[str], ranks: int) -> None:
    check(made(tmp_path, CSKVConfig(window=8, group=4, head_groups=4), [(16, 16)] * 2), on_ranks(ranks))
    assert said == []


def test_where_ranks_share_head_groups(tmp_path: Path, said: list[str]) -> None:
    """Two groups on four ranks: a rank has half of the latents, 8 of 16, for 16 of 64 numbers. 2.0 is half of 4.0."""
    adapter = made(tmp_path, CSKVConfig(window=8, group=4, head_groups=2), [(8, 8)] * 2)
    check(adapter, on_ranks(2))
    assert said == []
    check(adapter, on_ranks(4))
    assert "2.0 times smaller, not 4.0" in said[0]


def test_ranks_that_repeat_heads_lose_no_more_than_they_would(tmp_path: Path, said: list[str]) -> None:
    """Eight ranks for four heads: uncompressed, two ranks have the same head, 16 numbers of a token and layer."""
    adapter = made(tmp_path, CSKVConfig(window=8, group=4, head_groups=4), [(8, 8)] * 2)
    check(adapter, on_ranks(8))
    assert said == []


def test_head_groups_that_cut_across_ranks_are_refused() -> None:
    adapter = served(CSKVConfig(window=8, group=4, head_groups=2), [(8, 8)] * 2, heads=6)
    message = refused(ConfigError, adapter, on_ranks(3, heads=6))
    assert "2 head groups of 6 kv heads cut across ranks of 2" in message


def test_only_layers_together_count(tmp_path: Path, said: list[str]) -> None:
    """One layer alone would lose: 20 latents for 16 numbers. Both take 28 for 32."""
    check(made(tmp_path, WINDOW, [(10, 10), (4, 4)]), on_ranks(4))
    assert "the cache is 1.1 times smaller, not 4.6" in said[0]


@pytest.mark.parametrize("config", [WINDOW, NO_RING], ids=["in groups", "per token"])
def test_bits_count(config: CSKVConfig, tmp_path: Path, said: list[str]) -> None:
    """In fp32: 8 + 8 latents in 8 bits are 16 bytes. Per token there are one scale and minimum of 2 bytes for each, in
    all 24; over groups of 4, a key's 8 channels share theirs with 4 tokens: 8 * 4 / 4 + 4 = 12 bytes, in all 28. Four
    ranks have 64 bytes of a token and layer: 2.3 and 2.7 times as many, and not the 9.1 and 10.7 of one rank.
    """
    packed = CSKVConfig(window=config.window, group=config.group, k_bits=8, v_bits=8)
    check(made(tmp_path, packed, [(8, 8)] * 2), on_ranks(4))
    expected = "2.3 times smaller, not 9.1" if config is WINDOW else "2.7 times smaller, not 10.7"
    assert expected in said[0]


def test_small_latents_are_not_counted_as_padding(tmp_path: Path) -> None:
    """Parts of a page are rounded up to 16 bytes, not those of a token: 2 + 2 latents for 16 numbers of 2 bytes."""
    check(made(tmp_path, NO_RING, [(2, 2)] * 2), on_ranks(4, dtype=torch.bfloat16))


def test_one_rank_is_never_warned(tmp_path: Path, said: list[str]) -> None:
    check(made(tmp_path, WINDOW, [(32, 32)] * 2), on_ranks(1))
    assert said == []


def test_weights_that_lack_a_layer_are_refused(adapter: Served) -> None:
    path = adapter.folder / "config.json"
    described = json.loads(path.read_text())
    described["ranks"]["2"] = described["ranks"]["1"]
    described["base_model"]["num_layers"] = 3
    path.write_text(json.dumps(described))
    found = find_served(str(adapter.folder.parent), None, SimpleNamespace(cskv={"adapter": "cskv"}))
    assert "lacks 'layers.2.k.down'; the adapter folder" in refused(AdapterError, found, vllm_config(layers=3))
