"""Gains for PCA, in closed form: the weight of an error in keys and values.

What matters is not ||K - K^|| but the error in the attention logits, and not ||V - V^|| but the error in the layer's
output. RoPE turns query and key pairs by their relative position; averaged over positions, an error in a pair of key
channels counts by the energy of the queries there, whatever its direction. So for keys one weight per (kv head, pair),

    g^2 = (E q_a^2 + E q_b^2) / 2, summed over the query heads that share the kv head,

and for values, with W_o,i the columns of the output projection that read query head i, the block of a kv head is

    G_h = M_h^(1/2),  M_h = sum over its query heads of W_o,i^T W_o,i.

These are guesses at what an error costs the predictions. Fisher information (`cskv.calibration.fisher`) measures it, in
nats per token: an error d with second moment D costs 1/2 tr(F D), so that G = (F / 2)^(1/2), and what is minimised is
the loss itself, in the same unit for every projection.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from cskv.factorization.commuting import RopePairs

LEAST_FISHER = 1e-4  # as a share of the largest: what no gradient was seen for is not free
COHERENT = 0.25  # from 0.25 to 0.5 all is alike on real models


def key_gain(
    query_energy: Float[Tensor, " kv_dim"], pairs: RopePairs | None, head_dim: int
) -> Float[Tensor, " kv_dim"]:
    """Weight each key channel by how much an error in it counts in the attention logits.

    Args:
        query_energy: E[q^2] by channel, summed over the query heads of each kv head.
        pairs: the channels that RoPE turns together; None without RoPE.
        head_dim: channels per head.
    """
    energy = query_energy.double().unflatten(0, (-1, head_dim)).clone()
    if pairs is not None:
        both = (energy[:, pairs.real] + energy[:, pairs.imaginary]) / 2
        energy[:, pairs.real], energy[:, pairs.imaginary] = both, both
    return energy.flatten().sqrt()


def value_gain(
    output_weight: Float[Tensor, "hidden query_dim"], num_kv_heads: int, head_dim: int
) -> Float[Tensor, "kv_dim kv_dim"]:
    """Weight value channels by how much an error in them counts in the layer's output: block diagonal, symmetric.

    Args:
        output_weight: of the output projection; it reads the query heads in order.
        num_kv_heads, head_dim: of the values.
    """
    columns = output_weight.detach().double().unflatten(1, (num_kv_heads, -1, head_dim))
    blocks = torch.einsum("ohqc,ohqd->hcd", columns, columns)
    values, vectors = torch.linalg.eigh(blocks)
    roots = (vectors * values.clamp(min=0).sqrt()[:, None, :]) @ vectors.mT
    return torch.block_diag(*roots)


def shrunk(fisher: Float[Tensor, "kv_dim kv_dim"], shrinkage: float) -> Float[Tensor, "kv_dim kv_dim"]:
    """Shrink Fisher information towards its diagonal: gradients are heavy-tailed, so some directions are chance."""
    fisher = fisher.double()
    return (1 - shrinkage) * fisher + shrinkage * torch.diag(fisher.diagonal())


def fisher_gain(fisher: Float[Tensor, "kv_dim kv_dim"]) -> Float[Tensor, "kv_dim kv_dim"]:
    """Weight channels by what an error in them costs the predictions, so that squared errors are nats per token.

    Args:
        fisher: F = E[g g^T] of gradients of log-probabilities, per token, shrunk.
    """
    values, vectors = torch.linalg.eigh((fisher + fisher.T).double() / 4)
    return (vectors * values.clamp(min=LEAST_FISHER * float(values[-1])).sqrt()) @ vectors.T


def mixed_moments(
    mean: Float[Tensor, " kv_dim"],
    moment: Float[Tensor, "kv_dim kv_dim"],
    coherent_mean: Float[Tensor, " kv_dim"],
    coherent_moment: Float[Tensor, "kv_dim kv_dim"],
) -> tuple[Float[Tensor, " kv_dim"], Float[Tensor, "kv_dim kv_dim"]]:
    """Mix the moments of tokens that count alike with those of tokens that count by their gradients, and together.

    The first know all directions and not which matter, the second the reverse, from few gradients. The share of the
    second is `COHERENT`; the mixture has the scale of the first.

    Returns:
        mean and second moment.
    """
    mixture = (1 - COHERENT) * mean + COHERENT * coherent_mean
    own, coherent = (
        second - torch.outer(first, first) + torch.outer(first - mixture, first - mixture)
        for first, second in ((mean, moment), (coherent_mean, coherent_moment))
    )
    scale = own.trace() / coherent.trace().clamp(min=torch.finfo(coherent.dtype).tiny)
    return mixture, (1 - COHERENT) * own + COHERENT * scale * coherent + torch.outer(mixture, mixture)


def before_norm(
    gain: Float[Tensor, " kv_dim"],
    before: Float[Tensor, "kv_dim kv_dim"],
    after: Float[Tensor, "kv_dim kv_dim"],
) -> Float[Tensor, " kv_dim"]:
    """Convert a gain of normalised keys to one of the projection's output: the norm changes each channel's size.

    Args:
        gain: of keys after the norm.
        before, after: E[k k^T] on either side of the norm.
    """
    sizes = [moment.diagonal().double().clamp(min=0).sqrt() for moment in (before, after)]
    return gain * torch.where(sizes[0] > 0, sizes[1] / sizes[0].clamp(min=torch.finfo(torch.float64).tiny), 1.0)
