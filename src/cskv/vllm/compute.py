"""The attention of one layer in one step of a server, and what it writes into the cache.

Queries read sealed tokens by their latents, in pages, and sinks and the newest exactly: from the request's ring, and
those of the step itself. Requests that decode are done at once, whatever their lengths; a piece of a prompt is done by
itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from cskv.attention.attend import attends_to_latents, attention
from cskv.attention.inputs import AttentionInputs, KeyOffset, Logits, Rotation, causal_mask, rebuilt
from cskv.cache.pages import is_grouped, seal, store
from cskv.cache.ring import Ring
from cskv.factorization.factors import LayerFactors
from cskv.latents.pages import PagedLatents, Pages
from cskv.latents.view import View
from cskv.scratch import Scratch
from cskv.vllm.step import Prefill, Step


@dataclass(frozen=True)
class LayerCache:
    """The memory of one layer, of all requests.

    Attributes:
        k, v: pages of latents.
        ring: what the rings hold; None where no token is kept exactly beyond its own step.
        rings: (pages, slots, row): those of all requests; None as well.
        ring_page: (requests,): the ring of each request of the step; None as well.
    """

    k: Pages
    v: Pages
    ring: Ring | None = None
    rings: Tensor | None = None
    ring_page: Tensor | None = None


@dataclass(frozen=True)
class LayerRules:
    """Rules of one layer's attention.

    Attributes:
        factors: of the layer's kv heads here.
        rope: norm and RoPE of rebuilt keys, with cos and sin of all positions; None where keys are linear in latents.
        logits: scaling and soft-capping.
        scratch: scratch tensors.
        offset: what commuting latents leave out of keys, with cos and sin of all positions; None for nothing.
    """

    factors: LayerFactors
    rope: Rotation | None
    logits: Logits
    scratch: Scratch
    offset: KeyOffset | None = None

    def inputs(self, view: View, sinks: int) -> AttentionInputs:
        """Return what a query reads and is told, with cos and sin of the view's sealed tokens, which follow sinks."""
        rope, offset, sealed = self.rope, self.offset, slice(sinks, sinks + view.sealed)
        if rope is not None:
            rope = _at(rope, sealed)
        if offset is not None:
            offset = replace(offset, rotation=_at(offset.rotation, sealed))
        return AttentionInputs(view, self.factors, rope, self.logits, key_offset=offset)


def _at(rotation: Rotation, positions: slice) -> Rotation:
    """Keep cos and sin of some positions."""
    if rotation.cos is None or rotation.sin is None:
        return rotation
    return replace(rotation, cos=rotation.cos[:, positions], sin=rotation.sin[:, positions])


def attend(
    step: Step, cache: LayerCache, rules: LayerRules, query: Tensor, keys: Tensor, values: Tensor, output: Tensor
) -> None:
    """Attend in all requests of a step.

    Args:
        step: what it brings.
        cache: of the layer, as it was before.
        rules: of the layer.
        query: (tokens, q_heads, head_dim).
        keys, values: (tokens, kv_heads, head_dim), of the step's own tokens.
        output: (tokens, q_heads, head_dim): where the result goes.
    """
    if n := step.decodes:
        output[:n] = _decode(step, cache, rules, query[:n], keys[:n], values[:n])
    for prefill in step.prefills:
        rows = prefill.rows
        output[rows] = _prefill(step, prefill, cache, rules, query[rows], keys[rows], values[rows])


def write(step: Step, cache: LayerCache, keys: Tensor, values: Tensor, latents: tuple[Tensor, Tensor]) -> None:
    """Put a step's tokens into the cache, after `attend`.

    Args:
        step, cache, keys, values: as for `attend`.
        latents: (tokens, rank) of keys and of values.
    """
    for which, pages in enumerate((cache.k, cache.v)):
        if is_grouped(pages):
            _seal(step, cache, pages, which, latents[which])
        else:
            store(pages, step.slots, latents[which])
    if cache.ring is not None and cache.rings is not None and cache.ring_page is not None:
        row, request, position = step.kept
        parts = keys[row], values[row], latents[0][row], latents[1][row]
        cache.ring.write(cache.rings, cache.ring_page[request], position, parts)


