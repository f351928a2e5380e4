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
        sealed: those of them that are read from latents.
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


class Recent(NamedTuple):
    """Tokens that were in the rings before the step, oldest first, (requests, slots): position, and if it exists."""

    position: Tensor
    exists: Tensor


@dataclass(frozen=True)
class Step:
    """The plan of one step.

    Attributes:
        tokens: tokens of all requests; padding follows them in the batch.
        decodes: number of requests that append one token; they come first.
        prefills: the other requests.
        table: (requests, blocks): block table.
        slots: (tokens,): slot mapping, page * block_size + offset.
        start: (requests,): the first row of each request in the batch.
        length: (requests,): cached tokens before the step.
        sealed: (requests,): those of them that are read from latents.
        most, least: sealed tokens of the longest and of the shortest request that decodes.
        recent: tokens read from the rings.
        groups: groups sealed at the end of the step.
        kept: tokens written into the rings.
    """

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
    recent: Recent
    groups: Groups
    kept: Kept


def plan_step(starts: Numbers, lengths: Numbers, table: Tensor, slots: Tensor, window: int, group: int) -> Step:
    """Plan a step.

    Args:
        starts: (requests + 1,): where each request's tokens start in the batch, and where the last ones end. Requests
            with one token come first; those with none are padding, and come last.
        lengths: (requests,): tokens of each request, those of the step included.
        table, slots: see `Step`, on the device.
        window, group: see `CSKVConfig`.
    """
    new = np.diff(starts)
    requests = int((new > 0).sum())
    starts, new, lengths = starts[:requests], new[:requests], lengths[:requests]
    before = lengths - new
    sealed, sealed_after = (sealed_tokens(length, window, group) for length in (before, lengths))
    tokens = int(new.sum())
    decodes = int((new == 1).cumprod().sum())
    prefills = tuple(
        Prefill(i, slice(int(starts[i]), int(starts[i] + new[i])), int(before[i]), int(sealed[i]))
        for i in range(decodes, requests)
    )
    position = sealed[:, None] + np.arange(window + group - 1)
    sent = partial(_sent, device=table.device)
    decoding = sealed[:decodes]
    return Step(
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
        recent=Recent(sent(position), sent(position < before[:, None])),
        groups=Groups(*map(sent, _groups(sealed, sealed_after, group))),
        kept=Kept(*map(sent, _kept(starts, before, new, window + group - 1))),
    )


def _groups(sealed: Numbers, after: Numbers, group: int) -> tuple[Numbers, Numbers]:
    count = (after - sealed) // group
    request = np.repeat(np.arange(len(count)), count)
    return request, sealed[request] + _counting(count) * group


def _kept(starts: Numbers, before: Numbers, new: Numbers, slots: int) -> tuple[Numbers, Numbers, Numbers]:
    """Select the newest tokens of every request, up to the slots of a ring."""
    count = np.minimum(new, slots)
    request = np.repeat(np.arange(len(count)), count)
    place = (new - count)[request] + _counting(count)
    return starts[request] + place, request, before[request] + place


def _counting(count: Numbers) -> Numbers:
    """Count 0, 1, 2, ... anew for each count."""
    return np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)


def _sent(numbers: npt.NDArray[Any], device: torch.device) -> Tensor:
    host = torch.from_numpy(np.ascontiguousarray(numbers))
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)
