"""Parts of a softmax join to the whole, however it is cut."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from cskv.attention.partial import Partial


def part(logits: list[float], values: list[float]) -> Partial:
    x, v = torch.tensor(logits)[None, None, None], torch.tensor(values)
    most = x.amax(-1, keepdim=True)
    weights = (x - most).exp()
    return Partial(most, weights.sum(-1, keepdim=True), (weights * v).sum(-1, keepdim=True))


numbers = st.lists(st.tuples(st.floats(-80, 80, width=32), st.floats(-4, 4, width=32)), min_size=2, max_size=9)


@given(numbers, st.data())
def test_joined_parts_are_the_whole(pairs: list[tuple[float, float]], data: st.DataObject) -> None:
    cut = data.draw(st.integers(1, len(pairs) - 1))
    logits, values = [p[0] for p in pairs], [p[1] for p in pairs]
    left, right = part(logits[:cut], values[:cut]), part(logits[cut:], values[cut:])
    expected = float(torch.softmax(torch.tensor(logits, dtype=torch.float64), 0) @ torch.tensor(values).double())
    assert abs(left.joined(right).result().item() - expected) < 1e-4
    assert abs(right.joined(left).result().item() - expected) < 1e-4


def test_sinks_take_weight_and_give_nothing() -> None:
    joined = part([0.0], [6.0]).joined(part([0.0], [3.0]))
    assert joined.result(torch.tensor([0.0])).item() == 3.0  # a third each
    assert joined.result(torch.tensor([1000.0])).item() == 0.0
    assert joined.result(torch.tensor([-1000.0])).item() == 4.5
