from __future__ import annotations

import torch

from cskv.fingerprint import fingerprint
from tests.evaluation.support import tiny_llama


def of(model) -> str:
    return fingerprint(model.named_parameters())


def test_weights_dtypes_and_names_are_told_apart():
    model = tiny_llama()
    before = of(model)
    assert before == of(tiny_llama())
    assert before != of(tiny_llama().to(torch.bfloat16))
    assert before != fingerprint((f"other.{name}", tensor) for name, tensor in model.named_parameters())
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] += 1e-3
    assert before != of(model)


def test_the_number_of_threads_and_the_order_do_not_matter():
    tensors = [("a", torch.randn(999, 999, generator=torch.Generator().manual_seed(0))), ("b", torch.ones(3))]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = fingerprint(tensors)
        torch.set_num_threads(2)
        assert fingerprint(reversed(tensors)) == alone
    finally:
        torch.set_num_threads(threads)
