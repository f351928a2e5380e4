"""The files of an adapter folder, read with every check: nothing damaged or of another version gets past here.

config.json         what it is for and how it was made (settings, ranks, base model, figures)
model.safetensors   layers.{i}.{k|v}.{down|up} and, where there are any, .bias and .down_bias; the settings once more
README.md           a model card with the same figures

A save over an older adapter may be killed between two files, and other files may lie in the folder, so that it cannot
be replaced as one. So the weights, which are replaced first and in one step, carry the settings that they were saved
with, and both files name the fingerprint of the adapter. Where these differ the weights' own settings are the right
ones: the folder is the old adapter up to that step, and the new one from then on.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cskv.adapter.base_model import BaseModelInfo
from cskv.adapter.hub import download
from cskv.config import CSKVConfig
from cskv.errors import AdapterError, ConfigError
from cskv.factorization.factors import Factors, LayerFactors
from cskv.files import tensors_writer, text_writer, write_together
from cskv.quantization.grid import Grid

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
CARD_FILE = "README.md"
FORMAT_VERSION = 2  # of commuting keys with a bias, which older releases would add unrotated; all others are 1
MODEL_TYPE = "cskv"
Widths = tuple[tuple[int, int], ...]  # runs of (bits, channels)


class Settings(NamedTuple):
    """The contents of a folder's `config.json`. Ranks are {"k": rank, "v": rank, "kv_dim": channels} by layer."""

    config: CSKVConfig
    base: BaseModelInfo
    ranks: dict[int, dict[str, int]]
    metrics: dict[str, Any]
    widths: dict[tuple[int, str], Widths]


def download_adapter(model_id: str, **kwargs: Any) -> Path:
    """Fetch an adapter's files from the hub into its local cache.

    Raises:
        AdapterError: the hub has no such repository, or cannot be reached.
    """
    refusal = f"no adapter folder {model_id!r} here, and the hub gave none"
    return download(model_id, refusal, AdapterError, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE, CARD_FILE], **kwargs)


def write_adapter(folder: Path, tensors: Mapping[str, Tensor], description: Mapping[str, Any], card: str) -> None:
    """Write an adapter folder, or replace the adapter in one; other files stay.

    Args:
        folder: made if absent.
        tensors: of `model.safetensors`.
        description: of `config.json`; its "fingerprint" is that of tensors and settings.
        card: of `README.md`.

    Raises:
        CSKVError: the folder cannot be written; then it is as it was.
    """
    config = json.dumps(description, indent=2, sort_keys=True) + "\n"
    # One entry, since their order is random, and no figures: equal adapters are equal files.
    metadata = {MODEL_TYPE: json.dumps(dict(description) | {"metrics": {}}, sort_keys=True)}
    files = {WEIGHTS_FILE: tensors_writer(tensors, metadata), CONFIG_FILE: text_writer(config)}
    write_together(folder, files | {CARD_FILE: text_writer(card)})


def is_adapter(path: str | Path) -> bool:
    """Return whether this is a local adapter folder."""
    try:
        read_description(Path(path).expanduser())
    except AdapterError:
        return False
    return True


def read_description(folder: str | Path) -> dict[str, Any]:
    """Read an adapter folder's `config.json`, or what its weights say in its place, and check that it is one of ours.

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
    description = _newest(description, Path(folder))
    version = description.get("format_version", 0)
    if type(version) is not int:
        raise AdapterError(f"{path} has format_version {version!r}; expected a whole number, at most {FORMAT_VERSION}")
    if version > FORMAT_VERSION:
        raise AdapterError(f"{folder} has adapter format {version}, this cskv reads {FORMAT_VERSION}; upgrade")
    return description


def _newest(description: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return what the weights were saved with, where `config.json` belongs to other ones."""
    path = folder / WEIGHTS_FILE
    if not path.exists():  # whoever needs the weights says that they are missing
        return description
    try:
        with _opened(path) as file:
            saved = json.loads((file.metadata() or {}).get(MODEL_TYPE, "{}"))
        ours, theirs = description.get("fingerprint"), saved.get("fingerprint")
    except (AttributeError, ValueError) as error:
        raise AdapterError(f"{path} holds damaged metadata ({error}); copy or save the adapter again") from error
    if ours == theirs:
        return description
    if theirs is None:
        raise AdapterError(
            f"{folder}: {CONFIG_FILE} and {WEIGHTS_FILE} were not saved together: the former names fingerprint {ours}, "
            "the latter none; copy or save the adapter again"
        )
    warnings.warn(
        f"{folder} was not saved to the end: its {CONFIG_FILE} is still that of an older adapter, and the settings in "
        f"{WEIGHTS_FILE} are taken; save the adapter again",
        stacklevel=5,
    )
    return saved


