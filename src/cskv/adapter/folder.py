"""The files of an adapter folder, read with every check: nothing damaged or of another version gets past here.

config.json         what it is for and how it was made (settings, ranks, base model, figures)
model.safetensors   layers.{i}.{k|v}.{down|up} and, where there are any, .bias and .down_bias
README.md           a model card with the same figures
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cskv.adapter.base_model import BaseModelInfo
from cskv.config import CSKVConfig
from cskv.errors import AdapterError, ConfigError, first_line
from cskv.factorization.factors import Factors, LayerFactors
from cskv.quantization.grid import Grid

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
CARD_FILE = "README.md"
FORMAT_VERSION = 1
MODEL_TYPE = "cskv"
Widths = tuple[tuple[int, int], ...]  # runs of (bits, channels)


class Settings(NamedTuple):
    """What a folder's `config.json` says. Ranks are {"k": rank, "v": rank, "kv_dim": channels} by layer."""

    config: CSKVConfig
    base: BaseModelInfo
    ranks: dict[int, dict[str, int]]
    metrics: dict[str, Any]
    widths: dict[tuple[int, str], Widths]


class Contents(NamedTuple):
    """What a folder holds."""

    config: CSKVConfig
    layers: dict[int, LayerFactors]
    base: BaseModelInfo
    metrics: dict[str, Any]
    widths: dict[tuple[int, str], Widths]


def download(model_id: str, **kwargs: Any) -> Path:
    """An adapter's files from the hub, in its local cache.

    Raises:
        AdapterError: the hub has no such repository, or cannot be reached.
    """
    try:
        return Path(snapshot_download(model_id, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE, CARD_FILE], **kwargs))
    except (OSError, HFValidationError) as error:
        raise AdapterError(
            f"no adapter folder {model_id!r} here, and the hub gave none: {first_line(error)}"
        ) from error


def is_adapter(path: str | Path) -> bool:
    """Return whether this is a local adapter folder."""
    try:
        read_description(Path(path).expanduser())
    except AdapterError:
        return False
    return True


def read_description(folder: str | Path) -> dict[str, Any]:
    """The contents of an adapter folder's `config.json`, checked to be one of ours.

    Raises:
        AdapterError: it is missing, no JSON, not a cskv adapter, or of a newer format.
    """
    path = Path(folder) / CONFIG_FILE
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise AdapterError(f"{folder} has no {CONFIG_FILE}; expected a folder that `cskv train` wrote") from error
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"cannot read {path}: {error}") from error
    if not isinstance(description, dict) or description.get("model_type") != MODEL_TYPE:
        raise AdapterError(f"{folder} is not a cskv adapter: its {CONFIG_FILE} does not say model_type {MODEL_TYPE!r}")
    version = description.get("format_version", 0)
    if type(version) is not int:
        raise AdapterError(f"{path} has format_version {version!r}; expected a whole number, at most {FORMAT_VERSION}")
    if version > FORMAT_VERSION:
        raise AdapterError(f"{folder} has adapter format {version}, this cskv reads {FORMAT_VERSION}; upgrade")
    return description


def read_settings(folder: Path) -> Settings:
    """Read a folder's `config.json` alone.

    Raises:
        AdapterError: it is missing, damaged, or of a newer format.
    """
    description = read_description(folder)
    try:
        settings = Settings(
            config=CSKVConfig.from_dict(description["compression"]),
            base=_base_from_dict(description["base_model"]),
            ranks={
                int(index): {name: _whole(values[name]) for name in ("k", "v", "kv_dim")}
                for index, values in description["ranks"].items()
            },
            metrics=_checked("metrics", description.get("metrics", {}), dict),
            widths={
                (int(index), kind): tuple((_whole(bits), _whole(channels)) for bits, channels in runs)
                for index, kinds in description.get("widths", {}).items()
                for kind, runs in kinds.items()
            },
        )
    except ConfigError as error:
        raise AdapterError(f"{folder / CONFIG_FILE}: {error}") from error
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise AdapterError(f"{folder / CONFIG_FILE} lacks or garbles {error}; the folder is damaged") from error
    ranks = {(index, kind): of[kind] for index, of in settings.ranks.items() for kind in ("k", "v")}
    try:
        check_widths(settings.config, ranks, settings.widths)
    except AdapterError as error:
        raise AdapterError(f"{folder / CONFIG_FILE}: {error}") from error
    return settings


