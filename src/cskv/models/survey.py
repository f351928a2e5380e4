"""A survey of a model, made once and passed on: the facts that tie an adapter to it, its sites, and their recipes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from cskv.adapter.base_model import SUFFIX, BaseModelInfo
from cskv.errors import CSKVError
from cskv.models.probe import SiteRecipe, probe
from cskv.models.signature import take_signature
from cskv.models.sites import AttentionSite, find_sites


@dataclass(frozen=True)
class Survey:
    """The facts of a model that calibration, factorisation, training and attaching need.

    Attributes:
        model: the model.
        sites: its full-attention layers, in cache order.
    """

    model: nn.Module
    sites: list[AttentionSite]

    @cached_property
    def base(self) -> BaseModelInfo:
        """The facts that are remembered of it. Its projections are run for the signature when first asked for."""
        facts, signature = BaseModelInfo.from_model(self.model), take_signature(self.model, self.sites)
        if signature is not None and facts.name.lower().endswith(SUFFIX):  # dequantised weights were in few bits, too
            signature = dataclasses.replace(signature, packed=True)
        return dataclasses.replace(facts, signature=signature)

    @cached_property
    def recipes(self) -> dict[int, SiteRecipe]:
        """The recipe of every site, by layer index. Probed when first asked for: SVD and ASVD need none.

        Raises:
            UnsupportedModelError: a layer's keys or values match no recipe.
            DataError: the model's keys or values are not finite.
        """
        return probe(self.model, self.sites)


def survey(model: nn.Module) -> Survey:
    """Find what a transformers decoder model is made of.

    Raises:
        CSKVError: a compressor is attached, so the model's keys and values are not its own.
        UnsupportedModelError: it is no decoder, or has no layer that can be compressed.
    """
    hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    if any(hasattr(hook, "attachment") for hook in hooks):
        raise CSKVError("a compressor is attached to this model; call cskv.detach(model) first")
    return Survey(model, find_sites(model))
