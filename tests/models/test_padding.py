"""Padding is read off the masks that transformers makes for each kind of attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cskv.errors import UnsupportedModelError
from cskv.models.padding import leading_padding
from tests.models.families import tiny_model

TOKENS = torch.arange(5, 17).repeat(3, 1)
PADDING = (0, 5, 11)


def masks_of(implementation: str, family: str = "gemma3") -> list[Any]:
    """The masks that the layers of a model get for a batch with padding."""
    model = tiny_model(family, attn_implementation=implementation)
    mask, found = torch.ones_like(TOKENS), []
    for row, padding in zip(mask, PADDING):
        row[:padding] = 0

    def note(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        found.append(kwargs["attention_mask"])

    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        model(TOKENS, attention_mask=mask)
    return found


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_of_whole_and_sliding_layers(implementation: str) -> None:
    found = masks_of(implementation)  # most of its layers read the last 12 tokens only
    assert len(found) == 6
    assert all(mask.ndim == 4 for mask in found)
    assert [leading_padding(mask, 0, 12) for mask in found] == [PADDING] * 6


def test_of_flex_attention() -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    def causal_and_real(batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= torch.tensor(PADDING)[batch])

    mask = create_block_mask(causal_and_real, 3, None, 12, 12, device="cpu")
    assert leading_padding(mask, 0, 12) == PADDING


@pytest.mark.parametrize(
    ("mask", "seen", "new", "expected"),
    [
        (torch.tensor([[0, 0, 1, 1], [1, 1, 0, 1]]), 0, 4, (2, 0)),  # in the middle it is none
        (torch.tensor([[0, 0, 0, 1, 1]]), 2, 3, (1,)),
        (torch.tensor([[0, 0, 0, 0]]), 2, 2, (2,)),
        (torch.tensor([False, True]).expand(1, 1, 1, 2), 0, 2, (1,)),
        (torch.tensor([-torch.inf, 0.5]).expand(2, 4, 1, 2), 0, 2, (1, 1)),
        (torch.full((1, 1, 2, 2), torch.finfo(torch.bfloat16).min, dtype=torch.bfloat16), 0, 2, (2,)),
    ],
)
def test_by_hand(mask: Tensor, seen: int, new: int, expected: tuple[int, ...]) -> None:
    assert leading_padding(mask, seen, new) == expected


@pytest.mark.parametrize("mask", [torch.ones(1, 3), torch.ones(1, 4, 4), torch.ones(1, 1, 3, 4), "a mask"])
def test_what_says_nothing_of_padding_is_refused(mask: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="attention got a"):
        leading_padding(mask, 0, 4)
