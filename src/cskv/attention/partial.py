"""Attention over some of the tokens; such parts are joined by the log-sum-exp of their logits.

With m the largest logit of a part, l = sum exp(logit - m) and s = sum exp(logit - m) * value, the parts of a softmax
join as M = max m_i, and the result is sum exp(m_i - M) s_i / sum exp(m_i - M) l_i.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Partial(NamedTuple):
    """Attention over some of the tokens, in fp32.

    Attributes:
        most: the largest logit of every row.
        total: the sum of exp(logit - most): 1 or more, and 0 where a row reads nothing.
        sums: the sum of exp(logit - most) times the value, or its latents.
    """

    most: Float[Tensor, "batch q_heads new 1"]
    total: Float[Tensor, "batch q_heads new 1"]
    sums: Float[Tensor, "batch q_heads new channels"]

    def joined(self, other: Partial) -> Partial:
        """Join both parts to one. A row's largest logit is finite in one of them at least."""
        most = torch.maximum(self.most, other.most)
        ours, theirs = (self.most - most).exp_(), (other.most - most).exp_()
        return Partial(most, self.total * ours + other.total * theirs, self.sums * ours + other.sums * theirs)

    def result(self, sinks: Float[Tensor, " q_heads"] | None = None) -> Float[Tensor, "batch q_heads new channels"]:
        """Return the weighted mean, once all parts are joined, and 0 where a row reads nothing.

        Sinks are logits that take weight and give nothing.
        """
        if sinks is None:
            return self.sums / self.total.clamp(min=1)
        sink = sinks.to(self.most.dtype)[None, :, None, None]
        most = torch.maximum(self.most, sink)
        ours = (self.most - most).exp_()
        return self.sums * ours / (self.total * ours + (sink - most).exp_())
