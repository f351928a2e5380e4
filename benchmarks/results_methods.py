"""The methods of `make results`, and the adapters that they need, made once per seed and kept in a folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from cskv.adapter.adapter import CSKVAdapter
from cskv.calibration.calibrate import calibrate
from cskv.calibration.statistics import Statistics
from cskv.compression.allocation import allocate_ranks
from cskv.compression.initialise import in_few_bits, initialise
from cskv.compression.widths import allocate_widths
from cskv.config import CSKVConfig
from cskv.data.samples import TokenSamples
from cskv.demo.text import mixed_source
from cskv.methods.method import Method, compressed, uncompressed
from cskv.methods.press import press
from cskv.methods.quantized import quantized
from cskv.training.settings import TrainingSettings
from cskv.training.trainer import train

BUDGETS = (0.5, 0.4, 0.3, 0.2, 0.1, 0.05)
SNAPKV_BUDGETS = (0.5, 0.4, 0.2)
NUM_LINES, SAMPLE_LEN = 200, 1024
CALIBRATION_SAMPLES, TRAIN_SAMPLES, ALLOCATION_SAMPLES = 64, 600, 8
TRAINING = TrainingSettings(learning_rate=2e-3, warmup_steps=20, schedule="cosine", batch_size=2)
WINDOW, GROUP = 32, 32
WINDOWS = (0, 2, 8, 32, 128, 1024)
TRAINED = "CSKV, trained"


class Workshop:
    """Makes the adapters of one seed; one that is in the folder already is read.

    Args:
        folder: of this seed's statistics and adapters.
        seed: of the calibration and training text.
    """

    def __init__(self, model: Any, tokenizer: Any, folder: Path, seed: int) -> None:
        self.model, self.tokenizer, self.folder, self.seed = model, tokenizer, folder, seed

    @cached_property
    def statistics(self) -> Statistics:
        """Of the calibration text."""
        path = self.folder / "statistics.safetensors"
        if not path.exists():
            calibrate(self.model, self.samples(CALIBRATION_SAMPLES)).save(path)
        return Statistics.load(path)

    def samples(self, count: int) -> TokenSamples:
        """Offline text and LongEval records of other seeds, half and half."""
        return TokenSamples(mixed_source(NUM_LINES), self.tokenizer, count, SAMPLE_LEN, self.seed)

    def kept(self, name: str, make: Callable[[], CSKVAdapter]) -> CSKVAdapter:
        """The adapter of this name, made if need be."""
        path = self.folder / name
        if not (path / "config.json").exists():  # written last: the folder is complete
            make().save_pretrained(path)
        return CSKVAdapter.from_pretrained(path)

    def untrained(self, init: str, k_density: float, v_density: float) -> CSKVAdapter:
        """Uniform ranks."""
        config = CSKVConfig(k_density, v_density, init=init, window=WINDOW, group=GROUP)
        return initialise(self.model, config, self.statistics)

    def trained(self, density: float, bits: int = 16) -> CSKVAdapter:
        """The paper's recipe: ASVD, then layer-wise reconstruction; through the grid where latents are in few bits."""
        config = CSKVConfig(density, density, init="asvd", window=WINDOW, group=GROUP, k_bits=bits, v_bits=bits)

        def make() -> CSKVAdapter:
            adapter = initialise(self.model, config, self.statistics)
            train(self.model, adapter, self.samples(TRAIN_SAMPLES), TRAINING)
            return adapter

        return self.kept(f"trained-{density:g}" + ("" if bits == 16 else f"-{bits}bits"), make)

    def quantised_afterwards(self, density: float, bits: int) -> CSKVAdapter:
        """The trained adapter, its latents packed without training on it."""
        adapter = self.trained(density)
        config = dataclasses.replace(adapter.config, k_bits=bits, v_bits=bits)
        return in_few_bits(adapter, config, self.statistics)

    def allocated(self, density: float) -> CSKVAdapter:
        """Weighted PCA, ranks dealt out by sensitivity."""
        config = CSKVConfig(density, density, init="weighted-pca", window=WINDOW, group=GROUP)
        text = list(self.samples(ALLOCATION_SAMPLES))
        make = lambda: allocate_ranks(self.model, config, self.statistics, text, density).adapter  # noqa: E731 (short)
        return self.kept(f"allocated-{density:g}", make)

    def mixed(self, ratio: float) -> CSKVAdapter:
        """Weighted PCA, ranks and widths of 2 to 8 bits dealt out by sensitivity."""
        config = CSKVConfig(init="weighted-pca", mixed_widths=True, window=WINDOW, group=GROUP)
        text = list(self.samples(ALLOCATION_SAMPLES))
        make = lambda: allocate_widths(self.model, config, self.statistics, text, ratio).adapter  # noqa: E731 (short)
        return self.kept(f"mixed-{ratio:g}", make)


