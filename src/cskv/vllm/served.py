"""The adapter that a vLLM configuration names, and its settings as served.

`config.json` of an exported checkpoint, or `--hf-overrides`, holds

    "architectures": ["CSKVLlamaForCausalLM"],
    "cskv": {"adapter": FOLDER, "window": 32, "group": 32, "sinks": 4}

where FOLDER lies in the model's folder, or is a path or a hub id; window, group and sinks are the adapter's own if left
out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cskv.adapter.folder import Settings, download_adapter, read_settings
from cskv.adapter.hub import download
from cskv.config import CSKVConfig
from cskv.errors import AdapterError, ConfigError

KEY = "cskv"  # in a model's config.json
OVERRIDES = ("window", "group", "sinks")
NO_RING = "window 0, group 1 and sinks 0"  # for messages: what to serve with to have nothing kept exactly


@dataclass(frozen=True)
class Served:
    """An adapter as it is served.

    Attributes:
        folder: of the adapter.
        settings: of its `config.json`, window, group and sinks replaced where the model's configuration says so.
    """

    folder: Path
    settings: Settings

    @property
    def config(self) -> CSKVConfig:
        return self.settings.config

    @property
    def has_ring(self) -> bool:
        """Whether tokens are kept exactly after their own step."""
        return self.config.window + self.config.group + self.config.sinks > 1

    def summary(self) -> dict[str, Any]:
        """Return the settings that compiled shapes depend on."""
        return {"settings": self.config.to_dict(), "ranks": {str(i): r for i, r in self.settings.ranks.items()}}


def find_served(model: str, revision: str | None, config: Any) -> Served:
    """Find the adapter that a model's configuration names.

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
        expected = "expected 'adapter', 'window', 'group' and 'sinks'"
        raise ConfigError(f"{KEY!r} in the model's config has {unknown}; {expected}")
    folder = _folder(model, revision, named["adapter"])
    settings = read_settings(folder)
    changed = {name: named[name] for name in OVERRIDES if name in named}
    return Served(folder, settings._replace(config=dataclasses.replace(settings.config, **changed)))


def exact_tokens(window: int, group: int, sinks: int) -> str:
    """Name the tokens of a request that are kept exactly: "the first 4 and the newest 32 to 63"."""
    parts = [f"the first {sinks}"] if sinks else []
    if window + group > 1:
        parts.append(f"the newest {window} to {window + group - 1}")
    return " and ".join(parts)


def _folder(model: str, revision: str | None, adapter: str) -> Path:
    outside = Path(adapter).expanduser()
    for folder in (Path(model) / adapter, outside):
        if folder.is_dir():
            return folder
    if not outside.is_absolute():
        if not Path(model).is_dir():
            refusal = f"cannot look for adapter folder {adapter!r} in {model!r} on the hub"
            patterns = [f"{adapter}/*"]
            folder = download(model, refusal, AdapterError, revision=revision, allow_patterns=patterns) / adapter
            if folder.is_dir():
                return folder
        if "/" in adapter:
            return download_adapter(adapter)
    raise AdapterError(f"adapter folder {adapter!r} is neither in {model} nor here; export the adapter again")
