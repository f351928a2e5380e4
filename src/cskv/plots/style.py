"""Palette, canvas, saving and scales of all figures. matplotlib is imported inside, and draws off screen."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cskv.errors import DataError
from cskv.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart with every common colour blindness, and by the markers in black and white.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#E69F00", "#009E73", "#CC79A7", "#56B4E9")
MARKERS = ("o", "s", "v", "D", "^", "P", "X")
STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
PROJECTIONS = {"k": "Keys", "v": "Values"}


@contextlib.contextmanager
def _our_style() -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context(STYLE):
        yield


styled = _our_style()  # decorates what draws a figure; the caller's settings stay


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of a size in inches; it belongs to no window, and leaves pyplot's backend alone."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure, atomically; the suffix names the format.

    Raises:
        DataError: the suffix is no image format.
        CSKVError: the file cannot be written.
    """
    path = Path(path)
    kind = path.suffix.lstrip(".") or "png"
    if kind not in figure.canvas.get_supported_filetypes():
        raise DataError(f"cannot draw to {path}: {path.suffix} is no image format here; use .png, .pdf or .svg")
    write_atomically(path, lambda file: figure.savefig(file, format=kind))
    return path


def plain(text: str) -> str:
    """Escape text from a file: matplotlib reads what stands between dollar signs as a formula."""
    return text.replace("$", r"\$")


def side_by_side(xs: Sequence[float], step: float) -> list[float]:
    """Set positions that are closer than `step` side by side, so that no point hides another."""
    result = []
    for index, x in enumerate(xs):
        alike = [i for i, other in enumerate(xs) if abs(other - x) < step]
        result.append(x + step * (alike.index(index) - (len(alike) - 1) / 2))
    return result


def readable_scale(ax: Axes, values: Sequence[float]) -> None:
    """Make the y axis logarithmic, with plain numbers, where values differ much; leave it linear otherwise."""
    smallest, largest = min(values, default=0.0), max(values, default=0.0)
    if 0 < 4 * smallest < largest:
        ax.set_yscale("log")
        plain_log(ax.yaxis, smallest, largest)
    else:
        ax.margins(y=0.15)


def plain_log(axis: Axis, smallest: float, largest: float) -> None:
    """Write plain numbers along a logarithmic axis: many in a short range, powers of ten in a long one."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    decades = math.log10(largest / smallest)
    subs = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0) if decades < 0.7 else (1.0, 2.0, 5.0) if decades < 4 else (1.0,)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
