"""Programs that nobody has read, in a process of their own that is stopped and watched.

The process is a Python without the environment, site packages or startup files of this one, in an empty folder of its
own. It bounds its time, memory and files and gives up other files, processes and sockets before it runs the program
(`cskv.evaluation.confinement`). That is what a language model's mistakes need. It is no wall against code that was
written to break out, least of all where the kernel is not Linux: use a container or another machine for that.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from cskv.errors import CSKVError

CONFINEMENT = Path(__file__).with_name("confinement.py")
# -I without its ignoring of the environment, which is empty but for the order of sets: the same program, the same end.
ISOLATED = ("-P", "-s", "-S", "-B", "-X", "utf8")
ENVIRONMENT = {"PYTHONHASHSEED": "0"}


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    Attributes:
        cpu_seconds, wall_seconds: of computing, and until it is killed: long enough on a busy machine for the former
            alone to decide what passes.
        memory_bytes: of address space.
        file_bytes: of any file, and of what it prints.
        output_characters: that are kept of what it printed.
    """

    cpu_seconds: int = 5
    wall_seconds: float = 30.0
    memory_bytes: int = 1 << 29
    file_bytes: int = 1 << 20
    output_characters: int = 1 << 14


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
        finished: it came to its end: no exception, no exit, no limit.
        output: what it printed, errors included, cut to the limit.
    """

    finished: bool
    output: str


def run_confined(program: str, limits: Limits = Limits()) -> Outcome:
    """Run a Python program, confined.

    Args:
        program: its source.
        limits: what it may use.

    Raises:
        CSKVError: this platform cannot confine it.
    """
    if importlib.util.find_spec("resource") is None:
        raise CSKVError("programs of a model are run confined by limits of POSIX, which this platform does not have")
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="cskv-") as folder, tempfile.TemporaryFile() as printed:
        most = {
            "RLIMIT_CPU": limits.cpu_seconds,
            "RLIMIT_AS": limits.memory_bytes,
            "RLIMIT_FSIZE": limits.file_bytes,
        }
        asked = {"program": program, "token": token, "folder": folder, "limits": most}
        process = subprocess.Popen(
            [sys.executable, *ISOLATED, str(CONFINEMENT)],
            stdin=subprocess.PIPE,
            stdout=printed,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=ENVIRONMENT,
            start_new_session=True,
        )
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(json.dumps(asked).encode(), timeout=limits.wall_seconds)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        printed.seek(0)
        output = printed.read().decode(errors="replace")
    if output.startswith(f"{token} unconfined"):
        raise CSKVError(f"this platform cannot confine a program: {output.strip().partition(': ')[2]}")
    finished = process.returncode == 0 and output.endswith(token)
    return Outcome(finished, output.removesuffix(f"\n{token}")[: limits.output_characters])
