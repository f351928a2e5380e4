"""One layer's decode step on a compressed cache, against uncompressed and quantised ones, in one run.

    python benchmarks/decode.py              # measures what is missing in results/decode.json, then prints ratios
    python benchmarks/decode.py --quick      # short lengths and few repeats, into outputs/
    python benchmarks/decode_report.py       # tables, figures and goals into docs/decode-speed.md

A step appends one token and attends. Before a method is timed its output is compared with a plain softmax in fp32 over
the keys and values that it means; if one is wrong nothing is reported, and the script ends with an error.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from common import Row, Wrong, parse, parser, run
from decode_methods import BEST, SDPA, Method, Ours, Skipped, methods
from decode_problem import KINDS, Problem, Shape
from decode_tables import tables
from decode_timing import Stopwatch, free_bytes, summary, take_turns
from torch import Tensor

LENGTHS = tuple(1024 * 2**i for i in range(7))
BATCHES = (1, 4, 16)
# Root mean square of the error, as a share of the output's: rounding of keys, weights and values in each dtype.
TOLERANCE = {torch.bfloat16: 0.02, torch.float16: 0.005, torch.float32: 1e-4}
LARGEST_DEVIATION = 0.5  # of any method, 4 bits too, from attention to the exact keys and values
CACHES = 8  # uncompressed caches that all methods of a row and what they make in a step fit in


@dataclass(frozen=True)
class Settings:
    """Settings of a run: the layer, what attends to latents, the methods, and how long each is timed in a row."""

    shape: Shape
    dtype: torch.dtype
    device: torch.device
    backend: str
    names: tuple[str, ...]
    budget: float = 0.4  # seconds
    least: int = 3  # repeats
    most: int = 64

    def to_dict(self) -> dict[str, Any]:
        """Return what rows of one file share."""
        dtype, device = str(self.dtype).removeprefix("torch."), self.device.type
        return {"shape": asdict(self.shape), "dtype": dtype, "device": device, "threads": torch.get_num_threads()}


def measure(tokens: int, batch: int, settings: Settings) -> Row:
    """Measure a row: all methods at one length and batch size; raise `Wrong` if a method's output is."""
    row: Row = {"tokens": tokens, "batch": batch}
    if reason := too_large(tokens * batch, settings.shape, settings.dtype, settings.device):
        return row | {"skipped": reason}
    with torch.inference_mode():
        ready, row["methods"] = set_up(tokens, batch, settings)
        steps = {name: method.step for name, method in ready.items()}
        stopwatch = Stopwatch(settings.device)
        found = take_turns(steps, stopwatch, settings.budget, settings.least, settings.most)
        for name, seconds in found.items():
            method, own = ready[name], row["methods"][name]
            own |= {"seconds": summary(seconds), "nbytes": method.nbytes(), "read_nbytes": method.read_nbytes()}
            if isinstance(method, Ours):
                own["workspace_nbytes"] = method.scratch.nbytes()
    del ready, steps, method
    gc.collect()
    if settings.device.type == "cuda":
        torch.cuda.empty_cache()
    return row


def too_large(tokens: int, shape: Shape, dtype: torch.dtype, device: torch.device) -> str:
    """Say why a row of so many tokens in all does not fit in memory; "" where it does."""
    needed, free = CACHES * 2 * shape.kv_dim * dtype.itemsize * tokens, free_bytes(device)
    return "" if needed <= free else f"needs about {needed / 2**30:.0f} GiB of memory, {free / 2**30:.0f} are free"


def set_up(tokens: int, batch: int, settings: Settings) -> tuple[dict[str, Method], dict[str, Row]]:
    """Return the methods, ready and checked, and what is known of each; skipped ones are only in the latter."""
    known, ready, rows = methods(settings.backend), {}, {}
    for kind in KINDS:
        names = [name for name in settings.names if known[name][0] == kind]
        if not names:
            continue
        problem = Problem(kind, settings.shape, tokens, batch, settings.dtype, settings.device)
        truth = problem.truth()
        for name in names:
            try:
                method = known[name][1](problem)
            except Skipped as reason:
                rows[name] = {"skipped": str(reason)}
                continue
            rows[name] = check(name, method, problem, truth) | ({"note": method.note} if method.note else {})
            ready[name] = method
        problem.forget()
    order = [name for name in settings.names if name in ready]
    return {name: ready[name] for name in order}, rows


def check(name: str, method: Method, problem: Problem, truth: Tensor) -> Row:
    """Compare the first step with one softmax in fp32 over what the method reads, for the last sequence of the batch.

    It raises `Wrong` if that is further off than rounding explains, or few bits do.
    """
    output = method.step()
    if not method.is_checked:
        return {}
    read = method.represented()
    expected = truth if read is None else problem.softmax(*read)
    error, deviation = (_error(output[-1, :, 0], other) for other in (expected, truth))
    most = tolerance(problem.dtype, problem.device)
    if not error <= most or not deviation <= LARGEST_DEVIATION:
        raise Wrong(
            f"{name} at {problem.tokens} tokens, batch {problem.batch}: error {error:.3g} against a softmax in fp32 "
            f"(at most {most:g}), {deviation:.3g} against the exact cache (at most {LARGEST_DEVIATION:g}); nothing is "
            "reported"
        )
    return {"error": error, "deviation": deviation}


def tolerance(dtype: torch.dtype, device: torch.device) -> float:
    """Return the largest error that rounding explains. A GPU may multiply fp32 as TF32, whose precision is fp16's."""
    return TOLERANCE[torch.float16 if device.type == "cuda" and dtype == torch.float32 else dtype]


def _error(output: Tensor, expected: Tensor) -> float:
    return float((output.float() - expected).norm() / expected.norm())


def main(arguments: Sequence[str] | None = None, shape: Shape = Shape()) -> int:  # noqa: B008
    """Measure what is missing and print ratios."""
    options = parser(__doc__, "1K and 2K tokens, batch 1 and 4, a few repeats", list(methods()))
    options.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    options.add_argument("--budget", type=float, default=0.4, help="seconds of timing per method and row")
    asked = parse(options, arguments, "decode", whole=(LENGTHS, BATCHES), quick=((1024, 2048), (1, 4)))
    names = tuple(name for name in methods() if name in (SDPA, BEST, *asked.methods))
    repeats = {"budget": 0.05, "least": 2, "most": 4} if asked.quick else {"budget": asked.budget}
    settings = Settings(shape, getattr(torch, asked.dtype), torch.device(asked.device), asked.backend, names, **repeats)
    jobs = {f"{batch} x {tokens}": partial(measure, tokens, batch, settings) for batch, tokens in asked.cells}
    return run(asked.out, settings.to_dict(), jobs, tables, names)


if __name__ == "__main__":
    sys.exit(main())
