"""How blocks are cut, by hand and whatever the sizes: every ring has a place, and every stage uses every block."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cskv import ConfigError, CSKVConfig
from cskv.vllm import blocks
from cskv.vllm.blocks import Rings, choose_block_size, cut_rings, least_block_size, rings_of
from cskv.vllm.served import Served
from cskv.vllm.shards import ServedShard, Shard
from tests.vllm.adapters import HEAD_DIM, HEADS, served, vllm_config

WINDOW = CSKVConfig(window=8, group=4, sinks=0)
SINKS = CSKVConfig(window=0, group=1, sinks=4)
GROUPED = CSKVConfig(window=8, group=12, k_bits=4, v_bits=4, sinks=0)
NO_RING = CSKVConfig(window=0, group=1, sinks=0)


def share_of(adapter: Served, dtype: torch.dtype = torch.float32, ranks: int = 1) -> ServedShard:
    return ServedShard(adapter, Shard.of_rank(0, ranks, HEADS), dtype, HEAD_DIM)


@pytest.mark.parametrize(
    ("block_bytes", "ring_bytes", "layers", "bundles", "page_bytes"),
    [
        (4096, 1024, [4], 1, 4096),  # all four fit
        (4096, 1040, [4], 2, 4096),  # three fit, so that there are two bundles of two
        (4096, 3008, [4], 4, 4096),  # one fits
        (4096, 5008, [4], 4, 5008),  # not even one: the block is widened
        (4100, 1024, [4], 1, 4096),  # a page begins at multiples of 16 bytes
        (8192, 1024, [4, 4], 1, 4096),  # a stage has half of a block
        (8192, 1024, [3, 5], 2, 4096),  # one layer and two; two and three
        (8192, 2048, [1, 7], 1, 7 * 2048),  # as one stage has no two bundles, the other has one as well
        (3072, 512, [2, 2, 2], 1, 1024),
        (3072, 1024, [2, 3, 1], 1, 3 * 1024),
    ],
)
def test_rings_by_hand(block_bytes: int, ring_bytes: int, layers: list[int], bundles: int, page_bytes: int) -> None:
    assert cut_rings(block_bytes, ring_bytes, layers) == Rings(bundles, page_bytes, ring_bytes)


def test_bounds_by_hand() -> None:
    assert Rings(2, 4096, 1024).bounds(3) == [0, 1, 3]
    assert Rings(2, 4096, 1024).bounds(5) == [0, 2, 5]
    assert Rings(3, 4096, 1024).bounds(8) == [0, 2, 5, 8]
    assert Rings(1, 4096, 1024).bounds(7) == [0, 7]


sizes = st.integers(1, 200).map(lambda count: 16 * count)


@given(st.integers(16, 100_000), sizes, st.lists(st.integers(1, 20), min_size=1, max_size=5))
def test_every_ring_has_a_place_on_every_stage(block_bytes: int, ring_bytes: int, layers: list[int]) -> None:
    cut = cut_rings(block_bytes, ring_bytes, layers)
    assert cut.page_bytes % 16 == 0
    for count in layers:
        bounds = cut.bounds(count)
        assert (len(bounds), bounds[0], bounds[-1]) == (cut.bundles + 1, 0, count)  # as many on every stage
        for start, stop in pairwise(bounds):
            assert stop > start  # none is empty
            assert (stop - start) * ring_bytes <= cut.page_bytes  # its rings fit, side by side


@given(st.integers(16, 100_000), sizes, st.integers(1, 20))
def test_no_more_blocks_than_are_needed(block_bytes: int, ring_bytes: int, layers: int) -> None:
    """On one stage: blocks are not widened where one ring fits, and no fewer bundles would do then."""
    cut, page = cut_rings(block_bytes, ring_bytes, [layers]), block_bytes // 16 * 16
    if ring_bytes <= page:
        assert cut.page_bytes == page
        assert cut.bundles == 1 or -(-layers // (cut.bundles - 1)) * ring_bytes > page
    else:
        assert (cut.bundles, cut.page_bytes) == (layers, ring_bytes)


def test_the_least_block_size_by_hand() -> None:
    """Two layers of 8 + 8 latents: 128 bytes a token in fp32. Window 8 and groups of 4 leave 11 tokens of 2 * 32
    numbers: 2816 bytes.
    """
    share = share_of(served(WINDOW, [(8, 8), (8, 8)]))
    assert share.ring_bytes == 2816
    least = [least_block_size(share, step) for step in (16, 4, 22)]
    assert least == [32, 24, 22]  # 22 * 128 = 2816
    assert least_block_size(share, 16, stages=2) == 48  # 44 at least
    half = share_of(share.served, ranks=2)  # half of the heads, but all latents
    assert least_block_size(half, 1) == 11
    rings = rings_of(share, 48, [1, 1])
    assert rings == Rings(1, 48 * 64, 2816)


def test_sinks_make_rings_larger() -> None:
    """Five of them: 5 tokens more of 2 * 32 numbers, 4096 bytes in all, for which 32 tokens of 128 bytes are enough."""
    share = share_of(served(dataclasses.replace(WINDOW, sinks=5), EQUAL))
    assert share.ring_bytes == 4096
    assert least_block_size(share, 1) == 32
    alone = share_of(served(SINKS, EQUAL))  # 4 * 256 bytes: both layers' in 16 tokens
    assert rings_of(alone, 16, [2]) == Rings(1, 2048, 1024)


def test_latents_that_wait_make_rings_larger() -> None:
    """19 tokens of 2 * 32 numbers, and of keys 8 more: 19 * 72 * 4 bytes are 5472. Values are packed per token."""
    share = share_of(served(GROUPED, [(8, 8), (4, 8)]))
    assert share.ring_bytes == 5472
    page = [share.layouts[i].page_bytes(48) for i in (0, 1)]
    # Codes 4 or 2 and 4 bytes a token; 4 groups with 8 or 4 scales of 2 bytes; 48 with one; and as many minima.
    assert page == [192 + 192 + 2 * 64 + 2 * 96, 96 + 192 + 2 * 32 + 2 * 96]
    least = least_block_size(share, 48)
    assert least == 240  # 5 * (704 + 544) = 6240; 4992 would be too little
    assert rings_of(share, 240, [2]) == Rings(2, 6240, 5472)


ranks_lists = st.lists(st.tuples(st.integers(1, 32), st.integers(1, 32)), min_size=2, max_size=6)
configs = st.sampled_from(
    [WINDOW, SINKS, GROUPED, CSKVConfig(window=0, group=4, k_bits=8), CSKVConfig(window=30, group=1, sinks=4)]
)


@given(configs, ranks_lists, st.sampled_from([16, 48]), st.sampled_from([1, 2]))
def test_it_is_the_least_at_which_a_block_holds_a_ring(
    config: CSKVConfig, ranks: list[tuple[int, int]], step: int, stages: int
) -> None:
    share = share_of(served(config, ranks), torch.bfloat16)
    step = step * config.group
    least = least_block_size(share, step, stages)
    ring = max(ring.page_bytes for ring in share.rings.values())

    def stage(tokens: int) -> int:
        return sum(layout.page_bytes(tokens) for layout in share.layouts.values()) // stages

    most, fewest = -(-len(ranks) // stages), len(ranks) // stages
    needed = ring * -(-most // fewest)  # as many blocks for the rings on every stage: of 2 and 1 layers two share one
    assert least % step == 0
    assert stage(least) // 16 * 16 >= needed
    assert least == step or stage(least - step) // 16 * 16 < needed


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(ConfigError, match="3 pipeline stages for 2 layers"):
        least_block_size(share_of(served(WINDOW, EQUAL)), 16, stages=3)


def test_stages_of_very_different_numbers_of_layers_are_refused() -> None:
    share = share_of(served(WINDOW, [(8, 8)] * 8))
    least = least_block_size(share, 16, stages=2)
    with pytest.raises(ConfigError, match=r"cannot hold the exact tokens of stages of \[1, 7\] layers"):
        rings_of(share, least, [1, 7])


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is logged as a warning."""
    lines: list[str] = []
    monkeypatch.setattr(blocks.logger, "warning", lambda text, *of: lines.append(text % of))
    return lines


