from __future__ import annotations

import pytest

from cskv.errors import CSKVError
from cskv.methods.specification import method_of, needs_statistics, split
from tests.evaluation.support import tiny_llama


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("uncompressed", ("uncompressed", None)),
        ("svd@0.2", ("svd", 0.2)),
        ("weighted-pca@1", ("weighted-pca", 1.0)),
        ("quantized@4", ("quantized", 4.0)),
        ("quantized-quanto@2", ("quantized-quanto", 2.0)),
        ("streaming@0.05", ("streaming", 0.05)),
        ("SnapKVPress@0.5", ("SnapKVPress", 0.5)),
    ],
)
def test_names_and_budgets(text, expected):
    assert split(text) == expected


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("lora@0.2", "there is no baseline 'lora@0.2'; expected one like uncompressed, svd@0.2"),
        ("uncompressed@0.2", "there is no baseline"),
        ("svd", "baseline 'svd' has no budget; expected NAME@SHARE"),
        ("svd@half", "has no budget"),
        ("svd@0", r"has budget 0; expected a share in \(0, 1\]"),
        ("streaming@20", "has budget 20; expected a share"),
        ("quantized@0.25", "has budget 0.25; expected 1, 2, 4 or 8 bits"),
        ("quantized@3", "has budget 3; expected 1, 2, 4 or 8 bits"),
        ("", "there is no baseline ''"),
    ],
)
def test_what_names_nothing_is_refused(text, complaint):
    with pytest.raises(CSKVError, match=complaint):
        split(text)


def test_statistics_are_needed_for_all_factors_but_svd():
    wanted = [text for text in ("svd@0.2", "asvd@0.2", "pca@0.2", "quantized@4", "h2o@0.2") if needs_statistics(text)]
    assert wanted == ["asvd@0.2", "pca@0.2"]


def test_methods_are_made():
    model = tiny_llama()
    assert method_of("uncompressed", model, None, 4, 8).budget is None
    method = method_of("svd@0.25", model, None, 4, 8, 3)
    assert (method.label, method.first_piece, method.piece) == ("SVD 25 %", 3 + 4 + 8, 8)
    assert method.facts["settings"]["sinks"] == 3
