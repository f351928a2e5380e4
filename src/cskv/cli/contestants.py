"""The methods that `cskv evaluate` compares: adapters, baselines and the uncompressed cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cskv.cli.settings import model_name, statistics_path
from cskv.config import CSKVConfig
from cskv.errors import AdapterError, CSKVError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cskv.methods.method import Method


@dataclass(frozen=True)
class Contestants:
    """What the options say.

    Attributes:
        model_path: the base model; None where an adapter names it.
        model_id: the name in folder names; None for the path's last part.
        adapters: [NAME=]PATH each.
        baselines: NAME@BUDGET each.
        uncompressed: whether the model's own cache is measured.
        window, group: of untrained baselines; None for the defaults.
        statistics, calibration_root: where calibration statistics are.
    """

    model_path: str | None
    model_id: str | None
    adapters: list[str]
    baselines: list[str]
    uncompressed: bool
    window: int | None
    group: int | None
    statistics: Path | None
    calibration_root: Path

    def base(self) -> str:
        """The base model's path, after all specifications were found to be ones.

        Raises:
            CSKVError: there is nothing to measure, a specification is none, or no base model is named.
        """
        from cskv.adapter.adapter import CSKVAdapter
        from cskv.methods.specification import split

        for text in self.baselines:
            split(text)
        if not (self.adapters or self.baselines or self.uncompressed):
            raise CSKVError("nothing to measure; give --adapter or --baseline, or leave --no-uncompressed out")
        if self.model_path is not None:
            return self.model_path
        if not self.adapters:
            raise CSKVError("give the base model with --model-path, or an adapter that names it")
        base = CSKVAdapter.from_pretrained(_name_and_path(self.adapters[0])[1]).base.name
        if not base:
            raise AdapterError("the adapter does not name its base model; give it with --model-path")
        return base

    def methods(self, model: PreTrainedModel, base: str) -> list[Method]:
        """All methods, the uncompressed cache first.

        Raises:
            CSKVError: an adapter does not fit, or a package or statistics are missing.
        """
        from cskv.adapter.adapter import CSKVAdapter
        from cskv.calibration.statistics import Statistics
        from cskv.methods.method import compressed, uncompressed
        from cskv.methods.specification import method_of, needs_statistics
        from cskv.models.survey import survey

        found = [uncompressed()] if self.uncompressed else []
        for text in self.adapters:
            name, path = _name_and_path(text)
            adapter = CSKVAdapter.from_pretrained(path)
            adapter.check_fits(survey(model))
            found.append(compressed(adapter, name, source=path))
        statistics = None
        if any(map(needs_statistics, self.baselines)):
            path_of = statistics_path(self.calibration_root, model_name(base, self.model_id))
            statistics = Statistics.load(self.statistics or path_of)
        defaults = CSKVConfig()
        window = defaults.window if self.window is None else self.window
        group = defaults.group if self.group is None else self.group
        return found + [method_of(text, model, statistics, window, group) for text in self.baselines]


def _name_and_path(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    return (name, path) if equals else (Path(text).name, text)
