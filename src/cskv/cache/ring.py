"""The exact tokens of many requests: sinks and a ring of the newest per request, in pages beside those of latents.

Sinks, a request's first tokens, stay in the first places for good. Before a forward that appends to a request, all but
its newest other tokens are sealed (`cskv.cache.bibranch`), so that at most `window + group - 1` are not: behind the
sinks, a token's place is its position modulo that. A ring is read before the forward writes its own tokens over the
oldest ones. Where latents are packed in groups of tokens, those of tokens that are not sealed yet wait in the ring as
well.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cskv.latents.pages import ALIGNMENT


@dataclass(frozen=True)
class Ring:
    """What the ring of one request holds, of one layer.

    Attributes:
        window, group, sinks: see `CSKVConfig`.
        kv_heads, head_dim: of the exact keys and values.
        k_waiting, v_waiting: latents per token that wait to be packed with their group; 0 where none do.
        dtype: of all of them.
    """

    window: int
    group: int
    kv_heads: int
    head_dim: int
    k_waiting: int
    v_waiting: int
    dtype: torch.dtype
    sinks: int = 0

    @property
    def slots(self) -> int:
        """Tokens, the sinks first; 0 where nothing is ever kept exactly, and there is no ring."""
        return self.sinks + self.window + self.group - 1

    @property
    def row(self) -> tuple[int, int, int, int]:
        """Numbers of a token: key, value, and waiting latents of both."""
        kv_dim = self.kv_heads * self.head_dim
        return kv_dim, kv_dim, self.k_waiting, self.v_waiting

    @property
    def page_bytes(self) -> int:
        """Bytes of the ring."""
        size = self.slots * sum(self.row) * self.dtype.itemsize
        return -(-size // ALIGNMENT) * ALIGNMENT

    def rings(self, storage: Tensor) -> Float[Tensor, "pages slots row"]:
        """The rings in pages of bytes, (pages, page_bytes), without a copy."""
        numbers = storage.view(self.dtype)[:, : self.slots * sum(self.row)]
        return numbers.unflatten(1, (self.slots, sum(self.row)))

    def places(self, position: Int[Tensor, "*tokens"]) -> Int[Tensor, "*tokens"]:
        """The places of tokens in their rings."""
        newest = max(1, self.slots - self.sinks)  # where there are none, nobody asks for the place of one
        return torch.where(position < self.sinks, position, self.sinks + (position - self.sinks) % newest)

    def tokens(
        self,
        rings: Float[Tensor, "pages slots row"],
        page: Int[Tensor, " batch"],
        position: Int[Tensor, "batch tokens"],
    ) -> Float[Tensor, "batch tokens row"]:
        """What the rings hold of some positions."""
        return rings[page[:, None], self.places(position)]

    def heads(self, rows: Float[Tensor, "batch tokens row"]) -> tuple[Tensor, Tensor]:
        """Keys and values, (batch, kv_heads, tokens, head_dim), of rows of a ring."""
        keys, values, _, _ = rows.split(self.row, dim=-1)
        return (
            keys.unflatten(-1, (self.kv_heads, -1)).transpose(1, 2),
            values.unflatten(-1, (self.kv_heads, -1)).transpose(1, 2),
        )

    def exact(
        self,
        rings: Float[Tensor, "pages slots row"],
        page: Int[Tensor, " batch"],
        position: Int[Tensor, "batch slots"],
        exists: Bool[Tensor, "batch slots"],
    ) -> tuple[Tensor, Tensor]:
        """Keys and values, (batch, kv_heads, slots, head_dim), of the exact tokens of requests.

        Args:
            rings: those of all requests.
            page: of each request.
            position: of its tokens, oldest first.
            exists: which of them there are; the others are zeros.
        """
        return self.heads(self.tokens(rings, page, position).masked_fill(~exists[..., None], 0))  # NaN may lie there

    def write(
        self,
        rings: Float[Tensor, "pages slots row"],
        page: Int[Tensor, " tokens"],
        position: Int[Tensor, " tokens"],
        parts: tuple[Tensor, Tensor, Tensor, Tensor],
    ) -> None:
        """Put tokens into their rings.

        Args:
            rings: those of all requests.
            page: of each token's request.
            position: of each token; of a request, sinks and the newest `window + group - 1` at most.
            parts: keys, values and the latents of both, (tokens, ...); latents that do not wait are left out.
        """
        keys, values, k_latents, v_latents = parts
        waiting = k_latents[:, : self.k_waiting], v_latents[:, : self.v_waiting]
        rings[page, self.places(position)] = torch.cat([keys.flatten(1), values.flatten(1), *waiting], dim=1)
