"""`cskv train`: initialise an adapter's factors, then train them to rebuild the model's keys and values."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cskv.cli import options as opt
from cskv.cli.common import Interrupted, command, emit, is_main_process, say, set_logging
from cskv.cli.groups import CompressionOptions, LoadingOptions
from cskv.cli.initial import allocated_adapter, initial_adapter, requantised_adapter
from cskv.cli.outputs import check_writable
from cskv.cli.settings import adapter_name, model_name, statistics_path
from cskv.config import CSKVConfig
from cskv.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cskv.adapter.adapter import CSKVAdapter
    from cskv.compression.budget import Budget
    from cskv.data.samples import TokenSamples
    from cskv.training.settings import TrainingSettings

training_option = opt.panel("Training")


@dataclass(frozen=True)
class TrainingOptions:
    """Options of the training: the fields of `TrainingSettings` that have options."""

    epochs: Annotated[int, training_option("--epochs", "--epoches", help="Passes over the samples.")] = 1
    warmup_steps: Annotated[int, training_option(help="Steps over which the learning rate rises.")] = 0
    learning_rate: Annotated[
        float, training_option(help="AdamW's. The paper's 5e-5 suits 7B models; small models take 1e-3.")
    ] = 5e-5
    objective: Annotated[
        str,
        training_option(
            help="reconstruction of keys and values (the paper's), or end-to-end distillation of the model's "
            "predictions."
        ),
    ] = "reconstruction"
    schedule: Annotated[str, training_option(help="After the warm-up: constant or cosine.")] = "constant"
    batch_size: Annotated[int, training_option(help="Samples per forward of one process.")] = 1
    accumulation: Annotated[int, training_option("--gradient-accumulation", help="Forwards per step.")] = 1
    mixed_precision: Annotated[str, training_option(help="no or bf16, for the factors' products.")] = "no"
    gradient_checkpointing: Annotated[
        bool,
        training_option(
            "--gradient-checkpointing",
            help="Distillation holds the activations of one layer at a time, for a third more computation.",
        ),
    ] = False
    checkpoint_every: Annotated[int, training_option(help="Steps between checkpoints.")] = 200


@dataclass(frozen=True)
class InitialOptions:
    """Options on the factors that training begins with."""

    target_ratio: Annotated[
        float | None,
        opt.compression(
            help="Share of the bytes of a 16-bit cache that sealed tokens take: ranks and widths follow, over all "
            "layers, keys and values. Instead of densities and bits; without any window option the newest 32 to 63 "
            "tokens and 4 sinks are exact."
        ),
    ] = None
    bytes_per_token: Annotated[
        float | None, opt.compression(help="The same budget as bytes of a token over all layers.")
    ] = None
    max_kl: Annotated[
        float | None,
        opt.compression(
            help="The same as what the predictions may lose, in nats per token: the smallest cache that is predicted "
            "to lose no more."
        ),
    ] = None
    ranks_only: Annotated[
        bool, opt.compression("--ranks-only", help="Under such a budget keep all latents in 16 bits.")
    ] = False
    from_adapter: Annotated[
        Path | None,
        training_option(
            help="Start from the factors of this adapter, of 16-bit latents, instead of making new ones: with --k-bits "
            "and --v-bits, quantisation after training, or training through the grid. Densities, init and key factors "
            "are its own."
        ),
    ] = None
    use_init_params: Annotated[
        bool,
        training_option(
            "--use-init-params",
            help="Skip training: save the initial factors, in a folder whose name ends in -untrained.",
        ),
    ] = False

    def settings(self, compression: CompressionOptions) -> tuple[CSKVConfig, CSKVAdapter | None]:
        """Return the settings of the adapter to make, and the adapter whose factors it takes, if any.

        Raises:
            CSKVError: options are out of range or contradict each other, or there is no such adapter.
        """
        from cskv.adapter.adapter import CSKVAdapter

        settings, budget = compression.config(), self.budget()
        if self.ranks_only and budget is None:
            raise ConfigError("--ranks-only goes with a budget; give --target-ratio, --bytes-per-token or --max-kl")
        if self.from_adapter is not None:
            if budget is not None:
                raise ConfigError(
                    f"--from-adapter has its ranks already; give it without {' and '.join(self._given())}"
                )
            source = CSKVAdapter.from_pretrained(self.from_adapter)
            names = ["k_bits", "v_bits", "k_block", "v_block"]
            changes = {name: getattr(settings, name) for name in names} | compression.exact_tokens_given(settings)
            return dataclasses.replace(source.config, **changes), source
        if budget is not None and "window" not in compression.exact_tokens_given(settings):
            sinks = CSKVConfig.sinks if compression.sinks is None else compression.sinks
            settings = dataclasses.replace(settings, window=CSKVConfig.window, group=CSKVConfig.group, sinks=sinks)
        return settings, None

    def budget(self) -> Budget | None:
        """Return the budget that is given, if any.

        Raises:
            ConfigError: two are given, or one is out of range.
        """
        from cskv.compression.budget import Budget

        given = self._given()
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(given)} are one budget in two forms; give one of them")
        if not given:
            return None
        return Budget(ratio=self.target_ratio, bytes_per_token=self.bytes_per_token, max_kl=self.max_kl)

    def folder_name(self, settings: CSKVConfig) -> str:
        """Return the name of the adapter's folder under a root."""
        name = adapter_name(settings)
        budgets = {"ratio": self.target_ratio, "bytes": self.bytes_per_token, "kl": self.max_kl}
        for kind, value in budgets.items():
            if value is not None:  # in place of the densities
                name = f"{kind}{value:g}-{name.split('-', 2)[2]}" + ("-ranks" if self.ranks_only else "")
        return name + ("-untrained" if self.use_init_params else "")

    def _given(self) -> list[str]:
        names = "target_ratio", "bytes_per_token", "max_kl"
        return ["--" + name.replace("_", "-") for name in names if getattr(self, name) is not None]


