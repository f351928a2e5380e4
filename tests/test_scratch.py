"""Scratch tensors are made once."""

from __future__ import annotations

import threading

import torch

from cskv.scratch import Scratch

CPU = torch.device("cpu")


def test_a_name_keeps_its_memory() -> None:
    scratch = Scratch()
    first = scratch.take("keys", (4, 8), torch.float32, CPU)
    second = scratch.take("keys", (2, 3), torch.float32, CPU)
    assert second.data_ptr() == first.data_ptr()
    assert second.shape == (2, 3)
    assert second.is_contiguous()
    assert scratch.nbytes() == 4 * 8 * 4


def test_names_and_dtypes_do_not_share() -> None:
    scratch = Scratch()
    tensors = [
        scratch.take(n, (8,), d, CPU) for n, d in (("a", torch.float32), ("b", torch.float32), ("a", torch.int32))
    ]
    assert len({tensor.data_ptr() for tensor in tensors}) == 3


def test_it_grows_and_gives_back() -> None:
    scratch = Scratch()
    scratch.take("keys", (8,), torch.bfloat16, CPU)
    assert scratch.take("keys", (100,), torch.bfloat16, CPU).shape == (100,)
    assert scratch.nbytes() == 200
    scratch.clear()
    assert scratch.nbytes() == 0


def test_threads_share_no_memory() -> None:
    scratch, taken = Scratch(), list[torch.Tensor]()
    taken.append(scratch.take("keys", (8,), torch.float32, CPU).fill_(1))
    other = threading.Thread(target=lambda: taken.append(scratch.take("keys", (8,), torch.float32, CPU).fill_(2)))
    other.start()
    other.join()
    assert [tensor.unique().tolist() for tensor in taken] == [[1], [2]]
    assert scratch.take("keys", (8,), torch.float32, CPU).data_ptr() == taken[0].data_ptr()