def check_widths(
    config: CSKVConfig, ranks: Mapping[tuple[int, str], int], widths: Mapping[tuple[int, str], Widths]
) -> None:
    """Check that there are widths for all latents of every projection, or none where settings do not mix them.

    Raises:
        AdapterError: some are missing, too many, or out of range.
    """
    if set(widths) != (set(ranks) if config.mixed_widths else set()):
        raise AdapterError(
            f"widths are given for {len(widths)} projections; expected "
            + (f"all {len(ranks)}" if config.mixed_widths else "none without mixed_widths")
        )
    for part, runs in widths.items():
        try:
            total = Grid(runs, *config.block(part[1])).rank
        except ConfigError as error:
            raise AdapterError(f"layer {part[0]} {part[1]}: {error}") from error
        if total != ranks[part]:
            raise AdapterError(f"layer {part[0]} {part[1]} has {ranks[part]} latents, and widths for {total}")


def read_folder(folder: Path) -> Contents:
    """Read a folder and check that its files agree with each other.

    Raises:
        AdapterError: a file is missing, damaged, or does not fit the others.
    """
    settings = read_settings(folder)
    tensors = _read_tensors(folder / WEIGHTS_FILE)
    layers = {index: _layer_from(tensors, index, folder) for index in settings.ranks}
    if tensors:
        raise AdapterError(
            f"{folder / WEIGHTS_FILE} holds tensors that {CONFIG_FILE} does not name: {sorted(tensors)[:3]}"
        )
    for index, layer in layers.items():
        _check_ranks(folder, index, layer, settings)
    return Contents(settings.config, layers, settings.base, settings.metrics, settings.widths)


def read_layer(folder: Path, settings: Settings, index: int) -> LayerFactors:
    """The factors of one layer alone, with the same checks.

    Raises:
        AdapterError: as for `read_folder`.
    """
    layer = _layer_from(_read_tensors(folder / WEIGHTS_FILE, f"layers.{index}."), index, folder)
    _check_ranks(folder, index, layer, settings)
    return layer


def _check_ranks(folder: Path, index: int, layer: LayerFactors, settings: Settings) -> None:
    got = {"k": layer.k.rank, "v": layer.v.rank, "kv_dim": layer.k.kv_dim}
    if got != settings.ranks[index]:
        raise AdapterError(
            f"{folder}: layer {index} has ranks {got} in {WEIGHTS_FILE}, {settings.ranks[index]} in {CONFIG_FILE}"
        )


def _base_from_dict(values: dict[str, Any]) -> BaseModelInfo:
    known = {field.name for field in dataclasses.fields(BaseModelInfo)}
    unknown = sorted(set(values) - known)
    if unknown:
        warnings.warn(f"ignoring unknown facts on the base model {unknown}: written by a newer cskv?", stacklevel=5)
    facts = BaseModelInfo(**{key: value for key, value in values.items() if key in known})
    for name, kind in get_type_hints(BaseModelInfo).items():
        _checked(f"the base model's {name}", getattr(facts, name), kind)
    return facts


def _whole(value: object) -> int:
    return _checked("the number", value, int)


def _checked(name: str, value: Any, kind: Any) -> Any:
    """Return a value of `config.json`, found to be of a type.

    Raises:
        TypeError: it is of another one.
    """
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{name} {value!r} (expected {getattr(kind, '__name__', kind)})")
    return value


def _read_tensors(path: Path, prefix: str = "") -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118
    except FileNotFoundError as error:
        raise AdapterError(f"{path} is missing; the adapter folder is incomplete") from error
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{path} is truncated or corrupted ({error}); copy or train the adapter again") from error
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise AdapterError(f"{path}: {name} holds NaN or infinite values; train the adapter again")
    return tensors


def _layer_from(tensors: dict[str, Tensor], index: int, folder: Path) -> LayerFactors:
    pair = {}
    for kind in ("k", "v"):
        prefix = f"layers.{index}.{kind}"
        try:
            down, up = tensors.pop(f"{prefix}.down"), tensors.pop(f"{prefix}.up")
        except KeyError as error:
            raise AdapterError(f"{folder / WEIGHTS_FILE} lacks {error}; the adapter folder is damaged") from error
        bias, down_bias = tensors.pop(f"{prefix}.bias", None), tensors.pop(f"{prefix}.down_bias", None)
        fits = down.ndim == up.ndim == 2 and 0 < up.shape[1] <= down.shape[0] and down.shape[0] % up.shape[1] == 0
        fits = fits and up.shape[0] % (down.shape[0] // up.shape[1]) == 0
        for side, of in ((bias, up), (down_bias, down)):
            fits = fits and (side is None or side.shape == of.shape[:1])
        if not fits:
            raise AdapterError(
                f"{folder / WEIGHTS_FILE}: {prefix} has down {tuple(down.shape)} and up {tuple(up.shape)}"
            )
        pair[kind] = Factors(down, up, bias, down_bias)
    return LayerFactors(pair["k"], pair["v"])