@command
def train(
    model_path: opt.ModelPath,
    compression: CompressionOptions,
    initial: InitialOptions,
    training: TrainingOptions,
    loading: LoadingOptions,
    model_id: opt.ModelId = None,
    training_dataset: opt.TrainingDataset = "offline",
    num_samples: Annotated[int, training_option(help="Samples of text.")] = 2048,
    max_seq_len: Annotated[int, training_option(help="Tokens per sample.")] = 1024,
    output: Annotated[Path | None, opt.files("--output", "-o", help="Exact adapter folder, instead of a root.")] = None,
    ckpt_save_path: opt.AdapterRoot = opt.DEFAULT_ADAPTER_ROOT,
    asvd_calib_root: opt.CalibrationRoot = opt.DEFAULT_CALIBRATION_ROOT,
    statistics: opt.Statistics = None,
    seed: opt.Seed = 0,
    logging_level: opt.LoggingLevel = "WARNING",
) -> None:
    """Make an adapter: initialise its factors, then train them or leave them; the base model stays as it is.

    The default factors are the closed form of what errors cost the predictions, and `--use-init-params` takes them as
    they are, in seconds. Training is for few bits, for end-to-end distillation, and for the paper's own recipe
    (`--use-asvd`). All but SVD need `cskv calibrate` first. Interrupted by Ctrl-C, the same command continues from the
    last checkpoint and ends with the same factors.

    Examples:

    * `cskv train --model-path my-model --window 32 --group 32 --use-init-params`
    * `cskv train --model-path my-model --window 32 --group 32 --target-ratio 0.2 --use-init-params`
    * `cskv train --model-path my-model --window 32 --group 32 --max-kl 0.01 --use-init-params`
    * `cskv train --model-path my-model --window 32 --group 32 --k-bits 4 --v-bits 4 --objective distillation`
    * `cskv train --model-path my-model --use-asvd --use-window`
    * `cskv train --model_path my-model --k_density 0.5 --v_density 0.5 --use_asvd --use_window --k_bits 16 --v_bits 16`
    * `cskv train --model-path small-model --use-asvd --use-window --learning-rate 1e-3 --training-dataset notes.txt`
    * `cskv train --model-path my-model --init svd --use-init-params` (without calibration)
    * `torchrun --nproc-per-node 4 -m cskv.cli train --model-path my-model --use-asvd --use-window`
    """
    set_logging(logging_level)
    model_path = loading.name(model_path)
    from cskv.cli.loading import load_samples
    from cskv.training.settings import TrainingSettings

    (settings, source), budget = initial.settings(compression), initial.budget()
    training_settings = TrainingSettings(**vars(training))
    name = model_name(model_path, model_id)
    folder = output or ckpt_save_path / name / initial.folder_name(settings)
    check_writable(folder / "config.json")
    samples = None
    if not initial.use_init_params or budget is not None:
        samples = load_samples(training_dataset, model_path, num_samples, max_seq_len, seed)
    if settings.window + settings.group == 1:
        say("note: no exact window, every token is compressed at once; --use-window keeps the newest exact")
    model = loading.model(model_path)
    known = statistics_path(statistics, asvd_calib_root, name)
    if samples is not None and budget is not None:
        adapter = allocated_adapter(model, settings, known, samples, budget, ranks_only=initial.ranks_only)
    elif source is not None:
        adapter = requantised_adapter(model, source, settings, known)
    else:
        adapter = initial_adapter(model, settings, known)
    if samples is not None and not initial.use_init_params:
        adapter.metrics |= reconstruct(model, adapter, samples, training_settings, folder)
    if is_main_process():
        adapter.save_pretrained(folder)
        say(f"adapter: {folder}")
    facts = {"command": "train", "model": model_path, "adapter": str(folder), "settings": adapter.config.to_dict()}
    emit({**facts, **adapter.metrics})


def reconstruct(
    model: PreTrainedModel, adapter: CSKVAdapter, samples: TokenSamples, settings: TrainingSettings, folder: Path
) -> dict[str, Any]:
    """Train an adapter in place, with checkpoints and a log in its folder, and return the figures to keep, JSON-ready.

    The losses before the first step are left out where the log of that step is gone.
    """
    from cskv.training.log import FILE, read_log
    from cskv.training.trainer import train as run

    try:
        result = run(model, adapter, samples, settings, output=folder, show_progress=True)
    except KeyboardInterrupt as error:
        raise Interrupted(
            f"interrupted: the last checkpoint is kept in {folder}; run the same command again to continue"
        ) from error
    names = ["loss", *(name for name in ("k_loss", "v_loss") if getattr(result, name) is not None)]
    first = next((record for record in read_log(folder / FILE) if record.step == 1), None)
    if first is None:
        say(f"note: {folder / FILE} lacks the first step, so initial losses are not recorded")
    return {
        "objective": settings.objective,
        "steps": result.steps,
        "tokens": result.tokens,
        "seconds": round(result.seconds, 3),
        **({f"initial_{name}": getattr(first, name) for name in names} if first else {}),
        **{name: getattr(result, name) for name in names},
        "learning_rate": settings.learning_rate,
        "dataset": samples.source.name,
        "sample_tokens": samples.sample_len,
    }