@dataclass(frozen=True)
class Offer:
    """A method that is only made when it is wanted.

    Attributes:
        name, budget: the method's.
        make: makes it; this may train an adapter.
    """

    name: str
    budget: float | None
    make: Callable[[], Method]


def channel_methods(workshop: Workshop) -> Iterator[Offer]:
    """The uncompressed cache, quantised ones, and everything that shrinks channels, at every budget."""
    yield Offer("uncompressed", None, uncompressed)
    for bits in (4, 2):
        yield Offer("QuantizedCache (hqq)", bits / 16, partial(quantized, bits))
    for budget in sorted(BUDGETS, key=lambda b: (b != 0.2, -b)):  # 80 % first: an interrupted run says the most
        for name, init in (("SVD", "svd"), ("ASVD", "asvd")):
            yield _offer(name, budget, partial(workshop.untrained, init, budget, budget))
        yield _offer(TRAINED, budget, partial(workshop.trained, budget))
        yield _offer("CSKV, PCA", budget, partial(workshop.allocated, budget))
        if budget <= 0.2:
            yield _offer("CSKV, mixed widths", budget, partial(workshop.mixed, budget))


def token_methods() -> Iterator[Offer]:
    """What drops tokens. The uncompressed cache again, since another transformers runs here."""
    yield Offer("uncompressed", None, uncompressed)
    for budget in BUDGETS:
        for name, title in (("streaming", "StreamingLLM"), ("h2o", "H2O-like"), ("SnapKVPress", "SnapKV")):
            if title != "SnapKV" or budget in SNAPKV_BUDGETS:
                yield Offer(title, budget, partial(press, name, budget))


def ablation_methods(workshop: Workshop) -> Iterator[Offer]:
    """The paper's ablations: the window, the split of a budget between keys and values, and QAT."""
    for name, make in (
        (TRAINED, partial(workshop.trained, 0.2)),
        ("ASVD", partial(workshop.untrained, "asvd", 0.2, 0.2)),
    ):
        for window in WINDOWS:
            yield _offer(f"{name}, window {window}", 0.2, partial(_windowed, make, window), window=window)
    for total in (0.5, 0.2):
        for share in (0.25, 0.375, 0.5, 0.625, 0.75):
            k, v = 2 * total * share, 2 * total * (1 - share)
            name = f"ASVD, K {100 * k:g} % V {100 * v:g} %"
            yield _offer(name, total, partial(workshop.untrained, "asvd", k, v), k_density=k, v_density=v)
    for density in (0.5, 0.4, 0.3, 0.2):
        kept = density * 4 / 16
        afterwards = partial(workshop.quantised_afterwards, density, 4)
        yield _offer("4 bits, post-training", kept, afterwards, density=density)
        yield _offer("4 bits, QAT", kept, partial(workshop.trained, density, 4), density=density)


def _windowed(make: Callable[[], CSKVAdapter], window: int) -> CSKVAdapter:
    return make().with_settings(window=window)


def _offer(name: str, budget: float, make: Callable[[], CSKVAdapter], **facts: Any) -> Offer:
    return Offer(name, budget, lambda: compressed(make(), name, budget, **facts))
