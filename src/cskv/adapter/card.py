"""The model card of an adapter folder."""

from __future__ import annotations

from typing import Any

from huggingface_hub import ModelCardData

from cskv.adapter.base_model import hub_file


def model_card(description: dict[str, Any]) -> str:
    """Return a Markdown model card with the hub's YAML header, from `CSKVAdapter.describe()`."""
    base = description["base_model"]
    settings = description["compression"]
    tags = ["cskv", "kv-cache-compression"]
    repository, _ = hub_file(base["name"]) or (base["name"], "")
    header = ModelCardData(base_model=repository or None, library_name="cskv", tags=tags)
    lines = [
        "---",
        header.to_yaml(),
        "---",
        "",
        f"# KV cache compressor for {base['name'] or base['model_type']}",
        "",
        f"Keeps {settings['k_density']:.0%} of the key channels and {settings['v_density']:.0%} of the value channels",
        f"of the KV cache as latents{_bits(settings)} (CSKV, arXiv 2409.10593). The {_sinks(settings)}newest "
        f"{settings['window']} to {settings['window'] + settings['group'] - 1} tokens are kept exactly.",
        "",
        "```python",
        "import cskv",
        "from transformers import AutoModelForCausalLM",
        "",
        'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")',
        "```",
        "",
        "| layer | key latents | value latents | of channels |",
        "|---|---|---|---|",
        *(f"| {i} | {rank['k']} | {rank['v']} | {rank['kv_dim']} |" for i, rank in description["ranks"].items()),
        "",
        "| setting | value |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in sorted(settings.items())),
    ]
    if description["metrics"]:
        lines += ["", "| figure | value |", "|---|---|"]
        lines += [f"| {name} | {value} |" for name, value in sorted(_flat(description["metrics"]).items())]
    return "\n".join(lines) + "\n"


def _sinks(settings: dict[str, Any]) -> str:
    return f"first {settings['sinks']} and the " if settings["sinks"] else ""


def _bits(settings: dict[str, Any]) -> str:
    if settings.get("mixed_widths"):
        return " of 2 to 8 bits"
    bits = settings.get("k_bits", 16), settings.get("v_bits", 16)
    return "" if bits == (16, 16) else f" of {bits[0]} and {bits[1]} bits"


def _flat(metrics: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in metrics.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = f"{value:.6g}" if isinstance(value, float) else value
    return flat
