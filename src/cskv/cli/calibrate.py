"""`cskv calibrate`: one streaming pass over text that takes the statistics which PCA and ASVD need."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cskv.cli import options as opt
from cskv.cli.common import Interrupted, command, emit, progress, say, set_logging
from cskv.cli.groups import LoadingOptions
from cskv.cli.outputs import check_writable
from cskv.cli.settings import model_name, statistics_path
from cskv.config import CSKVConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cskv.calibration.statistics import Statistics
    from cskv.data.samples import TokenSamples


@command
def calibrate(
    model_path: opt.ModelPath,
    loading: LoadingOptions,
    model_id: opt.ModelId = None,
    training_dataset: opt.TrainingDataset = "offline",
    num_samples: opt.NumSamples = 24,
    max_seq_len: opt.MaxSeqLen = 1024,
    covariance: Annotated[
        bool,
        opt.running(
            help="Also second moments of keys and values, for PCA and `cskv analyze`: 16 kv_dim² bytes per layer."
        ),
    ] = True,
    fisher: Annotated[
        bool,
        opt.running(
            help="Also the Fisher information of keys and values, for the default factors and for budgets, by a "
            "backward pass after each forward. Not without --covariance."
        ),
    ] = True,
    gradient_checkpointing: Annotated[
        bool,
        opt.running("--gradient-checkpointing", help="The backward pass holds the activations of one layer at a time."),
    ] = False,
    window: Annotated[
        int, opt.window(help="Tokens that will be always exact: Fisher information leaves out how these are read.")
    ] = CSKVConfig.window,
    group: Annotated[int, opt.window(help="Tokens that will leave the window at a time.")] = CSKVConfig.group,
    sinks: Annotated[
        int, opt.window(help="Tokens at the start of every sample that statistics leave out.")
    ] = CSKVConfig.sinks,
    output: Annotated[Path | None, opt.files("--output", "-o", help="Exact file to write, instead of a root.")] = None,
    asvd_calib_root: opt.CalibrationRoot = opt.DEFAULT_CALIBRATION_ROOT,
    seed: opt.Seed = 0,
    logging_level: opt.LoggingLevel = "WARNING",
) -> None:
    """Take statistics of a model's layers over text, for PCA and ASVD.

    Writes one safetensors file. Memory does not grow with the number of samples. Interrupted, the same command goes on
    where it stopped.

    Examples:

    * `cskv calibrate --model_path my-model`
    * `cskv calibrate --model-path my-model --training-dataset notes.txt --num-samples 128 --max-seq-len 4096`
    * `cskv calibrate --model_path lmsys/longchat-7b-v1.5-32k --training_dataset pile_subset --device-map auto`
    """
    set_logging(logging_level)
    model_path = loading.name(model_path)
    from cskv.cli.loading import load_samples

    target = statistics_path(output, asvd_calib_root, model_name(model_path, model_id))
    check_writable(target)
    samples = load_samples(training_dataset, model_path, num_samples, max_seq_len, seed)
    config = CSKVConfig(window=window, group=group, sinks=sinks)
    model = loading.model(model_path)
    statistics = take_statistics(
        model,
        samples,
        config,
        covariance=covariance,
        fisher=fisher and covariance,
        checkpointed=gradient_checkpointing,
        kept=target.with_name(f"{target.name}.unfinished"),
    )
    statistics.save(target)
    say(f"statistics of {statistics.tokens:,} tokens of {statistics.source}: {target}")
    emit(
        {
            "command": "calibrate",
            "model": model_path,
            "statistics": str(target),
            "tokens": statistics.tokens,
            "layers": len(statistics.layers),
            "source": statistics.source,
            "covariance": statistics.has_covariance,
            "fisher": statistics.has_fisher,
        }
    )


def take_statistics(
    model: PreTrainedModel,
    samples: TokenSamples,
    config: CSKVConfig,
    *,
    covariance: bool = True,
    fisher: bool = True,
    checkpointed: bool = False,
    kept: Path | None = None,
) -> Statistics:
    """Calibrate under a progress bar; arguments as for `cskv.calibrate`."""
    from cskv.calibration.calibrate import calibrate as run

    with progress() as bar:
        task = bar.add_task("calibrating", total=len(samples))

        def report(done: int, _total: int | None) -> None:
            bar.update(task, completed=done)

        try:
            return run(
                model,
                samples,
                config,
                covariance=covariance,
                fisher=fisher,
                checkpointed=checkpointed,
                progress=report,
                kept=kept,
            )
        except KeyboardInterrupt as error:
            left = "start again" if kept is None else "the same command goes on from the sums that are kept"
            raise Interrupted(f"interrupted: no statistics were written; {left}") from error