def read_settings(folder: Path) -> Settings:
    """Read a folder's `config.json` alone.

    Raises:
        AdapterError: it is missing, damaged, or of a newer format.
    """
    description = read_description(folder)
    try:
        settings = Settings(
            config=CSKVConfig.from_dict(description["compression"]),
            base=_base(description["base_model"]),
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
        ranks = {(index, kind): of[kind] for index, of in settings.ranks.items() for kind in ("k", "v")}
        check_widths(settings.config, ranks, settings.widths)
    except (AdapterError, ConfigError) as error:
        raise AdapterError(f"{folder / CONFIG_FILE}: {error}") from error
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise AdapterError(f"{folder / CONFIG_FILE} lacks or garbles {error}; the folder is damaged") from error
    return settings


def check_widths(
    config: CSKVConfig, ranks: Mapping[tuple[int, str], int], widths: Mapping[tuple[int, str], Widths]
) -> None:
    """Check that widths are of all latents of a projection, and that there are some only where settings mix them.

    A projection without widths keeps its latents in 16 bits.

    Raises:
        AdapterError: some are missing, too many, or out of range.
    """
    if bool(widths) != config.mixed_widths or not widths.keys() <= ranks.keys():
        raise AdapterError(
            f"widths are given for {len(widths)} projections; expected "
            + (f"some or all of the {len(ranks)}" if config.mixed_widths else "none without mixed_widths")
        )
    for part, runs in widths.items():
        try:
            total = Grid(runs, *config.block(part[1])).rank
        except ConfigError as error:
            raise AdapterError(f"layer {part[0]} {part[1]}: {error}") from error
        if total != ranks[part]:
            raise AdapterError(f"layer {part[0]} {part[1]} has {ranks[part]} latents, and widths for {total}")


def read_folder(folder: Path) -> tuple[Settings, dict[int, LayerFactors]]:
    """Read a folder's settings, and its factors by layer, and check that they agree with each other.

    Raises:
        AdapterError: a file is missing, damaged, or does not fit the others.
    """
    settings = read_settings(folder)
    tensors = _read_tensors(folder / WEIGHTS_FILE)
    layers = {index: _layer_from(tensors, folder, settings, index) for index in settings.ranks}
    if tensors:
        raise AdapterError(
            f"{folder / WEIGHTS_FILE} holds tensors that {CONFIG_FILE} does not name: {sorted(tensors)[:3]}"
        )
    return settings, layers


def read_layer(folder: Path, settings: Settings, index: int) -> LayerFactors:
    """Read the factors of one layer alone, with the same checks.

    Raises:
        AdapterError: as for `read_folder`.
    """
    return _layer_from(_read_tensors(folder / WEIGHTS_FILE, f"layers.{index}."), folder, settings, index)


def _base(values: dict[str, Any]) -> BaseModelInfo:
    facts = BaseModelInfo.from_dict(values)
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
    with _opened(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise AdapterError(f"{path}: {name} holds NaN or infinite values; train the adapter again")
    return tensors


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError as error:
        raise AdapterError(f"{path} is missing; the adapter folder is incomplete") from error
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{path} is truncated or corrupted ({error}); copy or train the adapter again") from error


def _layer_from(tensors: dict[str, Tensor], folder: Path, settings: Settings, index: int) -> LayerFactors:
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
    got = {"k": pair["k"].rank, "v": pair["v"].rank, "kv_dim": pair["k"].kv_dim}
    if got != settings.ranks[index]:
        raise AdapterError(
            f"{folder}: layer {index} has ranks {got} in {WEIGHTS_FILE}, {settings.ranks[index]} in {CONFIG_FILE}"
        )
    return LayerFactors(pair["k"], pair["v"])
