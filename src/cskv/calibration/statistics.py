"""Statistics of each layer that calibration takes: named tensors, kept as one safetensors file.

Names and contents, all fp64, all means over tokens:

    input.mean_abs       (hidden,)         mean |x| of the layer input; what ASVD scales by
    input.mean           (hidden,)         mean x; what centres latents that are stored in few bits
    k.mean, v.mean       (kv_dim,)         mean of the projection's output, bias included
    k.moment, v.moment   (kv_dim, kv_dim)  mean of y y^T of that output
    key.mean, key.moment (kv_dim, ...)     the same of keys after their norm, before RoPE; where the family has a norm
    query.energy         (kv_dim,)         mean of q^2 after the norm, summed over the query heads of each kv head

    k.fisher, v.fisher            (kv_dim, kv_dim)  sum of g g^T over the tokens of a text, per token: the Fisher
                                                    information, in nats, of errors in old tokens' keys and values
    k.coherent_mean, ..._moment   (kv_dim, ...)     mean of y and y y^T, tokens counted by their gradients
    key.fisher, ...               (kv_dim, ...)     the same of keys after their norm, where the family has one

All but the first two come with `covariance=True`, and the last three with `fisher=True`: the defaults. The first
`sinks` tokens of every sample are left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cskv.adapter.base_model import BaseModelInfo, Surveyed
from cskv.errors import AdapterError, DataError
from cskv.files import tensors_writer, write_atomically

FORMAT = "cskv-statistics-1"
HIDDEN_SIZED = ("input.mean_abs", "input.mean")
FISHER = tuple(
    f"{kind}.{name}" for kind in ("k", "v", "key") for name in ("fisher", "coherent_mean", "coherent_moment")
)
KV_SIZED = ("k.mean", "v.mean", "k.moment", "v.moment", "key.mean", "key.moment", "query.energy", *FISHER)


@dataclass(frozen=True)
class Statistics:
    """Statistics of every layer of one base model.

    Attributes:
        layers: layer index -> name -> fp64 tensor on the CPU; the names are in the module's docstring.
        base: the model they were taken from.
        tokens: how many tokens were read, sinks included.
        source: the text's name.
        seed: of the text's order.
        sinks: how many tokens at the start of every sample were left out.
    """

    layers: Mapping[int, Mapping[str, Tensor]]
    base: BaseModelInfo
    tokens: int
    source: str = ""
    seed: int = 0
    sinks: int = 0

    @property
    def has_covariance(self) -> bool:
        """True if calibration also took the second moments of keys and values."""
        return all("k.moment" in layer and "v.moment" in layer for layer in self.layers.values())

    @property
    def has_fisher(self) -> bool:
        """True if calibration also took the Fisher information of keys and values."""
        return all("k.fisher" in layer and "v.fisher" in layer for layer in self.layers.values())

    def get(self, layer_idx: int, name: str) -> Tensor:
        """Return one statistic of one layer.

        Raises:
            DataError: it was not collected.
        """
        try:
            return self.layers[layer_idx][name]
        except KeyError as error:
            hint = " with Fisher information" if name in FISHER else " with covariance" if name in KV_SIZED else ""
            raise DataError(f"the statistics lack {name} of layer {layer_idx}; calibrate again{hint}") from error

    def key_moment(self, layer_idx: int) -> Float[Tensor, "kv_dim kv_dim"]:
        """Return the mean of k k^T of keys as RoPE gets them: after the norm, where there is one."""
        return self.get(layer_idx, f"{self.key_kind(layer_idx)}.moment")

    def key_kind(self, layer_idx: int) -> str:
        """Return "key" where a layer's keys are normalised after their projection, else "k"."""
        return "key" if "key.moment" in self.layers[layer_idx] else "k"

    def check_fits(self, survey: Surveyed) -> None:
        """Compare with a base model: architecture, layers and shapes, and its weights where both have a signature.

        Args:
            survey: of the model (`cskv.models.survey.survey`).

        Raises:
            AdapterError: they differ; the message says in what.
        """
        made, remedy = "the statistics were taken from", "calibrate this model"
        self.base.check_same(survey.base, made, remedy)
        where = f"{made} {self.base.name or 'a model'}"
        indices = [site.layer_idx for site in survey.sites]
        if indices != sorted(self.layers):
            raise AdapterError(f"{where} for layers {sorted(self.layers)}, this one has {indices}; {remedy}")
        for site in survey.sites:
            expected = {**dict.fromkeys(HIDDEN_SIZED, site.hidden_size), **dict.fromkeys(KV_SIZED, site.kv_dim)}
            for name, tensor in self.layers[site.layer_idx].items():
                if tensor.shape[-1] != expected.get(name, tensor.shape[-1]):
                    raise AdapterError(
                        f"{where}: {name} of layer {site.layer_idx} has {tensor.shape[-1]} channels, this model has "
                        f"{expected[name]}; {remedy}"
                    )
        self.base.check_weights(survey.base, made, remedy)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, atomically.

        Raises:
            CSKVError: the file cannot be written; one that is there stays.
        """
        tensors = {f"layers.{i}.{name}": tensor for i, layer in self.layers.items() for name, tensor in layer.items()}
        facts = {name: getattr(self, name) for name in ("tokens", "source", "seed", "sinks")} | {
            "base": asdict(self.base)
        }
        metadata = {"format": FORMAT, "statistics": json.dumps(facts, sort_keys=True)}
        write_atomically(path, tensors_writer(tensors, metadata))

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Read what `save` wrote.

        Raises:
            DataError: the file is missing, truncated, not ours, or holds NaN or infinity.
        """
        tensors, metadata = _read(Path(path))
        if metadata.get("format") != FORMAT:
            raise DataError(f"{path} holds no calibration statistics; expected a file that `cskv calibrate` wrote")
        layers: dict[int, dict[str, Tensor]] = {}
        try:
            facts = json.loads(metadata["statistics"])
            for key, tensor in tensors.items():
                _, index, name = key.split(".", 2)
                layers.setdefault(int(index), {})[name] = tensor
            base = BaseModelInfo.from_dict(facts.pop("base"))
            statistics = cls({i: layers[i] for i in sorted(layers)}, base, **facts)
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is damaged ({error}); calibrate again") from error
        statistics.check_finite()
        return statistics

    def check_finite(self, advice: str = "calibrate again") -> None:
        """Refuse statistics that are not numbers.

        Raises:
            DataError: some tensor holds NaN or infinity; the message names the layer.
        """
        for layer_idx, layer in self.layers.items():
            for name, tensor in layer.items():
                if not torch.isfinite(tensor).all():
                    raise DataError(f"{name} of layer {layer_idx} holds NaN or infinity; {advice}")


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118 (no mapping)
    except FileNotFoundError as error:
        raise DataError(
            f"there are no calibration statistics at {path}; make them with `cskv calibrate`, or take init svd, which "
            "needs none"
        ) from error
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} is truncated or no safetensors file ({error}); calibrate again") from error
