"""Methods that drop tokens, from NVIDIA's kvpress: StreamingLLM, H2O-like heavy hitters and whatever else it has.

kvpress compresses the prompt, once, at the end of its prefill; tokens that come later are kept. It needs an older
transformers than this library's newest (0.5.5: below 5.3), so it goes into an environment of its own, for instance
`make .venv-kvpress/ready`; all code here runs with both.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from cskv.errors import CSKVError
from cskv.methods.method import Method

# Our short names for those that the paper compares with, and what their series are called.
KNOWN = {"streaming": "StreamingLLMPress", "h2o": "ObservedAttentionPress"}
TITLES = {"StreamingLLMPress": "StreamingLLM", "ObservedAttentionPress": "H2O-like"}
RATIO = "compression_ratio"


def press(name: str, budget: float) -> Method:
    """Return the method that keeps a share of the prompt's tokens.

    Args:
        name: "streaming", "h2o", or the class name of any press that is made from a compression ratio alone.
        budget: the share of tokens that is kept, in (0, 1).

    Raises:
        CSKVError: kvpress is missing, has no such press, or the share is out of range.
    """
    if not 0.0 < budget < 1.0:
        raise CSKVError(f"{name} is to keep {budget} of the tokens; expected a share between 0 and 1")
    try:
        kvpress: Any = importlib.import_module("kvpress")
    except ImportError as error:
        raise CSKVError(
            f"methods that drop tokens need kvpress, which cannot be imported ({error}); it takes transformers below "
            "5.3, so give it an environment of its own: pip install cskv kvpress"
        ) from error
    version = importlib.metadata.version("kvpress")
    kind = KNOWN.get(name, name)
    made = getattr(kvpress, kind, None)
    if not (isinstance(made, type) and RATIO in getattr(made, "__dataclass_fields__", ())):
        raise CSKVError(
            f"kvpress {version} has no press {kind!r} that takes a compression ratio; expected "
            f"{', '.join(KNOWN)} or the name of such a class"
        )

    @contextmanager
    def on(model: PreTrainedModel) -> Iterator[None]:
        pressed: Any = made(**{RATIO: 1.0 - budget})
        before = model.config._attn_implementation
        switched = kind == "ObservedAttentionPress" and before != "eager"
        if switched:
            model.set_attn_implementation("eager")
        try:
            with pressed(model):
                yield None
        finally:
            if switched:
                model.set_attn_implementation(before)

    return Method(
        TITLES.get(kind, kind.removesuffix("Press")),
        budget,
        on,
        {"kind": "kvpress", "press": kind, "kvpress": version},
        pads=False,  # padding would be taken for the first tokens
        streams=False,
    )
