"""The shared library of the kernels: found beside this file where it was built, and loaded when it is first wanted.

It is plain C++ without a word of Python or torch, so that one build serves all their versions, and is called by ctypes.
It shares the OpenMP of torch, which is loaded before.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

LEVELS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx")
VARIABLE = "CSKV_CPU_KERNELS"  # the highest level to use, or "off"
MISSING = "the compiled CPU kernels are not installed: install cskv again where there is a C++ compiler"


@dataclass(frozen=True)
class Library:
    """A library that is loaded.

    Attributes:
        attend: of a level, the fields of a call as bytes, threads, and the address and size of scratch memory; returns
            0, or the bytes of scratch memory that it needs.
        level: the best that was built and that this processor has.
        built: all that were.
        is_threaded: whether it was built with OpenMP.
    """

    attend: Any
    level: int
    built: tuple[str, ...]
    is_threaded: bool

    @property
    def name(self) -> str:
        """The level by its name."""
        return LEVELS[self.level]


@cache
def library() -> Library | None:
    """Load the library; None where it was not built or `CSKV_CPU_KERNELS=off` rules it out."""
    import torch  # noqa: F401  loads its OpenMP, which the library then finds

    most = os.environ.get(VARIABLE, LEVELS[-1])
    path = next(iter(sorted(Path(__file__).parent.glob("_kernels*.so"))), None)
    if path is None or most == "off":
        return None
    loaded = ctypes.CDLL(str(path))
    attend = loaded.cskv_attend
    attend.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_int64)
    attend.restype = ctypes.c_int64
    bits = loaded.cskv_levels()
    usable = [level for level in range(len(LEVELS)) if bits >> level & 1 and level <= LEVELS.index(most)]
    built = tuple(name for level, name in enumerate(LEVELS) if bits >> (16 + level) & 1)
    return Library(attend, usable[-1], built, bool(loaded.cskv_threaded()))
