"""Fixtures and options that every test sees."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# Read when huggingface_hub is imported: no test asks the network for a model, not even for one that does not exist.
os.environ["HF_HUB_OFFLINE"] = "1"

# Triton decides as it is imported whether kernels are compiled or interpreted, and no test has imported it yet: pytest
# reads this file first, in every process of xdist.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# A shell that starts the tests in the background has Ctrl-C ignored, and so would all that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes says more about what else the machine does than about the code.
settings.register_profile("cskv", deadline=None)
settings.load_profile("cskv")

DEFAULT_REFERENCE_VECTORS = Path(__file__).parents[2] / "shared" / "reference-vectors"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where runs of the official implementation lie."""
    parser.addoption(
        "--reference-vectors",
        type=Path,
        default=DEFAULT_REFERENCE_VECTORS,
        help="a folder of runs of the official implementation; tests that need it are skipped when it is absent",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test per reference run."""
    if "reference_run" not in metafunc.fixturenames:
        return
    folder = metafunc.config.getoption("--reference-vectors")
    runs = sorted(path.parent for path in folder.glob("*/run.safetensors"))
    absent = pytest.param(None, marks=pytest.mark.skip(reason=f"no reference runs in {folder}"), id="absent")
    metafunc.parametrize("reference_run", runs or [absent], ids=lambda run: run.name if run else None)


@pytest.fixture(autouse=True, scope="session")
def _few_threads() -> None:
    """Tiny models are slower on many threads, and pytest-xdist brings its own processes."""
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
