"""Deal a budget of latents out over projections: the largest eigenvalue first.

Each further latent of a projection saves the next eigenvalue of its covariance. Where the losses of all projections are
in one unit, taking the largest eigenvalue that is left, again and again, is optimal, since each spectrum falls.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor

from cskv.errors import ConfigError

Key = TypeVar("Key")


def allocate(spectra: Mapping[Key, Tensor], budget: int, step: int = 1) -> dict[Key, int]:
    """The rank of every projection.

    Args:
        spectra: what each further latent saves, largest first, in one unit.
        budget: latents in all.
        step: ranks are multiples of this (head groups, or the pairs of commuting keys); at least one step each.

    Returns:
        ranks that sum to at most `budget`, and to more than `budget - step` unless everything is kept.

    Raises:
        ConfigError: the budget does not give every projection one step.
    """
    if budget < step * len(spectra):
        raise ConfigError(
            f"a budget of {budget} latents does not give {len(spectra)} projections {step} each; raise the target ratio"
        )
    gains, owners = [], []
    for key, spectrum in spectra.items():
        steps = spectrum.double()[: len(spectrum) // step * step].unflatten(0, (-1, step)).sum(1)
        gains.append(steps[1:])  # the first step is given to all
        owners += [key] * (len(steps) - 1)
    ranks = dict.fromkeys(spectra, step)
    left = budget // step - len(spectra)
    for index in torch.cat(gains).argsort(descending=True, stable=True)[:left].tolist():
        ranks[owners[index]] += step
    return ranks
