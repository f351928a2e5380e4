"""The attention function that reads a compressed cache where it lies.

The pre-hook of an attention module hands over, as a keyword argument that the module passes on, what it staged for the
cache; `CSKVLayer.update` returns the exact branch alone and leaves the view of both there. Where nothing is sealed yet,
or keys were rebuilt after all, the model's own function does the work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cskv.attention.inputs import Logits
from cskv.latents.view import View
from cskv.models.attention_interface import Original, name_of
from cskv.models.logits import UNDERSTOOD, logits_of

PREFIX = "cskv"
KWARG = "cskv_call"  # not "cache": that is taken by paged batching
MOST_NEW = 64  # longer pieces of a prompt are cheaper to attend to on rebuilt keys and values


class Call:
    """One call of an attention module: what to attend to, once `update` has said it, and how.

    Args:
        attend: from the query, the view of both branches and the logits' rules to the heads' outputs,
            (batch, q_heads, new, head_dim).
        ignored: arguments that the module's own attention function does not heed.
    """

    def __init__(self, attend: Callable[[Tensor, View, Logits], Tensor], ignored: frozenset[str]) -> None:
        self._attend = attend
        self.ignored = ignored
        self.view: View | None = None

    def attend(self, query: Tensor, logits: Logits) -> Tensor:
        """Attend to the view."""
        if self.view is None:
            raise RuntimeError("nothing was cached in this call")
        return self._attend(query, self.view, logits)


def is_switched(module: nn.Module) -> bool:
    """Whether a module will call our attention function."""
    implementation = getattr(getattr(module, "config", None), "_attn_implementation", None)
    return implementation in {name_of(PREFIX, known) for known in UNDERSTOOD}


def attend(
    original: Original, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """A transformers attention function: (batch, new, q_heads, head_dim) and no weights."""
    call: Call | None = kwargs.pop(KWARG, None)
    if call is None or call.view is None:
        return original(module, query, key, value, mask, **kwargs)
    if mask is not None:
        mask = mask[..., : call.view.length]
    with torch.no_grad():
        output = call.attend(query, logits_of(query, mask, kwargs, call.ignored))
    return output.transpose(1, 2).contiguous(), None