def _decode(step: Step, cache: LayerCache, rules: LayerRules, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    n = step.decodes
    keys, values, exists = keys[:, :, None], values[:, :, None], None
    if cache.ring is not None and cache.rings is not None and cache.ring_page is not None:
        exists = step.exact.exists[:n]
        old_keys, old_values = cache.ring.exact(cache.rings, cache.ring_page[:n], step.exact.position[:n], exists)
        keys, values = torch.cat([old_keys, keys], dim=2), torch.cat([old_values, values], dim=2)
        exists = torch.nn.functional.pad(exists, (0, 1), value=True)
    inputs = rules.inputs(_view(step, cache, slice(n), step.most, step.least, keys, values, exists), step.sinks)
    return attention(query[:, :, None], inputs, scratch=rules.scratch)[:, :, 0]


def _prefill(
    step: Step, prefill: Prefill, cache: LayerCache, rules: LayerRules, query: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """Attend in one request: (new, q_heads, head_dim)."""
    query, keys, values = (part.transpose(0, 1)[None] for part in (query, keys, values))
    of_request, exact = slice(prefill.request, prefill.request + 1), prefill.length - prefill.sealed
    if exact and cache.ring is not None and cache.rings is not None and cache.ring_page is not None:
        position, exists = (part[of_request] for part in step.exact)
        held = cache.ring.exact(cache.rings, cache.ring_page[of_request], position, exists)
        keys = torch.cat([held[0][:, :, :exact], keys], dim=2)
        values = torch.cat([held[1][:, :, :exact], values], dim=2)
    inputs = rules.inputs(_view(step, cache, of_request, prefill.sealed, prefill.sealed, keys, values), step.sinks)
    if attends_to_latents(query.shape[2], query.shape[1], keys.shape[1]):
        result = attention(query, inputs, scratch=rules.scratch)
    elif rules.logits.softcap is not None:  # torch's own attention has none
        result = attention(query, inputs, backend="torch", scratch=rules.scratch)
    else:
        result = _on_rebuilt(query, inputs)
    return result[0].transpose(0, 1)


def _view(
    step: Step, cache: LayerCache, requests: slice, most: int, least: int, keys: Tensor, values: Tensor,
    exists: Tensor | None = None,
) -> View:  # fmt: skip
    """Join exact and sealed tokens; keys and values share the table and the lengths, as kernels need it."""
    if not most:
        return View(keys, values, exists=exists)
    table, lengths = step.table[requests], step.sealed[requests]
    k, v = (PagedLatents(pages, table, lengths, most, least) for pages in (cache.k, cache.v))
    return View(keys, values, k, v, exists)


def _on_rebuilt(query: Tensor, inputs: AttentionInputs) -> Tensor:
    """Attend with a long piece of a prompt, for which all old keys and values are rebuilt once."""
    (keys, values), new = rebuilt(inputs), query.shape[2]
    mask = None if keys.shape[2] == new else causal_mask(new, keys.shape[2], query.device)
    scale, grouped = inputs.logits.scaling, query.shape[1] != keys.shape[1]
    return scaled_dot_product_attention(
        query, keys, values, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
    )


def _seal(step: Step, cache: LayerCache, pages: Pages, which: int, latents: Tensor) -> None:
    """Pack the groups that are due: of latents that wait in the rings, and of the step's own."""
    request, first = step.groups
    if not len(request):
        return
    ring, rings, ring_page = cache.ring, cache.rings, cache.ring_page
    if ring is None or rings is None or ring_page is None:
        raise RuntimeError("latents are packed in groups, and there is no ring in which they wait")
    position = first[:, None] + torch.arange(ring.group, device=first.device)
    new = position - step.length[request][:, None]
    waiting = ring.tokens(rings, ring_page[request], position).split(ring.row, dim=-1)[2 + which]
    own = latents[(step.start[request][:, None] + new).clamp(min=0)]
    group = torch.where((new >= 0)[..., None], own, waiting.to(own.dtype))
    place = first - step.sinks
    seal(pages, step.table[request, place // pages.block_size].long(), place % pages.block_size, group)
