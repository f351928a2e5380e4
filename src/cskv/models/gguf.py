"""Models in GGUF files, llama.cpp's format: read dequantised by transformers' own reader, and named by one string.

A base is named `folder/file.gguf`, or on the hub `owner/name/file.gguf`. transformers names folder and file apart,
prefers a file of that name in the working folder, leaves weights that the file lacks random, and does not know how the
file scales rotary frequencies. So all commands and loaders come here.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cskv.adapter.base_model import SUFFIX, hub_file
from cskv.adapter.hub import download
from cskv.errors import CSKVError, UnsupportedModelError, first_line
from cskv.models.gguf_header import Header, read_header
from cskv.models.gguf_rope import scaled_rope

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CONFIG_FILE = "config.json"


def checkpoint_name(path: str, gguf_file: str | None = None) -> str:
    """Return the one name of a base model.

    Args:
        path: a folder, a GGUF file, or a hub id.
        gguf_file: name of a GGUF file in the folder or repository.

    Returns:
        The path as it is, or the path of a GGUF file: the given one, or the only one of a folder without `config.json`.

    Raises:
        CSKVError: a file was given twice, or the folder holds several.
    """
    if gguf_file is not None:
        if is_gguf(path):
            raise CSKVError(f"{path} is a file, and so is --gguf-file {gguf_file}; give a folder or hub id with it")
        return f"{path.rstrip('/')}/{gguf_file}"
    folder = Path(path).expanduser()
    if not folder.is_dir() or (folder / CONFIG_FILE).is_file():
        return path
    found = sorted(file.name for file in folder.iterdir() if file.name.lower().endswith(SUFFIX))
    if len(found) > 1:
        raise CSKVError(f"{path} holds {len(found)} GGUF files; name one with --gguf-file: {', '.join(found)}")
    return f"{path.rstrip('/')}/{found[0]}" if found else path


def is_gguf(name: str | Path) -> bool:
    """Tell whether a base model's name is one of a GGUF file, by its end, or because there is a file of any name."""
    return str(name).lower().endswith(SUFFIX) or Path(name).expanduser().is_file()


def find_gguf(name: str | Path, **hub: Any) -> Header:
    """Find a GGUF file, here or on the hub, and check that it is whole.

    Args:
        name: its path, or `owner/name/file.gguf`.
        hub: arguments of the download (`revision`, `token`, ...).

    Raises:
        CSKVError: there is none, the package gguf is missing, or it is damaged, or one part of several.
    """
    path, remote = Path(name).expanduser(), hub_file(str(name))
    if not path.is_file() and remote is None:
        raise CSKVError(f"GGUF file {str(name)!r} does not exist; expected a file, or owner/name/file.gguf on the hub")
    if find_spec("gguf") is None:
        raise CSKVError(f"reading {name} needs the package gguf: pip install 'cskv[gguf]'")
    if not path.is_file() and remote is not None:
        repository, file = remote
        path = download(
            repository, f"no GGUF file {str(name)!r} here, and the hub gave none", allow_patterns=[file], **hub
        )
        path /= file
        if not path.is_file():
            raise CSKVError(f"{repository} on the hub has no file {file!r}")
    from gguf import GGML_QUANT_SIZES

    header = read_header(path)
    if (parts := header.values.get("split.count", 0)) > 1:
        raise CSKVError(f"{path} is one part of {parts}; join them with llama.cpp's llama-gguf-split --merge")
    whole = header.end({int(kind): size for kind, size in GGML_QUANT_SIZES.items()})
    if path.stat().st_size < whole:
        raise CSKVError(
            f"{path} is truncated: it has {path.stat().st_size:,} bytes of {whole:,}; copy or download it again"
        )
    return header


def load_gguf(name: str | Path, *model_args: Any, dtype: Any = "auto", **kwargs: Any) -> PreTrainedModel:
    """Load the model of a GGUF file, dequantised.

    Args:
        name: as for `find_gguf`.
        model_args: for transformers' `from_pretrained`.
        dtype: of the weights; "auto" or None is bfloat16.
        kwargs: for transformers' `from_pretrained`. Hub arguments go to the download.

    Raises:
        CSKVError: there is no such file, or it is damaged.
        UnsupportedModelError: transformers cannot read the architecture, the file lacks weights, or it scales rotary
            frequencies in a way that is not known.
    """
    import torch
    import transformers

    hub = {
        key: kwargs.pop(key)
        for key in ("revision", "cache_dir", "force_download", "local_files_only", "token")
        if key in kwargs
    }
    header = find_gguf(name, **hub)
    folder, file = _place(header.path)
    if hasattr(transformers, "GgufConfig"):  # older releases dequantise always
        kwargs["quantization_config"] = transformers.GgufConfig(gguf_file=file, dequantize=True)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, gguf_file=file)
        scaled_rope(header, config)
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            *model_args,
            config=config,
            gguf_file=file,
            dtype=torch.bfloat16 if dtype in (None, "auto") else dtype,
            output_loading_info=True,
            **kwargs,
        )
    except CSKVError:
        raise
    except Exception as error:  # transformers and gguf raise KeyError, ValueError, NotImplementedError and others
        raise UnsupportedModelError(f"transformers cannot read {name}: {first_line(error)}") from error
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise UnsupportedModelError(
            f"{name} lacks {len(missing)} weights of a {config.model_type}, for instance {missing[0]}; give a file "
            "that holds a whole model"
        )
    _make_plain(model, str(name))
    if remote := hub_file(str(name)):
        model.config._commit_hash = header.path.parents[remote[1].count("/")].name
    return model


def load_gguf_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a GGUF file, its chat template included.

    Raises:
        CSKVError: there is no such file, or it is damaged.
        UnsupportedModelError: transformers cannot read its tokenizer.
    """
    from transformers import AutoTokenizer

    folder, file = _place(find_gguf(name).path)
    try:
        return AutoTokenizer.from_pretrained(folder, gguf_file=file)
    except Exception as error:  # as above
        raise UnsupportedModelError(f"transformers cannot read the tokenizer of {name}: {first_line(error)}") from error


def save_dequantised(name: str | Path, folder: Path) -> None:
    """Write the model of a GGUF file as bf16 safetensors with tokenizer, chat template and generation settings.

    Raises:
        CSKVError: the file cannot be read.
    """
    load_gguf(name).save_pretrained(folder)
    load_gguf_tokenizer(name).save_pretrained(folder)


def _place(path: Path) -> tuple[str, str]:
    """Return what transformers takes: the folder, and the absolute path of the file."""
    file = os.path.abspath(path)
    return os.path.dirname(file), file


def _make_plain(model: Any, name: str) -> None:
    """Name a model by its file, and leave nothing that says that its weights are packed."""
    model.config.name_or_path = name
    for holder, attribute in ((model.config, "quantization_config"), (model, "hf_quantizer")):
        if hasattr(holder, attribute):
            delattr(holder, attribute)
    model.config.__dict__.pop("_model_name_or_path", None)
