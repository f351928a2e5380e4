"""Decoding by one CUDA graph: a step from token ids to logits is captured once, and replayed for every token.

Python, and all that it costs a step, runs only as a graph is captured. Of a cache whose latents are packed in groups of
tokens there are two graphs: one that packs, replayed when a row completes a group, and one that does not.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, StaticLayer

from cskv.attachment.static_layer import StaticCSKVLayer
from cskv.errors import CacheError
from cskv.models.compat import cache_kwarg


class DecodeGraph:
    """The decode step of a model on one static cache.

        cache = transformers.StaticCache(config=model.config, max_cache_len=4096)
        logits = model(prompt, past_key_values=cache).logits[:, -1]
        graph = cskv.DecodeGraph(model, cache)
        logits = graph.step(logits.argmax(-1, keepdim=True))  # runs the step, and captures it
        logits = graph.step()                                 # replays it, on the token that was likeliest

    Works with a compressor and without one. Where there is no GPU, steps run one operation after another.

    Args:
        model: a transformers model with a language-model head.
        cache: a `StaticCache` that a prefill has filled. Nobody else may append to it from here on.
        attention_mask: (batch, columns): that of the prefill, where it hid padding on the left. Nothing else is hidden.

    Attributes:
        tokens: (batch, 1): the input of the next step: the likeliest token of each row, unless `step` is given others.
        logits: (batch, vocabulary): the output of the last step. Each step overwrites it.
        length: columns that the cache holds.

    Raises:
        CacheError: the cache is not static, is empty, or slides, or the mask hides more than padding on the left.
    """

    def __init__(self, model: nn.Module, cache: Cache, attention_mask: Tensor | None = None) -> None:
        _check_layers(cache)
        self._model, self._arguments = model, {cache_kwarg(model): cache, "use_cache": True, "return_dict": True}
        self.length = int(cache.get_seq_length())
        if not self.length:
            raise CacheError("the cache is empty; run the prompt through the model before its decode step is captured")
        layers = [layer for layer in cache.layers if isinstance(layer, StaticCSKVLayer)]
        self._clock = layers[0].clock if layers else None
        self._blocks = {block for layer in layers for block in layer.store.blocks}
        self._capacity: int = cache.layers[0].max_cache_len
        device = cache.layers[0].device
        self._padding = [0]
        if attention_mask is not None:
            self._padding = self._leading(attention_mask)
            mask = torch.ones(len(self._padding), self._capacity, dtype=torch.bool, device=device)
            mask[:, : self.length] = attention_mask.to(device, torch.bool)
            self._arguments["attention_mask"] = mask
        self._positions = (self.length - torch.tensor(self._padding, device=device))[:, None]
        self._graphs: dict[bool, torch.cuda.CUDAGraph] = {}
        self.tokens = torch.zeros(cache.layers[0].batch_size, 1, dtype=torch.int64, device=device)
        self.logits: Tensor | None = None

    @torch.no_grad()
    def step(self, tokens: Tensor | None = None) -> Tensor:
        """Append a token to every row and return the logits of the next, (batch, vocabulary), until the next step.

        Args:
            tokens: (batch, 1) ids; None takes the likeliest after the last step.

        Raises:
            CacheError: the cache is full, or there has been no step to take the likeliest token of.
        """
        if self.length >= self._capacity:
            raise CacheError(
                f"the static cache holds {self._capacity} tokens, and is full; make it with a larger max_cache_len"
            )
        if tokens is not None:
            self.tokens.copy_(tokens)
        elif self.logits is None:
            raise CacheError("no step has been run yet; give the first one the tokens to append")
        packs = self._completes_a_block()
        if packs in self._graphs:
            self._graphs[packs].replay()
        else:
            self._run(packs)
            if self.tokens.is_cuda:
                self._graphs[packs] = self._captured(packs)
        self.length += 1
        return self.logits  # type: ignore[return-value]

    def _run(self, packs: bool) -> None:
        """Run the step: read `tokens`, write `logits` and the next `tokens`."""
        clock = self._clock
        if clock is not None:
            clock.packs, clock.heeds_mask = packs, False
        try:
            outputs = self._model(self.tokens, position_ids=self._positions, **self._arguments)
        finally:
            if clock is not None:
                clock.packs = clock.heeds_mask = True
        logits = outputs.logits[:, -1]
        if self.logits is None:
            self.logits = torch.empty_like(logits)
        self.logits.copy_(logits)
        self.tokens.copy_(logits.argmax(-1, keepdim=True))
        self._positions.add_(1)

    def _captured(self, packs: bool) -> torch.cuda.CUDAGraph:
        """Capture what has just been run: kernels are compiled, and nothing is executed."""
        graph = torch.cuda.CUDAGraph()
        pool = next((known.pool() for known in self._graphs.values()), None)
        with torch.cuda.graph(graph, pool=pool):
            self._run(packs)
        return graph

    def _completes_a_block(self) -> bool:
        """Return whether the next token is the last of a block of latents, in any row."""
        clock = self._clock
        if clock is None:
            return True
        places = [self.length - padding - clock.sinks for padding in self._padding]
        return any(place >= 0 and (place + 1) % block == 0 for place in places for block in self._blocks)

    def _leading(self, mask: Tensor) -> list[int]:
        """Count the padding of each row."""
        if mask.ndim != 2 or mask.shape[1] != self.length:
            raise CacheError(
                f"attention_mask is of shape {tuple(mask.shape)}; expected (batch, {self.length}), that of the prefill"
            )
        real = mask.bool()
        if bool((real[:, 1:] < real[:, :-1]).any()):
            raise CacheError("attention_mask hides tokens behind the first real one of a row; pad on the left only")
        return (~real).sum(1).tolist()  # type: ignore[no-any-return]


def _check_layers(cache: Cache) -> None:
    for layer in cache.layers:
        if type(layer) is not StaticLayer and not isinstance(layer, StaticCSKVLayer):
            raise CacheError(
                f"steps on {type(layer).__name__} layers are not all alike, so that none can be captured for all; use "
                "a StaticCache, of a model without sliding windows"
            )
