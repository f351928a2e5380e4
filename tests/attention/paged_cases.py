"""Cases of latents in pages that the kernels of every kind of device have to agree with the reference on."""

from __future__ import annotations

from dataclasses import replace

import torch

from tests.attention.cases import DEVICE
from tests.attention.problems import PagedProblem

ABSORBED = PagedProblem(device=DEVICE, rotary=None, lengths=(0, 1, 16, 17, 63, 200), block_size=16)
ROTATED = replace(ABSORBED, rotary=16)
KIVI = {"k_grid": (4, (8, 1)), "v_grid": (4, (1, 32))}

CASES = {
    "absorbed": (ABSORBED, {}),
    "rotated": (ROTATED, {}),
    "tiles within pages": (replace(ABSORBED, block_size=32, lengths=(0, 1, 32, 33, 200)), {}),
    "tiles within pages, rotated": (replace(ROTATED, block_size=64, lengths=(0, 64, 65, 200)), {}),
    "pages of no power of two": (replace(ROTATED, block_size=24, lengths=(23, 24, 25, 0, 100)), {}),
    "one page for all": (replace(ABSORBED, block_size=256, lengths=(7, 0, 200)), {}),
    "a bound far above": (replace(ROTATED, above=500, lengths=(33, 0, 500)), {}),
    "one request": (replace(ROTATED, lengths=(500,)), {}),
    "nobody has tokens, for all that is known": (replace(ABSORBED, lengths=(0, 0), above=40), {}),
    "wide names": (replace(ROTATED, names=torch.int64), {}),
    "all exact tokens": (replace(ABSORBED, hides=False, bias=True), {}),
    "several tokens": (replace(ROTATED, new=3, bias=True), {}),
    "several tokens, absorbed": (replace(ABSORBED, new=3, bias=True), {}),
    "normalised, partly rotated": (replace(ROTATED, rotary=8, norm=True, bias=True), {}),
    "groups": (replace(ABSORBED, q_heads=8, kv_heads=4, groups=2, bias=True), {}),
    "groups, rotated, packed": (replace(ROTATED, q_heads=8, kv_heads=4, groups=2, **KIVI), {}),
    "softcap and sinks": (ROTATED, {"softcap": 0.7, "sinks": True}),
    "mask": (ROTATED, {"mask": "bool"}),
    "mask, added": (replace(ABSORBED, new=3, hides=False, **KIVI), {"mask": "additive"}),
    "4 bits": (replace(ABSORBED, **KIVI), {}),
    "4 bits, rotated": (replace(ROTATED, **KIVI), {}),
    "4 bits, tiles within pages": (replace(ROTATED, block_size=64, lengths=(0, 64, 65, 200), **KIVI), {}),
    "8 bits": (replace(ROTATED, k_grid=(8, (16, 1)), v_grid=(8, (16, 1))), {}),
    "3 bits": (replace(ABSORBED, k_grid=(3, (4, 4)), v_grid=(3, (1, 32))), {}),
    "only keys packed": (replace(ROTATED, k_grid=(8, (1, 32))), {}),
    "only values packed": (replace(ABSORBED, v_grid=(4, (1, 4))), {}),
    "wide": (replace(ABSORBED, k_rank=300, v_rank=520, lengths=(40, 0)), {}),
    "wide, rotated": (replace(ROTATED, k_rank=300, v_rank=600, lengths=(40, 0), k_grid=(4, (8, 1))), {}),
}
