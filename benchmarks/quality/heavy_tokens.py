"""Tokens whose keys or values are unlike all others: how far sinks are out, and what is left when they are.

Of each text, keys and values: distances from the mean of the tokens behind the sinks, over the median distance, of the
first token, of the next three, and of the farthest behind these; and the largest share of a layer's variance that one
token in five hundred has.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.pages import Table
from cskv.calibration.hooks import Teacher
from cskv.data.samples import TokenSamples
from cskv.data.sources import open_source
from cskv.models.evaluation_mode import evaluation_mode
from cskv.models.survey import survey

SINKS, SAMPLES, TOKENS = 4, 4, 512
HEADINGS = ("text", "of", "first token", "next three", "farthest", "which", "share of 0.2 %")


def heavy_tokens(model: Any, tokenizer: Any, texts: Sequence[str]) -> Table:
    """Return a row for the keys and one for the values of each text."""
    return Table(
        "Distances over the median", HEADINGS, [row for text in texts for row in _rows(model, tokenizer, text)]
    )


@torch.no_grad()
def _rows(model: Any, tokenizer: Any, text: str) -> list[list[str]]:
    samples = torch.stack(list(islice(TokenSamples(open_source(text), tokenizer, SAMPLES, TOKENS), SAMPLES)))
    teacher = Teacher(model, survey(model).sites)
    with evaluation_mode(model), teacher.watching():
        seen = teacher.observe(samples)
    found = []
    for kind, name in (("k", "keys"), ("v", "values")):
        layers = {layer: _distances(getattr(observation, kind).float()) for layer, observation in seen.items()}
        out = torch.stack([distances for distances, _ in layers.values()])
        layer, sample, place = torch.unravel_index(out[..., SINKS:].argmax(), out[..., SINKS:].shape)
        token = tokenizer.decode(samples[sample, place + SINKS])
        figures = out[..., 0].mean(), out[..., 1:SINKS].mean(), out[..., SINKS:].max()
        which = f"{token!r} in layer {list(layers)[layer]}"
        share = max(share for _, share in layers.values())
        found.append([Path(text).stem, name, *(f"{float(figure):.1f}" for figure in figures), which, f"{share:.1%}"])
    return found


def _distances(y: Tensor) -> tuple[Tensor, float]:
    """Return a layer's distances over the median of the tokens behind the sinks, and the heaviest tokens' share."""
    squares = (y - y[:, SINKS:].mean((0, 1))).square().sum(-1)
    rest = squares[:, SINKS:]
    share = rest.flatten().topk(max(1, rest.numel() // 500)).values.sum() / rest.sum()
    return (squares / rest.median()).sqrt(), float(share)
