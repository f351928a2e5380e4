"""One step of a server: the reads and writes of the compressed cache of all requests, planned once for all layers.

A step appends tokens to every request: one to those that decode, which come first, and a chunk of the prompt to the
others. The host knows all lengths, so that it plans what to seal and keep, and nothing waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cskv.cache.bibranch import sealed_tokens

Numbers = npt.NDArray[np.int64]


class Prefill(NamedTuple):
    """A request that prefills a chunk of its prompt.

    Attributes:
        request: its row in the block table.
        rows: its tokens in the batch.
        length: its cached tokens before the step.
        sealed: those of them that are read from latents, the first behind the sinks.
    """

    request: int
    rows: slice
    length: int
    sealed: int


class Groups(NamedTuple):
    """Groups that are sealed at the end of the step, (groups,): row in the block table, position of the first token."""

    request: Tensor
    first: Tensor


class Kept(NamedTuple):
    """Tokens of the step that go into the rings, (tokens,): row in the batch, row in the block table, and position."""

    row: Tensor
    request: Tensor
    position: Tensor


class Exact(NamedTuple):
    """Tokens that were in the rings before the step, oldest first, (requests, slots): position, and if it exists."""

    position: Tensor
    exists: Tensor


@dataclass(frozen=True)
class Step:
    """The plan of one step.

    Attributes:
        sinks: see `CSKVConfig`. Latents are counted from there on: those of the token at `sinks + i` have place i.
        tokens: tokens of all requests; padding follows them in the batch.
        decodes: number of requests that append one token; they come first.
        prefills: the other requests.
        table: (requests, blocks): block table.
        slots: (tokens,): where latents that are stored one by one go, page * block_size + offset; negative: nowhere.
        start: (requests,): the first row of each request in the batch.
        length: (requests,): cached tokens before the step.
        sealed: (requests,): those of them that are read from latents, the first behind the sinks.
        most, least: sealed tokens of the longest and of the shortest request that decodes.
        exact: tokens read from the rings.
        groups: groups sealed at the end of the step.
        kept: tokens written into the rings.
    """

    sinks: int
    tokens: int
    decodes: int
    prefills: tuple[Prefill, ...]
    table: Tensor
    slots: Tensor
    start: Tensor
    length: Tensor
    sealed: Tensor
    most: int
    least: int
    exact: Exact
    groups: Groups
    kept: Kept


def plan_step(
    starts: Numbers, lengths: Numbers, table: Tensor, slots: Tensor, block_size: int, *,
    window: int, group: int, sinks: int,
) -> Step:  # fmt: skip
    """Plan a step.

    Args:
        starts: (requests + 1,): where each request's tokens start in the batch, and where the last ones end. Requests
            with one token come first; those with none are padding, and come last.
        lengths: (requests,): tokens of each request, those of the step included.
        table: see `Step`, on the device.
        slots: vLLM's slot mapping, on the device: where tokens would go if there were no sinks.
        block_size: tokens of a page.
        window, group, sinks: see `CSKVConfig`.
    """
    new = np.diff(starts)
    requests = int((new > 0).sum())
    starts, new, lengths = starts[:requests], new[:requests], lengths[:requests]
    before = lengths - new
    sealed, sealed_after = (sealed_tokens(np.maximum(length - sinks, 0), window, group) for length in (before, lengths))
    tokens = int(new.sum())
    decodes = int((new == 1).cumprod().sum())
    prefills = tuple(
        Prefill(i, slice(int(starts[i]), int(starts[i] + new[i])), int(before[i]), int(sealed[i]))
        for i in range(decodes, requests)
    )
    sent = partial(_sent, device=table.device)
    decoding = sealed[:decodes]
    if sinks:
        request, place = map(sent, _tokens(before - sinks, new))
        slots = _shifted(slots[:tokens], table, request, place, block_size)
    return Step(
        sinks=sinks,
        tokens=tokens,
        decodes=decodes,
        prefills=prefills,
        table=table[:requests],
        slots=slots[:tokens],
        start=sent(starts),
        length=sent(before),
        sealed=sent(sealed),
        most=int(decoding.max(initial=0)),
        least=int(decoding.min()) if decodes else 0,
        exact=Exact(*map(sent, _exact(before, sealed, sinks, window + group - 1))),
        groups=Groups(*map(sent, _tokens(sinks + sealed, (sealed_after - sealed) // group, group))),
        kept=Kept(*map(sent, _kept(starts, before, lengths, sinks, window + group - 1))),
    )


def _exact(before: Numbers, sealed: Numbers, sinks: int, newest: int) -> tuple[Numbers, npt.NDArray[np.bool_]]:
    """List the positions that rings may hold, the sinks first, and which of them are there."""
    place = np.arange(sinks + newest)
    position = place + np.where(place < sinks, 0, sealed[:, None])
    return position, position < before[:, None]


def _kept(
    starts: Numbers, before: Numbers, after: Numbers, sinks: int, newest: int
) -> tuple[Numbers, Numbers, Numbers]:
    """Select the sinks among the new tokens of every request, and the newest others, up to so many."""
    first = np.stack([before, np.maximum(np.maximum(before, sinks), after - newest)], axis=1).flatten()
    stop = np.stack([np.minimum(after, sinks), after], axis=1).flatten()
    half, position = _tokens(first, np.maximum(stop - first, 0))
    request = half // 2
    return starts[request] + position - before[request], request, position


def _tokens(first: Numbers, count: Numbers, step: int = 1) -> tuple[Numbers, Numbers]:
    """List the numbers of ranges, one range after another: which range it is, and the number."""
    which = np.repeat(np.arange(len(count)), count)
    counted = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    return which, first[which] + counted * step


def _shifted(slots: Tensor, table: Tensor, request: Tensor, place: Tensor, block_size: int) -> Tensor:
    """Find slots anew, of latents that are counted from the sinks on, where a token has a slot and is no sink."""
    page = table[request, place.clamp(min=0) // block_size].to(slots.dtype)
    return torch.where((slots >= 0) & (place >= 0), page * block_size + place % block_size, -1)


def _sent(numbers: npt.NDArray[Any], device: torch.device) -> Tensor:
    host = torch.from_numpy(np.ascontiguousarray(numbers))
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)
