"""Registers, spilled bytes and shared memory of the Triton kernels for Hopper, by Triton's own assembler.

Needs no GPU: the library's launches run as they are, but each kernel is compiled for sm_90 with the
arguments that it would get, and not launched. Spilled registers are read and written through memory at every tile.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch

from benchmarks.common import Jobs, Row
from benchmarks.pages import Table
from benchmarks.speed import decode
from benchmarks.speed.methods import methods, on_a_gpu
from benchmarks.speed.problem import KINDS, PER_HEAD, Problem, Shape
from benchmarks.speed.registry import Benchmark, Unavailable
from cskv.cache import buffer
from cskv.cache.latents import GPU_CODES_BYTES, GPU_ROW_BYTES

TOKENS, BATCH = 16_384, 1  # more would compile to the same
RANKS = (192, 208)  # of 1024 channels: whole numbers of 16 bytes for codes too, and the 20 % that is usual
KERNELS = ("scores", "partials", "outputs")
HOPPER, MULTIPROCESSORS = ("cuda", 90, 32), 132
RESOURCES = re.compile(r"REG:(?P<registers>\d+) STACK:(?P<spilled>\d+) SHARED:\d+ LOCAL:(?P<local>\d+)")
OURS = tuple(name for name, (kind, _) in (methods() | on_a_gpu()).items() if name.startswith((*KINDS, PER_HEAD)))


class Target:
    """Stands for Triton's driver of an H100 that is not there."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget(*HOPPER)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def is_active(self) -> bool:
        return True


class Compiled:
    """Stands for a kernel: compiles it for the arguments of a launch, and notes what it takes."""

    def __init__(self, kernel: Any, found: list[Row]) -> None:
        self._kernel, self._found = kernel, found

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return partial(self._compile, grid)

    def _compile(self, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
        made = self._kernel.warmup(*args, grid=grid, **kwargs)
        known = {"kernel": self._kernel.__name__, "grid": list(grid), "tile": kwargs.get("TILE")}
        self._found.append(
            known | {"warps": made.metadata.num_warps, "shared": made.metadata.shared} | _resources(made)
        )


def _resources(compiled: Any) -> Row:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = RESOURCES.search(text)
    if found is None:
        raise RuntimeError(f"{tool.name} says nothing of registers: {text!r}")
    return {name: int(value) for name, value in found.groupdict().items()}


@contextmanager
def compiling() -> Iterator[list[Row]]:
    """Compile what is launched in the block; the list takes what each kernel takes."""
    from triton.runtime import driver

    from cskv.attention.triton import launch, outputs, partials, scores

    found: list[Row] = []
    modules: dict[str, ModuleType] = {"scores": scores, "partials": partials, "outputs": outputs}
    kernels = {name: getattr(module, name) for name, module in modules.items()}
    counted, refused = launch._multiprocessors, launch.refusal
    launch.refusal = lambda *_inputs: None  # that the device is no GPU
    before = driver._active
    driver.set_active(Target())
    launch._multiprocessors = lambda _device: MULTIPROCESSORS
    for name, module in modules.items():
        setattr(module, name, Compiled(kernels[name], found))
    try:
        yield found
    finally:
        for name, module in modules.items():
            setattr(module, name, kernels[name])
        launch._multiprocessors, launch.refusal = counted, refused
        driver.set_active(before)


def compile_one(name: str, rank: int, asked: Any) -> Row:
    """Compile the kernels of one method's step on so many latents a token."""
    kind, make = (methods("triton") | on_a_gpu("triton"))[name]
    problem = Problem(kind, Shape(density=rank / 1024), TOKENS, BATCH, asked.dtype, torch.device("cpu"))
    with torch.inference_mode(), mock.patch.object(buffer, "_row", _row_on_a_gpu):
        attend = make(problem).call
        assert attend is not None, "ours have an attention call"
        with compiling() as found:
            attend()()
    return {"method": name, "rank": rank, "kernels": found}


def _row_on_a_gpu(channels: int, itemsize: int, _multiple: int) -> int:
    """Return the channels of a row as buffers on a GPU have them."""
    step = (GPU_CODES_BYTES if itemsize == 1 else GPU_ROW_BYTES) // itemsize
    return -(-channels // step) * step


def tables(results: dict[str, Any]) -> list[Table]:
    """Show a line per method, and what each of its kernels takes."""
    lines = []
    for row in sorted(results["rows"].values(), key=lambda row: row["rank"]):
        found = {kernel["kernel"]: _shown(kernel) for kernel in row["kernels"]}
        lines.append((row["method"], str(row["rank"]), *(found.get(name, "") for name in KERNELS)))
    title = "Registers of a thread (bytes spilled), shared memory and warps of a program, sm_90"
    return [Table(title, ("method", "latents", *KERNELS), lines)]


def _shown(kernel: Row) -> str:
    spilled = kernel["spilled"] + kernel["local"]
    registers = f"{kernel['registers']} ({spilled})" if spilled else str(kernel["registers"])
    return f"{registers}, {kernel['shared'] // 1024} KiB, {kernel['warps']}"


def plan(asked: Any) -> tuple[Row, Jobs]:
    """Return the settings, and a job per method."""
    try:
        import triton
    except ImportError as error:
        raise Unavailable(f"triton cannot be imported: {error}") from error
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise Unavailable("TRITON_INTERPRET=1 interprets kernels; unset it to compile them")
    asked.device = "cpu"
    settings = decode.resolve(asked, Shape(density=RANKS[0] / 1024)) | {
        "triton": triton.__version__,
        "target": list(HOPPER),
    }
    cells = [(name, rank) for rank in RANKS for name in asked.methods]
    return settings, {f"{name}, {rank}": partial(compile_one, name, rank, asked) for name, rank in cells}


BENCHMARK = Benchmark(
    plan,
    tables,
    "no less: it takes two minutes",
    methods=OURS,
    options={"--dtype": decode.OPTIONS["--dtype"]},
)
