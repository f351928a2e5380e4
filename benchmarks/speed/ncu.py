"""Nsight Compute on the kernels of the two slowest methods of a decode.json, at its longest row of one sequence.

python -m benchmarks.speed.ncu OUT_DIR       # runs ncu on itself, once per method, into OUT_DIR/ncu-METHOD.txt

What is shown of it goes into OUT_DIR/ncu.json as well.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import read_results, write_results
from benchmarks.pages import Table
from benchmarks.speed import decode
from benchmarks.speed.methods import methods, on_a_gpu
from benchmarks.speed.resources import OURS
from benchmarks.speed.tables import cells, median

COUNT, LAUNCHES = 2, 3
SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "Occupancy", "WarpStateStats")
METRIC = re.compile(r"\s*(\S.*?)\s{2,}(?:(\S+)\s+)?([\d.,]+)\s*$")
# Metrics and, as some have the same name, their units.
SHOWN = {
    ("Duration", ""): "time",
    ("DRAM Throughput", "%"): "DRAM",
    ("Memory Throughput", "%"): "memory",
    ("Compute (SM) Throughput", "%"): "SM",
    ("Achieved Occupancy", "%"): "occupancy",
    ("L2 Hit Rate", "%"): "L2 hits",
}


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
    status, rows = 0, {}
    for name in names:
        sections = [part for section in SECTIONS for part in ("--section", section)]
        which = ["-k", "regex:scores|partials|outputs", "-c", str(LAUNCHES), "--clock-control", "none"]
        command = [tool, *which, *sections, sys.executable, "-m", "benchmarks.speed.ncu", name, str(tokens)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        (folder / f"ncu-{name.replace(', ', '-').replace(' ', '-')}.txt").write_text(done.stdout + done.stderr)
        rows[name] = {"exit": done.returncode, "kernels": metrics(done.stdout)}
        write_results(folder / "ncu.json", {"rows": rows})
        if done.returncode:
            print("\n".join([f"{name}: exit {done.returncode}", *(done.stdout + done.stderr).splitlines()[-8:]]))
        status = status or done.returncode
    print("\n".join(["kernels seen:", *(" ".join(line) for line in table({"rows": rows}).rows)]))
    return status


def metrics(text: str) -> list[dict[str, str]]:
    """Read the metrics that are shown of every launch from what ncu prints."""
    launches: list[dict[str, str]] = []
    for line in text.splitlines():
        if ", Context " in line:
            launches.append({"kernel": line.split()[0]})
        found = METRIC.match(line)
        if not launches or found is None:
            continue
        metric, unit, value = found[1], found[2] or "", found[3]
        for (name, wanted), short in SHOWN.items():
            if metric == name and wanted in ("", unit):
                launches[-1][short] = f"{value} {unit}".strip()
    return launches


def table(results: dict[str, Any]) -> Table:
    """Show a line per kernel."""
    shown = tuple(SHOWN.values())
    lines = [
        (name, launch["kernel"], *(launch.get(key, "") for key in shown))
        for name, row in results["rows"].items()
        for launch in row["kernels"]
    ]
    return Table("Nsight Compute, 64K tokens, batch 1", ("method", "kernel", *shown), lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
