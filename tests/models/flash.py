"""A stand-in for FlashAttention, in plain torch: transformers' contract, and complaints where it is not kept.

It takes the padding out of every row, as the real one does, so that nothing of what it computes is a mask of queries
and keys. Registered in place of transformers' own function, which needs a GPU and a package. Another stands in for the
package only, so that transformers' own function runs.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, modeling_flash_attention_utils
from transformers.masking_utils import flash_attention_mask

PACKAGES = ("flash_attention_2", "flash_attention_3", "flash_attention_4")
KERNELS = ("kernels-community/vllm-flash-attn3", "kernels-community/flash-attn2@v1")


def flash_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend as `flash_attention_forward` does: (batch, heads, tokens, head_dim), to (batch, new, heads, head_dim)."""
    loaded = module.config._attn_implementation
    assert loaded in PACKAGES + KERNELS, f"no package or kernel is called {loaded!r}"
    assert "cskv_step" not in kwargs
    assert module.is_causal if is_causal is None else is_causal
    batch, heads, new, _ = query.shape
    total = key.shape[2]
    key, value = (part.repeat_interleave(heads // part.shape[1], dim=1) for part in (key, value))
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if attention_mask is not None:
        assert attention_mask.shape == (batch, total), f"a mask of shape {attention_mask.shape}, not (batch, tokens)"
        pieces = [(row, own.nonzero()[:, 0]) for row, own in enumerate(attention_mask != 0)]
    elif batch == 1 and new > 1 and position_ids is not None and int((position_ids == position_ids.min()).sum()) > 1:
        assert new == total, "packed texts have no past"
        starts = (position_ids[0] == position_ids.min()).nonzero()[:, 0].tolist()
        ends = [*starts[1:], total]
        pieces = [(0, torch.arange(start, end)) for start, end in zip(starts, ends, strict=True)]
    else:
        pieces = [(row, torch.arange(total)) for row in range(batch)]
    output = torch.zeros_like(query)
    for row, columns in pieces:
        asking = columns[columns >= total - new] - (total - new)
        q, k, v = query[row, :, asking], key[row, :, columns], value[row, :, columns]
        scores = scaling * (q @ k.transpose(1, 2)).float()
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        last = torch.arange(len(asking))[:, None] + len(columns) - len(asking)  # aligned at the bottom right
        behind = last - torch.arange(len(columns))
        hidden = behind < 0
        hidden |= behind > (len(columns) if sliding_window is None else sliding_window - 1)
        scores = scores.masked_fill(hidden, -torch.inf)
        if s_aux is not None:
            scores = torch.cat([scores, s_aux.float()[:, None, None].expand(-1, len(asking), 1)], dim=-1)
        weights = scores.softmax(-1)[..., : len(columns)].to(v.dtype)
        output[row, :, asking] = weights @ v
    return output.transpose(1, 2), None


class Calls:
    """Counts the calls of the stand-in.

    Attributes:
        lengths: how many queries and keys each had.
        function: what is called; a test may put another in its place.
    """

    def __init__(self) -> None:
        self.lengths: list[tuple[int, int]] = []
        self.function: Callable[..., Any] = flash_attention

    def __call__(self, module: nn.Module, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.lengths.append((query.shape[2], key.shape[2]))
        return self.function(module, query, key, *args, **kwargs)


@contextmanager
def standing_in() -> Iterator[Calls]:
    """Put the stand-in where transformers has FlashAttention, and where it would put kernels of the hub."""
    calls = Calls()
    with pytest.MonkeyPatch.context() as patch:
        for name in PACKAGES + KERNELS:
            patch.setitem(AttentionInterface._global_mapping, name, calls)
            patch.setitem(AttentionMaskInterface._global_mapping, name, flash_attention_mask)
        yield calls


class Package:
    """What `flash_attn` exports, in plain torch: tokens before heads, causality aligned at the bottom right.

    Attributes:
        lengths: how many queries and keys each call had, in all its rows.
    """

    def __init__(self) -> None:
        self.lengths: list[tuple[int, int]] = []

    def flash_attn_func(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        deterministic: bool = False,
    ) -> Tensor:
        self.lengths.append((q.shape[0] * q.shape[1], k.shape[0] * k.shape[1]))
        logits = softmax_scale, causal, window_size[0], softcap
        return torch.stack([_of_text(*row, *logits) for row in zip(q, k, v, strict=True)])

    def flash_attn_varlen_func(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        deterministic: bool = False,
    ) -> Tensor:
        self.lengths.append((q.shape[0], k.shape[0]))
        of_queries, of_keys = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
        assert max(of_queries) <= max_seqlen_q
        assert max(of_keys) <= max_seqlen_k
        texts = zip(q.split(of_queries), k.split(of_keys), v.split(of_keys), strict=True)
        return torch.cat([_of_text(*text, softmax_scale, causal, window_size[0], softcap) for text in texts])


def _of_text(q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool, left: int, softcap: float) -> Tensor:
    assert causal
    q, k, v = (part.transpose(0, 1) for part in (q, k, v))
    k, v = (part.repeat_interleave(len(q) // len(part), dim=0) for part in (k, v))
    scores = (q.shape[-1] ** -0.5 if scale is None else scale) * (q @ k.transpose(1, 2)).float()
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    new, total = scores.shape[1:]
    behind = torch.arange(total - new, total)[:, None] - torch.arange(total)
    hidden = (behind < 0) | (behind > left) if left >= 0 else behind < 0
    return (scores.masked_fill(hidden, -torch.inf).softmax(-1).to(v.dtype) @ v).transpose(0, 1)


@contextmanager
def packaged() -> Iterator[Package]:
    """Let transformers' own function find the packages of FlashAttention 2 and 3, as if they were installed."""
    package = Package()
    utils = modeling_flash_attention_utils
    exports = {"flash_attn_func": package.flash_attn_func, "flash_attn_varlen_func": package.flash_attn_varlen_func}
    exports["flash_attn_with_kvcache"] = None  # type: ignore[assignment]
    padding = {"pad_input": utils._pad_input, "unpad_input": utils._unpad_input}
    modules = {"flash_attn": exports, "flash_attn_interface": exports, "flash_attn.bert_padding": padding}
    with pytest.MonkeyPatch.context() as patch:
        for name, contents in modules.items():
            module = ModuleType(name)
            module.__spec__ = ModuleSpec(name, None)
            module.__dict__.update(contents)
            patch.setitem(sys.modules, name, module)
        patch.setattr(utils, "is_flash_attn_2_available", lambda: True)
        for name in ("_loaded_implementation", "_flash_fn", "_flash_varlen_fn"):
            patch.setattr(utils, name, None)
        yield package


@contextmanager
def uncompiled_flex_attention() -> Iterator[list[tuple[int, int]]]:
    """Let transformers call flex attention without compiling it, which takes longer than any test here.

    Yields how many queries and keys each call had.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    from transformers import masking_utils
    from transformers.integrations import flex_attention as integration

    lengths: list[tuple[int, int]] = []

    def attend(query: Tensor, key: Tensor, value: Tensor, training: bool = False, **kwargs: Any) -> Any:
        lengths.append((query.shape[2], key.shape[2]))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "flex_attention called without torch.compile", UserWarning)
            return flex_attention(query, key, value, **kwargs)

    def block_mask(*args: Any, _compile: bool = False, **kwargs: Any) -> Any:
        return create_block_mask(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(integration, "compile_friendly_flex_attention", attend)
        patch.setattr(masking_utils, "create_block_mask", block_mask)
        yield lengths
