"""The suites of methods by name: what is compared, on which text, and whether questions are asked.

To add one, write a function that gives its methods, and a line in `SUITES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from benchmarks.quality.subjects import GENERATION, QUESTIONS, TEXTS
from benchmarks.quality.workshop import BOTH, BUDGETS, OTHER, OWN, Recipe, Workshop
from cskv.methods.fp8 import fp8
from cskv.methods.method import Method, compressed, uncompressed
from cskv.methods.press import press
from cskv.methods.quantized import quantized
from cskv.training.settings import TrainingSettings

# Made when it is wanted, since this may train an adapter. Keys are the method's name and budget.
Methods = dict[tuple[str, float | None], Callable[[], Method]]

DENSITIES = (0.5, 0.2)
OURS, PAPER = "CSKV", "CSKV, the paper's"
WINDOWS = (0, 2, 8, 32, 128)
SPLITS = (0.25, 0.375, 0.5, 0.625, 0.75)  # of a budget's channels that are keys'
Block = tuple[int, int] | None
BLOCK_SHAPES: dict[str, tuple[Block, Block]] = {  # tokens x channels, of keys and values
    "of KIVI: K 32x1, V 1x32": (None, None),
    "32x1": ((32, 1), (32, 1)),
    "32x4": ((32, 4), (32, 4)),
    "K 8x4, V 4x8": ((8, 4), (4, 8)),
}
QAT_DENSITIES = (0.5, 0.2)
ON_LATENTS = 16  # tokens of a forward that attends to latents in every model
LAYER_WISE = TrainingSettings(learning_rate=2e-3, warmup_steps=10, schedule="cosine", batch_size=2)
DISTILLED = TrainingSettings(learning_rate=1e-4, warmup_steps=4, schedule="cosine", objective="distillation")
ASVD = {"init": "asvd"}
AS_PUBLISHED = {"init": "asvd", "sinks": 0}


@dataclass(frozen=True)
class Suite:
    """Methods that are measured together, in a file of their own.

    Attributes:
        about: for a person.
        methods: of a workshop.
        kind: what is measured: "texts" are perplexity and agreement alone, "questions" and "generation" are a
            subject's tasks.
        heldout: the text that is read: "own" or "other".
        presses: drops tokens by kvpress, which takes an environment of its own.
    """

    about: str
    methods: Callable[[Workshop], Methods]
    kind: str = TEXTS
    heldout: str = OWN
    presses: bool = False


def caches(workshop: Workshop) -> Methods:
    """Return every cache that shrinks channels or bits, at its budgets."""
    found: Methods = {("uncompressed", None): uncompressed, ("fp8", 0.5): fp8}
    found |= {("QuantizedCache (hqq)", bits / 16): partial(quantized, bits) for bits in (4, 2)}
    for ratio in BUDGETS:
        _add(found, workshop, OURS, ratio, Recipe(ratio=ratio))
    for name, recipe in {
        "SVD": Recipe({"init": "svd"}),
        "ASVD": Recipe(ASVD),
        PAPER: Recipe(ASVD, training=LAYER_WISE),
    }.items():
        _add(found, workshop, name, 0.2, recipe.at(0.2))
    _add(found, workshop, f"{PAPER}, 0 sinks", 0.2, Recipe(AS_PUBLISHED, training=LAYER_WISE).at(0.2))
    return found


def tokens(_workshop: Workshop) -> Methods:
    """Return what drops tokens, and the uncompressed cache again, since another transformers runs here."""
    found: Methods = {("uncompressed", None): uncompressed}
    for budget in (0.5, 0.2):
        for name, title in (("streaming", "StreamingLLM"), ("h2o", "H2O-like"), ("SnapKVPress", "SnapKV")):
            found[title, budget] = partial(press, name, budget)
    return found


def generation(workshop: Workshop) -> Methods:
    """Return caches of few bits, transformers' and ours: what they write, and not only what they read."""
    found: Methods = {("uncompressed", None): uncompressed}
    found |= {("QuantizedCache (hqq)", bits / 16): partial(quantized, bits) for bits in (4, 2)}
    for ratio in BUDGETS:
        _add(found, workshop, OURS, ratio, Recipe(ratio=ratio))
    for bits in (4, 3):
        recipe = Recipe({"k_bits": bits, "v_bits": bits}).at(0.2)
        _add(found, workshop, f"20 % of the channels in {bits} bits", 0.2 * bits / 16, recipe)
    return found


def factors(workshop: Workshop) -> Methods:
    """Return the ways to make factors, uniform ranks and ranks dealt out, without and with sinks."""
    groups = workshop.model.config.get_text_config(decoder=True).num_key_value_heads
    kinds = {
        "SVD": Recipe({"init": "svd"}),
        "ASVD": Recipe(ASVD),
        "ASVD, 0 sinks": Recipe(AS_PUBLISHED),
        "PCA": Recipe({"init": "pca"}),
        "weighted PCA": Recipe({"init": "weighted-pca"}),
        "weighted PCA, 0 sinks": Recipe({"init": "weighted-pca", "sinks": 0}),
        "Fisher PCA": Recipe(),
        "Fisher PCA, a head group per kv head": Recipe({"head_groups": groups}),
        "Fisher PCA, commuting keys": Recipe({"key_factors": "commuting"}),
    }
    found: Methods = {("uncompressed", None): uncompressed}
    for density in DENSITIES:
        for name, recipe in kinds.items():
            _add(found, workshop, name, density, recipe.at(density))
        ranks = Recipe(ratio=density, ranks_only=True)
        _add(found, workshop, "Fisher PCA, ranks dealt out", density, ranks)
        _add(found, workshop, "ASVD, trained layer by layer", density, Recipe(ASVD, training=LAYER_WISE).at(density))
        _add(found, workshop, "Fisher PCA, distilled", density, Recipe(training=DISTILLED).at(density))
    return found


