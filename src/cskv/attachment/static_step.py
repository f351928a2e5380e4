"""One forward of one compressed layer of a static cache.

A step of one token per row is made of the same operations on the same memory, whatever the token: it can be compiled as
one graph, or captured in a CUDA graph. A forward of several tokens, such as a prefill, is neither: it asks the device
once how many tokens there are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cskv.attachment.static_layer import StaticCSKVLayer
from cskv.attachment.step import Step
from cskv.attention.attend import AUTO, attention
from cskv.attention.inputs import Logits
from cskv.cache.clock import Clock, is_captured
from cskv.errors import CacheError
from cskv.latents.view import View
from cskv.scratch import Scratch

NO_GRADIENTS = "gradients cannot flow through a static compressed cache; use torch.no_grad(), or a dynamic cache"


class StaticStep(Step):
    """One forward of one layer on a cache of fixed size. It needs our attention function, which reads the latents."""

    _layer: StaticCSKVLayer  # type: ignore[assignment]

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append the new tokens and return the keys and values that the model's attention function is to get.

        Args:
            keys, values: (batch, kv_heads, new, head_dim), after norm and RoPE.

        Raises:
            CacheError: the tokens do not fit, are not those that the layer saw, or gradients would have to flow.
        """
        layer, new = self._layer, keys.shape[2]
        if self._call.x.shape[1] != new:
            raise CacheError(f"the layer saw {self._call.x.shape[1]} tokens, and {new} came to be cached")
        if keys.requires_grad and torch.is_grad_enabled():
            raise CacheError(NO_GRADIENTS)
        self._placed = placed = self.compressor.placed(values)
        latents = self.compressor.latents(placed, self._call, keys)
        if self.compressor.layer_idx == self.compressor.setup.last:
            self.state.guessed = 0
        self._new = new
        clock, store, table = layer.clock, layer.store, layer.table
        if clock.batch not in (0, keys.shape[0]):
            raise CacheError(f"the static cache holds {clock.batch} rows, and the forward has {keys.shape[0]}")
        if new > 1 or not store.is_allocated:
            self._extend(latents, keys, values)
            return self._given(keys.shape[1])
        if layer.owns_clock:
            clock.tick()
        if layer.owns_table and table is not None:
            table.append(*self._angles)
        self.view = view = store.append(*latents, keys, values)
        return view.keys, view.values

    def rebuilt(self) -> tuple[Tensor, Tensor]:
        """Return the keys and values of all columns, after a forward of several tokens.

        Raises:
            CacheError: there is a graph of gradients to be built through a step of one token.
        """
        if self.view is not None and self.view.exists is not None:
            raise CacheError(NO_GRADIENTS)
        return super().rebuilt()

    def mask(self, mask: Any, window: int | None) -> Tensor | None:
        """Return the model's mask in the view's order: of places, then of slots, in a step of one token."""
        view: View = self.view  # type: ignore[assignment]
        if view.exists is None:
            return super().mask(mask, window)
        clock = self._layer.clock
        if mask is None or not clock.heeds_mask:
            return None
        if mask.shape[-1] < clock.capacity:
            raise CacheError(
                f"attention got a mask of {mask.shape[-1]} tokens; one for a static cache tells of all {clock.capacity}"
            )
        if torch.compiler.is_compiling():  # it would take the count of steps for a constant
            return _by_place(mask, clock)
        return self.state.orders.made(mask, (id(clock), clock.steps), lambda: _by_place(mask, clock))

    def attend(self, query: Tensor, logits: Logits) -> Tensor:
        scratch = self.state.scratch
        if not torch.compiler.is_compiling() and is_captured():
            scratch = Scratch()  # of the graph: it goes on writing there
        inputs = self._inputs(logits, self.view)  # type: ignore[arg-type]
        return attention(query, inputs, backend=self.compressor.setup.backend or AUTO, scratch=scratch)

    @property
    def _angles(self) -> tuple[Tensor, Tensor]:
        return self._call.cos, self._call.sin  # type: ignore[return-value]

    @torch.compiler.disable
    def _extend(self, latents: tuple[Tensor, Tensor], keys: Tensor, values: Tensor) -> None:
        """Append several tokens, or the first, which say what is to be allocated."""
        layer, clock, store, table = self._layer, self._layer.clock, self._layer.store, self._layer.table
        new, batch = keys.shape[2], keys.shape[0]
        if layer.owns_clock:
            if not clock.batch:
                clock.allocate(batch, keys.device)
            clock.extend(new, self._padding)
        if not store.is_allocated:
            layer.allocate(latents, keys, values)
        if layer.owns_table and table is not None:
            if not table.rows:
                table.allocate(self._angles[0], values)
            table.extend(*self._angles)
        self.view = store.extend(*latents, keys, values)

    def _padding(self, seen: int) -> tuple[int, ...]:
        """Count the new columns that are padding of each row; only the first forward has some."""
        mask, new = self._call.mask, self._new
        return () if seen or mask is None else self.state.orders.padding(mask, seen, new, self._call.x.shape[0])

    def _cos_sin(self, table: Any, _rope: Any, view: View) -> tuple[Tensor, Tensor]:
        return table.cos[:, : view.sealed], table.sin[:, : view.sealed]


def _by_place(mask: Tensor, clock: Clock) -> Tensor:
    """Take of the model's mask the columns of places and slots; of a slot without a token any."""
    exact = (clock.token + clock.padding[:, None]).clamp(0, clock.capacity - 1)
    sealed = mask[..., clock.sinks : clock.sinks + clock.most]
    if not clock.padded:
        return torch.cat([sealed, mask.index_select(-1, exact[0])], dim=-1)
    place = torch.arange(clock.sinks, clock.sinks + clock.most, device=mask.device)
    sealed = (place + clock.padding[:, None]).clamp(max=clock.capacity - 1)
    columns = torch.cat([sealed, exact], dim=1)[:, None, None]
    shape = (columns.shape[0], *mask.shape[1:-1], columns.shape[-1])
    return mask.expand(shape[0], -1, -1, -1).gather(-1, columns.expand(shape))
