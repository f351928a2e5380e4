"""A server's attention is that of every request by itself, however its tokens come and wherever its pages lie.

What each request by itself gives is a `BiBranchStore` read by the reference: neither knows pages, rings or batches.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cskv.attention.attend import MOST_NEW
from cskv.quantization.grid import Grid
from cskv.vllm import compute
from cskv.vllm.compute import attend, write
from cskv.vllm.step import plan_step
from tests.attention.problems import Problem
from tests.vllm.batches import MOST, PLACES, Request, Server, Setting, Tokens, off_by

TOLERANCE = 1e-5
ENDS = -1  # in a schedule: the request ends, and another one begins in its place

PROBLEM = Problem(sealed=MOST)
PROBLEMS = {
    "rope": PROBLEM,
    "rope on a part, normalised, biased": replace(PROBLEM, rotary=8, norm=True, bias=True),
    "no rope": replace(PROBLEM, rotary=None),
    "no rope, head groups, biased": replace(PROBLEM, rotary=None, groups=2, bias=True),
    "rope, head groups": replace(PROBLEM, groups=2),
    "as many kv heads as query heads": replace(PROBLEM, q_heads=2),
    "one kv head": replace(PROBLEM, kv_heads=1),
}
SIZES = ((0, 1), (0, 4), (3, 1), (5, 4), (8, 8), (1, 2), (17, 8))  # (window, group)
SINKS = (0, 1, 4, 13, 400)  # 400: more than there are tokens


def grids(kind: str, group: int) -> tuple[Grid | None, Grid | None]:
    """Of 14 key and 10 value latents."""
    return {
        "plain": (None, None),
        "per token": (Grid.uniform(14, 4, (1, 32)), Grid.uniform(10, 8, (1, 4))),
        "in groups": (Grid.uniform(14, 4, (group, 1)), Grid.uniform(10, 3, (group, 4))),
        "keys in groups, values per token": (Grid.uniform(14, 4, (group, 1)), Grid.uniform(10, 4, (1, 32))),
        "keys plain, values in halves of groups": (None, Grid.uniform(10, 8, (max(1, group // 2), 1))),
        "mixed widths": (Grid(((8, 3), (3, 11)), group, 4), Grid(((6, 1), (2, 9)), group, 4)),
    }[kind]


KINDS = (
    "plain",
    "per token",
    "in groups",
    "keys in groups, values per token",
    "keys plain, values in halves of groups",
    "mixed widths",
)


def setting(kind: str, problem: str, sizes: tuple[int, int], block_size: int = 16, **others: object) -> Setting:
    window, group = sizes
    return Setting(PROBLEMS[problem], window, group, *grids(kind, group), block_size, **others)  # type: ignore[arg-type]


def run(server: Server, schedule: list[list[int]], paddings: list[int]) -> float:
    """Follow a schedule: for every step, how many tokens the request in each place gets. The largest error."""
    places: list[Request | None] = [None] * max(map(len, schedule))
    worst = 0.0
    for number, step in enumerate(schedule):
        batch = []
        for place, size in enumerate(step):
            request = places[place]
            if request is not None and (size == ENDS or request.length + size > MOST):
                server.end(request)
                places[place] = request = None
            if size > 0:
                request = places[place] = server.begin() if request is None else request
                batch.append((request, size))
        turn = number % max(1, len(batch))
        batch = sorted(batch[turn:] + batch[:turn], key=lambda pair: pair[1] > 1)
        if batch:
            worst = max(worst, off_by(*server.step(batch, paddings[number % len(paddings)])))
    assert (server.around() == 255).all()
    return worst


pieces = st.one_of(st.just(1), st.just(1), st.integers(0, 20), st.just(ENDS), st.sampled_from([33, 64, 65, 90]))
schedules = st.lists(st.lists(pieces, min_size=PLACES, max_size=PLACES), min_size=1, max_size=14)


@settings(max_examples=120)
@given(
    st.sampled_from(KINDS),
    st.sampled_from(sorted(PROBLEMS)),
    st.sampled_from(SIZES),
    st.sampled_from([8, 16, 24]),
    st.sampled_from([None, None, 2.0]),
    st.sampled_from(SINKS),
    schedules,
    st.lists(st.integers(0, 2), min_size=1, max_size=3),
    st.integers(0, 2**31),
)
def test_every_request_is_as_by_itself(
    kind: str,
    problem: str,
    sizes: tuple[int, int],
    block_size: int,
    softcap: float | None,
    sinks: int,
    schedule: list[list[int]],
    paddings: list[int],
    seed: int,
) -> None:
    server = Server(setting(kind, problem, sizes, block_size, softcap=softcap, sinks=sinks), seed=seed)
    assert run(server, schedule, paddings) <= TOLERANCE


# A prompt in pieces beside others, that decodes once it is read; requests that end, and whose blocks are used again.
SCHEDULE = [
    [37, 1, 0, 5],
    [30, 1, 70, 9],
    *[[1, 1, 1, 11]] * 5,
    [1, 65, 1, ENDS],
    [1, 1, ENDS, 3],
    *[[1, 0, 7, 1]] * 3,
    [ENDS, 1, 1, 1],
    *[[14, 1, 1, 1]] * 2,
]


@pytest.mark.parametrize("sizes", [(0, 1), (0, 4), (3, 1), (5, 4), (17, 8)], ids="window {0[0]} group {0[1]}".format)
@pytest.mark.parametrize("kind", KINDS)
def test_all_kinds_of_latents(kind: str, sizes: tuple[int, int]) -> None:
    problem = "rope" if sizes[0] % 2 else "no rope, head groups, biased"
    assert run(Server(setting(kind, problem, sizes)), SCHEDULE, [0, 1]) <= TOLERANCE


@pytest.mark.parametrize("sinks", [1, 4, 40, 400], ids="sinks {}".format)
@pytest.mark.parametrize("sizes", [(0, 1), (5, 4)], ids="window {0[0]} group {0[1]}".format)
def test_sinks(sizes: tuple[int, int], sinks: int) -> None:
    """40 are more than the first piece of a prompt has, 400 more than a request gets."""
    for kind in ("plain", "keys in groups, values per token"):
        assert run(Server(setting(kind, "rope", sizes, sinks=sinks)), SCHEDULE, [0, 1]) <= TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [(0, 1), (5, 4)], ids="window {0[0]} group {0[1]}".format)
def test_latents_of_sinks_are_never_read(kind: str, sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """They are NaN here. The sinks come in pieces, and with the last of them the first other tokens."""
    server = Server(setting(kind, "rope", sizes, sinks=6))
    request, drawn = server.begin(), server._draw

    def draw(count: int) -> Tokens:
        tokens = drawn(count)
        for latents in tokens.latents:
            latents[: max(0, 6 - (request.length - count))] = torch.nan
        return tokens

    monkeypatch.setattr(server, "_draw", draw)
    for size in (2, 1, 1, 7, *[1] * 12, 70, *[1] * 12):
        assert off_by(*server.step([(request, size)])) <= TOLERANCE


@pytest.mark.parametrize("problem", PROBLEMS)
def test_all_kinds_of_heads(problem: str) -> None:
    assert (
        run(Server(setting("keys in groups, values per token", problem, (5, 4), sinks=4)), SCHEDULE, [0]) <= TOLERANCE
    )


@pytest.mark.parametrize("sinks", [0, 5])
@pytest.mark.parametrize("sizes", [(0, 1), (5, 4)], ids="window {0[0]} group {0[1]}".format)
def test_what_latents_leave_out_is_read_at_its_positions(sizes: tuple[int, int], sinks: int) -> None:
    server = Server(setting("in groups", "no rope", sizes, sinks=sinks, offset=True))
    assert run(server, SCHEDULE, [0]) <= TOLERANCE


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_long_pieces_are_as_short_ones(softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Old keys and values are rebuilt for long pieces, which softcaps do not allow."""
    rebuilt = []
    monkeypatch.setattr(
        compute, "_on_rebuilt", lambda *given, old=compute._on_rebuilt: rebuilt.append(1) or old(*given)
    )
    for problem in ("rope", "no rope, head groups, biased"):
        server = Server(setting("in groups", problem, (5, 4), softcap=softcap, sinks=4))
        assert run(server, [[90, 3], [70, 64], [MOST_NEW, 65], [1, 100], [1, 1]], [0]) <= TOLERANCE
    assert len(rebuilt) == (0 if softcap else 2 * 4)


