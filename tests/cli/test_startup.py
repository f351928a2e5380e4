"""What `cskv` imports before there is work to do, and Ctrl-C while it imports."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

HEAVY = ("torch", "transformers", "numpy", "matplotlib", "datasets", "safetensors", "huggingface_hub", "accelerate")
REPORTING = f"""
import atexit, sys
atexit.register(lambda: sys.stderr.write("loaded " + ",".join(name for name in {HEAVY} if name in sys.modules) + "\\n"))
from cskv.cli import main
sys.argv = ["cskv", *sys.argv[1:]]
main()
"""


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["--help"], 0),
        (["train", "--help"], 0),
        (["generate", "--no-such-option"], 2),
        (["generate", "--max-new-tokens", "many"], 2),
        (["no-such-command"], 2),
    ],
)
def test_help_and_mistakes_in_options_import_nothing_heavy(options: list[str], code: int) -> None:
    done = subprocess.run([sys.executable, "-c", REPORTING, *options], capture_output=True, text=True)
    *lines, loaded = done.stderr.splitlines()
    assert (done.returncode, loaded) == (code, "loaded ")
    assert len(lines) == (0 if code == 0 else 1), done.stderr
    assert all(line.startswith("error: ") and "--help`)" in line for line in lines)


STALLING = """
import sys, time
class Stall:  # is asked for every module that is imported
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            print("importing", flush=True)
            {wait}
sys.meta_path.insert(0, Stall())
from cskv.cli import main
sys.argv = ["cskv", "inspect", {folder!r}]
main()
"""


@pytest.mark.parametrize(
    ("module", "wait"),
    [
        ("typer", "time.sleep(60)"),
        ("cskv.cli.report", "time.sleep(60)"),
        ("torch", "time.sleep(60)"),
        # C extensions turn an interruption into an error of their own.
        (
            "torch",
            "\n            try: time.sleep(60)\n            except KeyboardInterrupt: raise ImportError('no numpy')",
        ),
    ],
)
def test_ctrl_c_during_imports_is_one_line_and_130(module: str, wait: str, tmp_path: Path) -> None:
    code = STALLING.format(module=module, wait=wait, folder=str(tmp_path))
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "importing\n"
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (130, "error: interrupted\n")
