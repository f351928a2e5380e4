"""Keys rebuilt by 8-bit products: int8 latents times an int8 U_k, at twice the rate of 16-bit products on tensor cores.

Rounding is symmetric, to whole numbers from -127 to 127: a step for every row of U_k, once, and one for the latents of
every token, as they are read. Products of whole numbers are summed exactly:

    key[channel] = step_of_token * step_of_row[channel] * sum of latent * up, both whole numbers

A step that is the same for all latents of a token is too long for the small ones: the first components are tens of
times as large as the last. So latents are divided, and columns of U_k multiplied, by numbers that make both about as
large, as in SmoothQuant (arXiv 2211.10438). The norms of the down-projection's rows stand for the latents' size.

What is stored does not change, and the exact branch and prefills do not either.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from cskv.factorization.factors import Factors

LARGEST = 127


@dataclass(frozen=True)
class Int8Keys:
    """An up-projection of keys in 8 bits.

    Attributes:
        up: whole numbers, rows contiguous and padded with zeros to a multiple of 16 of them.
        steps: what a whole number stands for, of every row.
        balance: what the latents of all groups are multiplied by before they are rounded.
        rank: latents of a group: the columns of `up` that are no padding.
    """

    up: Int8[Tensor, "kv_dim padded"]
    steps: Float[Tensor, " kv_dim"]
    balance: Float[Tensor, " latents"]
    rank: int

    @classmethod
    def of(cls, factors: Factors) -> Int8Keys:
        """Round the up-projection of key factors."""
        rank, groups = factors.up.shape[1], factors.groups
        up = factors.up.float().unflatten(0, (groups, -1))
        of_up, of_latents = up.norm(dim=1), factors.down.float().norm(dim=1).view(groups, rank)
        usable = (of_up > 0) & (of_latents > 0)
        size = torch.where(usable, of_latents / torch.where(usable, of_up, 1), 1).sqrt()
        whole, steps = rounded((up * size[:, None]).flatten(0, 1))
        padded = torch.nn.functional.pad(whole, (0, -rank % 16))
        return cls(padded, steps[:, 0], (1 / size).flatten(), rank)

    def channels(self, latents: Float[Tensor, "batch tokens rank"]) -> Float[Tensor, "batch tokens kv_dim"]:
        """Rebuild key channels from the latents of all head groups, in fp32 and without a bias.

        The same numbers as by whole ones: those below 2**24 are exact in fp32, and their sums are as long as a group
        has at most 1040 latents.
        """
        groups = latents.shape[2] // self.rank
        whole, steps = rounded((latents.float() * self.balance).unflatten(2, (groups, -1)))
        up = self.up[:, : self.rank].float().unflatten(0, (groups, -1))
        products = torch.einsum("btgr,gcr->btgc", whole.float(), up) * steps
        return products.flatten(2) * self.steps


def rounded(numbers: Float[Tensor, "*rows columns"]) -> tuple[Int8[Tensor, "*rows columns"], Float[Tensor, "*rows 1"]]:
    """Round rows to whole numbers, half to even; return these and the steps that they count, in fp32."""
    numbers = numbers.float()
    steps = numbers.abs().amax(-1, keepdim=True) / LARGEST
    whole = torch.where(steps > 0, numbers / steps, 0).round()
    return whole.to(torch.int8), steps
