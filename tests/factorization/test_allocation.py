from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cskv import ConfigError
from cskv.factorization.allocation import allocate


def test_the_largest_eigenvalues_are_kept_wherever_they_are() -> None:
    spectra = {"a": torch.tensor([9.0, 8.0, 1.0, 0.5]), "b": torch.tensor([2.0, 1.5, 0.1, 0.0])}
    assert allocate(spectra, 4) == {"a": 2, "b": 2}
    assert allocate(spectra, 3) == {"a": 2, "b": 1}
    assert allocate(spectra, 8) == {"a": 4, "b": 4}
    assert allocate(spectra, 100) == {"a": 4, "b": 4}


def test_everyone_gets_one() -> None:
    assert allocate({"a": torch.tensor([9.0, 8.0]), "b": torch.tensor([0.0, 0.0])}, 2) == {"a": 1, "b": 1}
    with pytest.raises(ConfigError, match="budget of 1 latents does not give 2 projections 1 each"):
        allocate({"a": torch.ones(2), "b": torch.ones(2)}, 1)


falling = st.lists(st.floats(0, 100), min_size=4, max_size=4).map(lambda values: sorted(values, reverse=True))


@given(st.lists(falling, min_size=2, max_size=3), st.integers(0, 9))
def test_no_other_split_saves_more(spectra: list[list[float]], extra: int) -> None:
    tensors = {i: torch.tensor(spectrum, dtype=torch.float64) for i, spectrum in enumerate(spectra)}
    budget = len(spectra) + extra
    ranks = allocate(tensors, budget)
    assert sum(ranks.values()) == min(budget, 4 * len(spectra))

    def saved(split: tuple[int, ...]) -> float:
        return sum(float(tensors[i][:rank].sum()) for i, rank in enumerate(split))

    splits = (s for s in product(range(1, 5), repeat=len(spectra)) if sum(s) <= budget)
    assert saved(tuple(ranks.values())) == pytest.approx(max(saved(split) for split in splits))


@given(st.lists(falling, min_size=2, max_size=3), st.integers(6, 12))
def test_with_a_step_ranks_are_multiples_within_the_budget(spectra: list[list[float]], budget: int) -> None:
    ranks = allocate({i: torch.tensor(s) for i, s in enumerate(spectra)}, budget, step=2)
    assert all(rank in (2, 4) for rank in ranks.values())
    assert sum(ranks.values()) <= budget
