"""Nsight Compute on the kernels of the two slowest methods of a decode.json, at its longest row of one sequence.

python -m benchmarks.speed.ncu OUT_DIR       # runs ncu on itself, once per method, into OUT_DIR/ncu-METHOD.txt
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import torch

from benchmarks.common import read_results
from benchmarks.speed import decode
from benchmarks.speed.methods import methods, on_a_gpu
from benchmarks.speed.resources import OURS
from benchmarks.speed.tables import cells, median

COUNT, LAUNCHES = 2, 3
SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "Occupancy", "WarpStateStats")
SHOWN = ("Duration", "Memory Throughput", "DRAM Throughput", "Compute (SM) Throughput", "Achieved Occupancy", "L2 Hit")


def slowest(folder: Path) -> tuple[int, list[str]]:
    """Return the tokens of the longest row of one sequence, and the methods that take longest to attend there."""
    rows = cells(read_results(folder / "decode.json"), 1)
    if not rows:
        return 0, []
    found = {name: median(rows[-1], name, "graph") or 0.0 for name in OURS}
    return rows[-1]["tokens"], sorted((name for name in found if found[name]), key=lambda name: -found[name])[:COUNT]


def attend(name: str, tokens: int) -> None:
    """Make one attention call of a method, the last of a few."""
    kind, make = (methods() | on_a_gpu())[name]
    asked = Namespace(dtype="bfloat16", device="cuda")
    decode.resolve(asked, decode.GPU_SHAPE)
    with torch.inference_mode():
        call = make(decode.Problem(kind, asked.shape, tokens, 1, asked.dtype, asked.device)).call
        assert call is not None, "ours have an attention call"
        for _ in range(2):
            call()()
    torch.cuda.synchronize()


def main(arguments: list[str]) -> int:
    """Profile, or make the call that is profiled."""
    if len(arguments) == 2:
        attend(arguments[0], int(arguments[1]))
        return 0
    folder, tool = Path(arguments[0]), shutil.which("ncu")
    tokens, names = slowest(folder)
    if tool is None or not names:
        print("ncu is not installed" if tool is None else f"{folder} has no decode.json with a row of one sequence")
        return 0
    status = 0
    for name in names:
        sections = [part for section in SECTIONS for part in ("--section", section)]
        which = ["-k", "regex:scores|partials|outputs", "-c", str(LAUNCHES), "--clock-control", "none"]
        command = [tool, *which, *sections, sys.executable, "-m", "benchmarks.speed.ncu", name, str(tokens)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        (folder / f"ncu-{name.replace(', ', '-').replace(' ', '-')}.txt").write_text(done.stdout + done.stderr)
        print(f"{name}: exit {done.returncode}")
        shown = [
            line.strip() for line in done.stdout.splitlines() if "Context" in line or line.strip().startswith(SHOWN)
        ]
        print("\n".join(shown))
        status = status or done.returncode
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
