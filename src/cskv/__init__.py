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

_MODULES = {
    "adapter.adapter": ("CSKVAdapter",),
    "adapter.base_model": ("BaseModelInfo",),
    "attachment.attach": ("Attachment", "attach", "detach"),
    "attachment.cache_bytes": ("CacheReport", "cache_report"),
    "attachment.decode_graph": ("DecodeGraph",),
    "calibration.calibrate": ("calibrate",),
    "calibration.statistics": ("Statistics",),
    "compression.budget": ("Budget", "allocate", "allocate_each"),
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

if TYPE_CHECKING:  # "as" is how type checkers know names that are public
    from cskv.adapter.adapter import CSKVAdapter as CSKVAdapter
    from cskv.adapter.base_model import BaseModelInfo as BaseModelInfo
    from cskv.attachment.attach import Attachment as Attachment
    from cskv.attachment.attach import attach as attach
    from cskv.attachment.attach import detach as detach
    from cskv.attachment.cache_bytes import CacheReport as CacheReport
    from cskv.attachment.cache_bytes import cache_report as cache_report
    from cskv.attachment.decode_graph import DecodeGraph as DecodeGraph
    from cskv.calibration.calibrate import calibrate as calibrate
    from cskv.calibration.statistics import Statistics as Statistics
    from cskv.compression.budget import Budget as Budget
    from cskv.compression.budget import allocate as allocate
    from cskv.compression.budget import allocate_each as allocate_each
    from cskv.compression.initialise import initialise as initialise
    from cskv.config import CSKVConfig as CSKVConfig
    from cskv.data.samples import TokenSamples as TokenSamples
    from cskv.data.sources import open_source as open_source
    from cskv.errors import AdapterError as AdapterError
    from cskv.errors import CacheError as CacheError
    from cskv.errors import ConfigError as ConfigError
    from cskv.errors import CSKVError as CSKVError
    from cskv.errors import DataError as DataError
    from cskv.errors import UnsupportedModelError as UnsupportedModelError
    from cskv.factorization.factors import Factors as Factors
    from cskv.factorization.factors import LayerFactors as LayerFactors
    from cskv.training.settings import TrainingSettings as TrainingSettings
    from cskv.training.trainer import train as train

    __version__: str
else:  # type checkers read lists of names only where they are spelt out
    __all__ = list(_MODULE_OF)


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