EQUAL = [(8, 8), (8, 8)]


@pytest.mark.parametrize(
    ("config", "stages", "size"),
    [
        (WINDOW, 1, 32),
        (WINDOW, 2, 48),
        (SINKS, 1, 16),
        (SINKS, 2, 16),
        (GROUPED, 1, 192),
    ],  # 192 * 2 / 48 * 704 = 5632, and 5472 are needed
)
def test_a_block_size_is_chosen(config: CSKVConfig, stages: int, size: int, said: list[str]) -> None:
    server = vllm_config(parallel={"pipeline_parallel_size": stages})
    choose_block_size(share_of(served(config, EQUAL)), server)
    assert (server.cache_config.block_size, server.cache_config.user_specified_block_size) == (size, True)
    assert said == []


def test_without_rings_vllm_chooses() -> None:
    server = vllm_config()
    choose_block_size(share_of(served(NO_RING, [(8, 8), (4, 8)])), server)
    assert (server.cache_config.block_size, server.cache_config.user_specified_block_size) == (16, False)


def asked_for(size: int, stages: int = 1) -> Any:
    return vllm_config(
        cache={"block_size": size, "user_specified_block_size": True}, parallel={"pipeline_parallel_size": stages}
    )


@pytest.mark.parametrize(("config", "size"), [(WINDOW, 32), (WINDOW, 100), (GROUPED, 192), (GROUPED, 204)])
def test_a_block_size_that_was_asked_for_is_kept(config: CSKVConfig, size: int, said: list[str]) -> None:
    server = asked_for(size)
    choose_block_size(share_of(served(config, EQUAL)), server)
    assert server.cache_config.block_size == size
    assert said == []


