from __future__ import annotations

import pytest
import torch
from demo.settings import VARIANTS, DemoSettings, fast_dtype

from cskv.config import CSKVConfig
from cskv.errors import ConfigError


def test_variants_keep_what_their_names_say():
    assert [variant.name for variant in VARIANTS] == [
        "uncompressed",
        "50 % trained",
        "80 % SVD, untrained",
        "80 % ASVD, untrained",
        "80 % trained",
        "80 % PCA, allocated ranks, untrained",
        "mixed widths, untrained",
    ]
    assert [variant.is_compressed for variant in VARIANTS] == [False, True, True, True, True, True, True]
    assert VARIANTS[2].config == CSKVConfig(k_density=0.2, v_density=0.2, window=32, group=32, init="svd")
    assert VARIANTS[1].config == CSKVConfig(k_density=0.5, v_density=0.5, window=32, group=32, init="asvd")
    assert VARIANTS[6].config == CSKVConfig(window=32, group=32, init="fisher-pca")
    with pytest.raises(ConfigError, match="not compressed"):
        _ = VARIANTS[0].config


def test_work_that_is_no_work_is_refused():
    with pytest.raises(ConfigError, match="cases is 0"):
        DemoSettings(cases=0)
    with pytest.raises(ConfigError, match="train_samples is 1"):
        DemoSettings(train_samples=1, train_batch_size=2)


@pytest.mark.parametrize(("supported", "expected"), [(True, "auto"), (False, "float32")])
def test_a_processor_without_bf16_computes_in_fp32(monkeypatch, supported, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: supported)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    assert fast_dtype() == expected
