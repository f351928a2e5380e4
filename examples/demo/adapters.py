"""The demo's adapters: calibrated, factorised, trained and saved; a finished step is not done twice."""

from __future__ import annotations

from collections.abc import Callable

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cskv.adapter.adapter import CSKVAdapter
from cskv.calibration.calibrate import calibrate
from cskv.calibration.statistics import Statistics
from cskv.compression.budget import Budget, allocate
from cskv.compression.initialise import initialise
from cskv.data.mixed import mixed_source
from cskv.data.samples import TokenSamples
from cskv.training.trainer import train
from demo.settings import DemoSettings, Variant
from demo.workspace import Workspace


class Workshop:
    """Makes the demo's adapters in its folder.

    Args:
        model: the bare model.
        tokenizer: its own.
        settings: how much is calibrated and trained.
        workspace: the demo's folder.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: DemoSettings,
        workspace: Workspace,
    ) -> None:
        self.model, self.settings, self.workspace = model, settings, workspace
        self._tokenizer, self._text = tokenizer, mixed_source(settings.num_lines)

    def statistics(self, on_sample: Callable[[int], None]) -> Statistics:
        """Calibrate, unless that is done; `on_sample` gets the number of samples done."""
        path = self.workspace.path("statistics.safetensors")
        if not path.exists():
            samples = self._samples(self.settings.calibration_samples)
            calibrate(self.model, samples, progress=lambda done, _total: on_sample(done)).save(path)
        return Statistics.load(path)

    def make(self, variant: Variant, statistics: Statistics, on_step: Callable[[int, float | None], None]) -> None:
        """Factorise, train where the variant says so, and save the adapter folder. `on_step` gets (step, loss)."""
        folder = self.workspace.path("adapters", variant.key)
        if (folder / "config.json").exists():  # written last: the folder is complete
            return
        adapter = self._untrained(variant, statistics)
        adapter.metrics["text"] = self._text.name
        if variant.trained:
            result = train(
                self.model,
                adapter,
                self._samples(self.settings.train_samples),
                self.settings.training,
                output=self.workspace.path("training", variant.key),
                on_step=lambda record: on_step(record.step, record.loss),
            )
            adapter.metrics |= {name: getattr(result, name) for name in ("steps", "tokens", "k_loss", "v_loss")}
        adapter.save_pretrained(folder)

    def load(self, key: str) -> CSKVAdapter:
        """Read a variant's adapter from its folder."""
        return CSKVAdapter.from_pretrained(self.workspace.path("adapters", key))

    def _untrained(self, variant: Variant, statistics: Statistics) -> CSKVAdapter:
        config = variant.config
        if not (variant.allocated or variant.mixed):
            return initialise(self.model, config, statistics)
        samples = list(self._samples(self.settings.allocation_samples))
        budget = Budget(self.settings.byte_ratio if variant.mixed else config.k_density)
        return allocate(self.model, config, statistics, samples, budget, ranks_only=not variant.mixed).adapter

    def _samples(self, count: int) -> TokenSamples:
        return TokenSamples(self._text, self._tokenizer, count, self.settings.sample_len, self.settings.seed)
