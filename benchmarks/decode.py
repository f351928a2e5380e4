"""One layer's decode step on a compressed cache, against uncompressed and quantised ones, in one run.

    python benchmarks/decode.py              # measures what is missing in results/decode.json, then prints ratios
    python benchmarks/decode.py --quick      # short lengths and few repeats, into outputs/
    python benchmarks/decode_report.py       # tables, figures and goals into docs/decode-speed.md

A step appends one token and attends. Before a method is timed its output is compared with a plain softmax in fp32 over
the keys and values that it means; if one is wrong nothing is reported, and the script ends with an error.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import Row, measure_missing, read_results
from decode_methods import BEST, SDPA, Method, Ours, Skipped, methods
from decode_problem import KINDS, Problem, Shape
from decode_timing import Stopwatch, free_bytes, summary, take_turns
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "decode.json"
LENGTHS = tuple(1024 * 2**i for i in range(7))
BATCHES = (1, 4, 16)
# Root mean square of the error, as a share of the output's: rounding of keys, weights and values in each dtype.
TOLERANCE = {torch.bfloat16: 0.02, torch.float16: 0.005, torch.float32: 1e-4}
LARGEST_DEVIATION = 0.5  # of any method, 4 bits too, from attention to the exact keys and values
CACHES = 8  # uncompressed caches that all methods of a row and what they make in a step fit in


class Wrong(Exception):
    """A method's output is not what it should be: nothing may be reported."""


@dataclass(frozen=True)
class Settings:
    """How a run measures.

    Attributes:
        shape: of the layer.
        dtype, device, backend: of the layer, and what attends to latents.
        names: the methods.
        budget: seconds that a method may be timed for, in a row.
        least, most: repeats.
    """

    shape: Shape
    dtype: torch.dtype
    device: torch.device
    backend: str
    names: tuple[str, ...]
    budget: float = 0.4
    least: int = 3
    most: int = 64

    def to_dict(self) -> dict[str, Any]:
        """What rows of one file share."""
        dtype, device = str(self.dtype).removeprefix("torch."), self.device.type
        return {"shape": asdict(self.shape), "dtype": dtype, "device": device, "threads": torch.get_num_threads()}


def measure(tokens: int, batch: int, settings: Settings) -> Row:
    """A row: all methods at one length and batch size.

    Raises:
        Wrong: a method's output is.
    """
    row: Row = {"tokens": tokens, "batch": batch}
    needed, free = memory(tokens, batch, settings), free_bytes(settings.device)
    if needed > free:
        return row | {"skipped": f"needs about {needed / 2**30:.0f} GiB of memory, {free / 2**30:.0f} are free"}
    with torch.inference_mode():
        ready, row["methods"] = set_up(tokens, batch, settings)
        steps = {name: method.step for name, method in ready.items()}
        stopwatch = Stopwatch(settings.device)
        found = take_turns(steps, stopwatch, settings.budget, settings.least, settings.most)
        for name, seconds in found.items():
            row["methods"][name]["seconds"] = summary(seconds)
            row["methods"][name]["nbytes"] = ready[name].nbytes()
            row["methods"][name]["read_nbytes"] = ready[name].read_nbytes()
            if isinstance(ready[name], Ours):
                row["methods"][name]["workspace_nbytes"] = ready[name].scratch.nbytes()
    del ready, steps
    gc.collect()
    if settings.device.type == "cuda":
        torch.cuda.empty_cache()
    return row


def memory(tokens: int, batch: int, settings: Settings) -> int:
    """Bytes that a row needs, roughly."""
    return CACHES * 2 * settings.shape.kv_dim * settings.dtype.itemsize * tokens * batch


def set_up(tokens: int, batch: int, settings: Settings) -> tuple[dict[str, Method], dict[str, Row]]:
    """The methods, ready and checked, and what is known of each; skipped ones are only in the latter."""
    known, ready, rows = methods(settings.backend), {}, {}
    for kind in KINDS:
        names = [name for name in settings.names if known[name][0] == kind]
        if not names:
            continue
        problem = Problem(kind, settings.shape, tokens, batch, settings.dtype, settings.device)
        meant = problem.meant()
        truth = problem.softmax(*meant)
        del meant
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
    """The first step, against one softmax in fp32 over what the method reads, for the last sequence of the batch.

    Raises:
        Wrong: it is further off than rounding explains, or few bits do.
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
            f"(at most {most:g}), {deviation:.3g} against the exact cache (at most "
            f"{LARGEST_DEVIATION:g}); nothing is reported"
        )
    return {"error": error, "deviation": deviation}


def tolerance(dtype: torch.dtype, device: torch.device) -> float:
    """The largest error that rounding explains. A GPU may multiply fp32 as TF32, whose precision is fp16's."""
    return TOLERANCE[torch.float16 if device.type == "cuda" and dtype == torch.float32 else dtype]


def _error(output: Tensor, expected: Tensor) -> float:
    return float((output.float() - expected).norm() / expected.norm())


def jobs(lengths: Sequence[int], batches: Sequence[int], settings: Settings) -> dict[str, Callable[[], Row]]:
    """Name of a row -> how it is measured."""
    return {f"{batch} x {tokens}": partial(measure, tokens, batch, settings) for batch in batches for tokens in lengths}


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=None, help="cached tokens (1K to 64K)")
    parser.add_argument("--batches", type=int, nargs="+", default=None, help="sequences (1, 4, 16)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", default="auto", help="what attends to latents: auto, triton, torch, reference")
    parser.add_argument("--threads", type=int, help="of PyTorch; all cores when not given")
    parser.add_argument("--methods", nargs="+", default=list(methods()), choices=list(methods()), metavar="METHOD")
    parser.add_argument("--budget", type=float, default=0.4, help="seconds of timing per method and row")
    parser.add_argument("--quick", action="store_true", help="1K and 2K tokens, batch 1 and 4, a few repeats")
    parser.add_argument("--out", type=Path, help="the results file")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None, shape: Shape = Shape()) -> int:  # noqa: B008
    """Measure what is missing and print ratios."""
    asked = parsed(arguments)
    if asked.threads:
        torch.set_num_threads(asked.threads)
    lengths = asked.lengths or ((1024, 2048) if asked.quick else LENGTHS)
    batches = asked.batches or ((1, 4) if asked.quick else BATCHES)
    names = tuple(name for name in methods() if name in (SDPA, BEST, *asked.methods))
    repeats = {"budget": 0.05, "least": 2, "most": 4} if asked.quick else {"budget": asked.budget}
    settings = Settings(shape, getattr(torch, asked.dtype), torch.device(asked.device), asked.backend, names, **repeats)
    path = asked.out or (ROOT / "outputs" / "decode-quick.json" if asked.quick else RESULTS)
    results = read_results(path)
    if results.setdefault("settings", settings.to_dict()) != settings.to_dict():
        print(f"{path} was measured with other settings: {results['settings']}; give another --out", file=sys.stderr)
        return 2
    lacking = [name for name, row in results["rows"].items() if not set(names) <= set(row.get("methods", names))]
    for name in lacking:
        del results["rows"][name]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        measure_missing(path, results, jobs(lengths, batches, settings))
    except Wrong as wrong:
        print(f"wrong output, refused: {wrong}", file=sys.stderr)
        return 1
    from decode_tables import print_tables

    print_tables(results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
