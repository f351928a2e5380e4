"""A base model and its adapter as one checkpoint that vLLM loads: the base's files, and the adapter in a subfolder.

config.json     the base model's, with an architecture that the plugin knows and where the adapter is
cskv/           the adapter (`cskv.adapter.folder`)
...             the base model's weights, hard-linked where that is possible, and all its other files

What the plugin does not serve is refused here, before anything is written: a server that fails to start says less.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cskv.adapter.adapter import CSKVAdapter
from cskv.adapter.base_model import BaseModelInfo
from cskv.adapter.folder import CONFIG_FILE
from cskv.compression.budget import bytes_per_token
from cskv.errors import AdapterError, CSKVError, UnsupportedModelError
from cskv.files import write_folder, write_text
from cskv.models.signature import read_signature
from cskv.vllm.architectures import PREFIX
from cskv.vllm.source import SUBFOLDER, BaseConfig, BaseFiles, is_exported, list_files, read_config


@dataclass(frozen=True)
class ExportReport:
    """The result of an export.

    Attributes:
        folder: the checkpoint.
        base: the base model's folder.
        architecture: the one that `config.json` names now.
        window, group, sinks: see `CSKVConfig`.
        dtype: the one in which vLLM serves the model unless told otherwise.
        uncompressed_bytes_per_token: bytes of keys and values, all layers.
        bytes_per_token: bytes of latents, or of their codes and the parameters of full blocks; exact tokens aside.
        linked, copied: weight files that are hard links to the base's, and those that are copies.
        left_out: the base's weights in other formats.
    """

    folder: Path
    base: Path
    architecture: str
    window: int
    group: int
    sinks: int
    dtype: str
    uncompressed_bytes_per_token: int
    bytes_per_token: float
    linked: tuple[str, ...]
    copied: tuple[str, ...]
    left_out: tuple[str, ...]

    @property
    def ratio(self) -> float:
        """Compressed bytes per token over uncompressed ones."""
        return self.bytes_per_token / self.uncompressed_bytes_per_token

    @property
    def prefix_caching(self) -> bool:
        """Whether requests can share the pages of a common prefix: only where no tokens are kept exactly."""
        return self.window + self.group + self.sinks == 1

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON-ready values."""
        values = dataclasses.asdict(self)
        values |= {"folder": str(self.folder), "base": str(self.base)}
        values |= {name: list(values[name]) for name in ("linked", "copied", "left_out")}
        return values | {"ratio": self.ratio, "prefix_caching": self.prefix_caching}


def export(
    adapter: CSKVAdapter,
    base: Path,
    out: Path,
    *,
    window: int | None = None,
    group: int | None = None,
    sinks: int | None = None,
    copy: bool = False,
    overwrite: bool = False,
) -> ExportReport:
    """Write a checkpoint that vLLM loads. It is whole or absent.

    Args:
        adapter: one that compresses every layer of the base model. It is not changed.
        base: the base model's folder.
        out: the folder to write, absent or empty.
        window, group, sinks: in place of the adapter's.
        copy: never hard-link weights.
        overwrite: replace an earlier export in `out`.

    Raises:
        CSKVError: these do not belong together, the plugin does not serve them, or `out` cannot be written.
    """
    check_place(out, base, overwrite=overwrite)
    config = read_config(base)
    files = list_files(base)
    _check_layers(adapter, config, base, files)
    adapter = adapter.with_settings(window=window, group=group, sinks=sinks)
    linked: list[str] = []
    write_folder(
        out, lambda folder: linked.extend(_fill(folder, adapter, base, config, files, copy)), replace=overwrite
    )
    dtype = served_dtype(config)
    uncompressed, compressed = bytes_per_token(adapter, dtype)
    return ExportReport(
        folder=out,
        base=base,
        architecture=PREFIX + config.architecture,
        window=adapter.config.window,
        group=adapter.config.group,
        sinks=adapter.config.sinks,
        dtype=str(dtype).removeprefix("torch."),
        uncompressed_bytes_per_token=uncompressed,
        bytes_per_token=compressed,
        linked=tuple(linked),
        copied=tuple(name for name in files.weights if name not in linked),
        left_out=files.left_out,
    )


