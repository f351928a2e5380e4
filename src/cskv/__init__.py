"""cskv: a KV cache 5 to 20 times smaller, by channel shrinking (CSKV, arXiv 2409.10593).

    import cskv
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("my-adapter")   # the base model, its cache compressed
    with cskv.attach(base, cskv.CSKVAdapter.from_pretrained("my-adapter")):
        base.generate(...)

Importing registers the adapter format with transformers' auto classes; nothing else changes anywhere.
"""

from importlib.metadata import PackageNotFoundError, version

from cskv.adapter.adapter import CSKVAdapter
from cskv.adapter.base_model import BaseModelInfo
from cskv.attachment import auto
from cskv.attachment.attach import Attachment, attach, detach
from cskv.attachment.cache_bytes import CacheReport, cache_report
from cskv.calibration.calibrate import calibrate
from cskv.compression.initialise import initialise
from cskv.config import CSKVConfig
from cskv.errors import AdapterError, CacheError, ConfigError, CSKVError, DataError, UnsupportedModelError
from cskv.factorization.factors import Factors, LayerFactors

try:
    __version__ = version("cskv")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0.0.0"

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
    "UnsupportedModelError",
    "attach",
    "cache_report",
    "calibrate",
    "detach",
    "initialise",
]

auto.register()
