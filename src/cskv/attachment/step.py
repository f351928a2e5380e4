"""One forward of one compressed layer: its new tokens are appended, then its queries attend.

    hook        makes a Step of the layer's compressor, its part of the cache and the call, and hands it to both below
    update      the model caches keys and values: `append` makes their latents and stores both
    attention   the model's attention function, ours in its place: `attend` reads latents where they lie

Where our function does not stand in, or the piece of text is long, `append` gives the model's own function rebuilt keys
and values instead. The model's order of tokens is made that of the view on the way in, and back on the way out.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import replace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from cskv.attachment.compressor import LayerCompressor, Turned
from cskv.attachment.layer import CSKVLayer
from cskv.attachment.order import Orders
from cskv.attention.attend import attends_to_latents, attention
from cskv.attention.inputs import AttentionInputs, Logits, causal_mask, rebuilt
from cskv.cache.buffer import TokenBuffer
from cskv.cache.positions import PositionTable
from cskv.errors import CacheError
from cskv.latents.layout import Layout, Row
from cskv.latents.pages import PagedLatents
from cskv.latents.view import Latents, View
from cskv.models.attention_interface import Original, stands_beside
from cskv.models.calls import AttentionCall, logits_of
from cskv.models.cos_sin import CosSin
from cskv.models.masks import MaskKind, mask_kind
from cskv.scratch import Scratch

PREFIX = "cskv"
KWARG = "cskv_step"  # not "cache": that is taken by paged batching
KINDS: dict[str, MaskKind | None] = {}  # by names of our function; torch.compile cannot trace how they are found
NO_LOGITS = Logits(1.0)  # where keys and values are only rebuilt


def switched_kind(name: str) -> MaskKind | None:
    """Return what masks our function will get, by the name that a model's config gives; None where it is not ours."""
    kind = KINDS.get(name)
    if kind is None and (implementation := stands_beside(PREFIX, name)) is not None:
        kind = KINDS[name] = mask_kind(implementation)
    return kind


class ThreadState(threading.local):
    """What the forwards of a thread leave for one another. Nothing of it belongs to a cache, or is needed by one.

    Attributes:
        scratch: tensors of the attention on latents, used by one layer after the other.
        cos_sin: of the sealed tokens of the cache that was read last.
        turned: the rotation of sealed keys, by their latents in the view that was read last of a layer.
        orders: of the tokens of the forward under way.
        guessed: how many tokens of the forward under way, the last ones, may be rejected.
    """

    def __init__(self) -> None:
        self.scratch = Scratch()
        self.cos_sin = SealedCosSin()
        self.turned: WeakKeyDictionary[Latents, Turned] = WeakKeyDictionary()
        self.orders = Orders()
        self.guessed = 0

    def __deepcopy__(self, _memo: dict[int, Any]) -> ThreadState:
        return ThreadState()

    def nbytes(self) -> int:
        """Count the bytes allocated for the calling thread."""
        return self.scratch.nbytes() + self.cos_sin.nbytes() + self.orders.nbytes()

    def clear(self) -> None:
        """Free all memory of the calling thread."""
        self.scratch.clear()
        self.cos_sin.clear()
        self.turned.clear()
        self.orders.clear()


class _Held(NamedTuple):
    """Cos and sin that are kept: of which table, at which of its epochs, and a view of the tokens that were read."""

    table: weakref.ref[PositionTable]
    epoch: int
    buffers: tuple[TokenBuffer, TokenBuffer]
    read: tuple[Tensor, Tensor]


class _OfRows(NamedTuple):
    """The same of rows of different padding."""

    table: weakref.ref[PositionTable]
    epoch: int
    rows: tuple[Row, ...]
    read: tuple[Tensor, Tensor]


