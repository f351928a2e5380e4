"""Arguments of `--model_args`, checked before a model is loaded."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from cskv.adapter.adapter import CSKVAdapter
from cskv.adapter.folder import is_adapter
from cskv.config import CSKVConfig
from cskv.errors import AdapterError, ConfigError
from cskv.evaluation.decoding import IN_PREFILL, PROTOCOLS

NONE = "none"  # the uncompressed model, read in the same way
MISSING: Any = object()  # a string of arguments gives None for "none"

CHUNKS, PARALLEL = "chunks", "parallel"

# The harness hands what it does not know to `from_pretrained`, where a misspelt name is an error of many lines or none.
FROM_PRETRAINED = (
    *("attn_implementation", "cache_dir", "code_revision", "device_map", "force_download", "local_files_only"),
    *("low_cpu_mem_usage", "max_memory", "token", "use_safetensors", "variant", "quantization_config"),
    *("load_in_4bit", "load_in_8bit", "bnb_4bit_compute_dtype", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant"),
    *("rope_parameters", "rope_scaling", "rope_theta", "sliding_window"),
)
MERGE = "merge it into the weights, and make an adapter for the merged model"
REFUSED = {
    "peft": f"it changes the projections that the adapter was made for; {MERGE}",
    "delta": f"it changes the projections that the adapter was made for; {MERGE}",
    "autogptq": "its models are not transformers' own; load a GPTQ checkpoint through transformers (pretrained=...)",
    "gptqmodel": "its models are not transformers' own; load a GPTQ checkpoint through transformers (pretrained=...)",
    "tp_plan": "keys and values of one layer would lie on several devices; use parallelize=True",
    "mixed_precision_dtype": "the cache holds one dtype; load the model in it with dtype=...",
}


@dataclass(frozen=True)
class Compressor:
    """A compressor and the model that it is put on.

    Attributes:
        adapter: None for the uncompressed model.
        name: what was asked for, for the results.
        base: name of the base model, or a loaded one.
        revision: of the base on the hub.
        window, group, sinks: tokens, as the cache seals them; without an adapter only the sizes of chunks.
    """

    adapter: CSKVAdapter | None
    name: str
    base: Any
    revision: str
    window: int
    group: int
    sinks: int


def find_compressor(
    adapter: str | CSKVAdapter | None,
    pretrained: Any,
    revision: str | None = None,
    window: int | None = None,
    group: int | None = None,
    sinks: int | None = None,
) -> Compressor:
    """Load the adapter and find its base model.

    Args:
        adapter: folder or hub id; "none" or None for no compression; or an adapter.
        pretrained: folder or hub id of the base model, or a loaded one; None for the one that the adapter names.
        revision: of the base; None for the adapter's own, or "main".
        window, group, sinks: in place of the adapter's.

    Raises:
        AdapterError: there is no such adapter, it is damaged, or no base model is named.
        ConfigError: nothing was given for `adapter`, or the window, group or sinks are out of range.
    """
    if isinstance(pretrained, str) and is_adapter(pretrained):
        raise AdapterError(f"pretrained={pretrained} is an adapter; give it as adapter=..., and the base model here")
    if adapter is MISSING:
        raise ConfigError(
            "no adapter was given; expected adapter=FOLDER_OR_HUB_ID in --model_args, or adapter=none with "
            "pretrained=MODEL for the uncompressed model read in the same way"
        )
    if adapter is None or (isinstance(adapter, str) and adapter.lower() == NONE):
        if pretrained is None:
            raise ConfigError("adapter=none names no base model; give it with pretrained=MODEL")
        given = {"window": window, "group": group, "sinks": sinks}
        sizes = CSKVConfig(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
        return Compressor(None, NONE, pretrained, revision or "main", sizes.window, sizes.group, sizes.sinks)
    found = adapter if isinstance(adapter, CSKVAdapter) else CSKVAdapter.from_pretrained(str(adapter))
    found = found.with_settings(window=window, group=group, sinks=sinks)
    config = found.config
    name = "a loaded adapter" if isinstance(adapter, CSKVAdapter) else str(adapter)
    own = found.base.revision if pretrained is None else None
    base = found.base.path() if pretrained is None else pretrained
    return Compressor(found, name, base, revision or own or "main", config.window, config.group, config.sinks)


def check_arguments(given: Mapping[str, Any], known: Collection[str], reading: str = CHUNKS) -> None:
    """Refuse arguments that nobody knows, and those that do not go with a compressed cache.

    Args:
        given: the arguments beside our own.
        known: the names that the harness's Hugging Face model takes.
        reading: of log-likelihoods, "chunks" or "parallel".

    Raises:
        ConfigError: the first of them.
    """
    for name, why in REFUSED.items():
        if given.get(name):
            raise ConfigError(f"{name}={given[name]} does not go with a compressed cache: {why}")
    if reading == PARALLEL and (given.get("parallelize") or given.get("device_map")):
        raise ConfigError("reading=parallel is for a model on one device; leave it out, or parallelize and device_map")
    if given.get("backend", "default") not in ("default", "causal"):
        raise ConfigError(
            f"backend is {given['backend']!r}; expected causal: encoder-decoders have no cache to compress"
        )
    names = {*known, *FROM_PRETRAINED}
    for name in given:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {close[0]}?" if close else "see docs/lm-eval.md for those that there are"
            raise ConfigError(f"unknown argument {name}={given[name]} in --model_args; {hint}")


def check_settings(
    protocol: str = IN_PREFILL, question_tokens: int = 64, reading: str = CHUNKS, batch_size: int | str = 1
) -> None:
    """Refuse settings of ours that are out of range; they are those of `cskv.harness.model.CSKVLM`.

    Raises:
        ConfigError: the first of them.
    """
    for name, value, choices in (("protocol", protocol, PROTOCOLS), ("reading", reading, (CHUNKS, PARALLEL))):
        if value not in choices:
            raise ConfigError(f"{name} is {value!r}; expected {' or '.join(choices)}")
    if not isinstance(question_tokens, int) or question_tokens < 1:
        raise ConfigError(f"question_tokens is {question_tokens!r}; expected a whole number, at least 1")
    if str(batch_size).startswith("auto"):
        raise ConfigError(
            f"batch_size is {batch_size!r}, which tries texts of the greatest length through the cache, five times a "
            "guess, and says nothing of generation; give a number"
        )
    if not str(batch_size).isdigit() or int(batch_size) < 1:
        raise ConfigError(f"batch_size is {batch_size!r}; expected a whole number, at least 1")
