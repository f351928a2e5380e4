"""Texts fed in chunks are read as token-by-token decoding reads them, whatever is kept exactly."""

from __future__ import annotations

import pytest
import torch

import cskv
from cskv import CSKVConfig
from cskv.evaluation.forward import pieces, read
from cskv.harness.reading import chunked_logits
from tests.models.families import tiny_model, truncated_adapter


@pytest.mark.parametrize("sinks", [0, 3])
def test_chunks_are_read_as_single_tokens_are(sinks: int) -> None:
    model = tiny_model("llama")
    rows = torch.randint(3, 96, (2, 60), generator=torch.Generator().manual_seed(8))
    with cskv.attach(model, truncated_adapter(model, CSKVConfig(0.25, 0.25, window=5, group=4, sinks=sinks))):
        one_by_one = torch.cat([logits for _, logits in read(model, rows, pieces(60, 1, 1))], dim=1)
        chunked = chunked_logits(model, rows, sinks + 5 + 4, 4, 50)
    assert (chunked - one_by_one[:, 10:]).abs().max() < 1e-4 * one_by_one.abs().max()
