"""What was tried to make few bits go further: bases of the latents, blocks, and widths, on the bundled model.

    python benchmarks/grids.py            # measures, writes results/grids.json and the tables of docs/quantisation.md

Factors are PCA's at 20 % of the channels; nothing is trained. Losses are those of keys and values of held-out text,
summed over layers, relative to the loss of the same factors with 16-bit latents. KL is from the uncompressed model, in
nats per token, on held-out text and on LongEval records.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from common import fill_page, measure_missing, measured_on, read_results
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from cskv.adapter.adapter import CSKVAdapter
from cskv.calibration.calibrate import calibrate
from cskv.compression.budget import allocate_widths, observe_latents
from cskv.compression.bytes import ratio_of
from cskv.compression.divergence import Divergence
from cskv.compression.initialise import initialise
from cskv.compression.reading import Part
from cskv.config import CSKVConfig
from cskv.data.lines import make_case
from cskv.data.samples import TokenSamples
from cskv.data.sources import open_source
from cskv.demo.text import mixed_source
from cskv.evaluation.perplexity import token_sequences
from cskv.evaluation.reconstruction import reconstruction_losses
from cskv.factorization.basis import centred, hadamard_blocks, rotated, scaled
from cskv.factorization.factors import Factors, LayerFactors
from cskv.models.survey import survey

HERE = Path(__file__).resolve().parent
MODEL = HERE.parent / "tinymodel" / "checkpoint"
RESULTS = HERE / "results" / "grids.json"
PAGE = HERE.parent / "docs" / "quantisation.md"
BASE = CSKVConfig(0.2, 0.2, window=32, group=32, init="pca")
Block = tuple[int, int] | None
BLOCKS: dict[str, tuple[Block, Block]] = {
    "KIVI: K 32x1, V 1x32": (None, None),
    "32x1 both": ((32, 1), (32, 1)),
    "32x4 both": ((32, 4), (32, 4)),
    "8x4 K, 4x8 V": ((8, 4), (4, 8)),
}
Change = Callable[[Factors, Tensor], Factors]


def equalised(factors: Factors, latents: Tensor) -> Factors:
    """Centred, and all channels of unit variance."""
    return scaled(centred(factors, latents.mean(0)), 1 / latents.std(0))


def turned(factors: Factors, latents: Tensor) -> Factors:
    """Centred, and turned by Hadamard matrices of 32, 16, ... neighbouring channels: what `initialise` does."""
    return rotated(centred(factors, latents.mean(0)), hadamard_blocks(factors.rank).float())


def rotation(factors: Factors, latents: Tensor) -> Factors:
    """Centred, and turned by one random orthogonal matrix."""
    random = torch.randn(factors.rank, factors.rank, generator=torch.Generator().manual_seed(0))
    return rotated(centred(factors, latents.mean(0)), torch.linalg.qr(random)[0])


BASES: dict[str, Change] = {
    "as PCA gives them": lambda factors, latents: factors,
    "centred": lambda factors, latents: centred(factors, latents.mean(0)),
    "centred, equalised": equalised,
    "centred, Hadamard": turned,
    "centred, rotated": rotation,
}


class Bench:
    """The model, its statistics and the text that everything is measured on."""

    def __init__(self) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(MODEL).eval()
        tokenizer = AutoTokenizer.from_pretrained(MODEL)
        self.surveyed = survey(self.model)
        self.divergence = Divergence(self.surveyed)
        self.statistics = calibrate(self.model, TokenSamples(mixed_source(200), tokenizer, 32, 1024, 0))
        self.samples = list(TokenSamples(mixed_source(200), tokenizer, 8, 1024, 0))
        self.text = token_sequences(tokenizer, open_source("offline", "heldout").read(0), 1024, 6)
        records = (make_case(50, seed).prompt for seed in range(6))
        self.records = token_sequences(tokenizer, records, 512, 6)
        self.pca = initialise(self.model, BASE, self.statistics)
        self.latents: dict[Part, Tensor] = {}
        for part, latents in observe_latents(self.surveyed, self.pca, self.samples):
            seen = self.latents.get(part)
            self.latents[part] = latents[0] if seen is None else torch.cat([seen, latents[0]])
        self.floor = self._losses(self.pca)

    def _losses(self, adapter: CSKVAdapter) -> tuple[float, float]:
        found = reconstruction_losses(self.model, adapter, self.text)
        return sum(loss.k for loss in found), sum(loss.v for loss in found)

    def measure(self, adapter: CSKVAdapter) -> dict[str, float]:
        """The figures of one adapter."""
        k, v = self._losses(adapter)
        return {
            "ratio": ratio_of(adapter),
            "k_loss": k / self.floor[0],
            "v_loss": v / self.floor[1],
            "kl_text": self.divergence.mean(adapter, self.text),
            "kl_records": self.divergence.mean(adapter, self.records),
        }

    def changed(self, change: Change, config: CSKVConfig) -> CSKVAdapter:
        """The PCA adapter in another basis and on another grid."""
        layers = {}
        for i in self.pca.layer_indices:
            factors, latents = self.pca.factors(i), self.latents
            with torch.no_grad():
                pair = [_own(change(getattr(factors, kind), latents[i, kind])) for kind in ("k", "v")]
            layers[i] = LayerFactors(*pair)
        return CSKVAdapter(config, layers, self.pca.base)


def _own(factors: Factors) -> Factors:
    return Factors(factors.down.clone(), factors.up.clone(), factors.bias, factors.down_bias)


def makers(bench: Bench) -> Mapping[str, Callable[[], CSKVAdapter]]:
    """Name of a row -> how its adapter is made."""
    found: dict[str, Callable[[], CSKVAdapter]] = {"16 bits": lambda: bench.pca}
    for bits in (4, 2):
        for block, (k, v) in BLOCKS.items():
            for basis, change in BASES.items():
                config = replace(BASE, k_bits=bits, v_bits=bits, k_block=k, v_block=v)
                found[f"{bits} bits | {block} | {basis}"] = lambda c=change, s=config: bench.changed(c, s)
    for ratio in (0.065, 0.044):
        for init in ("pca", "weighted-pca"):
            for channels in (1, 2, 4, 8):
                config = replace(BASE, init=init, mixed_widths=True, k_block=(32, channels), v_block=(32, channels))
                found[f"mixed {ratio} | 32x{channels} both | {init}"] = lambda s=config, r=ratio: (
                    allocate_widths(bench.model, s, bench.statistics, bench.samples, r).adapter
                )
    return found


def table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """The results as Markdown."""
    lines = [
        "| widths | block (tokens x channels) | latents | bytes of 16-bit K and V | K loss | V loss | KL text "
        "| KL records |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        width, block, basis = (*name.split(" | "), "", "")[:3]
        figures = f"{row['ratio']:.1%} | {row['k_loss']:.3f} | {row['v_loss']:.3f} | {row['kl_text']:.4f}"
        lines.append(f"| {width} | {block} | {basis} | {figures} | {row['kl_records']:.4f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure every row that is missing, then write the table."""
    bench, results = Bench(), read_results(RESULTS)
    adapters = makers(bench)
    rows = {name: partial(_measured, bench, make) for name, make in adapters.items()}
    measure_missing(RESULTS, results, rows)
    found = {name: results["rows"][name] for name in adapters}
    fill_page(PAGE, "grids", f"{measured_on(results['environment'], 'grids')}\n\n{table(found)}")


def _measured(bench: Bench, make: Callable[[], CSKVAdapter]) -> dict[str, float]:
    return bench.measure(make())


if __name__ == "__main__":
    main()
