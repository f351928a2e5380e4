"""The demo's adapters: calibrated, factorised, trained and saved; a finished step is not done twice."""

from __future__ import annotations

from collections.abc import Callable

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cskv.adapter.adapter import CSKVAdapter
from cskv.calibration.calibrate import calibrate
from cskv.calibration.statistics import Statistics
from cskv.compression.allocation import allocate_ranks
from cskv.compression.initialise import initialise
from cskv.compression.widths import allocate_widths
from cskv.data.mixed import mixed_source
from cskv.data.samples import TokenSamples
from cskv.demo.settings import DemoSettings, Variant
from cskv.demo.workspace import Workspace
from cskv.training.trainer import train

OnStep = Callable[[int, float | None], None]


def calibration(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: DemoSettings,
    workspace: Workspace,
    on_sample: Callable[[int], None],
) -> Statistics:
    """The statistics that PCA and ASVD need; `on_sample` gets the number of samples done."""
    path = workspace.path("statistics.safetensors")
    if not path.exists():
        samples = _samples(tokenizer, settings, settings.calibration_samples)
        calibrate(model, samples, progress=lambda done, _total: on_sample(done)).save(path)
    return Statistics.load(path)


def make_adapter(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    variant: Variant,
    statistics: Statistics,
    settings: DemoSettings,
    workspace: Workspace,
    on_step: OnStep,
) -> None:
    """Factorise, train where the variant says so, and save the adapter folder. `on_step` gets (step, loss)."""
    folder = workspace.path("adapters", variant.key)
    if (folder / "config.json").exists():  # written last: the folder is complete
        return
    adapter = _initial(model, tokenizer, variant, statistics, settings)
    adapter.metrics["text"] = mixed_source(settings.num_lines).name
    if variant.trained:
        result = train(
            model,
            adapter,
            _samples(tokenizer, settings, settings.train_samples),
            settings.training,
            output=workspace.path("training", variant.key),
            on_step=lambda record: on_step(record.step, record.loss),
        )
        adapter.metrics |= {
            "steps": result.steps,
            "tokens": result.tokens,
            "k_loss": result.k_loss,
            "v_loss": result.v_loss,
        }
    adapter.save_pretrained(folder)


def _initial(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    variant: Variant,
    statistics: Statistics,
    settings: DemoSettings,
) -> CSKVAdapter:
    if not (variant.allocated or variant.mixed):
        return initialise(model, variant.config, statistics)
    samples = list(_samples(tokenizer, settings, settings.allocation_samples))
    if variant.mixed:
        return allocate_widths(model, variant.config, statistics, samples, settings.byte_ratio).adapter
    return allocate_ranks(model, variant.config, statistics, samples, variant.config.k_density).adapter


def _samples(tokenizer: PreTrainedTokenizerBase, settings: DemoSettings, count: int) -> TokenSamples:
    return TokenSamples(mixed_source(settings.num_lines), tokenizer, count, settings.sample_len, settings.seed)
