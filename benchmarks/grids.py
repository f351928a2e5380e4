"""Attempts to make few bits go further: bases of the latents, blocks, and widths, on the bundled model.

    python benchmarks/grids.py            # measures, writes results/grids.json and the tables of docs/quantisation.md

Factors are PCA's at 20 % of the channels; nothing is trained. Losses are those of keys and values of held-out text,
summed over layers, relative to the loss of the same factors with 16-bit latents. KL is from the uncompressed model, in
nats per token, on held-out text and on LongEval records.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from bundled import ALLOCATION_SAMPLES, Bench, Recipe, load, start
from common import Jobs
from pages import DOCS, Table, fill_page, measured_on
from torch import Tensor

from cskv.adapter.adapter import CSKVAdapter
from cskv.compression.budget import ratio_of
from cskv.compression.initialise import Part
from cskv.compression.losses import observe_latents
from cskv.data.lines import make_case
from cskv.factorization.basis import centred, hadamard_blocks, rotated, scaled
from cskv.factorization.factors import Factors, LayerFactors

BASE: dict[str, Any] = {"k_density": 0.2, "v_density": 0.2, "init": "pca"}
Block = tuple[int, int] | None
BLOCKS: dict[str, tuple[Block, Block]] = {
    "KIVI: K 32x1, V 1x32": (None, None),
    "32x1 both": ((32, 1), (32, 1)),
    "32x4 both": ((32, 4), (32, 4)),
    "8x4 K, 4x8 V": ((8, 4), (4, 8)),
}
Change = Callable[[Factors, Tensor], Factors]


def _rotation(rank: int) -> Tensor:
    return torch.linalg.qr(torch.randn(rank, rank, generator=torch.Generator().manual_seed(0)))[0]


# Of factors and their latents. Equalised channels have unit variance; Hadamard matrices of 32, 16, ... neighbouring
# channels are what `initialise` turns by; the last basis is turned by one random orthogonal matrix.
BASES: dict[str, Change] = {
    "as PCA gives them": lambda factors, x: factors,
    "centred": lambda factors, x: centred(factors, x.mean(0)),
    "centred, equalised": lambda factors, x: scaled(centred(factors, x.mean(0)), 1 / x.std(0)),
    "centred, Hadamard": lambda factors, x: rotated(centred(factors, x.mean(0)), hadamard_blocks(factors.rank).float()),
    "centred, rotated": lambda factors, x: rotated(centred(factors, x.mean(0)), _rotation(factors.rank)),
}


class Grids(Bench):
    """PCA's factors, their latents, and the text that everything is measured on."""

    def __init__(self) -> None:
        super().__init__(load(), 0, texts=6)
        self.records = self.tokens((make_case(50, seed).prompt for seed in range(6)), 512, 6)
        self.pca = self.make(Recipe(BASE))
        self.latents: dict[Part, Tensor] = {}
        factors = {(i, kind): getattr(self.pca.factors(i), kind) for i in self.pca.layer_indices for kind in ("k", "v")}
        for part, latents in observe_latents(self.surveyed, factors, list(self.samples(ALLOCATION_SAMPLES))):
            seen = self.latents.get(part)
            self.latents[part] = latents[0] if seen is None else torch.cat([seen, latents[0]])
        self.floor = self._summed(self.pca)

    def _summed(self, adapter: CSKVAdapter) -> tuple[float, float]:
        losses = self.losses(adapter)
        return sum(losses["k"]), sum(losses["v"])

    def measure(self, adapter: CSKVAdapter) -> dict[str, float]:
        """Measure one adapter."""
        k, v = self._summed(adapter)
        return {
            "ratio": ratio_of(adapter),
            "k_loss": k / self.floor[0],
            "v_loss": v / self.floor[1],
            "kl_text": self.divergence.mean(adapter, self.held_out),
            "kl_records": self.divergence.mean(adapter, self.records),
        }

    def changed(self, change: Change, settings: dict[str, Any]) -> CSKVAdapter:
        """Return the PCA adapter in another basis and on another grid."""
        layers = {}
        for i in self.pca.layer_indices:
            with torch.no_grad():
                pair = [change(getattr(self.pca.factors(i), kind), self.latents[i, kind]) for kind in ("k", "v")]
            layers[i] = LayerFactors(*(Factors(f.down.clone(), f.up.clone(), f.bias, f.down_bias) for f in pair))
        return CSKVAdapter(Recipe(settings).config, layers, self.pca.base)


def makers() -> dict[str, Callable[[Grids], CSKVAdapter]]:
    """Name of a row -> how its adapter is made."""
    found: dict[str, Callable[[Grids], CSKVAdapter]] = {"16 bits": lambda bench: bench.pca}
    for bits in (4, 2):
        for block, (k, v) in BLOCKS.items():
            for basis, change in BASES.items():
                settings = BASE | {"k_bits": bits, "v_bits": bits, "k_block": k, "v_block": v}
                found[f"{bits} bits | {block} | {basis}"] = lambda bench, c=change, s=settings: bench.changed(c, s)
    for ratio in (0.065, 0.044):
        for init in ("fisher-pca",):
            for channels in (1, 2, 4, 8):
                block = (32, channels)
                settings = BASE | {"init": init, "k_block": block, "v_block": block}
                recipe = Recipe(settings, ratio=ratio)
                found[f"mixed {ratio} | 32x{channels} both | {init}"] = lambda bench, r=recipe: bench.make(r)
    return found


def table(rows: Mapping[str, Mapping[str, float]]) -> Table:
    """Make the table of results."""
    cells = []
    for name, row in rows.items():
        losses = [f"{row[of]:.3f}" for of in ("k_loss", "v_loss")]
        kls = [f"{row[of]:.4f}" for of in ("kl_text", "kl_records")]
        cells.append([*(*name.split(" | "), "", "")[:3], f"{row['ratio']:.1%}", *losses, *kls])
    headings = (
        "widths", "block (tokens x channels)", "latents", "bytes of 16-bit K and V", "K loss", "V loss", "KL text",
        "KL records",
    )  # fmt: skip
    return Table("", headings, cells)


def jobs() -> Jobs:
    """Name of a row -> how it is measured."""
    bench = cache(Grids)
    return {name: lambda make=make: bench().measure(make(bench())) for name, make in makers().items()}


def write_report(results: dict[str, Any]) -> None:
    """Put the table between the page's markers."""
    found = {name: results["rows"][name] for name in makers()}
    fill_page(DOCS / "quantisation.md", "grids", measured_on(results["environment"], "grids"), table(found).markdown())


if __name__ == "__main__":
    start("grids", jobs, write_report)
