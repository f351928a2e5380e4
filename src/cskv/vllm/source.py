"""The base model that an exported checkpoint is made of: where it is, what its config says, which files are taken.

Pickled weights are left out, and so is what would make vLLM read something other than the exported config: where it
finds `consolidated*.safetensors`, it takes Mistral's own format and never looks at `config.json`.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from transformers import AutoConfig, PretrainedConfig

from cskv.adapter.folder import CONFIG_FILE, MODEL_TYPE
from cskv.errors import AdapterError, CSKVError, UnsupportedModelError, first_line
from cskv.vllm.architectures import PREFIX

SUBFOLDER = "cskv"  # of the checkpoint, where the adapter is
INDEX_FILE = "model.safetensors.index.json"
OTHER_WEIGHTS = (
    "*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.h5",
    "*.msgpack",
    "*.onnx",
    "*.gguf",
    "consolidated*.safetensors",
)


@dataclass(frozen=True)
class BaseFiles:
    """Files of a base model's folder, by their path in it.

    Attributes:
        weights: safetensors.
        others: tokenizer, generation settings and whatever else there is.
        left_out: weights in other formats.
    """

    weights: tuple[str, ...]
    others: tuple[str, ...]
    left_out: tuple[str, ...]


@dataclass(frozen=True)
class BaseConfig:
    """A base model's `config.json`.

    Attributes:
        values: as they are in the file.
        text: the language model's part as transformers and vLLM read it, with the defaults of its family.
        architecture: the class that the file names.
    """

    values: dict[str, Any]
    text: PretrainedConfig
    architecture: str


def download_base(model_id: str, revision: str | None = None) -> Path:
    """A base model's files from the hub, in its local cache, without weights in other formats than safetensors.

    Raises:
        CSKVError: the hub has no such repository, or cannot be reached.
    """
    ignored = [*OTHER_WEIGHTS, "*/*.safetensors", ".*"]
    try:
        return Path(snapshot_download(model_id, revision=revision, ignore_patterns=ignored))
    except (OSError, HFValidationError) as error:
        raise CSKVError(f"no model folder {model_id!r} here, and the hub gave none: {first_line(error)}") from error


def read_config(base: Path) -> BaseConfig:
    """The config of a base model's folder.

    Raises:
        CSKVError: it is missing or damaged, of an adapter or an exported checkpoint, or of a family not known here.
    """
    path = base / CONFIG_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CSKVError(f"{base} has no {CONFIG_FILE}; expected a model folder in Hugging Face format") from error
    except (OSError, ValueError) as error:
        raise CSKVError(f"cannot read {path}: {error}; copy or download the model again") from error
    if not isinstance(values, dict):
        raise CSKVError(f"{path} holds {type(values).__name__}; expected a JSON object, the config of a model")
    if values.get("model_type") == MODEL_TYPE:
        raise AdapterError(f"{base} is an adapter; expected the folder of its base model, give that with --model-path")
    architectures = values.get("architectures")
    if not isinstance(architectures, list) or not architectures or not isinstance(architectures[0], str):
        raise UnsupportedModelError(
            f"{path} names no architectures, got {architectures!r}; expected for instance ['LlamaForCausalLM']: add it"
        )
    if is_exported(values) or (base / SUBFOLDER).exists():
        raise UnsupportedModelError(
            f"{base} is an exported checkpoint already, or holds a {SUBFOLDER!r} of its own; expected a base model, "
            "give that with --model-path"
        )
    try:
        text = AutoConfig.from_pretrained(base, trust_remote_code=False).get_text_config(decoder=True)
    except (OSError, ValueError, KeyError) as error:
        raise UnsupportedModelError(f"transformers cannot read {path}: {first_line(error)}") from error
    return BaseConfig(values, text, architectures[0])


def is_exported(values: dict[str, Any]) -> bool:
    """Whether these are the values of an exported checkpoint's `config.json`."""
    architectures = values.get("architectures") or [""]
    return SUBFOLDER in values and str(architectures[0]).startswith(PREFIX)


def list_files(base: Path) -> BaseFiles:
    """What of a base model's folder is taken and what is not; hidden files and `config.json` are in neither.

    Weights are those that vLLM reads: what the index names or else all at the top, and none in folders below.

    Raises:
        CSKVError: there are no safetensors, or not all that the index names.
    """
    found = []
    for folder, folders, names in os.walk(base):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = (Path(folder, name) for name in sorted(names) if not name.startswith("."))
        found += [path.relative_to(base).as_posix() for path in paths if path.is_file() and path != base / CONFIG_FILE]
    left_out = [path for path in found if any(fnmatch(Path(path).name, pattern) for pattern in OTHER_WEIGHTS)]
    tensors = [path for path in found if path.endswith(".safetensors") and path not in left_out]
    weights = [path for path in tensors if "/" not in path]
    if INDEX_FILE in found:
        weights = _indexed(base, weights)
    if not weights:
        raise CSKVError(
            f"{base} has no weights as *.safetensors (pickled ones are never read); load the model with transformers "
            "and save it again with save_pretrained"
        )
    left_out += [path for path in tensors if path not in weights]
    skipped = {*weights, *left_out}
    return BaseFiles(tuple(weights), tuple(path for path in found if path not in skipped), tuple(left_out))


def _indexed(base: Path, weights: list[str]) -> list[str]:
    """The weights that the index names."""
    try:
        named = set(json.loads((base / INDEX_FILE).read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CSKVError(f"cannot read {base / INDEX_FILE}: {error!r}; copy or download the model again") from error
    missing = sorted(named - set(weights))
    if missing:
        raise CSKVError(
            f"{base} lacks {len(missing)} of the {len(named)} weight files that {INDEX_FILE} names, for instance "
            f"{missing[0]}; copy or download the model again"
        )
    return sorted(named)
