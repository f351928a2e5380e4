"""Which model a result is of."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from cskv.fingerprint import fingerprint
from cskv.models.sites import find_sites


def model_facts(model: PreTrainedModel) -> dict[str, Any]:
    """Return name, architecture, sizes, dtype and fingerprint, JSON-ready."""
    sites = find_sites(model)
    config = model.config.get_text_config(decoder=True)
    return {
        "name": str(model.config.name_or_path or ""),
        "type": config.model_type,
        "layers": config.num_hidden_layers,
        "kv_dim": sites[0].kv_dim,
        "parameters": model.num_parameters(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "fingerprint": fingerprint(model.named_parameters()),
    }
