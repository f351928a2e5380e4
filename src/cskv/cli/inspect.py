"""`cskv inspect`: what an adapter folder holds and what it saves."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cskv.cli.common import command, emit
from cskv.errors import AdapterError

if TYPE_CHECKING:
    from cskv.adapter import CSKVAdapter

BYTES = 2  # of one latent, key or value channel of a model in bfloat16 or float16


@command
def inspect(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder, as `cskv train` writes it.", show_default=False)],
) -> None:
    """Print an adapter's settings, ranks, bytes per token, figures and files, after checking that it is whole.

    Bytes per token count latents of a 16-bit model; the window, positions and uncompressed layers come on top.
    `cskv generate` prints the bytes that a real cache holds.

    Examples:

    * `cskv inspect outputs/adapters/my-model/k0.2-v0.2-asvd-window32-group32`
    * `cskv inspect ADAPTER | tail -n 1 | python -m json.tool`
    """
    from cskv.adapter import CSKVAdapter

    if not adapter.is_dir():
        raise AdapterError(f"adapter folder {str(adapter)!r} does not exist; expected one that `cskv train` wrote")
    report = report_of(CSKVAdapter.from_pretrained(adapter), adapter)
    for line in describe(report):
        typer.echo(line)
    emit(report)


def report_of(adapter: CSKVAdapter, folder: Path) -> dict[str, Any]:
    """Everything that `inspect` prints, JSON-ready; sizes in bytes."""
    description = adapter.describe()
    ranks = description["ranks"]
    latents = BYTES * sum(layer["k"] + layer["v"] for layer in ranks.values())
    full = BYTES * sum(2 * layer["kv_dim"] for layer in ranks.values())
    return {
        "command": "inspect",
        "adapter": str(folder),
        "base_model": description["base_model"],
        "settings": description["compression"],
        "ranks": ranks,
        "parameters": sum(parameter.numel() for parameter in adapter.parameters()),
        "bytes_per_token": latents,
        "uncompressed_bytes_per_token": full,
        "ratio": latents / full,
        "metrics": description["metrics"],
        "files": {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()},
    }


def describe(report: dict[str, Any]) -> list[str]:
    """The report as lines for a person."""
    base, settings = report["base_model"], report["settings"]
    lines = [
        f"adapter     {report['adapter']}",
        f"base model  {base['name'] or '(unnamed)'} ({base['model_type']}, {base['num_layers']} layers, "
        f"hidden size {base['hidden_size']})",
        f"settings    {', '.join(f'{name} {value}' for name, value in sorted(settings.items()))}",
        f"parameters  {report['parameters']:,}",
        "",
        "layers          K rank    V rank    of channels    K density    V density",
    ]
    lines += [_row(*entry) for entry in _runs(report["ranks"])]
    lines += [
        "",
        f"per token   {report['bytes_per_token']:,} bytes of latents in 16 bits, {report['ratio']:.1%} of the "
        f"{report['uncompressed_bytes_per_token']:,} that these layers' uncompressed cache takes",
        f"metrics     {_inline(report['metrics']) or 'none recorded'}",
        f"files       {', '.join(f'{name} {size:,} bytes' for name, size in report['files'].items())}",
    ]
    return lines


def _runs(ranks: dict[str, dict[str, int]]) -> Iterable[tuple[str, dict[str, int]]]:
    """Neighbouring layers with equal ranks, as one entry each."""
    for rank, members in groupby(ranks.items(), key=lambda item: item[1]):
        names = [name for name, _ in members]
        yield (names[0] if len(names) == 1 else f"{names[0]}-{names[-1]}"), rank


def _row(names: str, rank: dict[str, int]) -> str:
    k, v, kv_dim = rank["k"], rank["v"], rank["kv_dim"]
    return f"{names:<12}{k:>10}{v:>10}{kv_dim:>15}{k / kv_dim:>13.3f}{v / kv_dim:>13.3f}"


def _inline(metrics: dict[str, Any]) -> str:
    """Scalar figures on one line; nested ones are in the JSON line."""
    return ", ".join(
        f"{name} {value:.6g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in metrics.items()
        if isinstance(value, (int, float, str))
    )
