"""What a decode step does not do: make tensors of the size of the cache, copy it, or wait for the device."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Cache, DynamicCache

import cskv
from cskv.models.compat import cache_kwarg
from tests.attachment.test_closed_form import statistics_of
from tests.models.families import tiny_model, truncated_adapter

SEALED = 992
SETTINGS = {
    "joint": cskv.CSKVConfig(0.5, 0.5, window=32, group=32, sinks=4),
    "packed": cskv.CSKVConfig(0.5, 0.5, window=32, group=32, sinks=4, k_bits=4, v_bits=4),
    "commuting": cskv.CSKVConfig(0.5, 0.5, window=32, group=32, sinks=4, init="pca", key_factors="commuting"),
}
WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal")  # operations whose result the host has to know


class Watch(TorchDispatchMode):
    """Notes every operation: its name, and the largest new tensor that it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[int, str]] = []
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0]
        self.names.add(name)
        given = {tensor.untyped_storage().data_ptr() for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(result):
            if tensor.untyped_storage().data_ptr() not in given:
                self.made.append((tensor.numel(), name))
        return result


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _tensors(value)


@contextmanager
def prefilled(name: str, attention: str = "auto") -> Iterator[tuple[nn.Module, Cache]]:
    """A compressor on a model of 8 kv heads, and a cache of 32 blocks of 32 tokens after two steps."""
    from cskv.compression.initialise import initialise

    model = tiny_model("llama", num_key_value_heads=8, num_attention_heads=8, max_position_embeddings=2048)
    config = SETTINGS[name]
    commuting = config.key_factors == "commuting"
    adapter = initialise(model, config, statistics_of(model)) if commuting else truncated_adapter(model, config)
    cache = DynamicCache(config=model.config)
    with cskv.attach(model, adapter, attention=attention), torch.no_grad():
        model(torch.randint(3, 96, (1, SEALED + 36)), **{cache_kwarg(model): cache})
        for _ in range(2):
            model(torch.tensor([[5]]), **{cache_kwarg(model): cache})
        yield model, cache


@pytest.mark.parametrize("name", list(SETTINGS))
def test_no_step_makes_a_tensor_of_the_size_of_a_layers_keys(name: str) -> None:
    with prefilled(name) as (model, cache):
        layer = cache.layers[0]
        assert layer.store.sealed == SEALED
        with Watch() as watch:
            model(torch.tensor([[5]]), **{cache_kwarg(model): cache})
    # Scores are (q_heads, tokens), cos and sin (tokens, head_dim); keys would be (tokens, 8 heads * head_dim).
    keys = SEALED * 8 * 16
    largest = max(watch.made)
    assert largest[0] <= keys // 8 * (1 if name == "commuting" else 2), largest


def test_rebuilding_makes_them() -> None:
    """Guards the test above: the watch sees what is rebuilt."""
    with prefilled("joint", attention="rebuild") as (model, cache), Watch() as watch:
        model(torch.tensor([[5]]), **{cache_kwarg(model): cache})
    assert max(watch.made)[0] >= SEALED * 8 * 16


@pytest.mark.parametrize("name", list(SETTINGS))
def test_no_step_waits_for_the_device(name: str) -> None:
    """Sealing included: 32 steps bring one."""
    with prefilled(name) as (model, cache):
        before = cache.layers[0].store.sealed
        with Watch() as watch:
            for _ in range(33):
                model(torch.tensor([[5]]), **{cache_kwarg(model): cache})
        assert cache.layers[0].store.sealed > before
    assert "mm" in watch.names
    assert not watch.names.intersection(WAITS)


def test_the_workspace_does_not_grow_from_step_to_step() -> None:
    with prefilled("packed") as (model, cache):
        attachment = cskv.attachment.attach.attachment_of(model)
        before = attachment.workspace.nbytes()
        assert before > 0
        for _ in range(3):
            model(torch.tensor([[5]]), **{cache_kwarg(model): cache})
        assert attachment.workspace.nbytes() == before
    assert attachment.workspace.nbytes() == 0  # detached


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Any]:
    """What a program without shape checks, which cannot be traced and are calls themselves, says of steps."""
    root = Path(__file__).resolve().parents[2]
    program = [sys.executable, "-W", "ignore", "-m", "tests.attachment.step_program"]
    done = subprocess.run(program, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_step_of_a_layer_takes_few_python_calls(outcomes: dict[str, Any]) -> None:
    """A count, not a time: what a reader has to follow, and what a CPU pays before it computes."""
    assert 0 < outcomes["python"]["calls"] <= 70
    assert (
        0 < outcomes["python"]["files"] <= 15
    )  # four of them the compiled kernels': launch, arguments, library, project


def test_steps_compile_as_few_graphs(outcomes: dict[str, Any]) -> None:
    growing = outcomes["growing"]
    assert (growing["breaks"], growing["sealed"]) == (0, 72)
    assert growing["graphs"] <= growing["limit"]  # or it would go on without compiling
    assert growing["error"] < 1e-4
    for name in SETTINGS:
        outcome = outcomes[name]
        assert outcome["breaks"] == 0, name
        assert outcome["graphs"] <= 3, name  # lengths are constants at first, then symbols
        assert outcome["error"] < 1e-4, name
