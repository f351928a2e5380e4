"""What one step of a server does to the compressed cache of all its requests, worked out once for all layers.

A step brings every request some tokens: one to those that decode, which come first, and a piece of their prompt to the
others. All lengths are known to the host, so that what is to be sealed and kept is found there, and nothing waits for
the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cskv.config import sealed_tokens

Numbers = npt.NDArray[np.int64]


class Prefill(NamedTuple):
    """A request that reads a piece of its prompt.

    Attributes:
        request: its row in the block table.
        rows: its tokens among those of the step.
        length: tokens that it has in the cache already.
        sealed: those of them that are read from latents.
    """

    request: int
    rows: slice
    length: int
    sealed: int


class Groups(NamedTuple):
    """Groups of tokens that are sealed at the end of the step.

    Attributes:
        request: (groups,): the row of each in the block table.
        first: (groups,): the position of its first token.
    """

    request: Tensor
    first: Tensor


class Kept(NamedTuple):
    """Tokens of the step that go into the rings.

    Attributes:
        row, request, position: (tokens,): among those of the step, in the block table, and in its request.
    """

    row: Tensor
    request: Tensor
    position: Tensor


class Recent(NamedTuple):
    """Tokens that were in the rings before the step, oldest first.

    Attributes:
        position: (requests, slots): of each.
        exists: (requests, slots): which of them there are.
    """

    position: Tensor
    exists: Tensor


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        tokens: of all requests; what follows them in the batch is padding.
        decodes: requests, the first ones, that bring one token.
        prefills: the others.
        table: (requests, blocks): their pages, in order.
        slots: (tokens,): where each token goes, page * block_size + place.
        start: (requests,): the first token of each among those of the step.
        length: (requests,): tokens that each has in the cache already.
        sealed: (requests,): those of them that are read from latents.
        most, least: sealed tokens of the longest and of the shortest that decodes.
        recent: what is read from the rings.
        groups: what is sealed at the end, where tokens are packed in groups.
        kept: what goes into the rings.
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
    """Work a step out.

    Args:
        starts: (requests + 1,): where each request's tokens start in the batch, and where the last ones end. Requests
            that bring one token come first; those that bring none are padding, and come last.
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
    sent = _sender(table.device)
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
    """The newest tokens of every request, as many as a ring has places for."""
    count = np.minimum(new, slots)
    request = np.repeat(np.arange(len(count)), count)
    place = (new - count)[request] + _counting(count)
    return starts[request] + place, request, before[request] + place


def _counting(count: Numbers) -> Numbers:
    """0, 1, 2, ... anew for each count."""
    return np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)


def _sender(device: torch.device):  # type: ignore[no-untyped-def]
    def sent(numbers: npt.NDArray[Any]) -> Tensor:
        host = torch.from_numpy(np.ascontiguousarray(numbers))
        return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)

    return sent
