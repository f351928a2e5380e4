"""The page of the benchmark on real models: docs/real-models.md and its figure, from the committed results.

python benchmarks/real_models_report.py
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import stdev
from typing import Any

from common import RESULTS, read_results
from pages import DOCS, Table, fill_page, machine

from cskv.plots.style import COLOURS, MARKERS, new_figure, save, styled

NAMES = {"smollm2": "SmolLM2-135M", "qwen2.5-coder-1.5b": "Qwen2.5-Coder-1.5B"}
SERIES = {  # in the figure: a part of the rows' names
    "weighted PCA, no sinks": ("weighted PCA", "0 sinks"),
    "weighted PCA, 4 sinks": ("weighted PCA", "4 sinks"),
    "Fisher PCA, ranks dealt out": ("ranks dealt out",),
    "Fisher PCA, one budget": ("of the bytes",),
    "QuantizedCache, 4 and 2 bits": ("QuantizedCache",),
    "fp8": ("fp8",),
}
LEFT_OUT = ("calibrated on", "trained", "through the cache")


def tables(results: Mapping[str, Any]) -> list[Table]:
    """Make the tables of a model's results."""
    rows = results["rows"]
    with_other = any("kl_other" in row for row in rows.values())
    headings = ("", "bytes", "KL, nats per token", *(("on other text",) if with_other else ()))
    cells = [_cells(name, row, with_other) for name, row in rows.items() if "kl" in row]
    found = [Table(NAMES.get(results["settings"]["name"], ""), headings, sorted(cells, key=_order))]
    lines = [
        [name.removeprefix("lines: "), f"{row['score']:.0%} ({row['low']:.0%} to {row['high']:.0%})"]
        for name, row in rows.items()
        if "score" in row
    ]
    if lines:
        size = next(row for row in rows.values() if "score" in row)
        title = f"LongEval records of {size['lines']} lines, the question in the prompt, {size['n']} questions"
        found.append(Table(title, ("", "right (95 % interval)"), lines))
    return found


def _cells(name: str, row: Mapping[str, Any], with_other: bool) -> list[str]:
    values = row["kl_of_texts"]
    spread = f" ± {stdev(values) / len(values) ** 0.5:.4f}" if len(values) > 1 else ""
    spread += f", from {row['kl_before']:.4f}" if "kl_before" in row else ""
    other = [f"{row['kl_other']:.4f}" if "kl_other" in row else ""] if with_other else []
    return [name, f"{row['ratio']:.1%}", f"{row['kl']:.4f}{spread}", *other]


def _order(cells: Sequence[str]) -> tuple[bool, bool]:
    return cells[0].startswith("peer"), "of the bytes" in cells[0]


@styled
def draw(of_models: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw the KL of every way over its bytes, a model beside the other."""
    figure = new_figure(11, 4.8)
    axes = figure.subplots(1, len(of_models), squeeze=False, sharey=True)[0]
    for ax, (model, results) in zip(axes, of_models.items(), strict=True):
        for index, (label, parts) in enumerate(SERIES.items()):
            points = sorted(
                (100 * row["ratio"], row["kl"])
                for name, row in results["rows"].items()
                if "kl" in row and all(part in name for part in parts) and not any(part in name for part in LEFT_OUT)
            )
            if points:
                ax.plot(*zip(*points, strict=True), label=label, color=COLOURS[index], marker=MARKERS[index])
        ax.set(title=NAMES.get(model, model), xlabel="% of the bytes", yscale="log", xscale="log")
        ax.set_xticks([5, 10, 20, 50], ["5", "10", "20", "50"])
        ax.minorticks_off()
    axes[0].set(ylabel="KL from the uncompressed model, nats per token")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    save(figure, DOCS / "figures" / "real-models.png")


def main() -> None:
    """Fill the page and draw the figure."""
    of_models = {name: read_results(RESULTS / f"real-models-{name}.json") for name in NAMES}
    of_models = {name: results for name, results in of_models.items() if results["rows"]}
    parts = []
    for results in of_models.values():
        parts += [table.markdown() for table in tables(results)]
        where, settings = results["environment"], results["settings"]
        versions = (f"{name} {where[name]}" for name in ("torch", "transformers"))
        parts.append(
            f"{settings['texts']} texts of {settings['tokens']} tokens, ± the standard error; calibrated on "
            f"{settings['samples']} samples. {machine(where, *versions)}."
        )
    fill_page(DOCS / "real-models.md", "real_models", *parts)
    draw(of_models)


if __name__ == "__main__":
    main()
