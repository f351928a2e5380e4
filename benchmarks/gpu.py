"""Decoding on a GPU: correctness, copy bandwidth, the goals, graph replays, plans, a profile, the sweep.

    benchmarks/gpu.sh OUT        # all of it in one call, tests and generation too

Files in OUT: decode.json (as `decode.py` writes it, with the copy bandwidth and the attention call alone), gpu.json
(everything else), profile.txt.
Every section is kept as soon as it is done; one that fails says why, and the others go on.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import Wrong, write_results
from decode import BATCHES, LENGTHS, Settings, measure, set_up
from decode_methods import BEST, DENSE, Method, Ours, methods
from decode_problem import Shape
from decode_tables import gpu_goals, tables
from decode_timing import Stopwatch, summary

from cskv.attention.triton import launch
from cskv.attention.triton.plan import Plan, Shapes, split
from cskv.evaluation.environment import environment
from cskv.files import write_text

GOAL_TOKENS, GOAL_BATCHES = 65_536, (1, 8)
ODD_SIZES = ((1, 64), (1, 1000), (3, 2049))  # batch and tokens of the correctness section
COPIED = 2**30  # bytes
# Other plans for the Triton kernels than those that `cskv.attention.triton.plan` reasons out; `splits` multiplies.
VARIANTS: tuple[dict[str, int], ...] = (
    {},
    {"warps": 4},
    {"warps": 8},
    {"stages": 3},
    {"tile": 32},
    {"tile": 128},
    {"tile": 128, "warps": 8},
    {"value_block": 128},
    {"stages": 1},
    {"splits": 2},
)


class Run:
    """One call's results, written after every section."""

    def __init__(self, out: Path, settings: Settings, deadline: float, tuning_seconds: float) -> None:
        self.out, self.settings, self.deadline, self.tuning_seconds = out, settings, deadline, tuning_seconds
        out.mkdir(parents=True, exist_ok=True)
        where = environment().to_dict()
        self.found: dict[str, Any] = {"environment": where, "errors": {}, "seconds": {}}
        self.decode: dict[str, Any] = {"environment": where, "settings": settings.to_dict(), "rows": {}}
        self.wrong = False

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Time a section, and keep its error instead of stopping."""
        began = time.monotonic()
        try:
            yield
        except Wrong as wrong:
            self.wrong, self.found["errors"][name] = True, str(wrong)
            print(f"wrong output, refused: {wrong}", flush=True)
        except Exception as error:
            self.found["errors"][name] = f"{type(error).__name__}: {error}"
            traceback.print_exc(limit=8)
        self.found["seconds"][name] = time.monotonic() - began
        print(f"{name}: {self.found['seconds'][name]:.1f} s", flush=True)
        write_results(self.out / "gpu.json", self.found)
        write_results(self.out / "decode.json", self.decode)


def copy_bandwidth(device: torch.device, size: int) -> dict[str, Any]:
    """Measure the bytes per second of a copy, those read and those written."""
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    stopwatch = Stopwatch(device)
    stopwatch.seconds(lambda: target.copy_(source))
    return summary([2 * size / stopwatch.seconds(lambda: target.copy_(source)) for _ in range(20)])


def correctness(run: Run) -> list[str]:
    """Check every method at lengths that no tile divides, in every dtype, against a softmax in fp32."""
    passed = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        settings = replace(run.settings, dtype=dtype)
        for batch, tokens in ODD_SIZES:
            with torch.inference_mode():
                _, rows = set_up(tokens, batch, settings)
            passed += [f"{dtype} {batch} x {tokens} {name}: {row.get('error')}" for name, row in rows.items()]
    return passed


def add_cell(run: Run, batch: int, tokens: int) -> None:
    """Measure a row of decode.json."""
    began = time.monotonic()
    row = measure(tokens, batch, run.settings)
    row["wall_seconds"] = time.monotonic() - began  # the first one tunes and compiles kernels
    run.decode["rows"][f"{batch} x {tokens}"] = row


def calls_of(ready: dict[str, Method]) -> dict[str, Callable[[], object]]:
    """Return the attention call alone of every method that attends by the library, and of the best other one."""
    found: dict[str, Callable[[], object]] = {}
    for name, method in ready.items():
        if name == BEST:
            found[name] = method.attend_again
        elif isinstance(method, Ours) and name != DENSE:
            found[name] = partial(method.attend, method.append())
    return found


def attention_calls(run: Run, batch: int, tokens: int) -> dict[str, Any]:
    """Time the attention call alone, launched kernel by kernel and replayed as a CUDA graph."""
    copy = run.found["copy_bytes_per_second"]["median"]
    stopwatch, found = Stopwatch(run.settings.device), {}
    with torch.inference_mode():
        ready, _ = set_up(tokens, batch, run.settings)
        for name, call in calls_of(ready).items():
            own: dict[str, Any] = {"read_nbytes": ready[name].read_nbytes()}
            own["eager"] = summary([stopwatch.seconds(call) for _ in range(30)])
            try:
                replay = captured(call) if run.settings.device.type == "cuda" else call
                own["graph"] = summary([stopwatch.seconds(replay) for _ in range(30)])
            except Exception as error:
                own["graph_error"] = f"{type(error).__name__}: {error}"
            own["bytes_per_second"] = own["read_nbytes"] / own.get("graph", own["eager"])["median"]
            own["share_of_copy"] = own["bytes_per_second"] / copy
            found[name] = own
    return found


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """Capture a call's kernels as a CUDA graph, and return its replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def tuning(settings: Settings, batch: int, tokens: int, seconds: float) -> dict[str, Any]:
    """Time the attention call of every method under every plan, each compiled first, until so many seconds are over."""
    deadline, stopwatch, found = time.monotonic() + seconds, Stopwatch(settings.device), {}
    with torch.inference_mode():
        calls = calls_of(set_up(tokens, batch, settings)[0])
        calls.pop(BEST, None)
        for variant in VARIANTS:
            for name, call in calls.items():
                if time.monotonic() > deadline:
                    return found
                with plans(variant) as used:
                    call()
                    took = summary([stopwatch.seconds(call) for _ in range(10)])
                label = ", ".join(f"{key} {value}" for key, value in variant.items()) or "as planned"
                found.setdefault(name, {})[label] = took | {"plan": repr(used[-1])}
    return found


