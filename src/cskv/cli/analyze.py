"""`cskv analyze`: how redundant a model's keys and values are, layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cskv.cli import options as opt
from cskv.cli.calibrate import check_writable, take_statistics
from cskv.cli.common import command, emit, say, set_logging
from cskv.cli.settings import model_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cskv.statistics import Statistics

Output = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", help="Folder to write to. [default: outputs/analysis/MODEL_ID]", show_default=False,
        rich_help_panel=opt.FILES,
    ),
]  # fmt: skip
WeightsOnly = Annotated[
    bool, typer.Option("--weights-only", help="Spectra of the weights alone: no text.", rich_help_panel=opt.RUNNING)
]
NumSamples = Annotated[int, typer.Option("--num-samples", help="Samples of text.", rich_help_panel=opt.RUNNING)]
MaxSeqLen = Annotated[int, typer.Option("--max-seq-len", help="Tokens per sample.", rich_help_panel=opt.RUNNING)]


@command
def analyze(
    model_path: opt.ModelPath,
    model_id: opt.ModelId = None,
    statistics: opt.Statistics = None,
    training_dataset: opt.TrainingDataset = "offline",
    num_samples: NumSamples = 16,
    max_seq_len: MaxSeqLen = 1024,
    weights_only: WeightsOnly = False,
    output: Output = None,
    attn_impl: opt.AttnImpl = None,
    dtype: opt.Dtype = "auto",
    device: opt.Device = "auto",
    device_map: opt.DeviceMap = None,
    seed: opt.Seed = 0,
    logging_level: opt.LoggingLevel = "WARNING",
) -> None:
    """Singular value spectra of the K and V weights and of the calibrated K and V, as spectra.csv and spectra.png.

    The calibrated ones come from `--statistics` (made with `cskv calibrate --covariance`), or from a short calibration
    here.

    Examples:

    * `cskv analyze --model-path my-model`
    * `cskv analyze --model-path my-model --weights-only --output spectra`
    * `cskv analyze --model-path my-model --statistics outputs/calibration/my-model/statistics.safetensors`
    """
    set_logging(logging_level)
    from cskv.cli.loading import load_model
    from cskv.evaluation.spectra import calibrated_spectra, summary_rows, weight_spectra, write_csv

    name = model_name(model_path, model_id)
    folder = output or Path("outputs/analysis") / name
    check_writable(folder / "spectra.csv")
    plot = _plotter()
    model = load_model(model_path, attn_impl=attn_impl, dtype=dtype, device=device, device_map=device_map)
    spectra = weight_spectra(model)
    if not weights_only:
        known = _statistics(model, model_path, statistics, training_dataset, num_samples, max_seq_len, seed)
        spectra += calibrated_spectra(model, known)
    table = write_csv(spectra, folder / "spectra.csv")
    figure = plot(spectra, folder / "spectra.png", title=name)
    rows = summary_rows(spectra)
    for line in describe(rows):
        typer.echo(line)
    say(f"{table} and {figure}")
    emit({"command": "analyze", "model": model_path, "csv": str(table), "png": str(figure), "spectra": rows})


def _plotter() -> Any:
    """The drawing function, after finding out early that it can draw."""
    from cskv.errors import CSKVError
    from cskv.plots import plot_spectra

    try:
        import matplotlib  # noqa: F401 (only whether it is there)
    except ImportError as error:
        raise CSKVError("drawing needs matplotlib: pip install 'cskv[plots]'") from error
    return plot_spectra


def _statistics(
    model: PreTrainedModel,
    model_path: str,
    statistics: Path | None,
    dataset: str,
    num_samples: int,
    max_seq_len: int,
    seed: int,
) -> Statistics:
    """Saved statistics, or those of a short calibration now, with second moments."""
    from cskv.cli.loading import load_samples, load_tokenizer
    from cskv.statistics import Statistics

    if statistics is not None:
        return Statistics.load(statistics)
    samples = load_samples(dataset, load_tokenizer(model_path), num_samples, max_seq_len, seed)
    return take_statistics(model, samples, covariance=True)


def describe(rows: list[dict[str, Any]]) -> list[str]:
    """How many channels hold 90, 95 and 99 % of the energy, as lines for a person."""
    lines = ["layer  of            channels  for 90 %  for 95 %  for 99 % of the energy"]
    for row in rows:
        what = f"{row['projection'].upper()} {row['source']}"
        counts = "".join(f"{row[name]:>10}" for name in ("values", "rank_90", "rank_95", "rank_99"))
        lines.append(f"{row['layer']:>5}  {what:<12}{counts}")
    return lines
