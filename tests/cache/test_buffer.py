from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from cskv.cache.buffer import TokenBuffer


def rows(start: int, count: int, batch: int = 2, channels: int = 3) -> torch.Tensor:
    """Rows whose entries tell which token they are."""
    return (torch.arange(start, start + count).float()[None, :, None] + torch.zeros(batch, 1, channels)).contiguous()


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12))
def test_appends_of_any_sizes_hold_all_rows_in_order(sizes: list[int]) -> None:
    buffer = TokenBuffer()
    total = 0
    for size in sizes:
        buffer.append(rows(total, size))
        total += size
    assert buffer.length == total
    assert torch.equal(buffer.tokens, rows(0, total))


def test_slack_stays_under_a_tenth_at_16k_tokens() -> None:
    buffer = TokenBuffer()
    buffer.append(torch.zeros(1, 8000, 4))
    worst = 0.0
    for _ in range(8400):
        buffer.append(torch.zeros(1, 1, 4))
        if buffer.length >= 8192:
            worst = max(worst, buffer.slack_nbytes() / (buffer.nbytes() - buffer.slack_nbytes()))
    assert worst < 0.10
    assert buffer.nbytes() == buffer._storage.untyped_storage().nbytes()


def test_single_appends_rarely_move_the_storage() -> None:
    buffer = TokenBuffer()
    buffer.append(rows(0, 1000))
    moves, address = 0, buffer.tokens.data_ptr()
    for token in range(1000, 2000):
        buffer.append(rows(token, 1))
        moves += buffer.tokens.data_ptr() != address
        address = buffer.tokens.data_ptr()
    assert moves <= 13  # 1000 * (17/16)^12 > 2000


def test_guesses_that_are_cropped_again_do_not_reallocate() -> None:
    buffer = TokenBuffer()
    buffer.append(rows(0, 500))
    buffer.append(rows(500, 60))
    buffer.crop(500)
    moves, address = 0, buffer.tokens.data_ptr()
    for _ in range(20):
        buffer.append(rows(500, 10))
        buffer.crop(500)
        moves += buffer.tokens.data_ptr() != address
        address = buffer.tokens.data_ptr()
    assert moves <= 1
    assert torch.equal(buffer.tokens, rows(0, 500))


def test_a_large_crop_gives_memory_back() -> None:
    buffer = TokenBuffer()
    buffer.append(rows(0, 4000))
    before = buffer.nbytes()
    buffer.crop(100)
    assert buffer.nbytes() < before / 10
    assert torch.equal(buffer.tokens, rows(0, 100))


def test_crop_beyond_the_end_changes_nothing() -> None:
    buffer = TokenBuffer()
    buffer.append(rows(0, 5))
    buffer.crop(9)
    assert torch.equal(buffer.tokens, rows(0, 5))


def test_batch_changes_reach_old_and_new_rows() -> None:
    buffer = TokenBuffer()
    first = torch.arange(12.0).reshape(2, 2, 3)
    buffer.append(first)
    buffer.map_batch(lambda storage: storage.index_select(0, torch.tensor([1, 1, 0])))
    buffer.append(torch.zeros(3, 1, 3))
    assert torch.equal(buffer.tokens[:, :2], first[[1, 1, 0]])
    assert torch.equal(buffer.tokens[:, 2], torch.zeros(3, 3))


def test_a_buffer_with_capacity_moves_only_beyond_it() -> None:
    buffer = TokenBuffer(capacity=100)
    buffer.append(rows(0, 30))
    address = buffer.tokens.data_ptr()
    assert buffer.nbytes() == 2 * 100 * 3 * 4
    buffer.append(rows(30, 70))
    buffer.crop(10)
    buffer.append(rows(10, 90))
    assert buffer.tokens.data_ptr() == address
    assert torch.equal(buffer.tokens, rows(0, 100))
    buffer.append(rows(100, 1))
    assert torch.equal(buffer.tokens, rows(0, 101))


def test_rows_of_a_gpu_start_at_multiples_of_the_bytes_asked_for(monkeypatch) -> None:
    """5 channels of 4 bytes become 8; what is held and what is told stay as they were."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    buffer = TokenBuffer(gpu_row_bytes=32)
    for start, count in ((0, 7), (7, 30)):
        buffer.append(rows(start, count, channels=5))
    assert torch.equal(buffer.tokens, rows(0, 37, channels=5))
    assert buffer.tokens.stride() == (buffer._storage.shape[1] * 8, 8, 1)
    assert buffer.nbytes() - buffer.slack_nbytes() == 2 * 37 * 5 * 4
    buffer.crop(3)
    assert torch.equal(buffer.tokens, rows(0, 3, channels=5))
