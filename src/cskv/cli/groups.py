"""Options that belong together: dataclasses of options, which a command takes as one parameter each."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

from cskv.cli import options as opt
from cskv.cli.settings import block_of, check_number, exact_tokens, init_of
from cskv.config import CSKVConfig
from cskv.errors import CSKVError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def expand(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command one option per field of its parameters that are dataclasses, and check the range of all numbers.

    Raises:
        ConfigError: (by the command) a number is not finite, or beyond any use.
    """
    options: list[inspect.Parameter] = []
    groups: dict[str, tuple[Any, list[str]]] = {}
    for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
        group = parameter.annotation
        if not dataclasses.is_dataclass(group):
            options.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        hints = get_type_hints(group, include_extras=True)
        groups[name] = group, list(hints)
        for field in dataclasses.fields(group):
            default = inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
            options.append(
                inspect.Parameter(
                    field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hints[field.name]
                )
            )

    @functools.wraps(function)
    def expanded(**given: Any) -> None:
        for name, value in given.items():
            check_number(f"--{name.replace('_', '-')}", value)
        for name, (group, fields) in groups.items():
            given[name] = group(**{field: given.pop(field) for field in fields})
        function(**given)

    expanded.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    expanded.__annotations__ = {option.name: option.annotation for option in options}
    return expanded


@dataclass(frozen=True)
class LoadingOptions:
    """Options on the base model's file, device and precision."""

    gguf_file: opt.GgufFile = None
    attn_impl: Annotated[
        str | None,
        opt.model(
            help="Attention implementation: eager, sdpa, flash_attention_2, ... [default: transformers' own choice]"
        ),
    ] = None
    dtype: Annotated[
        str, opt.model(help="auto (the checkpoint's own; of GGUF bfloat16), float32, bfloat16 or float16.")
    ] = "auto"
    device: Annotated[str, opt.model(help="auto (a GPU if there is one), cpu, cuda, cuda:1, mps, ...")] = "auto"
    device_map: Annotated[
        str | None, opt.model(help="Spread one copy of the model over several devices: auto, balanced, sequential.")
    ] = None

    def name(self, path: str) -> str:
        """Return the one name of the base model that a path and `--gguf-file` mean.

        Raises:
            CSKVError: they name two files, or the folder holds several.
        """
        from cskv.models.gguf import checkpoint_name

        return checkpoint_name(path, self.gguf_file)

    def optional_name(self, path: str | None) -> str | None:
        """Return the name likewise, or None where no path was given and the adapter names the base.

        Raises:
            CSKVError: as for `name`, or there is a file without a path.
        """
        if path is None and self.gguf_file is not None:
            raise CSKVError("--gguf-file is a file in a folder or repository; give that with --model-path")
        return None if path is None else self.name(path)

    def model(self, name: str) -> PreTrainedModel:
        """Load a base model, in evaluation mode.

        Raises:
            CSKVError: it cannot be loaded so.
        """
        from cskv.cli.loading import load_model

        return load_model(
            name, attn_impl=self.attn_impl, dtype=self.dtype, device=self.device, device_map=self.device_map
        )


@dataclass(frozen=True)
class CompressionOptions:
    """Options of the compression, under the paper's names and plainer ones."""

    k_density: Annotated[float, opt.compression(help="Share of the key channels kept, in (0, 1].")] = 0.2
    v_density: Annotated[float, opt.compression(help="Share of the value channels kept, in (0, 1].")] = 0.2
    use_asvd: Annotated[
        bool | None,
        opt.compression(help="The paper's initialisations: ASVD, or plain SVD. [default: neither, see --init]"),
    ] = None
    init: Annotated[
        str | None,
        opt.compression(
            help="How factors are made: fisher-pca, weighted-pca, pca, asvd or svd. All but svd need `cskv calibrate` "
            "first. [default: fisher-pca]"
        ),
    ] = None
    key_factors: Annotated[
        str, opt.compression(help="joint, or commuting: latents that commute with RoPE (PCA only).")
    ] = "joint"
    head_groups: Annotated[int, opt.compression(help="Groups of kv heads with factors of their own.")] = 1
    k_bits: Annotated[int, opt.compression(help="Bits per key latent: 2 to 8, or 16 (the model's own dtype).")] = 16
    v_bits: Annotated[int, opt.compression(help="Bits per value latent, likewise.")] = 16
    k_block: Annotated[
        str | None,
        opt.compression(
            help="TOKENSxCHANNELS that share a minimum and a scale, for instance 32x4. "
            "[default: one channel over a group]"
        ),
    ] = None
    v_block: Annotated[
        str | None,
        opt.compression(
            help="The same for values. [default: 1x32; under a budget four channels over a group for both]"
        ),
    ] = None
    use_window: Annotated[
        bool | None,
        opt.window(
            help="Keep recent tokens exact as the paper does: window 0, group `--q-window-size`, no sinks. Without any "
            "window option none are."
        ),
    ] = None
    q_window_size: Annotated[int, opt.window(help="Tokens per group for `--use-window`.")] = 32
    window: Annotated[int | None, opt.window(help="Tokens that are always exact, instead of `--use-window`.")] = None
    group: Annotated[int | None, opt.window(help="Tokens that leave the window at a time.")] = None
    sinks: Annotated[
        int | None,
        opt.window(
            help="First tokens of every sequence that are always exact. [default: 4 with `--window` or `--group`, else "
            "0; of an adapter that is given, its own]"
        ),
    ] = None

    def exact_tokens_given(self, settings: CSKVConfig) -> dict[str, int]:
        """Return what options say in place of an adapter's own window, group and sinks; `settings` are those of all."""
        names = ["window", "group"] if (self.use_window, self.window, self.group) != (None, None, None) else []
        names += ["sinks"] if self.sinks is not None else []
        return {name: getattr(settings, name) for name in names}

    def config(self) -> CSKVConfig:
        """Return the settings that the options name.

        Raises:
            ConfigError: one is out of range, or something was given in two ways.
        """
        given: dict[str, Any] = dict(vars(self))
        names = ("use_window", "q_window_size", "window", "group", "sinks")
        given |= exact_tokens(*(given.pop(name) for name in names))
        init = init_of(given.pop("init"), given.pop("use_asvd"))
        given |= {f"{kind}_block": block_of(f"--{kind}-block", given[f"{kind}_block"]) for kind in ("k", "v")}
        return CSKVConfig(init=init, **given)