@pytest.mark.parametrize("kind", KINDS)
def test_latents_in_half_precision_are_sealed_to_the_bit(kind: str) -> None:
    """Those that wait in rings too. Outputs differ by what tensors of 8 bits lose."""
    server = Server(setting(kind, "rope", (5, 4), dtype=torch.bfloat16, sinks=4))
    assert run(server, SCHEDULE, [0]) <= 5e-2


@pytest.mark.parametrize("kind", ["plain", "per token"])
def test_a_shared_prefix_is_read_where_it_is(kind: str) -> None:
    """Prefix caching, with window 0, group 1 and no sinks: a new request begins with pages that another one wrote."""
    server = Server(setting(kind, "rope", (0, 1)))
    first = server.begin()
    server.step([(first, 32)])
    kept = [server.k.data[first.pages].clone(), server.v.data[first.pages].clone()]
    second = server.begin(prefix=first)
    second.store = copy.deepcopy(first.store)
    for sizes in ((1, 9), (1, 1), (20, 1), (1, 70)):
        batch = sorted(zip((first, second), sizes), key=lambda pair: pair[1] > 1)
        assert off_by(*server.step(batch)) <= TOLERANCE
    for pages, before in zip((server.k, server.v), kept):
        assert torch.equal(pages.data[second.pages[:2]], before)
    assert first.pages[:2] == second.pages[:2]
    assert not set(first.pages[2:]) & set(second.pages[2:])


def test_an_empty_batch_does_nothing() -> None:
    """As when a server warms up."""
    server = Server(setting("in groups", "rope", (5, 4), sinks=4))
    none = np.zeros(3, dtype=np.int64), np.zeros(2, dtype=np.int64)
    step = plan_step(*none, torch.zeros(2, 4, dtype=torch.int32), torch.full((4,), -1), 16, window=5, group=4, sinks=4)
    before, cache, tokens = server.memory.clone(), server._cache([], 2), server._draw(0)
    attend(step, cache, server.rules, tokens.query, tokens.keys, tokens.values, tokens.query.clone())
    write(step, cache, tokens.keys, tokens.values, tokens.latents)
    assert torch.equal(server.memory, before)
