"""Tests of the plugin need vLLM; those of what is made for it do not."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

WITHOUT_VLLM = (
    "test_blocks.py",
    "test_compute.py",
    "test_export.py",
    "test_probe.py",
    "test_refusals.py",
    "test_served.py",
    "test_shards.py",
    "test_step.py",
)
# Beside those of pyproject.toml, for tests in this folder alone.
IGNORED = (
    # As it registers its CPU kernels, vLLM looks at every name in torch.distributed, deprecated ones too.
    r"ignore:`torch\.distributed\.reduce_op` is deprecated:FutureWarning:vllm\.triton_utils\.dispatcher",
)


class _NeedsVLLM(pytest.Module):
    """A test file that is not imported, because what it imports is not there."""

    def collect(self) -> list[pytest.Item]:
        pytest.skip("vLLM is not installed: make test-vllm", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Skip whole files where vLLM is absent: they may import it at their top."""
    if module_path.name in WITHOUT_VLLM or find_spec("vllm") is not None:
        return None
    return _NeedsVLLM.from_parent(parent, path=module_path)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let vLLM's own warnings pass in tests that need it."""
    here = Path(__file__).parent
    for item in items:
        if item.path.parent == here and item.path.name not in WITHOUT_VLLM:
            for ignored in IGNORED:
                item.add_marker(pytest.mark.filterwarnings(ignored))
