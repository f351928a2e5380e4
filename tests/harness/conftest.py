"""Adapters of the bundled model, and local tasks."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import cskv
from cskv.compression.initialise import initialise
from cskv.data.lines import make_case
from cskv.data.offline import documents
from tests.harness.support import CHECKPOINT, LINES, write_tasks

SINKS, WINDOW, GROUP = 4, 8, 8


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of a full-rank adapter, which changes nothing, and of low-rank ones, which change much."""
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype="float32")
    folder = tmp_path_factory.mktemp("adapters")
    for name, density, bits in (("full", 1.0, 16), ("low", 0.25, 16), ("packed", 0.5, 4)):
        config = cskv.CSKVConfig(density, density, WINDOW, GROUP, sinks=SINKS, init="svd", k_bits=bits, v_bits=bits)
        initialise(model, config).save_pretrained(folder / name)
    return {name: str(folder / name) for name in ("full", "low", "packed")}


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Held-out texts of different lengths."""
    return [text[200:][:length] for (_, text), length in zip(documents("heldout"), (700, 90, 400, 60), strict=False)]


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    pytest.importorskip("wonderwords")
    cases = [make_case(lines, seed) for seed, lines in enumerate((LINES, LINES // 2))]
    return write_tasks(tmp_path_factory.mktemp("tasks"), texts, [(case.prompt, case.expected) for case in cases])
