"""Loading models, tokenizers and devices with errors that a person can act on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cskv.errors import CSKVError, first_line

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from cskv.data.samples import TokenSamples

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


def load_model(
    path: str, *, attn_impl: str | None = None, dtype: str = "auto", device: str = "auto", device_map: str | None = None
) -> PreTrainedModel:
    """Load a causal language model in evaluation mode.

    Args:
        path: folder, hub id or GGUF file, which is dequantised.
        attn_impl: transformers' `attn_implementation`, or None for its default.
        dtype: one of `DTYPES`; "auto" is the checkpoint's own, of GGUF bfloat16.
        device: where all of it goes; "auto" is a GPU if there is one. Ignored when `device_map` is given.
        device_map: Accelerate's placement over several devices, one of `DEVICE_MAPS`, or the name of a device.

    Raises:
        CSKVError: no such model, a damaged or unsupported one, an adapter, or an unknown dtype or device.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM

    from cskv.adapter.folder import MODEL_TYPE
    from cskv.models.gguf import is_gguf, load_gguf

    if dtype not in DTYPES:
        raise CSKVError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    if device_map is not None and device_map not in DEVICE_MAPS:
        find_device(device_map)
    target = None if device_map else find_device(device)
    path = check_model(path)
    model: Any
    kwargs: dict[str, Any] = {"dtype": dtype}
    kwargs |= {"attn_implementation": attn_impl} if attn_impl else {}
    kwargs |= {"device_map": device_map} if device_map else {}
    try:
        if is_gguf(path):
            model = load_gguf(path, **kwargs)
        elif AutoConfig.from_pretrained(os.path.expanduser(path)).model_type == MODEL_TYPE:
            raise CSKVError(f"{path} is an adapter; give the model that it was made for")
        else:
            model = AutoModelForCausalLM.from_pretrained(os.path.expanduser(path), **kwargs)
    except CSKVError:
        raise
    except SafetensorError as error:
        raise CSKVError(f"the weights of {path} are truncated or corrupted: {error}") from error
    except Exception as error:  # what a damaged config or a missing package raises somewhere inside transformers
        raise CSKVError(f"cannot load the model {path}: {first_line(error)}") from error
    if target is not None:
        model = model.to(target)
    return model.eval()


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer beside a model, or in its GGUF file.

    Raises:
        CSKVError: there is none, or it is damaged.
    """
    from transformers import AutoTokenizer

    from cskv.models.gguf import is_gguf, load_gguf_tokenizer

    path = check_model(path)
    if is_gguf(path):
        return load_gguf_tokenizer(path)
    try:
        return AutoTokenizer.from_pretrained(os.path.expanduser(path))
    except Exception as error:  # tokenizers raises bare Exception for a file it cannot parse
        raise CSKVError(f"cannot load the tokenizer of {path}: {first_line(error)}") from error


def load_samples(name: str, model_path: str, num_samples: int, sample_len: int, seed: int) -> TokenSamples:
    """Open a named text as samples of a model's tokens, after finding out that there is at least one.

    Raises:
        CSKVError: the model has no tokenizer, or a damaged one.
        DataError: no such text, an empty one, or one shorter than a sample.
    """
    from cskv.data.samples import TokenSamples
    from cskv.data.sources import open_source

    tokenizer = load_tokenizer(model_path)  # before the text, which may have to be downloaded
    samples = TokenSamples(open_source(name), tokenizer, num_samples, sample_len, seed)
    next(iter(samples))
    return samples


def find_device(name: str) -> torch.device:
    """Return the device of that name; "auto" is this process's GPU, where there is none the CPU.

    Raises:
        CSKVError: no such device here.
    """
    import torch

    if name == "auto":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
        name = "mps" if torch.backends.mps.is_available() else name
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:  # torch built without CUDA asserts
        raise CSKVError(f"device {name!r} cannot be used here: {first_line(error)}") from error
    if device.type == "meta":
        raise CSKVError("device 'meta' holds no data; expected auto, cpu, cuda, cuda:1, mps, ...")
    return device


def check_model(path: str) -> str:
    """Return a base model's one name, and say at once that it is missing, instead of asking the hub for a model of it.

    Raises:
        CSKVError: a folder is missing, has no config, or several GGUF files.
    """
    from cskv.models.gguf import checkpoint_name, is_gguf

    path = checkpoint_name(path)
    folder = Path(path).expanduser()
    is_local = path.startswith((".", "/", "~")) or path.count("/") > 1  # a hub id is `name` or `owner/name`
    if is_gguf(path):  # its loader checks it
        return path
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise CSKVError(
                f"{path} has no config.json; expected a model folder in Hugging Face format, or a .gguf file"
            )
    elif is_local:
        raise CSKVError(f"model folder {path!r} does not exist; give a folder in Hugging Face format or a hub id")
    return path
