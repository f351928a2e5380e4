"""How a GGUF file scales rotary frequencies, as transformers' config says it; its reader of GGUF leaves this out.

llama.cpp keeps linear scaling as a factor. Of Llama 3.1's it keeps only the outcome, a divisor for every frequency: the
settings that all such models share are tried, and taken if they give these very divisors.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from cskv.errors import UnsupportedModelError
from cskv.models.gguf_header import Header

DIVISORS = "rope_freqs.weight"
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
READ_BY_TRANSFORMERS = ("gpt-oss",)


def scaled_rope(header: Header, config: Any) -> None:
    """Set a config's `rope_parameters` to what the file says.

    Raises:
        UnsupportedModelError: the file scales frequencies in another way than Llama 3.1's or linearly.
    """
    if header.architecture in READ_BY_TRANSFORMERS:
        return
    scaling, factor = _scaling(header)
    unknown = [name for name in header.tensors if name.startswith("rope_factors")]
    if scaling not in ("none", "linear") or unknown:
        _refuse(header, f"{scaling} scaling" if scaling not in ("none", "linear") else unknown[0])
    if scaling == "none" and DIVISORS not in header.tensors:
        return
    parameters = getattr(config, "rope_parameters", None) or _refuse(header, "a scaling that its family has not")
    parameters = parameters.get("full_attention", parameters)  # those of sliding layers are never scaled
    if DIVISORS in header.tensors:
        parameters |= _llama3(header, float(parameters["rope_theta"]))
    else:
        parameters |= {"rope_type": "linear", "factor": factor}


def _scaling(header: Header) -> tuple[str, float]:
    factor = float(header.value("rope.scaling.factor", header.value("rope.scale_linear", 1.0)))
    named = str(header.value("rope.scaling.type", "none" if factor in (0.0, 1.0) else "linear"))
    return ("none" if named == "linear" and factor in (0.0, 1.0) else named), factor


def _llama3(header: Header, base: float) -> dict[str, Any]:
    divisors = header.numbers(DIVISORS)
    wavelengths = 2 * math.pi * base ** (np.arange(len(divisors)) / len(divisors))
    factor, low, high = float(divisors.max()), LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"]
    smooth = ((LLAMA3["original_max_position_embeddings"] / wavelengths - low) / (high - low)).clip(0, 1)
    if not np.allclose(divisors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-3):
        _refuse(header, f"{DIVISORS} other than Llama 3.1's")
    return {"rope_type": "llama3", "factor": factor, **LLAMA3}


def _refuse(header: Header, what: str) -> Any:
    raise UnsupportedModelError(
        f"{header.path} scales rotary positions by {what}, which transformers does not read from GGUF; give the model "
        "in safetensors"
    )
