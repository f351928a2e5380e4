"""Masks of every kind say the same, once written out."""

from __future__ import annotations

import pytest
import torch
from transformers import AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask, sdpa_mask

from cskv.errors import CacheError
from cskv.models.masks import MaskKind, mask_kind, of_pairs

PADDED = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 0, 0, 1, 1]])


@pytest.mark.parametrize("dtype", [torch.bool, torch.long])
def test_padding_is_hidden_and_so_is_what_comes_later(dtype: torch.dtype) -> None:
    found = of_pairs(PADDED.to(dtype), MaskKind.PADDING, 2, 5)
    assert found is not None
    assert found.tolist() == [
        [[[True, True, True, True, False], [True, True, True, True, True]]],
        [[[False, False, True, True, False], [False, False, True, True, True]]],
        [[[True, False, False, True, False], [True, False, False, True, True]]],
    ]
    assert of_pairs(None, MaskKind.PADDING, 2, 5) is None


def test_a_window_counts_tokens_but_not_the_padding_between_them() -> None:
    """FlashAttention takes padding out first: the third row's last token reads the first one too, three tokens back."""
    found = of_pairs(PADDED, MaskKind.PADDING, 1, 5, window=3)
    assert found is not None
    assert found[:, 0, 0].int().tolist() == [[0, 0, 1, 1, 1], [0, 0, 1, 1, 1], [1, 0, 0, 1, 1]]
    alone = of_pairs(None, MaskKind.PADDING, 2, 5, window=3)
    assert alone is not None
    assert alone[0, 0].int().tolist() == [[0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]
    assert of_pairs(None, MaskKind.PADDING, 2, 5, window=5) is None


def test_blocks_are_read_for_every_head() -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    def reads(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (key <= query + 2) & (key > head) & PADDED[batch, key].bool()

    mask = create_block_mask(reads, 3, 2, 3, 5, device="cpu", _compile=False)
    found = of_pairs(mask, MaskKind.BLOCKS, 3, 5)
    assert found is not None
    assert found.shape == (3, 2, 3, 5)
    assert found[0].int().tolist() == [
        [[0, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 1, 1, 1, 1]],
        [[0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1]],
    ]
    assert found[1:, 0, 2].int().tolist() == [[0, 0, 1, 1, 1], [0, 0, 0, 1, 1]]


def test_masks_of_pairs_stay_as_they_are() -> None:
    mask = torch.zeros(1, 1, 2, 5)
    for kind in (MaskKind.PAIRS, MaskKind.BLOCKS):  # flex attention adds such a one to its scores
        assert of_pairs(mask, kind, 2, 5) is mask
    assert of_pairs(None, MaskKind.PAIRS, 2, 5) is None


@pytest.mark.parametrize(
    ("mask", "kind", "message"),
    [
        (torch.ones(2, 1, 1, 5), MaskKind.PADDING, r"a Tensor of shape \(2, 1, 1, 5\) for 1 new of 5 .* \(batch, 5\)"),
        (torch.ones(2, 4), MaskKind.PADDING, r"a Tensor of shape \(2, 4\) for 1 new of 5 tokens; expected none"),
        (None, MaskKind.BLOCKS, "flex attention got no mask for 1 new of 5 tokens; expected a BlockMask"),
    ],
)
def test_other_masks_are_refused(mask: object, kind: MaskKind, message: str) -> None:
    with pytest.raises(CacheError, match=message) as caught:
        of_pairs(mask, kind, 1, 5)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "made_by", "kind"),
    [
        ("sdpa", None, MaskKind.PAIRS),
        ("eager", None, MaskKind.PAIRS),
        ("flash_attention_2", None, MaskKind.PADDING),
        ("flash_attention_3", None, MaskKind.PADDING),
        ("flex_attention", None, MaskKind.BLOCKS),
        ("kernels-community/flash-attn2", flash_attention_mask, MaskKind.PADDING),
        ("someone/my-flash-attn@main", flash_attention_mask, MaskKind.PADDING),
        ("kernels-community/flash-sparse", sdpa_mask, None),  # it has a function of its own
        ("someone/flash-attn:their_function", flash_attention_mask, None),
        ("someones_own", flash_attention_mask, None),
        ("paged|eager", None, None),
        ("nobodys", None, None),
    ],
)
def test_the_kind_follows_from_the_implementation(
    name: str, made_by: object, kind: MaskKind | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if made_by is not None:
        monkeypatch.setitem(AttentionMaskInterface._global_mapping, name, made_by)
    assert mask_kind(name) == kind
