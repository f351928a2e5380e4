"""The base model that an adapter or statistics belong to."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from torch import nn

from cskv.errors import AdapterError

FACTS = ("model_type", "hidden_size", "num_layers")


@dataclass(frozen=True)
class BaseModelInfo:
    """What is remembered of the base model, so that an adapter is not put on another one.

    Attributes:
        name: its folder or hub id.
        model_type: transformers' name of the architecture, for instance "llama".
        hidden_size: channels of the residual stream.
        num_layers: all layers of the model, compressed or not.
        revision: the hub commit, where known.
    """

    name: str
    model_type: str
    hidden_size: int
    num_layers: int
    revision: str | None = None

    @classmethod
    def from_model(cls, model: nn.Module) -> BaseModelInfo:
        """Read the facts from a loaded transformers model."""
        config = model.config
        info = cls.from_config(config.get_text_config(decoder=True), str(config.name_or_path or ""))  # type: ignore[operator, union-attr]
        return dataclasses.replace(info, revision=getattr(config, "_commit_hash", None))

    @classmethod
    def from_config(cls, text: Any, name: str = "") -> BaseModelInfo:
        """Read the facts from the config of a language model, transformers' or vLLM's."""
        return cls(name, text.model_type, text.hidden_size, text.num_hidden_layers)

    def check_same(self, other: BaseModelInfo, made: str, remedy: str) -> None:
        """Compare with the model at hand.

        Args:
            other: the model at hand.
            made: begins the message, such as "the adapter was made for".
            remedy: ends it: what to do.

        Raises:
            AdapterError: it is another model; the message says in which fact.
        """
        for name in FACTS:
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                raise AdapterError(
                    f"{made} {self.name or 'a model'} with {name} {ours}, this model has {theirs}; {remedy}"
                )
