"""Compiles the kernels for an H100, which needs no GPU, and prints the shared memory of each."""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cskv.attention.inputs import AttentionInputs, Logits, RMSNorm, Rotation
from cskv.attention.int8_keys import Int8Keys
from cskv.attention.triton import launch, outputs, partials, scores
from cskv.factorization.factors import Factors, LayerFactors
from cskv.latents.pages import PagedLatents, PageLayout
from cskv.latents.view import Latents, PackedLatents, PlainLatents, View
from cskv.quantization.dispatch import by_kernels
from cskv.quantization.grid import Grid, quantise
from cskv.quantization.triton import kernels as quantization_kernels

TARGET = GPUTarget("cuda", 90, 32)
POINTERS = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.uint8: "*u8",
    torch.int8: "*i8", torch.int16: "*i16",
    torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip


class Compiled:
    """Stands for a kernel, and compiles it for the arguments of a launch."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, _grid: tuple[int, ...]) -> Compiled:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages") if name in kwargs}
        bound = {**dict(zip(self.kernel.arg_names, args)), **kwargs}
        signature, constants, attributes = {}, {}, {}
        for index, parameter in enumerate(self.kernel.params):
            value = bound[parameter.name]
            special = isinstance(value, int) and not parameter.do_not_specialize
            if parameter.is_constexpr or value is None or (special and value == 1):
                signature[parameter.name], constants[parameter.name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[parameter.name], attributes[(index,)] = POINTERS[value.dtype], [["tt.divisibility", 16]]
            else:
                signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
                if special and value % 16 == 0:
                    attributes[(index,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constants, attributes)
        compiled = triton.compile(source, target=TARGET, options=options)
        print(self.kernel.__name__, compiled.metadata.shared)


def step(
    rank: int, packed: bool, rotated: bool, normalised: bool = False, page: int = 0, dtype=torch.bfloat16, bits=(3, 4),
    in_int8: bool = False,
) -> None:  # fmt: skip
    """One step of an 8B model's layer, with latents in pages of so many tokens unless that is 0."""
    values, exact = torch.zeros(1, 4000, rank).to(dtype), torch.zeros(1, 8, 32, 128).to(dtype)
    k: Latents = PlainLatents(values)
    v, grids = k, (Grid.uniform(rank, bits[0], (min(page or 32, 32), 1)), Grid.uniform(rank, bits[1], (1, 32)))
    if page:
        layout = PageLayout(rank, rank, dtype, *grids if packed else ())
        table, lengths = torch.zeros(1, -(-4000 // page), dtype=torch.int32), torch.tensor([4000])
        storage = torch.zeros(1, layout.page_bytes(page), dtype=torch.uint8)
        k, v = (PagedLatents(pages, table, lengths, 4000) for pages in layout.pages(storage, page))
    elif packed:
        k, v = (PackedLatents(*quantise(values, grid), grid, dtype) for grid in grids)
    factors = Factors(torch.zeros(rank, 8).to(dtype), torch.zeros(1024, rank).to(dtype))
    angles = torch.zeros(1, 4000, 128).to(dtype)
    norm = RMSNorm(torch.ones(128).to(dtype), 1e-6) if normalised else None
    rope = Rotation(angles, angles, lambda channels, *_: channels, is_plain=True, norm=norm) if rotated else None
    query = torch.zeros(1, 32, 1, 128).to(dtype)
    layer, logits = LayerFactors(factors, factors), Logits(128**-0.5)
    int8_keys = Int8Keys.of(factors) if in_int8 else None
    launch.attention(query, AttentionInputs(View(exact, exact, k, v), layer, rope, logits, int8_keys=int8_keys))


if __name__ == "__main__":
    scores.scores, partials.partials, outputs.outputs = (
        Compiled(kernel) for kernel in (scores.scores, partials.partials, outputs.outputs)
    )
    quantization_kernels.parameters, quantization_kernels.codes = (
        Compiled(kernel) for kernel in (quantization_kernels.parameters, quantization_kernels.codes)
    )
    launch._multiprocessors = lambda _device: 132
    step(208, packed=False, rotated=False, dtype=torch.float16)
    step(205, packed=True, rotated=False)
    step(205, packed=False, rotated=True)
    step(1024, packed=False, rotated=True)
    step(52, packed=True, rotated=True)
    step(208, packed=False, rotated=True, normalised=True)
    step(205, packed=False, rotated=True, dtype=torch.float32)
    step(205, packed=True, rotated=True, bits=(4, 4), in_int8=True)
    step(24, packed=True, rotated=True, bits=(4, 4), in_int8=True)  # planes shorter than an 8-bit product
    step(24, packed=False, rotated=True, in_int8=True)
    step(208, packed=False, rotated=True, page=16)  # tiles cross pages
    step(205, packed=True, rotated=False, page=16)
    step(208, packed=False, rotated=False, page=64)  # and do not
    step(205, packed=True, rotated=True, page=64)
    by_kernels(torch.zeros(1, 32, 205).bfloat16(), Grid.uniform(205, 4, (32, 1)))
