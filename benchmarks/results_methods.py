"""The methods of `make results`, and the adapters that they need, made once per seed and kept in a folder."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from bundled import Maker, Recipe

from cskv.adapter.adapter import CSKVAdapter
from cskv.calibration.statistics import Statistics
from cskv.compression.initialise import in_few_bits
from cskv.methods.method import Method, compressed, uncompressed
from cskv.methods.press import press
from cskv.methods.quantized import quantized
from cskv.training.settings import TrainingSettings

BUDGETS = (0.5, 0.4, 0.3, 0.2, 0.1, 0.05)
SNAPKV_BUDGETS = (0.5, 0.4, 0.2)
CALIBRATION_SAMPLES, TRAIN_SAMPLES = 64, 600
TRAINING = TrainingSettings(learning_rate=2e-3, warmup_steps=20, schedule="cosine", batch_size=2)
WINDOWS = (0, 2, 8, 32, 128, 1024)
TRAINED = "CSKV, trained"

# Made when it is wanted, since this may train an adapter. Keys are the method's name and budget.
Methods = dict[tuple[str, float | None], Callable[[], Method]]


class Workshop(Maker):
    """Makes the adapters of one seed; one that is in the seed's folder already is read."""

    def __init__(self, model: Any, folder: Path, seed: int) -> None:
        super().__init__(model, seed)
        self.folder = folder
        self.statistics = functools.cache(self._kept_statistics)

    def _kept_statistics(self, count: int) -> Statistics:
        path = self.folder / "statistics.safetensors"
        if not path.exists():
            super().statistics(count).save(path)
        return Statistics.load(path)

    def make(self, recipe: Recipe) -> CSKVAdapter:
        """Make an adapter from the statistics of this seed."""
        return super().make(dataclasses.replace(recipe, calibration=CALIBRATION_SAMPLES))

    def kept(self, name: str, recipe: Recipe) -> CSKVAdapter:
        """Return the adapter of this name, made if need be."""
        path = self.folder / name
        if not (path / "config.json").exists():  # written last: the folder is complete
            self.make(recipe).save_pretrained(path)
        return CSKVAdapter.from_pretrained(path)

    def untrained(self, init: str, k_density: float, v_density: float) -> CSKVAdapter:
        """Uniform ranks."""
        return self.make(Recipe({"k_density": k_density, "v_density": v_density, "init": init}))

    def trained(self, density: float, bits: int = 16) -> CSKVAdapter:
        """Follow the paper: ASVD, then layer-wise reconstruction; through the grid where latents are in few bits."""
        settings = {"init": "asvd", "k_bits": bits, "v_bits": bits}
        recipe = Recipe(settings, training=TRAINING, samples=TRAIN_SAMPLES).at(density)
        return self.kept(f"trained-{density:g}" + ("" if bits == 16 else f"-{bits}bits"), recipe)

    def quantised_afterwards(self, density: float, bits: int) -> CSKVAdapter:
        """Pack the latents of the trained adapter without training on it."""
        adapter = self.trained(density)
        config = dataclasses.replace(adapter.config, k_bits=bits, v_bits=bits)
        return in_few_bits(adapter, config, self.statistics(CALIBRATION_SAMPLES))

    def allocated(self, density: float) -> CSKVAdapter:
        """Fisher PCA, ranks dealt out over all projections."""
        return self.kept(f"allocated-{density:g}", Recipe({"init": "fisher-pca"}, allocated=True).at(density))

    def mixed(self, ratio: float) -> CSKVAdapter:
        """Fisher PCA, ranks and widths of one budget."""
        return self.kept(f"mixed-{ratio:g}", Recipe({"init": "fisher-pca"}, ratio=ratio))


def channel_methods(workshop: Workshop) -> Methods:
    """Return the uncompressed cache, quantised ones, and everything that shrinks channels, at every budget."""
    found: Methods = {("uncompressed", None): uncompressed}
    found |= {("QuantizedCache (hqq)", bits / 16): partial(quantized, bits) for bits in (4, 2)}
    for budget in sorted(BUDGETS, key=lambda b: (b != 0.2, -b)):  # 80 % first: an interrupted run says the most
        for name, init in (("SVD", "svd"), ("ASVD", "asvd")):
            _add(found, name, budget, partial(workshop.untrained, init, budget, budget))
        _add(found, TRAINED, budget, partial(workshop.trained, budget))
        _add(found, "CSKV, PCA", budget, partial(workshop.allocated, budget))
        if budget <= 0.2:
            _add(found, "CSKV, mixed widths", budget, partial(workshop.mixed, budget))
    return found


def token_methods(_workshop: Workshop) -> Methods:
    """Return what drops tokens, and the uncompressed cache again, since another transformers runs here."""
    found: Methods = {("uncompressed", None): uncompressed}
    for budget in BUDGETS:
        for name, title in (("streaming", "StreamingLLM"), ("h2o", "H2O-like"), ("SnapKVPress", "SnapKV")):
            if title != "SnapKV" or budget in SNAPKV_BUDGETS:
                found[title, budget] = partial(press, name, budget)
    return found


def split_names() -> dict[tuple[str, float], tuple[float, float]]:
    """Name and budget of each split of a budget -> densities of keys and values."""
    found = {}
    for total in (0.5, 0.2):
        for share in (0.25, 0.375, 0.5, 0.625, 0.75):
            k, v = 2 * total * share, 2 * total * (1 - share)
            found[f"ASVD, K {100 * k:g} % V {100 * v:g} %", total] = k, v
    return found


def ablation_methods(workshop: Workshop) -> Methods:
    """Return the paper's ablations: the window, the split of a budget between keys and values, and QAT."""
    found: Methods = {}
    makers = {TRAINED: partial(workshop.trained, 0.2), "ASVD": partial(workshop.untrained, "asvd", 0.2, 0.2)}
    for name, make in makers.items():
        for window in WINDOWS:
            windowed = lambda make=make, window=window: make().with_settings(window=window)  # noqa: E731 (short)
            _add(found, f"{name}, window {window}", 0.2, windowed, window=window)
    for (name, total), (k, v) in split_names().items():
        _add(found, name, total, partial(workshop.untrained, "asvd", k, v), k_density=k, v_density=v)
    for density in (0.5, 0.4, 0.3, 0.2):
        kept, afterwards = density * 4 / 16, partial(workshop.quantised_afterwards, density, 4)
        _add(found, "4 bits, post-training", kept, afterwards, density=density)
        _add(found, "4 bits, QAT", kept, partial(workshop.trained, density, 4), density=density)
    return found


def _add(found: Methods, name: str, budget: float, make: Callable[[], CSKVAdapter], **facts: Any) -> None:
    found[name, budget] = lambda: compressed(make(), name, budget, **facts)
