"""The options that several commands take, under the paper's names and plainer ones."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

MODEL, COMPRESSION, WINDOW, FILES, RUNNING = "Model", "Compression", "Exact window", "Files", "Running"

DEFAULT_ADAPTER_ROOT = Path("outputs/adapters")
DEFAULT_CALIBRATION_ROOT = Path("outputs/calibration")

ModelPath = Annotated[
    str,
    typer.Option("--model-path", "--model", "-m", help="Folder or hub id of the base model.", rich_help_panel=MODEL),
]
OptionalModelPath = Annotated[
    str | None,
    typer.Option(
        "--model-path",
        "--model",
        "-m",
        help="Folder or hub id of the base model. Without it: the one that the adapter names.",
        rich_help_panel=MODEL,
    ),
]
ModelId = Annotated[
    str | None,
    typer.Option(
        "--model-id", help="Your name for the model, used in folder names. [default: the path's last part]",
        show_default=False, rich_help_panel=MODEL,
    ),
]  # fmt: skip
AttnImpl = Annotated[
    str | None,
    typer.Option(
        "--attn-impl",
        help="Attention implementation: eager, sdpa, flash_attention_2, ... [default: transformers' own choice]",
        show_default=False,
        rich_help_panel=MODEL,
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype", help="auto (the checkpoint's own), float32, bfloat16 or float16.", rich_help_panel=MODEL
    ),
]  # fmt: skip
Device = Annotated[
    str,
    typer.Option("--device", help="auto (a GPU if there is one), cpu, cuda, cuda:1, mps, ...", rich_help_panel=MODEL),
]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        "--device-map", help="Spread one copy of the model over several devices: auto, balanced, sequential.",
        rich_help_panel=MODEL,
    ),
]  # fmt: skip
KDensity = Annotated[
    float, typer.Option("--k-density", help="Share of the key channels kept, in (0, 1].", rich_help_panel=COMPRESSION)
]
VDensity = Annotated[
    float, typer.Option("--v-density", help="Share of the value channels kept, in (0, 1].", rich_help_panel=COMPRESSION)
]
UseAsvd = Annotated[
    bool | None,
    typer.Option(
        "--use-asvd/--no-use-asvd",
        help="The paper's initialisations: ASVD, or plain SVD. [default: neither, see --init]",
        show_default=False,
        rich_help_panel=COMPRESSION,
    ),
]
Init = Annotated[
    str | None,
    typer.Option(
        "--init",
        help="How factors are made: weighted-pca, pca, asvd or svd. All but svd need `cskv calibrate` first. "
        "[default: weighted-pca]",
        show_default=False,
        rich_help_panel=COMPRESSION,
    ),
]
KeyFactors = Annotated[
    str,
    typer.Option(
        "--key-factors",
        help="joint, or commuting: latents that commute with RoPE (PCA only).",
        rich_help_panel=COMPRESSION,
    ),
]
HeadGroups = Annotated[
    int,
    typer.Option("--head-groups", help="Groups of kv heads with factors of their own.", rich_help_panel=COMPRESSION),
]
TargetRatio = Annotated[
    float | None,
    typer.Option(
        "--target-ratio",
        help="Share of all key and value channels kept, or with --mixed-widths of the bytes of a 16-bit cache; dealt "
        "out over layers by measured sensitivity, instead of densities. Needs a PCA init.",
        show_default=False,
        rich_help_panel=COMPRESSION,
    ),
]
KBits = Annotated[
    int,
    typer.Option(
        "--k-bits", help="Bits per key latent: 2 to 8, or 16 (the model's own dtype).", rich_help_panel=COMPRESSION
    ),
]
VBits = Annotated[
    int, typer.Option("--v-bits", help="Bits per value latent, likewise.", rich_help_panel=COMPRESSION)
]  # fmt: skip
KBlock = Annotated[
    str | None,
    typer.Option(
        "--k-block",
        help="TOKENSxCHANNELS that share a minimum and a scale, for instance 32x4. [default: one channel over a group]",
        show_default=False,
        rich_help_panel=COMPRESSION,
    ),
]
VBlock = Annotated[
    str | None,
    typer.Option(
        "--v-block",
        help="The same for values. [default: 1x32; with --mixed-widths four channels over a group for both]",
        show_default=False,
        rich_help_panel=COMPRESSION,
    ),
]
MixedWidths = Annotated[
    bool,
    typer.Option(
        "--mixed-widths",
        help="Choose a width of 2 to 8 bits for every latent channel, so that the cache takes --target-ratio of the "
        "uncompressed bytes. Instead of --k-bits and --v-bits.",
        rich_help_panel=COMPRESSION,
    ),
]
UseWindow = Annotated[
    bool | None,
    typer.Option(
        "--use-window/--no-use-window",
        help="Keep recent tokens exact: window 0, group `--q-window-size`. Without any window option none are.",
        show_default=False,
        rich_help_panel=WINDOW,
    ),
]
QWindowSize = Annotated[
    int, typer.Option("--q-window-size", help="Tokens per group for `--use-window`.", rich_help_panel=WINDOW)
]
Window = Annotated[
    int | None,
    typer.Option(
        "--window", help="Tokens that are always exact, instead of `--use-window`.", rich_help_panel=WINDOW
    ),
]  # fmt: skip
Group = Annotated[
    int | None,
    typer.Option("--group", help="Tokens that leave the window at a time.", rich_help_panel=WINDOW),
]
TrainingDataset = Annotated[
    str,
    typer.Option(
        "--training-dataset",
        "--dataset",
        help="A text file, or offline (Python's own documentation and sources), pile_subset, wikitext2, c4.",
        rich_help_panel=FILES,
    ),
]
CalibrationRoot = Annotated[
    Path,
    typer.Option(
        "--asvd-calib-root",
        "--cache-root-path",
        help="Folder of calibration statistics, one folder per model id.",
        rich_help_panel=FILES,
    ),
]
Statistics = Annotated[
    Path | None,
    typer.Option(
        "--statistics", help="Exact file of calibration statistics, instead of a root.", rich_help_panel=FILES
    ),
]  # fmt: skip
AdapterRoot = Annotated[
    Path,
    typer.Option(
        "--kv-ckpt-root-path",
        "--ckpt-save-path",
        help="Folder of adapters, one folder per model id and settings.",
        rich_help_panel=FILES,
    ),
]
Seed = Annotated[
    int,
    typer.Option("--seed", help="Seed of every random choice.", min=0, max=2**32 - 1, rich_help_panel=RUNNING),
]
LoggingLevel = Annotated[
    str,
    typer.Option("--logging-level", help="DEBUG, INFO, WARNING, ERROR or CRITICAL.", rich_help_panel=RUNNING),
]
