"""Widths from a budget: hand-computed choices, optimality, and the water-filling that theory asks for."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cskv import ConfigError
from cskv.quantization.widths import CHOICES, RANKS, Losses, choose_widths, runs_of, width_errors

ALONE = (32, 1)  # a minimum and a scale of 16 bits each for 32 values: a bit per kept channel
FREE = (2**20, 4)  # blocks so large that their minimum and scale cost nothing


def table(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def ideal(variances: Tensor, choices: range | tuple[int, ...] = CHOICES) -> Tensor:
    """What every halving of the step gives: a quarter of the error per bit. Convex in the bits."""
    return variances[:, None] * 4.0 ** -torch.tensor(list(choices), dtype=torch.float64)


def random_variances(number: int, seed: int) -> Tensor:
    return torch.randn(number, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).mul(2).exp()


def bits_spent(widths: Tensor, block: tuple[int, int]) -> float:
    return float(widths.sum() + (widths > 0).sum() * 32 / (block[0] * block[1]))


def error_of(errors: Tensor, widths: Tensor, choices: tuple[int, ...] = CHOICES) -> float:
    return sum(float(row[choices.index(bits)]) for row, bits in zip(errors, widths.tolist()))


@pytest.mark.parametrize(
    ("budget", "widths"),
    [
        (3.0, [2, 0]),  # 2 bits save 80 of the first channel, 8 of the second; each costs 2 and 1 for its block
        (5.9, [2, 0]),
        (6.0, [2, 2]),  # per bit, 8 / 3 of the second channel come before 4 / 2 of the first
        (7.9, [2, 2]),
        (8.0, [4, 2]),
        (10.0, [4, 4]),
        (1000.0, [4, 4]),
    ],
)
def test_bits_go_where_they_save_most(budget: float, widths: list[int]) -> None:
    losses = {"only": Losses(table([100, 20, 16], [10, 2, 1.6]), (0, 2, 4), ALONE)}
    assert choose_widths(losses, budget)["only"].tolist() == widths


def test_projections_share_one_budget() -> None:
    tables = {"k": table([100, 10, 1], [80, 8, 1]), "v": table([3, 1, 0.5], [1, 0.9, 0.8])}
    chosen = choose_widths({key: Losses(own, (0, 2, 4), FREE) for key, own in tables.items()}, 8.01)
    assert {key: widths.tolist() for key, widths in chosen.items()} == {"k": [4, 2], "v": [2, 0]}


def test_a_block_of_its_own_costs_more_than_a_share() -> None:
    """Equal errors, but a channel of k takes 2 + 1 bits, and one of v 2 + 1/4."""
    alike = table([4, 1], [4, 1], [4, 1])
    losses = {"k": Losses(alike, (0, 2), ALONE), "v": Losses(alike, (0, 2), (32, 4))}
    chosen = choose_widths(losses, 3 + 3 * 2.25)
    assert {key: widths.tolist() for key, widths in chosen.items()} == {"k": [2, 0, 0], "v": [2, 2, 2]}


def test_every_projection_keeps_a_channel() -> None:
    tables = {"k": table([1e6, 1e5, 1e4], [1e6, 1e5, 1e4]), "v": table([1e-6, 0, 0], [2e-6, 0, 0])}
    chosen = choose_widths({key: Losses(own, (0, 2, 4), FREE) for key, own in tables.items()}, 6.01)
    assert {key: widths.tolist() for key, widths in chosen.items()} == {"k": [2, 2], "v": [0, 2]}


def test_a_budget_too_small_is_refused() -> None:
    tables = {"k": table([4, 1], [2, 1]), "v": table([1, 0], [3, 0])}
    losses = {key: Losses(own, (0, 2), ALONE) for key, own in tables.items()}
    assert [widths.tolist() for widths in choose_widths(losses, 6.0).values()] == [[2, 0], [0, 2]]
    says = "5 bits per token does not keep a latent of each of 2 projections, which takes 6; raise it"
    with pytest.raises(ConfigError, match=says):
        choose_widths(losses, 5.0)


problems = st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(0, 2**31), st.floats(0, 6))


def drawn(problem: tuple[int, int, int, float]) -> tuple[dict[int, Tensor], dict[int, tuple[int, int]], float]:
    """Tables of random variances, blocks, and a budget that is large enough: so many bits per channel at least."""
    projections, rank, seed, bits = problem
    errors = {i: ideal(random_variances(rank, seed + i)) for i in range(projections)}
    return errors, {i: ((32, 1), (32, 4), (8, 2))[i] for i in errors}, projections * max(4.0, rank * bits)


def chosen_and_spent(errors, blocks, budget: float) -> tuple[dict[int, Tensor], float, float]:
    widths = choose_widths({i: Losses(own, CHOICES, blocks[i]) for i, own in errors.items()}, budget)
    spent = sum(bits_spent(widths[i], blocks[i]) for i in widths)
    return widths, spent, sum(error_of(errors[i], widths[i]) for i in widths)


@given(problems, st.floats(1, 3))
def test_the_budget_is_kept_and_a_larger_one_never_hurts(problem: tuple[int, int, int, float], factor: float) -> None:
    errors, blocks, budget = drawn(problem)
    widths, spent, error = chosen_and_spent(errors, blocks, budget)
    assert spent <= budget + 1e-9
    assert all(chosen.any() for chosen in widths.values())
    assert set(torch.cat(list(widths.values())).tolist()) <= set(CHOICES)
    _, more_spent, less_error = chosen_and_spent(errors, blocks, factor * budget)
    assert more_spent >= spent - 1e-9
    assert less_error <= error + 1e-12


@given(problems)
def test_no_exchange_within_the_bits_lowers_the_error(problem: tuple[int, int, int, float]) -> None:
    """One channel gets any width and another any: whatever takes no more bits loses no less."""
    errors, blocks, budget = drawn(problem)
    widths, _, error = chosen_and_spent(errors, blocks, budget)
    changes = []  # (channel, bits more, error more)
    for i, chosen in widths.items():
        for channel, bits in enumerate(chosen.tolist()):
            for other in CHOICES:
                changed = chosen.clone()
                changed[channel] = other
                if changed.any():
                    more = bits_spent(changed, blocks[i]) - bits_spent(chosen, blocks[i])
                    worse = errors[i][channel, CHOICES.index(other)] - errors[i][channel, CHOICES.index(bits)]
                    changes.append((len(widths) * channel + i, more, worse))
    channels, bits, errors_more = (torch.tensor(column, dtype=torch.float64) for column in zip(*changes))
    exchange = channels[:, None] != channels
    fits = exchange & (bits[:, None] + bits <= 1e-9)
    assert ((errors_more[:, None] + errors_more)[fits] >= -1e-9 * error).all()


@given(st.integers(2, 64), st.integers(0, 2**31), st.floats(0.75, 4))
def test_gaussian_channels_are_filled_like_vessels_with_water(number: int, seed: int, bits: float) -> None:
    """With D at which 1/2 log2(variance / D) sum to the bits taken, no width is off by more than one bit."""
    variances, choices = random_variances(number, seed), range(17)
    chosen = choose_widths({0: Losses(ideal(variances, choices), tuple(choices), FREE)}, number * bits)[0]
    low, high = 1e-12 * float(variances.min()), float(variances.max())
    for _ in range(200):
        level = math.sqrt(low * high)
        low, high = (level, high) if _filled(variances, level).sum() > chosen.sum() else (low, level)
    assert number * bits - chosen.sum() < 1 + 1e-3 * number  # the next bit does not fit
    assert (_filled(variances, high) - chosen).abs().max() <= 1 + 1e-3


def _filled(variances: Tensor, level: float) -> Tensor:
    return (0.5 * (variances / level).log2()).clamp(min=0)


def ranks_of(spectra: dict[str, list[float]], budget: int, step: int = 1) -> dict[str, int]:
    """Ranks by eigenvalue, from a budget of latents."""
    losses = {
        key: Losses(table(*([value, 0.0] for value in spectrum)), RANKS, step=step) for key, spectrum in spectra.items()
    }
    widths = choose_widths(losses, 16.0 * budget)
    assert all(set(own.tolist()) <= {0, 16} for own in widths.values())
    assert all((own.diff() <= 0).all() for own in widths.values())  # the leading ones
    return {key: int(own.count_nonzero()) for key, own in widths.items()}


def test_the_largest_eigenvalues_are_kept_wherever_they_are() -> None:
    spectra = {"a": [9.0, 8.0, 1.0, 0.5], "b": [2.0, 1.5, 0.1, 0.0]}
    assert ranks_of(spectra, 4) == {"a": 2, "b": 2}
    assert ranks_of(spectra, 3) == {"a": 2, "b": 1}
    assert ranks_of(spectra, 8) == {"a": 4, "b": 4}
    assert ranks_of(spectra, 100) == {"a": 4, "b": 4}
    assert ranks_of({"a": [9.0, 8.0], "b": [0.0, 0.0]}, 2) == {"a": 1, "b": 1}
    with pytest.raises(ConfigError, match="does not keep a latent of each of 2 projections, which takes 64"):
        ranks_of(spectra, 3, step=2)


falling = st.lists(st.floats(0, 100), min_size=4, max_size=4).map(lambda values: sorted(values, reverse=True))


@given(st.lists(falling, min_size=2, max_size=3), st.integers(0, 9))
def test_no_other_ranks_save_more(spectra: list[list[float]], extra: int) -> None:
    budget = len(spectra) + extra
    ranks = ranks_of(dict(zip("abc", spectra)), budget)
    assert sum(ranks.values()) == min(budget, 4 * len(spectra))

    def saved(split: tuple[int, ...]) -> float:
        return sum(sum(spectrum[:rank]) for spectrum, rank in zip(spectra, split))

    splits = (split for split in product(range(1, 5), repeat=len(spectra)) if sum(split) <= budget)
    assert saved(tuple(ranks.values())) == pytest.approx(max(saved(split) for split in splits))


@given(st.lists(falling, min_size=2, max_size=3), st.integers(6, 12))
def test_with_a_step_ranks_are_multiples_within_the_budget(spectra: list[list[float]], budget: int) -> None:
    ranks = ranks_of(dict(zip("abc", spectra)), budget, step=2)
    assert all(rank in (2, 4) for rank in ranks.values())
    assert budget - 2 < sum(ranks.values()) <= budget or set(ranks.values()) == {4}


def test_runs_are_widest_first_and_otherwise_in_order() -> None:
    order, runs = runs_of(torch.tensor([2, 8, 0, 4, 8, 2, 0, 4]))
    assert order.tolist() == [1, 4, 3, 7, 0, 5]
    assert runs == ((8, 2), (4, 2), (2, 2))
    order, runs = runs_of(torch.tensor([3, 3, 3]))
    assert (order.tolist(), runs) == ([0, 1, 2], ((3, 3),))


@given(st.lists(st.sampled_from(CHOICES), min_size=1, max_size=40))
def test_runs_tell_the_width_of_every_kept_channel(widths: list[int]) -> None:
    order, runs = runs_of(torch.tensor(widths))
    assert [widths[i] for i in order] == [bits for bits, channels in runs for _ in range(channels)]
    assert sorted(order.tolist()) == [i for i, bits in enumerate(widths) if bits]
    assert [bits for bits, _ in runs] == sorted({bits for bits in widths if bits}, reverse=True)


def test_errors_by_hand() -> None:
    """0, 1, 2, 6 in 2 bits are read as 0, 0, 2, 6; 8 bits have steps of 6 / 255, rounded up to bfloat16."""
    latents = torch.tensor([0.0, 1, 2, 6])[None, :, None]
    errors = width_errors(latents, (4, 1), (0, 2, 8))
    assert errors[0, :2].tolist() == [(1 + 4 + 36) / 4, 1 / 4]
    assert 0 < errors[0, 2] < (6 / 255 * 1.01 / 2) ** 2


@pytest.mark.parametrize("block", [(32, 1), (32, 4), (1, 8)])
def test_errors_begin_with_the_mean_square_and_fall_with_bits(block: tuple[int, int]) -> None:
    scale = torch.tensor([8.0, 4, 3, 2, 1, 1, 0.5, 0.5])
    latents = scale * torch.randn(2, 640, 8, generator=torch.Generator().manual_seed(0))
    errors = width_errors(latents, block)
    assert errors.shape == (8, len(CHOICES))
    torch.testing.assert_close(errors[:, 0], latents.double().square().mean((0, 1)))
    total = errors.sum(0)
    assert (total.diff() < 0).all()
    for i, bits in enumerate(CHOICES[2:-1], start=2):  # from 3 bits on a bit is worth 6 dB
        ratio = total[i] / total[i + 1]
        assert ratio == pytest.approx(4 ** (CHOICES[i + 1] - bits), rel=0.35)
    if block[1] == 1:
        assert (errors.diff(dim=1) < 0).all()


def test_neighbours_of_one_block_share_its_error() -> None:
    """A quiet channel beside a loud one is read on the loud one's grid."""
    loud_and_quiet = torch.randn(1, 320, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([100.0, 1.0])
    together, alone = (width_errors(loud_and_quiet, block)[1] for block in ((32, 2), (32, 1)))
    assert together[0] == alone[0] == loud_and_quiet[..., 1].double().square().mean()
    assert (together[1:] > 10 * alone[1:]).all()
