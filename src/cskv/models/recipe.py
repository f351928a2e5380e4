"""From rebuilt channels to the keys and values that a model caches: bias -> norm -> RoPE, per family.

The recipe of a layer is found by `cskv.models.probe`; here it is only carried out, with the model's own norm modules
and its own `apply_rotary_pos_emb`.
"""

from __future__ import annotations

import enum
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cskv.attention.inputs import RMSNorm
from cskv.errors import UnsupportedModelError
from cskv.factorization.commuting import RopePairs

Rotate = Callable[[Tensor, Tensor, Tensor], Tensor]
KEY_NORMS = {"k_norm": "q_norm", "k_layernorm": "q_layernorm", "key_layernorm": "query_layernorm"}  # and the queries'
ANGLE = 0.75  # radians: neither cos nor sin is near zero
# The largest error that is still rounding, relative to the largest value.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}


class NormStyle(enum.Enum):
    """The place of a family's norm of keys."""

    NONE = "none"
    PER_HEAD = "per head"  # over head_dim, after the split into heads (Qwen3, Gemma3)
    FLAT = "flat"  # over kv_dim, before the split (OLMo2)
    AFTER_ROPE = "per head, after RoPE"


class RopeStyle(enum.Enum):
    """The channels that a family rotates."""

    NONE = "none"
    FULL = "all channels"  # also families whose function rotates the first channels only and passes the rest (Phi3)
    SLICED = "first channels"  # the forward cuts the rotated channels out itself (StableLM, Phi)


