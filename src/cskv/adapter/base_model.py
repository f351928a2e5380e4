"""The base model that an adapter or statistics belong to."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from cskv.errors import AdapterError


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

    def path(self, given: str | None = None) -> str:
        """Return the folder or hub id to load: the given one, or else the recorded name.

        Raises:
            AdapterError: neither is there.
        """
        if not (given or self.name):
            raise AdapterError(
                "the adapter does not name its base model; give it with --model-path (pretrained= in the harness), or "
                "load it and call cskv.attach"
            )
        return given or self.name

    @classmethod
    def from_model(cls, model: nn.Module) -> BaseModelInfo:
        """Read the facts from a loaded transformers model."""
        config = model.config.get_text_config(decoder=True)  # type: ignore[operator, union-attr]
        return cls(
            name=str(model.config.name_or_path or ""),  # type: ignore[union-attr]
            model_type=config.model_type,
            hidden_size=config.hidden_size,
            num_layers=config.num_hidden_layers,
            revision=getattr(model.config, "_commit_hash", None),
        )
