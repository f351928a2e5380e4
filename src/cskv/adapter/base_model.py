"""The base model that an adapter or statistics belong to, and the check that a model is that one."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from cskv.errors import AdapterError

FACTS = ("model_type", "hidden_size", "num_layers")
SUFFIX = ".gguf"
ROUNDING, PACKED = 0.01, 0.25  # relative differences of weights: bf16 makes 0.003, packing in 4 bits 0.12


class LayerShape(Protocol):
    """An attention layer of a base model: its index in the cache, and the sizes of its key and value projections."""

    @property
    def layer_idx(self) -> int: ...

    @property
    def kv_dim(self) -> int: ...

    @property
    def hidden_size(self) -> int: ...


class Surveyed(Protocol):
    """A model, or a description of one: `cskv.models.survey.Survey`, for instance."""

    @property
    def base(self) -> BaseModelInfo: ...

    @property
    def sites(self) -> Sequence[LayerShape]: ...


@dataclass(frozen=True)
class Signature:
    """Random contractions of the key and value weights, by which a model is told from another one of equal shapes.

    For weights W, numbers s^T W r with fixed vectors r and s of +1 and -1. Their mean square is |W|_F^2, and that of
    the differences between two models |W - W'|_F^2, so they measure how far apart two models are: the same checkpoint
    in another dtype is near, a fine-tuned one is not. No hash could do that.

    Attributes:
        packed: whether the weights were held in few bits, or it is not known how.
        layers: layer index -> "k" and "v" -> the numbers.
    """

    packed: bool
    layers: dict[str, dict[str, list[float]]]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Signature:
        """Invert `dataclasses.asdict`.

        Raises:
            TypeError, KeyError, ValueError, AttributeError: it is damaged.
        """
        numbers = {
            index: {kind: [float(number) for number in kinds[kind]] for kind in ("k", "v")}
            for index, kinds in values["layers"].items()
        }
        return cls(bool(values["packed"]), numbers)

    def difference(self, other: Signature) -> float:
        """Estimate |W - W'|_F / |W|_F over all layers: of keys and of values, and of these the root mean square."""
        ratios = []
        for kind in ("k", "v"):
            pairs = [
                (ours, theirs)
                for index in self.layers.keys() & other.layers.keys()
                for ours, theirs in zip(self.layers[index][kind], other.layers[index][kind], strict=False)
            ]
            size = sum(ours * ours + theirs * theirs for ours, theirs in pairs) / 2
            ratios.append(sum((ours - theirs) ** 2 for ours, theirs in pairs) / size if size else 0.0)
        return math.sqrt(sum(ratios) / 2)

    def tolerance(self, other: Signature) -> float:
        """Return the largest difference between two forms of the same weights."""
        return PACKED if self.packed or other.packed else ROUNDING


@dataclass(frozen=True)
class BaseModelInfo:
    """Facts of the base model that are kept with an adapter, so that it is not put on another one.

    Attributes:
        name: its folder, hub id or GGUF file (`folder/file.gguf`, or on the hub `owner/name/file.gguf`).
        model_type: transformers' name of the architecture, for instance "llama".
        hidden_size: channels of the residual stream.
        num_layers: all layers of the model, compressed or not.
        revision: the hub commit, where known.
        signature: of its key and value weights; None where they were not at hand, or by an older cskv. It has a
            tolerance, so `==` leaves it out.
    """

    name: str
    model_type: str
    hidden_size: int
    num_layers: int
    revision: str | None = None
    signature: Signature | None = field(default=None, compare=False, repr=False)

    def path(self, given: str | None = None) -> str:
        """Return the folder, hub id or GGUF file to load: the given one, or else the recorded name.

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
        """Read the facts from a loaded transformers model, without the signature (see `cskv.models.survey`)."""
        config: Any = model.config
        packed: Any = getattr(config, "quantization_config", None)
        file = packed.get("gguf_file") if isinstance(packed, dict) else getattr(packed, "gguf_file", None)
        name = str(config.name_or_path or "")
        info = cls.from_config(config.get_text_config(decoder=True), str(Path(name, file)) if file else name)
        return dataclasses.replace(info, revision=getattr(config, "_commit_hash", None))

    @classmethod
    def from_config(cls, text: Any, name: str = "") -> BaseModelInfo:
        """Read the facts from the config of a language model, transformers' or vLLM's."""
        return cls(name, text.model_type, text.hidden_size, text.num_hidden_layers)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> BaseModelInfo:
        """Invert `dataclasses.asdict`. Keys that this version does not know are dropped with a warning.

        Raises:
            TypeError, KeyError, ValueError, AttributeError: a fact is missing, or of another form.
        """
        known = {each.name for each in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            warnings.warn(f"ignoring unknown facts on the base model {unknown}: written by a newer cskv?", stacklevel=6)
        kept = {key: value for key, value in values.items() if key in known}
        if kept.get("signature") is not None:
            kept["signature"] = Signature.from_dict(kept["signature"])
        return cls(**kept)

    def check_same(self, other: BaseModelInfo, made: str, remedy: str) -> None:
        """Compare names and sizes with those of the model at hand.

        Args:
            other: the model at hand.
            made: begins the message, such as "the adapter was made for".
            remedy: ends it: what to do.

        Raises:
            AdapterError: it is another model; the message says in which fact.
        """
        made = f"{made} {self.name or 'a model'}"
        for name in FACTS:
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                raise AdapterError(f"{made} with {name} {ours}, this model has {theirs}: {remedy}")

    def check_weights(self, other: BaseModelInfo, made: str, remedy: str) -> None:
        """Compare key and value weights with those of the model at hand, of equal shapes; arguments as `check_same`.

        Warns where it is not known which weights these facts are of, and is silent where the model's are not at hand.

        Raises:
            AdapterError: they differ by more than rounding; the message says how far.
        """
        if other.signature is None:
            return
        made = f"{made} {self.name or 'a model'}"
        if self.signature is None:
            warnings.warn(
                f"{made}, and by an older cskv: whether from the weights of this model is not known", stacklevel=4
            )
            return
        apart, allowed = self.signature.difference(other.signature), self.signature.tolerance(other.signature)
        if not apart <= allowed:
            raise AdapterError(
                f"{made}, whose key and value weights differ by {apart:.1%} from those of this model "
                f"({other.name or 'unnamed'}), where at most {allowed:.0%} is rounding; {remedy}"
            )


def hub_file(name: str) -> tuple[str, str] | None:
    """Split the name of a GGUF file on the hub into repository and file; None for any other name."""
    owner, _, rest = name.partition("/")
    repository, _, file = rest.partition("/")
    if not file.lower().endswith(SUFFIX) or owner in ("", ".", "..", "~") or Path(name).exists():
        return None
    return f"{owner}/{repository}", file
