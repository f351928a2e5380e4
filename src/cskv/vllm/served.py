"""Which adapter a vLLM configuration names, and its settings as served.

`config.json` of an exported checkpoint, or `--hf-overrides`, holds

    "architectures": ["CSKVLlamaForCausalLM"],
    "cskv": {"adapter": FOLDER, "window": 32, "group": 32}

where FOLDER lies in the model's folder, or is a path or a hub id; window and group are the adapter's own if left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError

from cskv.adapter.folder import Settings, download, read_layer, read_settings
from cskv.cache.ring import Ring
from cskv.config import CSKVConfig
from cskv.errors import AdapterError, ConfigError, first_line
from cskv.factorization.factors import LayerFactors
from cskv.latents.pages import PageLayout
from cskv.quantization.grid import Grid
from cskv.vllm.shards import Shard

KEY = "cskv"  # in a model's config.json
OVERRIDES = ("window", "group")


@dataclass(frozen=True)
class Served:
    """An adapter as it is served.

    Attributes:
        folder: of the adapter.
        settings: of its `config.json`, window and group replaced where the model's configuration says so.
    """

    folder: Path
    settings: Settings

    @property
    def config(self) -> CSKVConfig:
        return self.settings.config

    @property
    def has_ring(self) -> bool:
        """Whether tokens are kept exactly beyond their own step."""
        return self.config.window + self.config.group > 1

    @property
    def is_grouped(self) -> bool:
        """Whether latents are packed in groups of tokens."""
        config = self.config
        packed = (kind for kind in ("k", "v") if config.mixed_widths or config.bits(kind) < 16)
        return any(config.block(kind)[0] > 1 for kind in packed)

    def layout(self, layer: int, shard: Shard, dtype: Any) -> PageLayout:
        """The pages of one layer's latents on one tensor-parallel rank."""
        ranks = [shard.rank_of(self.settings.ranks[layer][kind], self.config.head_groups) for kind in ("k", "v")]
        grids = [
            Grid.of(self.config, kind, rank, self.settings.widths.get((layer, kind)))
            for kind, rank in zip(("k", "v"), ranks, strict=True)
        ]
        return PageLayout(ranks[0], ranks[1], dtype, grids[0], grids[1])

    def ring(self, layer: int, shard: Shard, dtype: Any, head_dim: int) -> Ring:
        """The ring of one layer on one tensor-parallel rank. It means nothing unless `has_ring`."""
        layout = self.layout(layer, shard, dtype)
        waiting = [
            0 if grid is None or grid.block_tokens == 1 else grid.rank for grid in (layout.k_grid, layout.v_grid)
        ]
        return Ring(self.config.window, self.config.group, shard.heads, head_dim, waiting[0], waiting[1], dtype)

    def factors(self, layer: int, shard: Shard) -> LayerFactors:
        """The factors of one layer that one tensor-parallel rank keeps.

        Raises:
            AdapterError: the folder is damaged, or its settings do not say how its factors were made.
        """
        factors, groups = read_layer(self.folder, self.settings, layer), self.config.head_groups
        expected = groups, self.settings.ranks[layer]["kv_dim"]
        for kind, part in (("k", factors.k), ("v", factors.v)):
            if (part.groups, part.kv_dim) != expected:  # a rank would keep the wrong part of them
                raise AdapterError(
                    f"adapter {self.folder}: layer {layer} {kind} has {part.groups} head groups and {part.kv_dim} "
                    f"channels, its settings {groups} and {expected[1]}; train the adapter again"
                )
        return LayerFactors(shard.factors(factors.k, groups), shard.factors(factors.v, groups))

    def summary(self) -> dict[str, Any]:
        """What decides the shapes of what is compiled."""
        return {"settings": self.config.to_dict(), "ranks": {str(i): r for i, r in self.settings.ranks.items()}}


def find_served(model: str, revision: str | None, config: Any) -> Served:
    """The adapter that a model's configuration names.

    Args:
        model: folder or hub id.
        revision: of the hub's repository.
        config: what transformers read of its `config.json`, overrides included.

    Raises:
        AdapterError: none is named, or it cannot be read.
        ConfigError: an override is out of range.
    """
    named = getattr(config, KEY, None)
    if not isinstance(named, Mapping) or not isinstance(named.get("adapter"), str):
        raise AdapterError(
            f'the model\'s config has {KEY!r}: {named!r}; expected {{"adapter": FOLDER}}, as `cskv export` writes it'
        )
    unknown = sorted(set(named) - {"adapter", *OVERRIDES})
    if unknown:
        raise ConfigError(f"{KEY!r} in the model's config has {unknown}; expected 'adapter', 'window' and 'group'")
    folder = _folder(model, revision, named["adapter"])
    settings = read_settings(folder)
    changed = {name: named[name] for name in OVERRIDES if name in named}
    return Served(folder, settings._replace(config=dataclasses.replace(settings.config, **changed)))


def _folder(model: str, revision: str | None, adapter: str) -> Path:
    inside, outside = Path(model) / adapter, Path(adapter).expanduser()
    if inside.is_dir():
        return inside
    if outside.is_dir():
        return outside
    if not outside.is_absolute():
        if not Path(model).is_dir():
            folder = _in_repository(model, revision, adapter)
            if folder.is_dir():
                return folder
        if "/" in adapter:
            return download(adapter)
    raise AdapterError(f"adapter folder {adapter!r} is neither in {model} nor here; export the adapter again")


def _in_repository(model: str, revision: str | None, adapter: str) -> Path:
    """An adapter in the model's repository on the hub; it may not be there."""
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=[f"{adapter}/*"])) / adapter
    except (OSError, HFValidationError) as error:
        message = f"cannot look for adapter folder {adapter!r} in {model!r} on the hub: {first_line(error)}"
        raise AdapterError(message) from error
