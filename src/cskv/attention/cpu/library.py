"""The shared library of the kernels: found beside this file where it was built, and loaded when it is first wanted.

It is plain C++ without a word of Python or torch, so that one build serves all their versions, and is called by ctypes.
It is linked with no OpenMP: it takes the functions of torch's, which is loaded before, whatever that file is called.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from cskv.errors import ConfigError, first_line

LEVELS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx")
OFF = "off"
VARIABLE = "CSKV_CPU_KERNELS"  # the highest level to use, or "off"
MISSING = "the compiled CPU kernels are not installed: install cskv again where there is a C++ compiler"
SWITCHED_OFF = f"the compiled CPU kernels are switched off: unset the variable {VARIABLE}"


@dataclass(frozen=True)
class Library:
    """A library that is loaded.

    Attributes:
        attend: of a level, the fields of a call as bytes, threads, and the address and size of scratch memory; returns
            0, or the bytes of scratch memory that it needs.
        project: of a level, the fields of a projection as bytes, and threads.
        level: the best that was built and that this processor has.
        usable: those that this processor has.
        built: all that were.
        is_threaded: whether it was built with OpenMP.
    """

    attend: Any
    project: Any
    level: int
    usable: tuple[str, ...]
    built: tuple[str, ...]
    is_threaded: bool

    @property
    def name(self) -> str:
        """The level by its name."""
        return LEVELS[self.level]


def library() -> Library | None:
    """Return the library; None where there is none to use, see `lacking`.

    Raises:
        ConfigError: `CSKV_CPU_KERNELS` is no level.
    """
    found = _load()
    return found if isinstance(found, Library) else None


def lacking() -> str | None:
    """Return why there is no library to use, and what to do; None where there is one."""
    found = _load()
    return found if isinstance(found, str) else None


@cache
def _load() -> Library | str:
    most = os.environ.get(VARIABLE) or LEVELS[-1]
    if most == OFF:
        return SWITCHED_OFF
    if most not in LEVELS:
        raise ConfigError(f"{VARIABLE} is {most!r}; expected the highest level to use, {', '.join(LEVELS)}, or {OFF}")
    path = next(iter(sorted(Path(__file__).parent.glob("_kernels*.so"))), None)
    if path is None:
        return MISSING
    import torch  # noqa: F401  loads its OpenMP for all to use

    from cskv.attention.cpu.arguments import SEALED, STEP

    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        return f"the compiled CPU kernels cannot be loaded, install cskv again: {first_line(error)}"
    if not hasattr(loaded, "cskv_call_bytes") or loaded.cskv_call_bytes() != STEP.size + SEALED.size:
        return "the compiled CPU kernels are those of another cskv: install cskv again"
    attend = loaded.cskv_attend
    attend.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_int64)
    attend.restype = ctypes.c_int64
    project = loaded.cskv_project
    project.argtypes, project.restype = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int), None
    bits = loaded.cskv_levels()
    usable = tuple(name for level, name in enumerate(LEVELS[: LEVELS.index(most) + 1]) if bits >> level & 1)
    built = tuple(name for level, name in enumerate(LEVELS) if bits >> (16 + level) & 1)
    return Library(attend, project, LEVELS.index(usable[-1]), usable, built, bool(loaded.cskv_threaded()))