@dataclass(frozen=True)
class Recipe:
    """From channels (batch, tokens, kv_dim) to cached heads (batch, kv_heads, tokens, head_dim).

    Attributes:
        head_dim: channels per head.
        norm: the model's norm module, or None for `NormStyle.NONE`.
        norm_style, rope_style: where it applies, and which channels are rotated.
        rotate: `rotate(heads, cos, sin)`, the defining module's own rotation; None for `RopeStyle.NONE`.
    """

    head_dim: int
    norm: nn.Module | None = None
    norm_style: NormStyle = NormStyle.NONE
    rope_style: RopeStyle = RopeStyle.NONE
    rotate: Rotate | None = None

    def heads(
        self, channels: Float[Tensor, "batch tokens kv_dim"], cos: Tensor | None, sin: Tensor | None
    ) -> Float[Tensor, "batch kv_heads tokens head_dim"]:
        """Apply the recipe. `cos` and `sin`, (batch or 1, tokens, rotary_dim), are unused without RoPE."""
        if self.norm_style is NormStyle.FLAT:
            channels = self.norm(channels)  # type: ignore[misc]
        heads = channels.unflatten(-1, (-1, self.head_dim))
        if self.norm_style is NormStyle.PER_HEAD:
            heads = self.norm(heads)  # type: ignore[misc]
        heads = heads.transpose(1, 2)
        if self.rope_style is not RopeStyle.NONE:
            heads = self.rotated(heads, cos, sin)  # type: ignore[arg-type]
        if self.norm_style is NormStyle.AFTER_ROPE:
            heads = self.norm(heads)  # type: ignore[misc]
        return heads

    def normalised(self, channels: Float[Tensor, "batch tokens kv_dim"]) -> Float[Tensor, "batch tokens kv_dim"]:
        """Apply the norm alone, without RoPE."""
        return replace(self, rope_style=RopeStyle.NONE).heads(channels, None, None).transpose(1, 2).flatten(2)

    def rotated(self, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Apply RoPE alone, to (batch, kv_heads, tokens, head_dim)."""
        if self.rope_style is RopeStyle.FULL:
            return self.rotate(heads, cos, sin)  # type: ignore[misc]
        rotary = cos.shape[-1]
        turned = self.rotate(heads[..., :rotary], cos, sin)  # type: ignore[misc]
        return torch.cat([turned, heads[..., rotary:]], dim=-1)


def candidates(
    module: nn.Module, norms: Iterable[str], head_dim: int, rotations: Iterable[tuple[RopeStyle, Rotate | None]]
) -> Iterator[Recipe]:
    """Yield every combination of no norm or one that the module has, with a rotation.

    Args:
        module: the attention module.
        norms: names under which it may hold a norm.
        head_dim: channels per head.
        rotations: pairs (style, function); the function is None for `RopeStyle.NONE`.
    """
    modules = [norm for norm in (getattr(module, name, None) for name in norms) if isinstance(norm, nn.Module)]
    used = (NormStyle.PER_HEAD, NormStyle.FLAT, NormStyle.AFTER_ROPE)
    for norm, norm_style in [(None, NormStyle.NONE), *product(modules, used)]:
        for rope_style, rotate in rotations:
            yield Recipe(head_dim, norm, norm_style, rope_style, rotate)


@torch.no_grad()
def closest(
    recipes: Iterable[Recipe], channels: Tensor, cos: Tensor | None, sin: Tensor | None, cached: Tensor
) -> tuple[Recipe | None, float]:
    """Find the recipe that comes closest to what was cached.

    Args:
        recipes: the first of equally close ones wins.
        channels: (batch, tokens, kv_dim), the projection's output.
        cos, sin: of these tokens, or None.
        cached: (batch, kv_heads, tokens, head_dim).

    Returns:
        The recipe, None if none gives heads of that shape; and its largest error, relative to the largest value.
    """
    best, least = None, float("inf")
    scale = cached.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    for recipe in recipes:
        try:
            heads = recipe.heads(channels, cos, sin)
        except (RuntimeError, ValueError, IndexError):  # shapes that do not go together: not this family's recipe
            continue
        if heads.shape == cached.shape and (error := float((heads - cached).abs().max() / scale)) < least:
            best, least = recipe, error
    return best, least


def rotation_of(attention: nn.Module) -> Rotate | None:
    """Return the rotation that an attention module's own file defines, as a function of keys alone, or None."""
    function = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    if function is None:
        return None
    names = list(inspect.signature(function).parameters)
    if names[:2] == ["q", "k"]:
        # No query heads: the function turns queries and keys alike, and only the keys are wanted.
        return lambda heads, cos, sin: function(heads[:, :0], heads, cos, sin)[1]
    return lambda heads, cos, sin: function(heads, cos, sin)


@torch.no_grad()
def kernel_norm(recipe: Recipe, heads: Tensor) -> RMSNorm | None:
    """Return the norm over each head as a weight and an epsilon, tried on some heads; None if it is another kind."""
    norm = recipe.norm
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if recipe.norm_style is not NormStyle.PER_HEAD or norm is None or not isinstance(eps, float):
        return None
    ones = norm(torch.ones_like(heads[:1, :1, :1, :])).flatten()
    found = RMSNorm(ones * (1 + eps) ** 0.5, eps)
    normalised = heads * (heads.square().mean(-1, keepdim=True) + eps).rsqrt() * found.weight
    expected = norm(heads)
    tolerance = TOLERANCE.get(heads.dtype, 3e-2) * float(expected.abs().max())
    return found if float((normalised - expected).abs().max()) <= tolerance else None


def find_pairs(keys: Recipe, cos: Tensor) -> RopePairs:
    """Find the pairs of channels that a layer's RoPE rotates.

    Args:
        keys: the layer's recipe; its keys are rotated.
        cos: (batch or 1, tokens, rotary_dim), as the layer is given it; only its width counts.

    Raises:
        UnsupportedModelError: the rotation turns other than pairs of channels.
    """
    angles = torch.full((1, keys.head_dim, cos.shape[-1]), ANGLE, dtype=torch.float64)
    unit_vectors = torch.eye(keys.head_dim, dtype=torch.float64)[None, None]
    turned = keys.rotated(unit_vectors, angles.cos(), angles.sin())[0, 0]
    mixes = (turned != 0).fill_diagonal_(False)
    others = mixes.sum(1)
    if others.max() > 1:
        most = int(others.argmax())
        raise UnsupportedModelError(f"RoPE turns channel {most} into {others[most]} others; expected one partner")
    if not torch.equal(mixes, mixes.T):
        raise UnsupportedModelError(f"RoPE's partners are not mutual: {dict(mixes.nonzero().tolist())}")
    # A real unit vector becomes cos e_real + sin e_imaginary; an imaginary one gets -sin.
    real, imaginary = (mixes & (turned > 0)).nonzero().T.contiguous()
    return RopePairs(real, imaginary, (others == 0).nonzero().flatten())
