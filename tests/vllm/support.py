"""Base models as folders, and adapters that fit them."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import cskv
from tests.models.families import tiny_model, truncated_adapter

CONFIG = cskv.CSKVConfig(k_density=0.25, v_density=0.5, window=8, group=4, sinks=2)


def save_base(folder: Path, family: str = "llama", **changes: Any) -> Path:
    """A random model with two layers of 32 key and value channels, and the small files of a repository on the hub."""
    tiny_model(family, **changes).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "state.json").write_text("{}")
    return folder


def adapter_for(family: str = "llama", config: cskv.CSKVConfig = CONFIG, **changes: Any) -> cskv.CSKVAdapter:
    """Low-rank factors of the model that `save_base` saves."""
    return truncated_adapter(tiny_model(family, **changes), config)


def edit_config(folder: Path, *removed: str, **changes: Any) -> None:
    """Take values out of a `config.json`, and change others."""
    path = folder / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in values.items() if name not in removed}))


def as_hub_cache(base: Path, cache: Path, model_id: str, revision: str) -> Path:
    """A folder's files as the hub's cache keeps them: blobs by their hash, and a snapshot of symlinks to them."""
    repository = cache / f"models--{model_id.replace('/', '--')}"
    snapshot = repository / "snapshots" / revision
    for path in sorted(path for path in base.rglob("*") if path.is_file()):
        blob = repository / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(path.read_bytes())
        link = snapshot / path.relative_to(base)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def files_in(folder: Path) -> list[str]:
    """The paths of all files below a folder, hidden ones too."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
