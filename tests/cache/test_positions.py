from __future__ import annotations

import torch

from cskv.cache.positions import PositionTable


def test_positions_come_back_as_written_at_four_bytes_each() -> None:
    table = PositionTable()
    table.append((torch.tensor([[0, 1, 2], [0, 0, 1]]),))
    table.append((torch.tensor([[3], [2]]),))
    (positions,) = table.read(0, 4)
    assert positions.dtype == torch.int64
    assert positions.tolist() == [[0, 1, 2, 3], [0, 0, 1, 2]]
    assert table.nbytes() == 2 * (3 + 16) * 4  # three rows and the least slack


def test_cos_and_sin_keep_their_dtype_and_shape() -> None:
    table = PositionTable()
    cos, sin = torch.rand(1, 5, 8, dtype=torch.bfloat16), torch.rand(1, 5, 8, dtype=torch.bfloat16)
    table.append((cos, sin))
    read = table.read(0, 3)
    assert torch.equal(read[0], cos[:, :3])
    assert torch.equal(read[1], sin[:, :3])


def test_rows_shared_by_the_batch_meet_rows_of_their_own() -> None:
    table = PositionTable()
    table.append((torch.tensor([[0, 1]]),))
    table.append((torch.tensor([[2], [5]]),))
    table.append((torch.tensor([[9]]),))
    assert table.read(0, 4)[0].tolist() == [[0, 1, 2, 9], [0, 1, 5, 9]]


def test_shared_rows_are_not_reordered_and_own_rows_are() -> None:
    shared, own = PositionTable(), PositionTable()
    shared.append((torch.tensor([[0, 1]]),))
    own.append((torch.tensor([[0, 1], [5, 6]]),))
    for table in (shared, own):
        table.map_batch(lambda rows: rows.index_select(0, torch.tensor([1, 0, 1])[: 3 if rows.shape[0] > 1 else 1]))
    assert shared.read(0, 2)[0].tolist() == [[0, 1]]
    assert own.read(0, 2)[0].tolist() == [[5, 6], [0, 1], [5, 6]]


def test_crop_forgets_the_end() -> None:
    table = PositionTable()
    table.append((torch.arange(6)[None],))
    table.crop(4)
    table.append((torch.tensor([[40]]),))
    assert table.read(0, table.length)[0].tolist() == [[0, 1, 2, 3, 40]]
