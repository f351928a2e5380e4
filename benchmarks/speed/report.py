"""The pages of a folder of results: docs/decode-speed.md with its figure, of decode.json and generation.json, and the
table of docs/vllm.md, of serving.json; what the kernels take, of resources.json. What was measured on a GPU has its own
place.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.common import read_results
from benchmarks.pages import DOCS, Table, fill_page, measured_on
from benchmarks.speed import generation, gpu, graph, levels, models, paged, resources, serving
from benchmarks.speed.methods import BEST, DENSE, POSITIONS, QUANTIZED, SDPA
from benchmarks.speed.registry import Unavailable
from benchmarks.speed.tables import NAMES, batches, cells, cpu_goals, gpu_goals, kernels_of, median, tables
from cskv.plots.style import COLOURS, MARKERS, new_figure, save, styled

COLOUR_OF = {SDPA: 0, BEST: 0, QUANTIZED: 5, DENSE: 3, "joint": 1, "grouped": 4, "commuting": 2}


def write_pages(folder: Path, docs: Path = DOCS) -> list[Table]:
    """Fill the pages that there are results for, and return the goals and tables that stand there."""
    decode, generated, served = (read_results(folder / f"{name}.json") for name in ("decode", "generation", "serving"))
    found = []
    if decode["rows"]:
        found.append(write_decoding(decode, generated, docs / "decode-speed.md", folder))
    if served["rows"]:
        (table,) = serving.tables(served)
        fill_page(docs / "vllm.md", "speed/serving", table.markdown(), serving.words(served))
        found.append(table)
    compiled = read_results(folder / "resources.json")
    if compiled["rows"]:
        (table,) = resources.tables(compiled)
        words = f"Compiled by Triton {compiled['settings']['triton']} for sm_90. Reproduce with "
        command = "`python -m benchmarks.speed resources`."
        fill_page(docs / "decode-speed.md", "speed/resources", words + command, table.markdown())
    for name, module in (("levels", levels), ("models", models)):
        results = read_results(folder / f"{name}.json")
        if results["rows"]:
            where = measured_on(results["environment"], f"speed/{name}")
            parts = [table.markdown() for table in module.tables(results)]  # type: ignore[attr-defined]
            fill_page(docs / "decode-speed.md", f"speed/{name}", where, *parts)
    if not found:
        raise Unavailable(f"{folder} has no rows of decode.json or serving.json; measure them first")
    return found


def write_decoding(decode: dict[str, Any], generated: dict[str, Any], page: Path, folder: Path) -> Table:
    """Fill the page on decoding, and draw the figure beside it; return the goals. The folder of a GPU has more."""
    settings, shape = decode["settings"], decode["settings"]["shape"]
    is_gpu = settings["device"] == "cuda"
    script, figure = ("speed/gpu", "decode-speed-gpu.png") if is_gpu else ("speed/decode", "decode-speed.png")
    layer = (
        f"{shape['q_heads']} query heads, {shape['kv_heads']} kv heads, head_dim {shape['head_dim']}, "
        f"{settings['dtype']}, {100 * (1 - shape['density']):.0f} % of the channels left out."
        + ("" if is_gpu else f" Compiled kernels: {kernels_of(decode)}.")
    )
    goals = gpu_goals(decode) if is_gpu else cpu_goals(decode, read_results(folder / "models.json"))
    parts = [measured_on(decode["environment"], "speed/decode"), layer]
    parts += [table.markdown() for table in (goals, *tables(decode))]
    if is_gpu:
        parts += [table.markdown() for table in _of_gpu(folder)]
    if generated["rows"]:
        (speeds,) = generation.tables(generated)
        if is_gpu:
            parts.append(speeds.markdown())
        else:
            where = measured_on(generated["environment"], "speed/generation")
            fill_page(page, "speed/generation", where, speeds.markdown())
    draw(decode, page.parent / "figures" / figure)
    fill_page(page, script, *parts, f"![Time and bytes over the cached tokens](figures/{figure})")
    return goals


def _of_gpu(folder: Path) -> list[Table]:
    """Make the tables of decoding end to end, of pages, and of plans, as far as they were measured."""
    found = []
    for name, make in (("graph", _end_to_end), ("paged", paged.tables), ("gpu", gpu.tables)):
        results = read_results(folder / f"{name}.json")
        if results["rows"]:
            found += make(results)
    return [table for table in found if table.rows]


def _end_to_end(results: dict[str, Any]) -> list[Table]:
    return [graph.goals(results), *graph.tables(results)]


@styled
def draw(decode: dict[str, Any], path: Path) -> None:
    """Time (above) and bytes (below) over the length, a column per batch size."""
    columns = batches(decode)
    figure = new_figure(4.4 * len(columns) + 0.6, 8.2)
    axes = figure.subplots(2, len(columns), sharex=True, sharey="row", squeeze=False)
    is_gpu = decode["settings"]["device"] == "cuda"
    for column, batch in enumerate(columns):
        _panels(axes[0][column], axes[1][column], decode, batch, is_gpu)
        axes[0][column].set_title(f"batch {batch}")
        axes[1][column].set_xlabel("cached tokens")
    axes[0][0].set_ylabel("a step, milliseconds" if is_gpu else f"a step's time / {SDPA}'s\nat the shortest length")
    axes[1][0].set_ylabel("bytes allocated")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4 if len(columns) > 1 else 2, frameon=False)
    figure.suptitle("One layer's decode step, and its cache")
    save(figure, path)


def _panels(above: Any, below: Any, decode: dict[str, Any], batch: int, is_gpu: bool) -> None:
    rows = cells(decode, batch)
    unit = 1e-3 if is_gpu else median(rows[0], SDPA) or 1.0
    for name in NAMES:
        own = [row for row in rows if median(row, name) is not None]
        if name == POSITIONS or not own:
            continue
        index = COLOUR_OF.get(name.removesuffix(", 4 bits"))
        if index is None:  # in the tables alone
            continue
        style = {"color": COLOURS[index], "marker": MARKERS[index], "markersize": 5, "linewidth": 1.5}
        if name == BEST:
            style["marker"] = "x"
        if name == BEST or name.endswith(", 4 bits"):
            style["linestyle"] = "--"
        lengths = [row["tokens"] for row in own]
        above.plot(lengths, [(median(row, name) or 0.0) / unit for row in own], label=name, **style)
        below.plot(lengths, [row["methods"][name]["nbytes"] for row in own], **style)
    ticks = sorted({row["tokens"] for row in cells(decode) if "methods" in row})  # the axes are shared
    for ax in (above, below):
        ax.set(xscale="log", yscale="log")
        ax.set_xticks(ticks, [f"{tokens // 1024}K" for tokens in ticks])
        ax.xaxis.minorticks_off()
    held = [m["nbytes"] for row in cells(decode) for m in row.get("methods", {}).values() if m.get("nbytes")]
    sizes = [2**power for power in range(16, 38, 2) if min(held) / 2 <= 2**power <= 2 * max(held)]
    below.set_yticks(sizes, [_size(size) for size in sizes])
    below.yaxis.minorticks_off()


def _size(size: int) -> str:
    shift, unit = next((shift, unit) for shift, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")) if size >> shift)
    return f"{size >> shift} {unit}"
