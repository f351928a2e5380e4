"""Agreement with the uncompressed model along the text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from cskv.errors import DataError
from cskv.evaluation.pooling import Pooled
from cskv.plots.series import Look, add_legend, method_looks
from cskv.plots.style import new_figure, plain, readable_scale, save, styled


@styled
def plot_positions(
    points: Iterable[Pooled], path: str | Path, title: str | None = None, looks: Mapping[str, Look] | None = None
) -> Path:
    """Draw equal first choices and KL over the position in the text, a line per method.

    Args:
        points: the chosen ones, at most one budget of each method; those without positions are left out.
        path: the PNG (or PDF, SVG) to write.
        title: above both panels.
        looks: of the methods (`method_looks`), when several figures are to agree.

    Raises:
        DataError: no point has positions, or a method comes twice.
        CSKVError: the file cannot be written.
    """
    found = [point for point in points if point.positions]
    if not found:
        raise DataError("no agreement to draw; give at least one row that has positions")
    names = [point.method for point in found]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise DataError(f"{', '.join(twice)} come(s) with several budgets or sizes; choose one of each method")
    looks = {name: (looks or method_looks(found))[name] for name in names}
    figure = new_figure(12.0, 5.2 + 0.24 * -(-len(looks) // 3))
    first, apart = figure.subplots(1, 2)
    for point in found:
        middles = [(part.start + part.stop) / 2 for part in point.positions]
        look = looks[point.method] | {"linewidth": 1.4}
        first.plot(middles, [100 * part.top1 for part in point.positions], **look)
        kls = [part.kl for part in point.positions]
        if max(kls) > 0:
            apart.plot(middles, kls, **look)
    first.set(title="Same first choice", xlabel="position in the text, tokens", ylabel="tokens, % (higher is better)")
    apart.set(title="KL divergence", xlabel="position in the text, tokens", ylabel="nats per token (lower is better)")
    positive = [part.kl for point in found for part in point.positions if part.kl > 0]
    if positive:
        readable_scale(apart, min(positive), max(positive))
    else:
        apart.remove()
    add_legend(figure, looks, 12.0)
    figure.suptitle(plain(title or "Agreement with the uncompressed model along the text"))
    return save(figure, path)
