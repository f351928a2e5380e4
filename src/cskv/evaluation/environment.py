"""Provenance of a figure: hardware, versions and date, to be stored beside every result."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


@dataclass(frozen=True)
class Environment:
    """The machine and the software of a measurement.

    Attributes:
        cpu: the processor's name.
        cores: the cores this process may run on.
        threads: the threads PyTorch computes with.
        accelerator: the name of the first GPU, or None.
        python, torch, transformers, triton, cskv: versions.
        date: UTC, ISO 8601, to the second.
    """

    cpu: str
    cores: int
    threads: int
    accelerator: str | None
    python: str
    torch: str
    transformers: str
    triton: str
    cskv: str
    date: str

    def to_dict(self) -> dict[str, str | int | None]:
        """Return the fields as JSON-ready values."""
        return asdict(self)


def environment() -> Environment:
    """Describe the machine and the versions that the current process runs with."""
    import torch

    return Environment(
        cpu=cpu_name(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        accelerator=torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=package_version("transformers"),
        triton=package_version("triton"),
        cskv=package_version("cskv"),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def cpu_name(cpuinfo: str | Path = "/proc/cpuinfo") -> str:
    """Return the processor's name as Linux tells it, or what the platform module knows."""
    try:
        lines = Path(cpuinfo).read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next((name for name in names if name), platform.processor() or platform.machine() or "unknown")


def package_version(package: str) -> str:
    """Return a package's version, or "not installed"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
