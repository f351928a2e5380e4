"""The methods that `cskv evaluate` compares: adapters, baselines and the uncompressed cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cskv.cli import options as opt
from cskv.cli.settings import model_name, statistics_path
from cskv.config import CSKVConfig
from cskv.errors import CSKVError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cskv.methods.method import Method


METHODS = "Methods"

Adapters = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter", "-a",
        help="Adapter folder or hub id, as [NAME=]PATH; again for more. The name is its series in figures.",
        show_default=False, rich_help_panel=METHODS,
    ),
]  # fmt: skip
Baselines = Annotated[
    list[str] | None,
    typer.Option(
        "--baseline", "-b",
        help="svd@0.2, asvd@0.2, pca@0.2, weighted-pca@0.2 (untrained factors), quantized@4 (bits; needs cskv[peers]), "
        "streaming@0.2, h2o@0.2 or any press of kvpress, which needs an environment of its own; again for more.",
        show_default=False, rich_help_panel=METHODS,
    ),
]  # fmt: skip
Uncompressed = Annotated[
    bool,
    typer.Option(
        "--uncompressed/--no-uncompressed", help="Measure the model's own cache, too.", rich_help_panel=METHODS
    ),
]


@dataclass(frozen=True)
class Contestants:
    """The methods that the options name. The window and group are those of untrained baselines."""

    model_path: opt.OptionalModelPath = None
    model_id: opt.ModelId = None
    adapter: Adapters = None
    baseline: Baselines = None
    uncompressed: Uncompressed = True
    window: opt.Window = None
    group: opt.Group = None
    statistics: opt.Statistics = None
    asvd_calib_root: opt.CalibrationRoot = opt.DEFAULT_CALIBRATION_ROOT

    def base(self) -> str:
        """The base model's path, after all specifications were found to be ones.

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
        for text in self.adapter or ():
            name, path = _name_and_path(text)
            adapter = CSKVAdapter.from_pretrained(path)
            adapter.check_fits(survey(model))
            found.append(compressed(adapter, name, source=path))
        statistics = None
        if any(map(needs_statistics, (self.baseline or ()))):
            path_of = statistics_path(self.asvd_calib_root, model_name(base, self.model_id))
            statistics = Statistics.load(self.statistics or path_of)
        defaults = CSKVConfig()
        window = defaults.window if self.window is None else self.window
        group = defaults.group if self.group is None else self.group
        return found + [method_of(text, model, statistics, window, group) for text in (self.baseline or ())]


def _name_and_path(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    return (name, path) if equals else (Path(text).name, text)
