"""cskv: a KV cache 5 to 20 times smaller, by channel shrinking (CSKV, arXiv 2409.10593).

    import cskv
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("my-adapter")   # the base model, its cache compressed
    with cskv.attach(base, cskv.CSKVAdapter.from_pretrained("my-adapter")):
        base.generate(...)

Importing registers the adapter format with transformers' auto classes; nothing else changes anywhere. Neither torch nor
transformers is imported before a name that needs it is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cskv.attachment.registration import register

if TYPE_CHECKING:
    from cskv.adapter.adapter import CSKVAdapter
    from cskv.adapter.base_model import BaseModelInfo
    from cskv.attachment.attach import Attachment, attach, detach
    from cskv.attachment.cache_bytes import CacheReport, cache_report
    from cskv.calibration.calibrate import calibrate
    from cskv.calibration.statistics import Statistics
    from cskv.compression.initialise import initialise
    from cskv.config import CSKVConfig
    from cskv.data.samples import TokenSamples
    from cskv.data.sources import open_source
    from cskv.errors import AdapterError, CacheError, ConfigError, CSKVError, DataError, UnsupportedModelError
    from cskv.factorization.factors import Factors, LayerFactors
    from cskv.training.settings import TrainingSettings
    from cskv.training.trainer import train

    __version__: str

__all__ = [
    "AdapterError",
    "Attachment",
    "BaseModelInfo",
    "CSKVAdapter",
    "CSKVConfig",
    "CSKVError",
    "CacheError",
    "CacheReport",
    "ConfigError",
    "DataError",
    "Factors",
    "LayerFactors",
    "Statistics",
    "TokenSamples",
    "TrainingSettings",
    "UnsupportedModelError",
    "attach",
    "cache_report",
    "calibrate",
    "detach",
    "initialise",
    "open_source",
    "train",
]

_MODULES = {
    "adapter.adapter": ("CSKVAdapter",),
    "adapter.base_model": ("BaseModelInfo",),
    "attachment.attach": ("Attachment", "attach", "detach"),
    "attachment.cache_bytes": ("CacheReport", "cache_report"),
    "calibration.calibrate": ("calibrate",),
    "calibration.statistics": ("Statistics",),
    "compression.initialise": ("initialise",),
    "config": ("CSKVConfig",),
    "data.samples": ("TokenSamples",),
    "data.sources": ("open_source",),
    "errors": ("AdapterError", "CSKVError", "CacheError", "ConfigError", "DataError", "UnsupportedModelError"),
    "factorization.factors": ("Factors", "LayerFactors"),
    "training.settings": ("TrainingSettings",),
    "training.trainer": ("train",),
}
_MODULE_OF = {name: f"{__name__}.{module}" for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = _version()
    elif name in _MODULE_OF:
        value = getattr(import_module(_MODULE_OF[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("cskv")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "0.0.0"


register()
