"""From command line options to settings, and from settings to the folder where an adapter is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from cskv.config import CSKVConfig
from cskv.errors import ConfigError

GREATEST = 2**32  # of any option: what is counted, and seeds, are below it
MOST_LINES = 100_000  # of a LongEval record, some two million tokens
Number = TypeVar("Number", int, float)


def check_number(option: str, value: object, below: int = GREATEST) -> None:
    """Refuse a number that no option takes: not finite, or so large that it must be a slip.

    Raises:
        ConfigError: it is one.
    """
    if isinstance(value, (int, float)) and not (math.isfinite(value) and abs(value) < below):
        raise ConfigError(f"{option} is {value}; expected a number below {below}")


def words(given: Iterable[str]) -> tuple[str, ...]:
    """Return all values, each once, in their order."""
    return tuple(dict.fromkeys(part.strip() for text in given for part in text.split(",") if part.strip()))


def numbers(
    option: str, given: Iterable[str], kind: Callable[[str], Number], below: int = GREATEST
) -> tuple[Number, ...]:
    """Return all values as numbers, each once, in their order.

    Raises:
        ConfigError: one is no such number, or beyond any use.
    """
    found = []
    for word in words(given):
        try:
            found.append(kind(word))
        except ValueError:
            wanted = "whole numbers" if kind is int else "numbers"
            raise ConfigError(f"{option} has {word!r}; expected {wanted}, with commas between them") from None
        check_number(option, found[-1], below)
    return tuple(dict.fromkeys(found))


def exact_tokens(
    use_window: bool | None, q_window_size: int, window: int | None, group: int | None, sinks: int | None
) -> dict[str, int]:
    """Return the exact window, the sealing group and the exact sinks, in tokens, as `CSKVConfig` names them.

    The paper's `--use_window --q_window_size g` is window 0 and group g; without `--use_window` it compresses every
    token at once, which is window 0 and group 1. Neither has sinks unless `--sinks` says so. `--window` and `--group`
    set both directly, and leave the sinks at their default.

    Raises:
        ConfigError: both ways were used.
    """
    if window is None and group is None:
        return {"window": 0, "group": q_window_size if use_window else 1, "sinks": sinks or 0}
    if use_window is not None:
        raise ConfigError("give either --use-window with --q-window-size, or --window with --group, not both")
    given = {"window": window, "group": group, "sinks": sinks}
    return {name: getattr(CSKVConfig(), name) if value is None else value for name, value in given.items()}


def model_name(model_path: str, model_id: str | None) -> str:
    """Return the name of a model in folder names: the given id, or the last part of the path, without `.gguf`.

    Raises:
        ConfigError: the id is no plain folder name.
    """
    path = Path(model_path).expanduser().resolve()
    own = path.stem if path.suffix.lower() == ".gguf" else path.name
    name = own if model_id is None else model_id
    if not name or name in (".", "..") or Path(name).name != name:
        raise ConfigError(f"model id is {name!r}; expected one folder name, without slashes")
    return name


def init_of(init: str | None, use_asvd: bool | None) -> str:
    """Return the initialisation that `--init` or the paper's `--use_asvd` names, or the default one.

    Raises:
        ConfigError: they contradict each other.
    """
    named = None if use_asvd is None else "asvd" if use_asvd else "svd"
    if init is None:
        return named or CSKVConfig().init
    if named not in (None, init):
        option = "--use-asvd" if use_asvd else "--no-use-asvd"
        raise ConfigError(f"{option} and --init {init} contradict each other; give one of them")
    return init


def adapter_name(config: CSKVConfig) -> str:
    """Return the folder name of an adapter with these settings, with what differs from the paper's form at its end."""
    name = f"k{config.k_density:g}-v{config.v_density:g}-{config.init}-window{config.window}-group{config.group}"
    name += f"-sinks{config.sinks}" if config.sinks else ""
    name += f"-{config.key_factors}" if config.key_factors != "joint" else ""
    name += f"-headgroups{config.head_groups}" if config.head_groups > 1 else ""
    for kind in ("k", "v") if config.is_quantised else ():
        tokens, channels = config.block(kind)
        width = "mixed" if config.mixed_widths else f"{config.bits(kind)}bits"
        name += f"-{kind}{width}" + ("" if width == "16bits" else f"-{tokens}x{channels}")
    return name


def block_of(option: str, text: str | None) -> tuple[int, int] | None:
    """Read a block of tokens by channels, such as "32x4".

    Raises:
        ConfigError: it is no pair of whole numbers.
    """
    if text is None:
        return None
    tokens, _, channels = text.lower().partition("x")
    if not tokens.isdecimal() or not channels.isdecimal():
        raise ConfigError(f"{option} is {text!r}; expected TOKENSxCHANNELS, for instance 32x4")
    return int(tokens), int(channels)


def statistics_path(given: Path | None, root: Path, name: str) -> Path:
    """Return the file of a model's statistics: the given one, or the one of that model name under a root."""
    return given or root / name / "statistics.safetensors"
