"""`cskv analyze`: how redundant a model's keys and values are, layer by layer, and what an adapter makes of it."""

from __future__ import annotations

import dataclasses
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cskv.cli import options as opt
from cskv.cli.calibrate import take_statistics
from cskv.cli.common import command, emit, say, set_logging
from cskv.cli.groups import LoadingOptions
from cskv.cli.outputs import check_writable
from cskv.cli.settings import model_name
from cskv.config import CSKVConfig
from cskv.errors import CSKVError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cskv.calibration.statistics import Statistics
    from cskv.data.samples import TokenSamples

FILES = ("spectra.csv", "spectra.png")
ADAPTER_FILES = ("ranks.png", "losses.png", "losses.csv")


@command
def analyze(
    model_path: opt.ModelPath,
    loading: LoadingOptions,
    model_id: opt.ModelId = None,
    statistics: opt.Statistics = None,
    training_dataset: opt.TrainingDataset = "offline",
    num_samples: opt.NumSamples = 16,
    max_seq_len: opt.MaxSeqLen = 1024,
    weights_only: Annotated[bool, opt.running("--weights-only", help="Spectra of the weights alone: no text.")] = False,
    adapter: Annotated[
        str | None, opt.files("--adapter", "-a", help="Also draw this adapter's ranks and losses.")
    ] = None,
    output: Annotated[
        Path | None, opt.files("--output", "-o", help="Folder to write to. [default: outputs/analysis/MODEL_ID]")
    ] = None,
    seed: opt.Seed = 0,
    logging_level: opt.LoggingLevel = "WARNING",
) -> None:
    """Write singular value spectra of the K and V weights and of the calibrated K and V: spectra.csv, spectra.png.

    With `--adapter`: its ranks per layer as ranks.png, and its reconstruction loss per layer beside that of SVD, ASVD
    and PCA at the same ranks as losses.png and losses.csv.

    The calibrated ones come from `--statistics` (made with `cskv calibrate`), or from a short calibration here.

    Examples:

    * `cskv analyze --model-path my-model`
    * `cskv analyze --model-path my-model --weights-only --output spectra`
    * `cskv analyze --model-path m --adapter outputs/adapters/m/k0.2-v0.2-fisher-pca-window32-group32-sinks4-untrained`
    * `cskv analyze --model-path my-model --statistics outputs/calibration/my-model/statistics.safetensors`
    """
    set_logging(logging_level)
    model_path = loading.name(model_path)
    from cskv.calibration.statistics import Statistics
    from cskv.cli.loading import load_samples
    from cskv.evaluation.spectra import calibrated_spectra, summary_rows, weight_spectra, write_csv
    from cskv.plots import plot_spectra

    name = model_name(model_path, model_id)
    folder = output or Path("outputs/analysis") / name
    check_writable(*(folder / file for file in (*FILES, *(ADAPTER_FILES if adapter else ()))))
    if find_spec("matplotlib") is None:
        raise CSKVError("drawing needs matplotlib: pip install 'cskv[plots]'")
    model = loading.model(model_path)
    spectra = weight_spectra(model)
    samples: Any = None
    if adapter is not None or not (weights_only or statistics):
        samples = load_samples(training_dataset, model_path, num_samples, max_seq_len, seed)
    if not weights_only:
        known = Statistics.load(statistics) if statistics else _moments(model, samples)
        spectra += calibrated_spectra(model, known)
    drawn = []
    if adapter is not None:
        drawn = compare(model, adapter, samples, folder)
        say(", ".join(drawn))
    table = write_csv(spectra, folder / "spectra.csv")
    figure = plot_spectra(spectra, folder / "spectra.png", title=name)
    rows = summary_rows(spectra)
    for line in describe(rows):
        typer.echo(line)
    say(f"{table} and {figure}")
    files = {"csv": str(table), "png": str(figure), "adapter_files": drawn}
    emit({"command": "analyze", "model": model_path, **files, "spectra": rows})


def compare(model: PreTrainedModel, adapter: str, samples: TokenSamples, folder: Path) -> list[str]:
    """Draw an adapter's ranks, and its losses beside those of the closed forms, and return the files.

    Raises:
        AdapterError: the adapter is damaged, or belongs to another model.
    """
    from cskv.adapter.adapter import CSKVAdapter
    from cskv.compression.initialise import initialise
    from cskv.evaluation.reconstruction import reconstruction_losses
    from cskv.files import write_text
    from cskv.models.survey import survey
    from cskv.plots import plot_losses, plot_ranks

    loaded = CSKVAdapter.from_pretrained(adapter)
    loaded.check_fits(survey(model))
    ranks = {i: (loaded.factors(i).k.rank, loaded.factors(i).v.rank) for i in loaded.layer_indices}
    statistics = _moments(model, samples)
    methods = {"this adapter": loaded}
    for init in ("svd", "asvd", "pca"):
        config = dataclasses.replace(loaded.config, init=init, key_factors="joint", head_groups=1)
        methods[init.upper()] = initialise(model, config, statistics, ranks)
    losses = {
        name: [(loss.layer, loss.k, loss.v) for loss in reconstruction_losses(model, method, samples)]
        for name, method in methods.items()
    }
    lines = [f"{name},{layer},{k!r},{v!r}" for name, rows in losses.items() for layer, k, v in rows]
    write_text(folder / "losses.csv", "\n".join(["method,layer,k_loss,v_loss", *lines]) + "\n")
    plot_ranks(ranks, folder / "ranks.png")
    plot_losses(losses, folder / "losses.png")
    return [str(folder / name) for name in ADAPTER_FILES]


def describe(rows: list[dict[str, Any]]) -> list[str]:
    """Return how many channels hold 90, 95 and 99 % of the energy, as lines for a person."""
    lines = ["layer  of            channels  for 90 %  for 95 %  for 99 % of the energy"]
    for row in rows:
        what = f"{row['projection'].upper()} {row['source']}"
        counts = "".join(f"{row[name]:>10}" for name in ("values", "rank_90", "rank_95", "rank_99"))
        lines.append(f"{row['layer']:>5}  {what:<12}{counts}")
    return lines


def _moments(model: PreTrainedModel, samples: TokenSamples) -> Statistics:
    return take_statistics(model, samples, CSKVConfig(), fisher=False)
