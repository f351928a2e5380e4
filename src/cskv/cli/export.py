"""`cskv export`: a checkpoint that vLLM serves."""

from __future__ import annotations

import dataclasses
import shlex
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cskv.cli import options as opt
from cskv.cli.common import command, emit
from cskv.cli.groups import LoadingOptions
from cskv.cli.loading import check_model
from cskv.cli.outputs import check_writable

if TYPE_CHECKING:
    from cskv.adapter.adapter import CSKVAdapter
    from cskv.vllm.export import ExportReport


@command
def export(
    adapter: Annotated[str, typer.Argument(help="Adapter folder, as `cskv train` writes it, or hub id.")],
    out: Annotated[Path, opt.files("--out", "--output", "-o", help="Folder to write.")],
    model_path: opt.OptionalModelPath = None,
    gguf_file: opt.GgufFile = None,
    window: Annotated[int | None, opt.window(help="Tokens that are always exact. [default: the adapter's]")] = None,
    group: Annotated[
        int | None,
        opt.window(
            help="Tokens that leave the window at a time; a multiple of the tokens of the adapter's blocks. Packed "
            "latents of an adapter that was trained without --k-block and --v-block are stored in blocks that follow "
            "the group: another group is another grid than it was trained for. [default: the adapter's]"
        ),
    ] = None,
    sinks: Annotated[
        int | None, opt.window(help="First tokens of a request that are always exact. [default: the adapter's]")
    ] = None,
    copy: Annotated[
        bool,
        opt.files(
            "--copy",
            help="Copy weights always. Without it they are hard links to the base model's where both folders are on "
            "one file system: they take no room, and who changes one in place changes both.",
        ),
    ] = False,
    overwrite: Annotated[bool, opt.files("--overwrite", help="Replace an earlier export in the folder.")] = False,
) -> None:
    """Write a checkpoint that vLLM serves from a compressed cache: the base model's files, and the adapter beside them.

    `config.json` names an architecture that the plugin knows, all else is the base model's. Weights in other formats
    than safetensors are left out, but a GGUF file that is the base itself is dequantised to bfloat16. Window,
    group and sinks only say how tokens are read: they may be changed without training.

    Examples:

    * `cskv export outputs/adapters/my-model/k0.2-v0.2-fisher-pca-window32-group32-sinks4-untrained --out served`
    * `cskv export ADAPTER --out served --window 0 --group 1 --sinks 0`
    """
    from cskv.adapter.adapter import CSKVAdapter
    from cskv.vllm.export import check_place
    from cskv.vllm.export import export as write

    out = out.expanduser()
    folder = Path(adapter).expanduser()
    check_place(out, *([folder] if folder.is_dir() else []), overwrite=overwrite)
    check_writable(out / "config.json")
    loaded = CSKVAdapter.from_pretrained(folder if folder.is_dir() else adapter)
    model_path = LoadingOptions(gguf_file=gguf_file).optional_name(model_path)
    with find_base(loaded, model_path, out) as (name, base):
        report = write(loaded, base, out, window=window, group=group, sinks=sinks, copy=copy, overwrite=overwrite)
    if name != base:  # the links are to a folder that is gone
        report = dataclasses.replace(report, base=name, linked=(), copied=report.linked + report.copied)
    for line in describe(report):
        typer.echo(line)
    emit({"command": "export", "adapter": adapter, **report.to_dict()})


@contextmanager
def find_base(adapter: CSKVAdapter, model_path: str | None, out: Path) -> Iterator[tuple[Path, Path]]:
    """Find the base model, the given one or what the adapter names: its path or download, and a folder of safetensors.

    That of a GGUF file is a temporary one beside `out`, on the same file system.

    Raises:
        CSKVError: there is none, or it cannot be read.
    """
    from cskv.files import writing_to
    from cskv.models.gguf import is_gguf, save_dequantised
    from cskv.vllm.source import download_base

    name = check_model(adapter.base.path(model_path))
    folder = Path(name).expanduser()
    if is_gguf(name):
        with writing_to(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            room = tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.")
        with room as dequantised:
            with writing_to(out):
                save_dequantised(name, Path(dequantised))
            yield folder, Path(dequantised)
    elif folder.is_dir():
        yield folder, folder
    else:
        folder = download_base(name, adapter.base.revision if name == adapter.base.name else None)
        yield folder, folder


def describe(report: ExportReport) -> list[str]:
    """Return the report as lines for a person."""
    from cskv.models.gguf import is_gguf
    from cskv.vllm.served import exact_tokens

    made = "dequantised" if is_gguf(report.base) else "copied"
    weights = [
        *([f"{len(report.linked)} file(s) hard-linked to the base model's"] if report.linked else []),
        *([f"{len(report.copied)} file(s) {made}"] if report.copied else []),
    ]
    lines = [
        f"folder      {report.folder}",
        f"serves      {report.architecture} from {report.base}",
        f"weights     {', '.join(weights)}",
        f"cache       {report.uncompressed_bytes_per_token:,} bytes per token uncompressed, "
        f"{report.bytes_per_token:,.6g} compressed ({report.ratio:.1%}), in {report.dtype}, exact tokens aside",
    ]
    if report.left_out:
        lines.insert(3, f"left out    {', '.join(report.left_out)}")
    if not report.prefix_caching:
        exact = exact_tokens(report.window, report.group, report.sinks)
        lines.append(
            f"prefixes    are not shared: {exact} tokens of a request are kept exactly, so prefix caching will be "
            "switched off; `--window 0 --group 1 --sinks 0` allows it"
        )
    folder = shlex.quote(str(report.folder))
    return [*lines, f"serve       python -m vllm.entrypoints.openai.api_server --model {folder}"]
