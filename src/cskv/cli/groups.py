"""Options that belong together: dataclasses of options, which a command takes as one parameter each."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_type_hints

from cskv.cli import options as opt
from cskv.cli.settings import block_of, init_of, window_and_group
from cskv.config import CSKVConfig
from cskv.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GREATEST = 2**32  # of any option: what is counted, and seeds, are below it


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


def check_number(option: str, value: object, below: int = GREATEST) -> None:
    """Refuse a number that no option takes: not finite, or so large that it must be a slip.

    Raises:
        ConfigError: it is one.
    """
    if isinstance(value, (int, float)) and not (math.isfinite(value) and abs(value) < below):
        raise ConfigError(f"{option} is {value}; expected a number below {below}")


@dataclass(frozen=True)
class LoadingOptions:
    """Where the base model runs, and in what precision."""

    attn_impl: opt.AttnImpl = None
    dtype: opt.Dtype = "auto"
    device: opt.Device = "auto"
    device_map: opt.DeviceMap = None

    def model(self, path: str) -> PreTrainedModel:
        """Load a base model, in evaluation mode.

        Raises:
            CSKVError: it cannot be loaded so.
        """
        from cskv.cli.loading import load_model

        return load_model(path, **vars(self))


@dataclass(frozen=True)
class CompressionOptions:
    """How the cache is compressed, under the paper's names and plainer ones."""

    k_density: opt.KDensity = 0.2
    v_density: opt.VDensity = 0.2
    use_asvd: opt.UseAsvd = None
    init: opt.Init = None
    key_factors: opt.KeyFactors = "joint"
    head_groups: opt.HeadGroups = 1
    k_bits: opt.KBits = 16
    v_bits: opt.VBits = 16
    k_block: opt.KBlock = None
    v_block: opt.VBlock = None
    use_window: opt.UseWindow = None
    q_window_size: opt.QWindowSize = 32
    window: opt.Window = None
    group: opt.Group = None

    @property
    def window_given(self) -> bool:
        return (self.use_window, self.window, self.group) != (None, None, None)

    def config(self, *, mixed_widths: bool = False) -> CSKVConfig:
        """Return the settings that the options name.

        Raises:
            ConfigError: one is out of range, or something was given in two ways.
        """
        given: dict[str, Any] = dict(vars(self))
        window, group = window_and_group(
            *(given.pop(name) for name in ("use_window", "q_window_size", "window", "group"))
        )
        init = init_of(given.pop("init"), given.pop("use_asvd"))
        given |= {f"{kind}_block": block_of(f"--{kind}-block", given[f"{kind}_block"]) for kind in ("k", "v")}
        return CSKVConfig(window=window, group=group, init=init, mixed_widths=mixed_widths, **given)
