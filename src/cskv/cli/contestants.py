"""The methods that `cskv evaluate` compares: adapters, baselines and the uncompressed cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cskv.cli import options as opt
from cskv.cli.settings import model_name, statistics_path
from cskv.config import CSKVConfig
from cskv.errors import CSKVError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cskv.methods.method import Method


method_option = opt.panel("Methods")


@dataclass(frozen=True)
class Contestants:
    """Options that name the methods to compare."""

    model_path: opt.OptionalModelPath = None
    model_id: opt.ModelId = None
    adapter: Annotated[
        list[str] | None,
        method_option(
            "--adapter",
            "-a",
            help="Adapter folder or hub id, as [NAME=]PATH; again for more. The name is its series in figures.",
        ),
    ] = None
    baseline: Annotated[
        list[str] | None,
        method_option(
            "--baseline",
            "-b",
            help="svd@0.2, asvd@0.2, pca@0.2, weighted-pca@0.2 (untrained factors), quantized@4 (bits; needs "
            "cskv[peers]), fp8, streaming@0.2, h2o@0.2 or any press of kvpress, which needs an environment of its own; "
            "again for more.",
        ),
    ] = None
    uncompressed: Annotated[bool, method_option(help="Measure the model's own cache, too.")] = True
    window: Annotated[int, opt.window(help="Newest tokens that untrained baselines keep exact.")] = CSKVConfig.window
    group: Annotated[int, opt.window(help="Tokens that leave the window at a time.")] = CSKVConfig.group
    sinks: Annotated[int, opt.window(help="First tokens that they keep exact.")] = CSKVConfig.sinks
    statistics: opt.Statistics = None
    asvd_calib_root: opt.CalibrationRoot = opt.DEFAULT_CALIBRATION_ROOT

    def base(self) -> str:
        """Return the base model's path, after all specifications were found to be ones.

        Raises:
            CSKVError: there is nothing to measure, a specification is none, or no base model is named.
        """
        from cskv.adapter.adapter import CSKVAdapter
        from cskv.methods.specification import split

        for text in self.baseline or ():
            split(text)
        if not (self.adapter or self.baseline or self.uncompressed):
            raise CSKVError("nothing to measure; give --adapter or --baseline, or leave --no-uncompressed out")
        if self.model_path is not None:
            return self.model_path
        if not self.adapter:
            raise CSKVError("give the base model with --model-path, or an adapter that names it")
        return CSKVAdapter.from_pretrained(_name_and_path(self.adapter[0])[1]).base.path()

    def methods(self, model: PreTrainedModel, base: str) -> list[Method]:
        """Return all methods, the uncompressed cache first.

        Raises:
            CSKVError: an adapter does not fit, or a package or statistics are missing.
        """
        from cskv.adapter.adapter import CSKVAdapter
        from cskv.calibration.statistics import Statistics
        from cskv.methods.method import compressed, uncompressed
        from cskv.methods.specification import method_of, needs_statistics
        from cskv.models.survey import survey

        found = [uncompressed()] if self.uncompressed else []
        for text in self.adapter or ():
            name, path = _name_and_path(text)
            adapter = CSKVAdapter.from_pretrained(path)
            adapter.check_fits(survey(model))
            found.append(compressed(adapter, name, source=path))
        statistics = None
        if any(map(needs_statistics, (self.baseline or ()))):
            name = model_name(base, self.model_id)
            statistics = Statistics.load(statistics_path(self.statistics, self.asvd_calib_root, name))
        exact = self.window, self.group, self.sinks
        return found + [method_of(text, model, statistics, *exact) for text in (self.baseline or ())]


def _name_and_path(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    return (name, path) if equals else (Path(text).name, text)