def widths(workshop: Workshop) -> Methods:
    """Return latents in few bits: one width after and through training, and budgets, distilled and not."""
    found: Methods = {}
    for bits in (4, 3, 2):
        few = {"k_bits": bits, "v_bits": bits}
        kept = 0.2 * bits / 16
        for name, recipe in {
            "post-training": Recipe(few),
            "QAT layer by layer": Recipe(ASVD | few, training=LAYER_WISE),
            "QAT end to end": Recipe(few, training=DISTILLED),
        }.items():
            _add(found, workshop, f"20 % of the channels in {bits} bits, {name}", kept, recipe.at(0.2))
    for ratio in BUDGETS:
        _add(found, workshop, OURS, ratio, Recipe(ratio=ratio))
        _add(found, workshop, f"{OURS}, distilled", ratio, Recipe(ratio=ratio, training=DISTILLED))
    return found


def blocks(workshop: Workshop) -> Methods:
    """Return shapes of the blocks that share a minimum and a scale: of one width throughout, and of mixed widths."""
    found: Methods = {}
    for bits in (4, 2):
        for name, (k, v) in BLOCK_SHAPES.items():
            few = {"k_bits": bits, "v_bits": bits, "k_block": k, "v_block": v}
            title = f"20 % of the channels in {bits} bits, blocks {name}"
            _add(found, workshop, title, 0.2 * bits / 16, Recipe(few).at(0.2))
    for ratio in (0.1, 0.05):
        for channels in (1, 2, 4, 8):
            shape = {"k_block": (32, channels), "v_block": (32, channels)}
            _add(found, workshop, f"{OURS}, blocks 32x{channels}", ratio, Recipe(shape, ratio=ratio))
    return found


def texts(workshop: Workshop) -> Methods:
    """Return budgets spent by the right kind of text, the wrong one and a mixture."""
    found: Methods = {}
    names = {OWN: "prose", OTHER: "Python's documentation and sources", BOTH: "both"}
    for ratio in BUDGETS:
        for text, name in names.items():
            _add(found, workshop, f"calibrated on {name}", ratio, Recipe(ratio=ratio, text=text))
    return found


def paper(workshop: Workshop) -> Methods:
    """Return the paper's ablations: the window, the split between keys and values, 4 bits with and without training."""
    found: Methods = {}
    trained = Recipe(ASVD, training=LAYER_WISE)
    for name, recipe in {PAPER: trained.at(0.2), "ASVD": Recipe(ASVD).at(0.2), OURS: Recipe(ratio=0.1)}.items():
        kept = recipe.ratio or 0.2
        for window in WINDOWS:
            _add(found, workshop, f"{name}, window {window}", kept, recipe, {"window": window})
    for (name, total), (k, v) in splits().items():
        _add(found, workshop, name, total, Recipe(ASVD | {"k_density": k, "v_density": v}))
    for density in QAT_DENSITIES:
        few = replace(trained, settings=ASVD | {"k_bits": 4, "v_bits": 4})
        _add(found, workshop, "4 bits, post-training", density / 4, replace(trained.at(density), bits=4))
        _add(found, workshop, "4 bits, QAT", density / 4, few.at(density))
    return found


def rebuild(workshop: Workshop) -> Methods:
    """Return our caches with keys rebuilt in full, and by 8-bit products, both read from a cache step by step."""
    found: Methods = {}
    for ratio in BUDGETS:
        recipe = Recipe(ratio=ratio)
        for name, in_int8 in ((f"{OURS}, from a cache", False), (f"{OURS}, int8 keys", True)):
            found[name, ratio] = partial(_from_a_cache, workshop, name, ratio, recipe, in_int8)
    return found


def _from_a_cache(workshop: Workshop, name: str, budget: float, recipe: Recipe, in_int8: bool) -> Method:
    method = compressed(workshop.adapter(recipe), name, budget, int8_keys=in_int8, recipe=recipe.key)
    return replace(method, whole=None, piece=ON_LATENTS)


def splits() -> dict[tuple[str, float], tuple[float, float]]:
    """Name and budget of each split of a budget -> densities of keys and values."""
    found = {}
    for total in DENSITIES:
        for share in SPLITS:
            k, v = 2 * total * share, 2 * total * (1 - share)
            found[f"ASVD, K {100 * k:g} % V {100 * v:g} %", total] = k, v
    return found


SUITES: Mapping[str, Suite] = {
    "caches": Suite("every cache at its budgets: texts and questions", caches, QUESTIONS),
    "tokens": Suite("the same of caches that drop tokens (kvpress)", tokens, QUESTIONS, presses=True),
    "generation": Suite("long texts or code, written from caches of few bits", generation, GENERATION),
    "factors": Suite("ways to make the factors", factors),
    "blocks": Suite("shapes of the blocks that share a minimum and a scale", blocks),
    "widths": Suite("latents in few bits, with and without training", widths),
    "texts": Suite("calibrated on the right text, the wrong one and both, read on the right one", texts),
    "texts-other": Suite("the same, read on the other text", texts, heldout=OTHER),
    "rebuild": Suite("keys rebuilt in full and by 8-bit products", rebuild),
    "paper": Suite("the paper's ablations", paper),
}


def _add(
    found: Methods,
    workshop: Workshop,
    name: str,
    budget: float,
    recipe: Recipe,
    changes: Mapping[str, int] | None = None,
) -> None:
    def make() -> Method:
        adapter = workshop.adapter(recipe)
        facts: dict[str, Any] = {"recipe": recipe.key}
        return compressed(adapter.with_settings(**changes) if changes else adapter, name, budget, **facts)

    found[name, budget] = make
