"""`cskv inspect`: what an adapter folder holds and what it saves."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cskv.cli.common import command, emit
from cskv.cli.tables import cache_lines
from cskv.errors import AdapterError

if TYPE_CHECKING:
    from cskv.adapter.adapter import CSKVAdapter

DEFAULT_TOKENS, MOST_TOKENS = 16_384, 10**9


@command
def inspect(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder, as `cskv train` writes it.")],
    tokens: Annotated[int, typer.Option(help="Length of the sequence.", min=1, max=MOST_TOKENS)] = DEFAULT_TOKENS,
) -> None:
    """Print an adapter's settings, ranks, figures and files, and the bytes of a cache, after checking that it is whole.

    Bytes are those of one sequence of `--tokens` tokens of a 16-bit model, prefilled at once. `cskv generate` prints
    those of a real cache.

    Examples:

    * `cskv inspect outputs/adapters/my-model/k0.2-v0.2-fisher-pca-window32-group32-sinks4-untrained`
    * `cskv inspect ADAPTER --tokens 131072 | tail -n 1 | python -m json.tool`
    """
    from cskv.adapter.adapter import CSKVAdapter

    if not adapter.is_dir():
        raise AdapterError(f"adapter folder {str(adapter)!r} does not exist; expected one that `cskv train` wrote")
    report = report_of(CSKVAdapter.from_pretrained(adapter), adapter, tokens)
    for line in describe(report):
        typer.echo(line)
    emit(report)


def report_of(adapter: CSKVAdapter, folder: Path, tokens: int) -> dict[str, Any]:
    """Return everything that `inspect` prints, JSON-ready; sizes in bytes."""
    from cskv.attachment.cache_bytes import adapter_report

    description = adapter.describe()
    bits = {
        str(i): [16.0 if grid is None else grid.bits_per_latent for grid in adapter.grids(i)]
        for i in adapter.layer_indices
    }
    return {
        "command": "inspect",
        "adapter": str(folder),
        "base_model": description["base_model"],
        "settings": description["compression"],
        "ranks": description["ranks"],
        "bits_per_latent": bits,
        "widths": description.get("widths"),
        "parameters": sum(parameter.numel() for parameter in adapter.parameters()),
        "cache": adapter_report(adapter, tokens).to_dict(),
        "metrics": description["metrics"],
        "files": {path.name: path.stat().st_size for path in sorted(folder.glob("[!.]*")) if path.is_file()},
    }


def describe(report: dict[str, Any]) -> list[str]:
    """Return the report as lines for a person."""
    base, settings = report["base_model"], report["settings"]
    lines = [
        f"adapter     {report['adapter']}",
        f"base model  {base['name'] or '(unnamed)'} ({base['model_type']}, {base['num_layers']} layers, "
        f"hidden size {base['hidden_size']})",
        f"weights     {'known' if base['signature'] else 'not known, made by an older cskv'}: "
        f"{'an' if base['signature'] else 'no'} other model of equal shapes is refused",
        f"settings    {', '.join(f'{name} {value}' for name, value in sorted(settings.items()))}",
        f"parameters  {report['parameters']:,}",
        "",
        "layers          K rank    V rank    of channels    K density    V density    K bits    V bits",
    ]
    layers = {name: {**rank, "bits": report["bits_per_latent"][name]} for name, rank in report["ranks"].items()}
    lines += [_row(*entry) for entry in _runs(layers)]
    lines += [
        "",
        *cache_lines(report["cache"]),
        f"metrics     {_inline(report['metrics']) or 'none recorded'}",
        f"files       {', '.join(f'{name} {size:,} bytes' for name, size in report['files'].items())}",
    ]
    return lines


def _runs(ranks: dict[str, dict[str, Any]]) -> Iterable[tuple[str, dict[str, Any]]]:
    """Join neighbouring layers with equal ranks and bits."""
    for rank, members in groupby(ranks.items(), key=lambda item: item[1]):
        names = [name for name, _ in members]
        yield (names[0] if len(names) == 1 else f"{names[0]}-{names[-1]}"), rank


def _row(names: str, rank: dict[str, Any]) -> str:
    k, v, kv_dim, bits = rank["k"], rank["v"], rank["kv_dim"], rank["bits"]
    return (
        f"{names:<12}{k:>10}{v:>10}{kv_dim:>15}{k / kv_dim:>13.3f}{v / kv_dim:>13.3f}{bits[0]:>10.2f}{bits[1]:>10.2f}"
    )


def _inline(metrics: dict[str, Any]) -> str:
    """Return scalar figures on one line; nested ones are in the JSON line."""
    return ", ".join(
        f"{name} {value:.6g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in metrics.items()
        if isinstance(value, (int, float, str))
    )