class SealedCosSin:
    """Cos and sin of the sealed tokens of one cache, kept from step to step: a step adds those of newly sealed tokens.

    A cache keeps position numbers only; what is kept here is made anew when another cache is read.
    """

    def __init__(self) -> None:
        self._held: dict[object, _Held] = {}
        self._of_rows: dict[object, _OfRows] = {}

    def read(
        self, owner: int | None, table: PositionTable, rope: CosSin, start: int, sealed: int, like: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return cos and sin, (batch or 1, sealed, rotary_dim), on the device and in the dtype of `like`.

        Args:
            owner: the layer that keeps the positions.
            table: the positions.
            rope: how they become cos and sin.
            start: the first sealed token, the same in every call.
            sealed: tokens from there on.
            like: any tensor of the layer.
        """
        if torch.compiler.is_compiling():  # it cannot trace what is kept between forwards
            cos, sin = rope.cos_sin(table.read(start, start + sealed), like)
            return cos.to(like), sin.to(like)
        key = (owner, like.device, like.dtype)
        held = self._held.get(key)
        if held is None or held.table() is not table or held.epoch != table.epoch:
            held = _Held(weakref.ref(table), table.epoch, (TokenBuffer(), TokenBuffer()), (like, like))
        elif held.read[0].shape[1] == sealed:
            return held.read
        done = held.buffers[0].length
        if done < sealed:
            for buffer, new in zip(
                held.buffers, rope.cos_sin(table.read(start + done, start + sealed), like), strict=True
            ):
                buffer.append(new.to(like))
        cos, sin = (buffer.tokens[:, :sealed] for buffer in held.buffers)
        self._held[key] = held._replace(read=(cos, sin))
        return cos, sin

    def read_rows(
        self, owner: int | None, table: PositionTable, rope: CosSin, layout: Layout, columns: Tensor, like: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return them where rows have different padding, (batch, places, rotary_dim); made anew once any row seals.

        Args:
            owner, table, rope, like: as for `read`.
            layout: of the rows.
            columns: its `sealed_columns`, on the device of `like`.
        """
        key = (owner, like.device, like.dtype)
        held = self._of_rows.get(key)
        if held is None or held[:3] != (weakref.ref(table), table.epoch, layout.rows):
            cos, sin = rope.cos_sin(table.at(columns), like)
            held = self._of_rows[key] = _OfRows(
                weakref.ref(table), table.epoch, layout.rows, (cos.to(like), sin.to(like))
            )
        return held.read

    def nbytes(self) -> int:
        """Count the bytes really allocated."""
        of_rows = (part.untyped_storage().nbytes() for held in self._of_rows.values() for part in held.read)
        return sum(buffer.nbytes() for held in self._held.values() for buffer in held.buffers) + sum(of_rows)

    def clear(self) -> None:
        """Forget everything."""
        self._held.clear()
        self._of_rows.clear()


class Step:
    """One forward of one layer.

    Args:
        compressor: of the layer.
        layer: its part of the cache.
        call: what its attention module was called with.
        state: of the thread.
        kind: what masks our attention function will get, where the module will call that; else None.

    Attributes:
        view: what the queries read, once the new tokens are appended.
        attends: whether they do so by `attend`; else `append` has returned all keys and values.
    """

    def __init__(
        self,
        compressor: LayerCompressor,
        layer: CSKVLayer,
        call: AttentionCall,
        state: ThreadState,
        kind: MaskKind | None,
    ) -> None:
        self.compressor, self.state = compressor, state
        self.attends = kind is not None
        self._kind = kind
        self.view: View | None = None
        self._layer, self._call = layer, call
        self._positions: tuple[Tensor, ...] | None = None
        rope = compressor.recipe.rope
        if layer.owns_table and rope is not None:
            self._positions = rope.rows(call.cos, call.sin, call.position_ids)  # type: ignore[arg-type]

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append the new tokens and return the keys and values that the model's attention function is to get.

        Those are the exact ones alone where our function reads the latents itself, else all.

        Args:
            keys, values: (batch, kv_heads, new, head_dim), after norm and RoPE.

        Raises:
            CacheError: other tokens came than the layer saw, or gradients would have to flow through latents.
        """
        layer, seen, new = self._layer, self._call.x.shape[1], keys.shape[2]
        if layer.store.awaits_tokens:
            self._expect(new, keys.shape[0])
        store = layer.store
        if seen != new:
            raise CacheError(f"the layer saw {seen} tokens, and {new} came to be cached; start a new cache")
        if store.cuts_gradients and keys.requires_grad and torch.is_grad_enabled():
            raise CacheError(
                "gradients cannot flow back through the compressed tokens of this cache; fill it under "
                "torch.no_grad(), or detach the compressor to train"
            )
        if self._positions is not None:
            layer.table.append(self._positions)
        self._placed = placed = self.compressor.placed(values)
        latents = self.compressor.latents(placed, self._call, keys)
        self.view = store.append(*latents, keys, values, guessed=self.state.guessed)
        if self.compressor.layer_idx == self.compressor.setup.last:
            self.state.guessed = 0
        self._new = new
        return self._given(keys.shape[1])

    def rebuilt(self) -> tuple[Tensor, Tensor]:
        """Return the keys and values of all columns, (batch, kv_heads, length, head_dim); zeros where padded."""
        view: View = self.view  # type: ignore[assignment]
        keys, values = rebuilt(replace(self._inputs(NO_LOGITS, view), int8_keys=None))
        return self.state.orders.in_columns(keys.to(view.keys.dtype), values.to(view.values.dtype), view)

    def mask(self, mask: Any, window: int | None) -> Tensor | None:
        """Return the model's mask, of pairs and in the view's order; `window` as FlashAttention is told it."""
        view: View = self.view  # type: ignore[assignment]
        if self._kind is not MaskKind.PAIRS:
            total = view.length if view.layout is None else view.layout.length
            mask = self.state.orders.of_pairs(mask, self._kind, self._new, total, window)  # type: ignore[arg-type]
        return mask if mask is None and view.layout is None else self.state.orders.mask(mask, view, self._new)

    def attend(self, query: Tensor, logits: Logits) -> Tensor:
        """Return the heads' outputs, (batch, q_heads, new, head_dim), in the query's dtype.

        Args:
            query: after norm and RoPE.
            logits: with the mask in the view's order.
        """
        inputs = self._inputs(logits, self.view)
        return attention(query, inputs, backend=self.compressor.setup.backend, scratch=self.state.scratch)

    def _given(self, kv_heads: int) -> tuple[Tensor, Tensor]:
        """Return the keys and values that the model's attention function is to get of the view."""
        view: View = self.view  # type: ignore[assignment]
        if view.k is None:
            self.attends = False
            return (view.keys, view.values) if view.layout is None else self.rebuilt()
        self.attends = self.attends and attends_to_latents(self._new, self.compressor.q_heads, kv_heads)
        return (view.keys, view.values) if self.attends else self.rebuilt()

    def _inputs(self, logits: Logits, view: View) -> AttentionInputs:
        compressor, placed = self.compressor, self._placed
        _, rotation, offset = self._turned(view)
        return AttentionInputs(view, placed.factors, rotation, logits, compressor.value_heads, offset, placed.int8_keys)

    def _turned(self, view: View) -> Turned:
        """Return the rotation of sealed keys and what their latents leave out, kept until other tokens are sealed."""
        known, k, placed = self.state.turned, view.k, self._placed
        in_buffers = k is not None and not isinstance(k, PagedLatents)  # of pages every step makes a view of its own
        keeps = in_buffers and view.layout is None and not torch.compiler.is_compiling()
        if keeps and (turned := known.get(k)) is not None and turned.placed is placed:
            return turned
        cos, sin, table, rope = None, None, self._layer.table, self.compressor.recipe.rope
        if rope is not None and table is not None and k is not None:
            cos, sin = self._cos_sin(table, rope, view)
        turned = self.compressor.turned(placed, cos, sin)
        if keeps:
            known[k] = turned
        return turned

    def _cos_sin(self, table: PositionTable, rope: CosSin, view: View) -> tuple[Tensor, Tensor]:
        kept, owner, layout = self.state.cos_sin, self.compressor.owner_idx, view.layout
        if layout is None:
            return kept.read(owner, table, rope, view.sinks, view.sealed, view.values)
        columns = self.state.orders.sealed_columns(layout, view.values.device)
        return kept.read_rows(owner, table, rope, layout, columns, view.values)

    def _expect(self, new: int, batch: int) -> None:
        """Tell the layer of the padding among the new columns: only the first tokens of a row can have it before them.

        A mask that gives no row any padding, or none at all, changes nothing.
        """
        mask, padding = self._call.mask, tuple[int, ...]()
        if mask is not None:
            padding = self.state.orders.padding(mask, self._layer.store.length, new, batch)
        self._layer.expect(padding)


def attend(
    original: Original, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Stand in for a transformers attention function: return (batch, new, q_heads, head_dim) and no weights."""
    step: Step | None = kwargs.pop(KWARG, None)
    if step is None or not step.attends:
        if step is not None and isinstance(mask, Tensor) and mask.ndim == 4:
            mask = mask[..., : key.shape[2]]  # that of a static cache tells of tokens to come as well
        elif mask is None and 1 < query.shape[2] < key.shape[2] and getattr(module, "is_kv_shared_layer", False):
            mask = _of_last(module, query.shape[2], key)
        return original(module, query, key, value, mask, **kwargs)
    if query.requires_grad and torch.is_grad_enabled():
        keys, values = step.rebuilt()
        mask = mask[..., : keys.shape[2]] if isinstance(mask, Tensor) else mask
        return original(module, query, keys, values, mask, **kwargs)
    if torch.is_grad_enabled():
        with torch.no_grad():
            return _on_latents(step, query, mask, kwargs), None
    return _on_latents(step, query, mask, kwargs), None


def _on_latents(step: Step, query: Tensor, mask: Any, kwargs: dict[str, Any]) -> Tensor:
    mask = step.mask(mask, kwargs.get("sliding_window"))
    logits = logits_of(query, mask, kwargs, step.compressor.recipe.attention.ignored)
    return step.attend(query, logits).transpose(1, 2).contiguous()


def _of_last(module: nn.Module, new: int, key: Tensor) -> Tensor | None:
    """Return what the last queries read, for sdpa, which takes no mask to mean the first.

    Gemma4 lets layers that read other layers' keys see a prompt's last tokens alone, and keeps from doing so without a
    mask where it knows sdpa by its name.
    """
    if switched_kind(module.config._attn_implementation) is not MaskKind.PAIRS:
        return None
    return causal_mask(new, key.shape[2], key.device)[None, None]