def check_place(out: Path, *sources: Path, overwrite: bool = False) -> None:
    """Check that a checkpoint can be written there.

    Args:
        out: the folder to write.
        sources: folders that are read, which `out` must be apart from.
        overwrite: whether an earlier export may be there.

    Raises:
        CSKVError: it would destroy something.
    """
    place = out.resolve()
    for source in (source.resolve() for source in sources):
        if place == source or place in source.parents or source in place.parents:
            raise CSKVError(f"{out} is, lies in or holds {source}, which is read; choose a folder apart from it")
    if place.exists() and not place.is_dir():
        raise CSKVError(f"{out} is a file; choose a folder that does not exist")
    if not place.exists() or not any(place.iterdir()):
        return
    if not overwrite:
        raise CSKVError(f"{out} is not empty; choose another folder, or give --overwrite to replace an earlier export")
    try:
        replaceable = is_exported(json.loads((place / CONFIG_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError, LookupError, TypeError):
        replaceable = False
    if not replaceable:
        raise CSKVError(f"{out} holds something other than an earlier export, which --overwrite does not delete")


def served_dtype(config: BaseConfig) -> torch.dtype:
    """Return the dtype in which vLLM serves a model unless told otherwise: the config's, or bfloat16 for float32."""
    named = config.text.dtype or config.values.get("dtype") or config.values.get("torch_dtype")
    dtype = getattr(torch, named.removeprefix("torch."), None) if isinstance(named, str) else named
    return dtype if dtype in (torch.float16, torch.bfloat16) else torch.bfloat16


class _Layer(NamedTuple):
    """An attention layer as the config describes it (`cskv.adapter.base_model.LayerShape`)."""

    layer_idx: int
    kv_dim: int
    hidden_size: int


class _Described(NamedTuple):
    """A model as its config describes it (`cskv.adapter.base_model.Surveyed`)."""

    base: BaseModelInfo
    sites: list[_Layer]


def _check_layers(adapter: CSKVAdapter, config: BaseConfig, base: Path, files: BaseFiles) -> None:
    text = config.text
    heads = getattr(text, "num_attention_heads", None)
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    if not isinstance(kv_heads, int) or not isinstance(heads, int):
        raise UnsupportedModelError(f"{base / CONFIG_FILE} gives no one number of heads for all layers")
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    layers = range(text.num_hidden_layers)
    info = BaseModelInfo.from_config(text, str(base))
    kinds = getattr(text, "layer_types", None)
    if kinds is None:
        slides = getattr(text, "sliding_window", None) is not None and getattr(text, "use_sliding_window", True)
        kinds = ["sliding_attention"] if slides else []
    if others := sorted(set(kinds) - {"full_attention"}):
        raise UnsupportedModelError(
            f"{base} has layers of {', '.join(others)}; with vLLM only models whose layers all attend to all tokens "
            "are served, others run with transformers (cskv.attach)"
        )
    adapter.base.check_same(info, "the adapter was made for", "give the base model that it names")
    if adapter.layer_indices != list(layers):
        raise AdapterError(
            f"the adapter compresses layers {adapter.layer_indices} of {len(layers)}; with vLLM all or none are: train "
            "one for every layer"
        )
    sites = [_Layer(index, kv_heads * head_dim, text.hidden_size) for index in layers]
    signature = read_signature([base / name for name in files.weights], sites)
    adapter.check_fits(_Described(dataclasses.replace(info, signature=signature), sites))


def _fill(
    folder: Path, adapter: CSKVAdapter, base: Path, config: BaseConfig, files: BaseFiles, copy: bool
) -> list[str]:
    """Write the checkpoint's files and return the names of the weights that were hard-linked."""
    linked = [name for name in files.weights if _place(base / name, folder / name, link=not copy)]
    for name in files.others:
        _place(base / name, folder / name, link=False)
    adapter.save_pretrained(folder / SUBFOLDER)
    values = config.values | {"architectures": [PREFIX + config.architecture], "cskv": {"adapter": SUBFOLDER}}
    write_text(folder / CONFIG_FILE, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
    return linked


def _place(source: Path, target: Path, *, link: bool) -> bool:
    """Link or copy a file, through symlinks (the hub's cache is made of them), and tell whether it was linked."""
    target.parent.mkdir(parents=True, exist_ok=True)
    source = source.resolve()
    if link:
        try:
            os.link(source, target)
            return True
        except OSError:  # another file system, or one without hard links: if copying fails too, it says why
            target.unlink(missing_ok=True)
    shutil.copyfile(source, target)
    return False
