"""The demo is no part of the library: its modules lie beside the script that runs them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))


@pytest.fixture(autouse=True, scope="module")
def few_documents():
    """Few and small: reading the whole standard library for every stream of samples would take most of the time."""
    from cskv.data import offline

    documents = [(f"stdlib/{i}", f"def function_{i}():\n    return {i}\n" * 40) for i in range(8)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offline, "documents", lambda split: iter(documents))
        yield
