"""The options that several commands take, under the paper's names and plainer ones, and the panels of the help."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

DEFAULT_ADAPTER_ROOT = Path("outputs/adapters")
DEFAULT_CALIBRATION_ROOT = Path("outputs/calibration")


def panel(title: str) -> Callable[..., Any]:
    """Return `typer.Option` for the options of one panel. Without a name, an option is named like its parameter."""
    return partial(typer.Option, rich_help_panel=title)


model, compression, window, files, running = map(panel, ("Model", "Compression", "Exact window", "Files", "Running"))

MODEL_NAMES = ("--model-path", "--model", "-m")
ModelPath = Annotated[str, model(*MODEL_NAMES, help="Folder, hub id or .gguf file of the base model.")]
OptionalModelPath = Annotated[
    str | None,
    model(
        *MODEL_NAMES, help="Folder, hub id or .gguf file of the base model. Without it: the one that the adapter names."
    ),
]
GgufFile = Annotated[str | None, model(help="GGUF file in the folder or repository that --model-path names.")]
ModelId = Annotated[
    str | None, model(help="Your name for the model, used in folder names. [default: the path's last part]")
]
TrainingDataset = Annotated[
    str,
    files(
        "--training-dataset",
        "--dataset",
        help="A text file, or offline (Python's own documentation and sources), pile_subset, wikitext2, c4; with + "
        "between them several in turns.",
    ),
]
NumSamples = Annotated[int, running(help="Samples of text.")]
MaxSeqLen = Annotated[int, running(help="Tokens per sample.")]
CalibrationRoot = Annotated[
    Path,
    files("--asvd-calib-root", "--cache-root-path", help="Folder of calibration statistics, one folder per model id."),
]
Statistics = Annotated[Path | None, files(help="Exact file of calibration statistics, instead of a root.")]
AdapterRoot = Annotated[
    Path,
    files("--kv-ckpt-root-path", "--ckpt-save-path", help="Folder of adapters, one folder per model id and settings."),
]
Seed = Annotated[int, running(help="Seed of every random choice.", min=0, max=2**32 - 1)]
LoggingLevel = Annotated[str, running(help="DEBUG, INFO, WARNING, ERROR or CRITICAL.")]
