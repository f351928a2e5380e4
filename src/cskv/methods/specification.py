"""Methods by name: `NAME@BUDGET`, as the command line takes them."""

from __future__ import annotations

from transformers import PreTrainedModel

from cskv.calibration.statistics import Statistics
from cskv.compression.initialise import initialise
from cskv.config import CSKVConfig
from cskv.errors import CSKVError
from cskv.methods.fp8 import fp8
from cskv.methods.method import Method, compressed, uncompressed
from cskv.methods.press import KNOWN, press
from cskv.methods.quantized import quantized

TITLES = {  # untrained, at any density
    "svd": "SVD",
    "asvd": "ASVD",
    "pca": "PCA",
    "weighted-pca": "weighted PCA",
    "fisher-pca": "Fisher PCA",
}
QUANTISED = {"quantized": "hqq", "quantized-hqq": "hqq", "quantized-quanto": "quanto"}
WITHOUT_BUDGET = {"uncompressed": uncompressed, "fp8": fp8}
EXAMPLES = "uncompressed, svd@0.2, asvd@0.2, pca@0.2, quantized@4, fp8, streaming@0.2, h2o@0.2, SnapKVPress@0.2"


def split(text: str) -> tuple[str, float | None]:
    """Return the name and the budget of a specification: a share of the cache, bits for a quantised one, or None.

    Raises:
        CSKVError: it names no method, or its budget is no such number.
    """
    name, at, number = text.partition("@")
    if name in WITHOUT_BUDGET and not at:
        return name, None
    if name not in (*QUANTISED, *TITLES, *KNOWN) and not name.endswith("Press"):
        raise CSKVError(f"there is no baseline {text!r}; expected one like {EXAMPLES}")
    try:
        budget = float(number)
    except ValueError:
        raise CSKVError(f"baseline {text!r} has no budget; expected NAME@SHARE, or NAME@BITS for quantized") from None
    wanted = "1, 2, 4 or 8 bits" if name in QUANTISED else "a share in (0, 1]"
    if not (budget in (1, 2, 4, 8) if name in QUANTISED else 0.0 < budget <= 1.0):
        raise CSKVError(f"baseline {text!r} has budget {number}; expected {wanted}")
    return name, budget


def needs_statistics(text: str) -> bool:
    """Tell whether the method is made from calibration statistics."""
    name, _ = split(text)
    return name in TITLES and name != "svd"


def method_of(
    text: str,
    model: PreTrainedModel,
    statistics: Statistics | None,
    window: int,
    group: int,
    sinks: int = CSKVConfig.sinks,
) -> Method:
    """Make the method.

    Args:
        text: its specification.
        model: the bare model.
        statistics: where `needs_statistics`.
        window, group, sinks: exact tokens of untrained factors.

    Raises:
        CSKVError: it names no method, a setting is out of range, a package or statistics are missing, or the statistics
            are of another model.
    """
    name, budget = split(text)
    if budget is None:
        return WITHOUT_BUDGET[name]()
    if name in QUANTISED:
        return quantized(int(budget), QUANTISED[name])
    if name in TITLES:
        config = CSKVConfig(budget, budget, init=name, window=window, group=group, sinks=sinks)
        return compressed(initialise(model, config, statistics), TITLES[name], budget)
    return press(name, budget)