def test_groups_must_not_be_cut() -> None:
    with pytest.raises(ConfigError) as caught:
        choose_block_size(share_of(served(GROUPED, EQUAL)), asked_for(208))
    assert str(caught.value) == (
        "a block of 208 tokens would cut groups of 12 that are packed together; give --block-size a multiple of 12"
    )


@pytest.mark.parametrize(
    "config",
    [
        CSKVConfig(window=8, group=12),  # plain latents
        CSKVConfig(window=8, group=12, v_bits=4),  # only values are packed, token by token
        CSKVConfig(window=8, group=12, k_bits=4, v_bits=4, k_block=(1, 8)),
    ],
)
def test_tokens_that_are_packed_one_by_one_may_be_cut(config: CSKVConfig) -> None:
    server = asked_for(512)
    choose_block_size(share_of(served(config, EQUAL)), server)
    assert server.cache_config.block_size == 512


def test_a_small_block_size_wastes_memory(said: list[str]) -> None:
    choose_block_size(share_of(served(WINDOW, EQUAL)), asked_for(16))
    assert said == [
        "blocks of 16 tokens cannot hold the exact tokens of one layer, so memory is wasted; give --block-size 32 or "
        "more"
    ]


def test_with_pipeline_stages_a_small_block_size_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        choose_block_size(share_of(served(WINDOW, EQUAL)), asked_for(32, stages=2))
    assert str(caught.value) == (
        "blocks of 32 tokens cannot hold the exact tokens of one layer, which 2 pipeline stages need; give "
        "--block-size 48 or more"
    )


def test_with_pipeline_stages_ranks_must_not_differ() -> None:
    for config in (WINDOW, SINKS):
        with pytest.raises(ConfigError) as caught:
            choose_block_size(
                share_of(served(config, [(8, 8), (4, 8)])), vllm_config(parallel={"pipeline_parallel_size": 2})
            )
        assert str(caught.value) == (
            "2 pipeline stages, exact tokens and layers of different ranks or widths do not go together in vLLM's "
            "block pool; serve with window 0, group 1 and sinks 0, or with one rank for all layers"
        )
    choose_block_size(share_of(served(WINDOW, [(8, 8), (4, 8)])), vllm_config())
