"""The trained compressor of one base model: the factors of every compressed layer, kept as a folder.

Nothing is pickled. `push_to_hub` comes from the hub's own mixin.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import PyTorchModelHubMixin
from torch import nn

from cskv.adapter.base_model import BaseModelInfo, Surveyed
from cskv.adapter.card import model_card
from cskv.adapter.folder import (
    FORMAT_VERSION,
    MODEL_TYPE,
    Widths,
    check_widths,
    download_adapter,
    read_folder,
    write_adapter,
)
from cskv.config import CSKVConfig
from cskv.errors import AdapterError
from cskv.factorization.factors import Factors, LayerFactors
from cskv.fingerprint import digest
from cskv.quantization.grid import Grid


class CSKVAdapter(nn.Module, PyTorchModelHubMixin):
    """Low-rank factors of the key and value projections of a base model, per compressed layer.

    Down- and up-projections are parameters named `layers.{i}.{k|v}.{down|up}`; biases, which are exact, are buffers.

    Args:
        config: the settings that made it.
        layers: layer index in the cache -> factors. Tensors are taken over, not copied.
        base: the model it belongs to.
        metrics: JSON-ready figures (losses, accuracies, ...) for `config.json` and the model card.
        widths: (layer index, "k" or "v") -> runs of (bits, channels) that sum to the rank, for `config.mixed_widths`.
    """

    def __init__(
        self,
        config: CSKVConfig,
        layers: Mapping[int, LayerFactors],
        base: BaseModelInfo,
        metrics: Mapping[str, Any] | None = None,
        widths: Mapping[tuple[int, str], Widths] | None = None,
    ) -> None:
        super().__init__()
        if not layers:
            raise AdapterError("an adapter needs the factors of at least one layer, got none")
        self.widths = dict(widths or {})
        ranks = {(index, kind): getattr(layers[index], kind).rank for index in layers for kind in ("k", "v")}
        check_widths(config, ranks, self.widths)
        self.config = config
        self.base = base
        self.metrics: dict[str, Any] = dict(metrics or {})
        self.layers = nn.ModuleDict(
            {
                str(index): nn.ModuleDict({kind: _FactorModule(getattr(layers[index], kind)) for kind in ("k", "v")})
                for index in sorted(layers)
            }
        )

    @property
    def layer_indices(self) -> list[int]:
        """The compressed layers, by their index in the cache."""
        return [int(name) for name in self.layers]

    def factors(self, layer_idx: int) -> LayerFactors:
        """Return the factors of one layer. Their tensors are this module's parameters: gradients reach them."""
        if str(layer_idx) not in self.layers:
            raise AdapterError(f"the adapter has no layer {layer_idx}; it has {self.layer_indices}")
        layer: Any = self.layers[str(layer_idx)]
        return LayerFactors(layer["k"].factors(), layer["v"].factors())

    def grid(self, layer_idx: int, kind: str) -> Grid | None:
        """Return the grid of one layer's key ("k") or value ("v") latents; None where they keep the model's dtype."""
        rank = getattr(self.factors(layer_idx), kind).rank
        return Grid.from_config(self.config, kind, rank, self.widths.get((layer_idx, kind)))

    def grids(self, layer_idx: int) -> tuple[Grid | None, Grid | None]:
        """Return the grids of a layer's key and value latents."""
        return self.grid(layer_idx, "k"), self.grid(layer_idx, "v")

    def with_settings(
        self, *, window: int | None = None, group: int | None = None, sinks: int | None = None
    ) -> CSKVAdapter:
        """Return this adapter for another window, group or number of sinks, in tokens; None keeps its own.

        The factors are shared.

        Raises:
            ConfigError: one is out of range, or does not go with the blocks of latents.
        """
        given = {"window": window, "group": group, "sinks": sinks}
        changes = {name: value for name, value in given.items() if value is not None}
        config = dataclasses.replace(self.config, **changes)  # type: ignore[arg-type]
        layers = {index: self.factors(index) for index in self.layer_indices}
        return CSKVAdapter(config, layers, self.base, self.metrics, self.widths)

    def fingerprint(self) -> str:
        """Hash the factors, and the settings that decide what a cache holds, to 16 hexadecimal digits.

        Equal ones can read each other's caches. It reads every factor, so keep it rather than ask twice.
        """
        grids = [self.grids(index) for index in self.layer_indices]
        return digest(self.state_dict().items(), self.config.key_factors, self.config.head_groups, grids)

    def check_fits(self, survey: Surveyed) -> None:
        """Compare with a base model: its names, layers and shapes, and its weights where both have a signature.

        Args:
            survey: of the model (`cskv.models.survey.survey`).

        Raises:
            AdapterError: they differ; the message says in what.
        """
        made, remedy = "the adapter was made for", "load the base model that it names, or make an adapter for this one"
        self.base.check_same(survey.base, made, remedy)
        indices = [site.layer_idx for site in survey.sites]
        if indices != self.layer_indices:
            raise AdapterError(f"the adapter compresses layers {self.layer_indices}, this model's cache has {indices}")
        for site in survey.sites:
            factors = self.factors(site.layer_idx)
            for kind, ours in (("k", factors.k), ("v", factors.v)):
                reads = site.kv_dim if kind == "k" and self.config.key_factors == "commuting" else site.hidden_size
                if (ours.kv_dim, ours.hidden_size) != (site.kv_dim, reads):
                    raise AdapterError(
                        f"layer {site.layer_idx} {kind}: the adapter maps {ours.hidden_size} to {ours.kv_dim} channels,"
                        f" the model {reads} to {site.kv_dim}"
                    )
        self.base.check_weights(survey.base, made, remedy)

    def _leaves_out_constants(self) -> bool:
        commuting = self.config.key_factors == "commuting"
        return commuting and any(self.factors(index).k.bias is not None for index in self.layer_indices)

    def describe(self) -> dict[str, Any]:
        """Return what `config.json` holds, the fingerprint aside."""
        description = {
            "model_type": MODEL_TYPE,
            "format_version": FORMAT_VERSION if self._leaves_out_constants() else 1,
            "base_model": dataclasses.asdict(self.base),
            "compression": self.config.to_dict(),
            "ranks": {
                str(i): {"k": self.factors(i).k.rank, "v": self.factors(i).v.rank, "kv_dim": self.factors(i).k.kv_dim}
                for i in self.layer_indices
            },
            "metrics": self.metrics,
        }
        if self.widths:
            description["widths"] = {
                str(i): {
                    kind: [list(run) for run in self.widths[i, kind]] for kind in ("k", "v") if (i, kind) in self.widths
                }
                for i in self.layer_indices
            }
        return description

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write the folder, for `save_pretrained` and `push_to_hub`."""
        description = self.describe() | {"fingerprint": self.fingerprint()}
        write_adapter(Path(save_directory), self.state_dict(), description, model_card(description))

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> str | None:
        """Write config.json, model.safetensors and the model card into a folder, whole or not at all.

        An adapter that is there is replaced; other files stay.

        Args:
            save_directory: the folder, made if absent.
            **kwargs: the hub mixin's own (`repo_id`, `push_to_hub`, ...).

        Raises:
            CSKVError: the folder cannot be written; then it is as it was.
        """
        if kwargs.get("push_to_hub"):
            return super().save_pretrained(save_directory, **kwargs)
        self._save_pretrained(Path(save_directory))
        return None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **hub: Any) -> CSKVAdapter:
        """Load an adapter from a folder or the hub.

        Args:
            pretrained_model_name_or_path: a folder, or a repository on the hub.
            **hub: `huggingface_hub.snapshot_download`'s own (`revision`, `token`, `cache_dir`, ...).

        Raises:
            AdapterError: no such folder, or its files are missing, truncated, or do not agree with each other.
        """
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            folder = download_adapter(str(pretrained_model_name_or_path), **hub)
        settings, layers = read_folder(folder)
        return cls(settings.config, layers, settings.base, settings.metrics, settings.widths)


class _FactorModule(nn.Module):
    def __init__(self, factors: Factors) -> None:
        super().__init__()
        self.down = nn.Parameter(factors.down)
        self.up = nn.Parameter(factors.up)
        self.register_buffer("bias", factors.bias)
        self.register_buffer("down_bias", factors.down_bias)

    def factors(self) -> Factors:
        return Factors(self.down, self.up, self.bias, self.down_bias)  # type: ignore[arg-type]
