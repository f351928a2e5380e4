"""The trained compressor of one base model: factors for every compressed layer, kept as a folder.

    config.json         what it is for and how it was made (settings, ranks, base model, figures)
    model.safetensors   layers.{i}.{k|v}.{down|up} and, for biased projections, .bias
    README.md           a model card with the same figures

Every file is written atomically and nothing is pickled. `push_to_hub` comes from the hub's own mixin.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import PyTorchModelHubMixin, snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from cskv.atomic import write_tensors, write_text
from cskv.card import model_card
from cskv.config import CSKVConfig
from cskv.errors import AdapterError, ConfigError
from cskv.factorization.factors import Factors, LayerFactors
from cskv.quantization.grid import Grid

if TYPE_CHECKING:
    from cskv.models.sites import AttentionSite

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
CARD_FILE = "README.md"
FORMAT_VERSION = 1
MODEL_TYPE = "cskv"
Widths = tuple[tuple[int, int], ...]


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
        _check_widths(config, layers, self.widths)
        self.config = config
        self.base = base
        self.metrics: dict[str, Any] = dict(metrics or {})
        self.layers = nn.ModuleDict({str(index): _LayerModule(layers[index]) for index in sorted(layers)})

    @property
    def layer_indices(self) -> list[int]:
        """The compressed layers, by their index in the cache."""
        return [int(name) for name in self.layers]

    def factors(self, layer_idx: int) -> LayerFactors:
        """The factors of one layer. Their tensors are this module's parameters: gradients reach them."""
        if str(layer_idx) not in self.layers:
            raise AdapterError(f"the adapter has no layer {layer_idx}; it has {self.layer_indices}")
        return self.layers[str(layer_idx)].factors()  # type: ignore[operator]

    def grid(self, layer_idx: int, kind: str) -> Grid | None:
        """How latents of one layer's keys ("k") or values ("v") are stored; None leaves them in the model's dtype."""
        block = self.config.block(kind)
        if self.config.mixed_widths:
            return Grid(self.widths[layer_idx, kind], *block)
        bits = self.config.bits(kind)
        return None if bits == 16 else Grid.uniform(getattr(self.factors(layer_idx), kind).rank, bits, block)

    def grids(self, layer_idx: int) -> tuple[Grid | None, Grid | None]:
        """The grids of a layer's key and value latents."""
        return self.grid(layer_idx, "k"), self.grid(layer_idx, "v")

    def check_fits(self, base: BaseModelInfo, sites: list[AttentionSite]) -> None:
        """Compare with a base model.

        Raises:
            AdapterError: names, layers or shapes differ; the message says which.
        """
        for name in ("model_type", "hidden_size", "num_layers"):
            ours, theirs = getattr(self.base, name), getattr(base, name)
            if ours != theirs:
                raise AdapterError(
                    f"made for {self.base.name or 'a model'} with {name} {ours}, this model has {theirs}: "
                    "load the base model that it names"
                )
        indices = [site.layer_idx for site in sites]
        if indices != self.layer_indices:
            raise AdapterError(f"the adapter compresses layers {self.layer_indices}, this model's cache has {indices}")
        for site in sites:
            factors = self.factors(site.layer_idx)
            for kind, ours in (("k", factors.k), ("v", factors.v)):
                reads = site.kv_dim if kind == "k" and self.config.key_factors == "commuting" else site.hidden_size
                if (ours.kv_dim, ours.hidden_size) != (site.kv_dim, reads):
                    raise AdapterError(
                        f"layer {site.layer_idx} {kind}: the adapter maps {ours.hidden_size} to {ours.kv_dim} channels,"
                        f" the model {reads} to {site.kv_dim}"
                    )

    def describe(self) -> dict[str, Any]:
        """Everything that `config.json` holds."""
        description = {
            "model_type": MODEL_TYPE,
            "format_version": FORMAT_VERSION,
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
                str(i): {kind: [list(run) for run in self.widths[i, kind]] for kind in ("k", "v")}
                for i in self.layer_indices
            }
        return description

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write the folder, for `save_pretrained` and `push_to_hub`. The config is last: with it, all is there."""
        folder = Path(save_directory)
        write_tensors(folder / WEIGHTS_FILE, self.state_dict(), metadata={"format": "pt"})
        write_text(folder / CARD_FILE, model_card(self.describe()))
        write_text(folder / CONFIG_FILE, json.dumps(self.describe(), indent=2, sort_keys=True) + "\n")

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> str | None:
        """Write config.json, model.safetensors and the model card into a folder, each atomically.

        Args:
            save_directory: the folder, made if absent.
            **kwargs: the hub mixin's own (`repo_id`, `push_to_hub`, ...).

        Raises:
            CSKVError: the folder cannot be written.
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
        return _read_folder(folder if folder.is_dir() else _download(str(pretrained_model_name_or_path), **hub))