@contextmanager
def plans(variant: dict[str, int]) -> Iterator[list[Plan]]:
    """Change every plan that is made in the block. The list takes what was planned."""
    planned, used = launch.plan, []

    def changed(shapes: Shapes, multiprocessors: int) -> Plan:
        plan = planned(shapes, multiprocessors)
        direct = {key: value for key, value in variant.items() if key != "splits"}
        used.append(split(replace(plan, **direct), shapes.tokens, plan.splits * variant.get("splits", 1)))
        return used[-1]

    launch.plan = changed
    try:
        yield used
    finally:
        launch.plan = planned


def fastest(found: dict[str, Any]) -> list[str]:
    """Return a line per method: the best plan, and what it saves."""
    lines = []
    for name, by_plan in found.items():
        best = min(by_plan, key=lambda label: by_plan[label]["median"])
        ratio = by_plan["as planned"]["median"] / by_plan[best]["median"]
        lines.append(f"{name}: {best} is the fastest of {len(by_plan)} plans, {ratio:.2f}x as planned")
    return lines


def profile(run: Run, batch: int, tokens: int) -> str:
    """Show the kernels that a step spends its time in."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    is_gpu = run.settings.device.type == "cuda"
    activities = [ProfilerActivity.CUDA, ProfilerActivity.CPU] if is_gpu else [ProfilerActivity.CPU]
    texts = []
    with torch.inference_mode():
        ready, _ = set_up(tokens, batch, run.settings)
        for name, method in ready.items():
            method.step()
            with profiled(activities=activities) as profiler:
                for _ in range(5):
                    method.step()
            order = "self_cuda_time_total" if is_gpu else "self_cpu_time_total"
            shown = profiler.key_averages().table(sort_by=order, row_limit=8, max_name_column_width=60)
            texts.append(f"{name}, batch {batch}, {tokens} tokens, 5 steps\n{shown}")
    return "\n\n".join(texts)


def print_calls(found: dict[str, Any]) -> None:
    """Print a line per method."""
    for point, by_name in found.items():
        for name, own in by_name.items():
            graph = own.get("graph", {}).get("median", float("nan"))
            print(
                f"{point} {name}: {1e6 * own['eager']['median']:.0f} us, replayed {1e6 * graph:.0f} us, "
                f"{own['bytes_per_second'] / 1e9:.0f} GB/s, {own['share_of_copy']:.0%} of a copy"
            )


def everything(run: Run, goal_tokens: int, lengths: Sequence[int], copied: int) -> None:
    """Run all sections, the most important first."""
    device = run.settings.device
    with run.section("copy bandwidth"):
        run.found["copy_bytes_per_second"] = copy_bandwidth(device, copied)
        run.decode["copy_bytes_per_second"] = run.found["copy_bytes_per_second"]["median"]
    with run.section("correctness"):
        run.found["correctness"] = correctness(run)
    for batch in GOAL_BATCHES:
        with run.section(f"goals, batch {batch}"):
            add_cell(run, batch, goal_tokens)
    run.decode["attention_calls"] = {}
    for batch in GOAL_BATCHES:
        with run.section(f"attention calls, batch {batch}"):
            run.decode["attention_calls"][f"{batch} x {goal_tokens}"] = attention_calls(run, batch, goal_tokens)
    if device.type == "cuda" and run.settings.backend in ("auto", "triton"):
        with run.section("plans"):
            run.found["plans"] = tuning(run.settings, 1, goal_tokens, run.tuning_seconds)
            print(*fastest(run.found["plans"]), sep="\n")
    with run.section("profile"):
        write_text(run.out / "profile.txt", profile(run, 1, goal_tokens))
    for batch in BATCHES:
        for tokens in lengths:
            if time.monotonic() > run.deadline:
                run.found["errors"][f"sweep, {batch} x {tokens}"] = "no time left"
            elif f"{batch} x {tokens}" not in run.decode["rows"]:
                with run.section(f"sweep, {batch} x {tokens}"):
                    add_cell(run, batch, tokens)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a folder")
    parser.add_argument("--seconds", type=float, default=200.0, help="after which no further length is begun")
    parser.add_argument("--tuning-seconds", type=float, default=50.0, help="for other plans of the Triton kernels")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", default="auto", help="what attends to latents: auto, triton, torch, reference")
    parser.add_argument("--dry", action="store_true", help="a tiny layer and short lengths, to see that all of it runs")
    asked = parser.parse_args(arguments)
    if asked.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device; --device cpu --dry shows that all of it runs", file=sys.stderr)
        return 2
    shape = Shape(8, 4, 32) if asked.dry else Shape()
    budget = {"budget": 0.02, "least": 2, "most": 3} if asked.dry else {"budget": 0.2}
    settings = Settings(shape, torch.bfloat16, torch.device(asked.device), asked.backend, tuple(methods()), **budget)
    run = Run(asked.out, settings, time.monotonic() + asked.seconds, asked.tuning_seconds)
    lengths, goal_tokens = ((128, 256), 256) if asked.dry else (LENGTHS, GOAL_TOKENS)
    everything(run, goal_tokens, lengths, COPIED // 1024 if asked.dry else COPIED)
    if run.wrong:
        print("an output was wrong: no figures are reported", file=sys.stderr)
        return 1
    print_calls(run.decode["attention_calls"])
    for table in (*tables(run.decode), gpu_goals(run.decode)):
        table.print()
    return 3 if run.found["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