def _check_widths(
    config: CSKVConfig, layers: Mapping[int, LayerFactors], widths: Mapping[tuple[int, str], Widths]
) -> None:
    expected = {(index, kind): getattr(layers[index], kind).rank for index in layers for kind in ("k", "v")}
    if set(widths) != (set(expected) if config.mixed_widths else set()):
        raise AdapterError(
            f"widths are given for {len(widths)} projections; expected "
            + (f"all {len(expected)}" if config.mixed_widths else "none without mixed_widths")
        )
    for part, runs in widths.items():
        total = Grid(runs, *config.block(part[1])).rank
        if total != expected[part]:
            raise AdapterError(f"layer {part[0]} {part[1]} has {expected[part]} latents, and widths for {total}")


class _FactorModule(nn.Module):
    def __init__(self, factors: Factors) -> None:
        super().__init__()
        self.down = nn.Parameter(factors.down)
        self.up = nn.Parameter(factors.up)
        self.register_buffer("bias", factors.bias)
        self.register_buffer("down_bias", factors.down_bias)

    def factors(self) -> Factors:
        return Factors(self.down, self.up, self.bias, self.down_bias)  # type: ignore[arg-type]


class _LayerModule(nn.Module):
    def __init__(self, factors: LayerFactors) -> None:
        super().__init__()
        self.k = _FactorModule(factors.k)
        self.v = _FactorModule(factors.v)

    def factors(self) -> LayerFactors:
        return LayerFactors(self.k.factors(), self.v.factors())


def _download(model_id: str, **kwargs: Any) -> Path:
    try:
        return Path(snapshot_download(model_id, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE, CARD_FILE], **kwargs))
    except (OSError, HFValidationError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise AdapterError(f"no adapter folder {model_id!r} here, and the hub gave none: {first_line}") from error


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
    except (OSError, ValueError) as error:
        raise AdapterError(f"cannot read {path}: {error}") from error
    if not isinstance(description, dict) or description.get("model_type") != MODEL_TYPE:
        raise AdapterError(f"{folder} is not a cskv adapter: its {CONFIG_FILE} does not say model_type {MODEL_TYPE!r}")
    if description.get("format_version", 0) > FORMAT_VERSION:
        raise AdapterError(
            f"{folder} has adapter format {description['format_version']}, this cskv reads {FORMAT_VERSION}; upgrade"
        )
    return description


def _read_folder(folder: Path) -> CSKVAdapter:
    description = read_description(folder)
    try:
        config = CSKVConfig.from_dict(description["compression"])
        base = _base_from_dict(description["base_model"])
        ranks = {int(index): values for index, values in description["ranks"].items()}
        metrics = description.get("metrics", {})
        widths = {
            (int(index), kind): tuple((int(bits), int(channels)) for bits, channels in runs)
            for index, kinds in description.get("widths", {}).items()
            for kind, runs in kinds.items()
        }
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise AdapterError(f"{folder / CONFIG_FILE} lacks or garbles {error}; the folder is damaged") from error
    except ConfigError as error:
        raise AdapterError(f"{folder / CONFIG_FILE}: {error}") from error
    tensors = _read_tensors(folder / WEIGHTS_FILE)
    layers = {index: _layer_from(tensors, index, folder) for index in ranks}
    if tensors:
        raise AdapterError(
            f"{folder / WEIGHTS_FILE} holds tensors that {CONFIG_FILE} does not name: {sorted(tensors)[:3]}"
        )
    for index, layer in layers.items():
        got = {"k": layer.k.rank, "v": layer.v.rank, "kv_dim": layer.k.kv_dim}
        if got != ranks[index]:
            raise AdapterError(
                f"{folder}: layer {index} has ranks {got} in {WEIGHTS_FILE}, {ranks[index]} in {CONFIG_FILE}"
            )
    return CSKVAdapter(config, layers, base, metrics, widths)


def _base_from_dict(values: dict[str, Any]) -> BaseModelInfo:
    known = {field.name for field in dataclasses.fields(BaseModelInfo)}
    unknown = sorted(set(values) - known)
    if unknown:
        warnings.warn(f"ignoring unknown facts on the base model {unknown}: written by a newer cskv?", stacklevel=4)
    return BaseModelInfo(**{key: value for key, value in values.items() if key in known})


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors = load_file(path)
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
