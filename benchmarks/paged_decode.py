"""One layer's decode attention on latents in pages, against an uncompressed cache, contiguous and in pages.

    python benchmarks/paged_decode.py OUT.json      # needs a CUDA device; measures what OUT.json lacks

Requests of a batch are all as long as the context, or between an eighth of it and all of it ("mixed"). Every method is
captured in a CUDA graph, as a server does; without one it is timed as well. Before a method is timed its output is
compared with the reference in fp32; if one is wrong nothing is reported of its row, and the script ends with an error.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import Row, Wrong, run
from decode import TOLERANCE, too_large
from decode_problem import WINDOW, Problem, Shape
from decode_timing import Stopwatch, summary, take_turns
from gpu import captured
from pages import Table
from torch import Tensor

from cskv.attention import reference
from cskv.attention.inputs import AttentionInputs
from cskv.attention.triton import launch
from cskv.evaluation.environment import package_version
from cskv.latents.pages import PagedLatents, PageLayout, Pages
from cskv.latents.view import PackedLatents, PlainLatents, View
from cskv.quantization.grid import Grid, quantise

BATCHES, CONTEXTS = (1, 8, 32), (2048, 8192, 32_768)
SDPA, FLASH = "sdpa", "vllm flash, paged"
OURS: Mapping[str, int | None] = {"20 %": None, "20 % x int8": 8, "20 % x int4": 4}
SHAPE = Shape(density=208 / 1024)  # a multiple of 8 latents, as kernels load 16 bytes at a time
GROUP = 32  # tokens of a key group


@dataclass(frozen=True)
class Method:
    """One way to attend, to be timed."""

    step: Callable[[], Tensor]  # one attention, (batch, q_heads, 1, head_dim)
    nbytes: int  # of the cache that it reads
    latents: Sequence[Tensor]  # of keys and of values, (batch, tokens, rank), that it means


class Requests:
    """A problem's batch as requests of lengths of their own, their exact tokens behind the sealed ones."""

    def __init__(self, problem: Problem, lengths: Sequence[int], block_size: int) -> None:
        self.problem, self.lengths, self.block_size = problem, list(lengths), block_size
        self.device, self.most = problem.device, max(lengths)
        self.sealed = torch.tensor(self.lengths, dtype=torch.int32, device=self.device)
        self.total = self.sealed + WINDOW
        self.rope = problem.positions.rope(self.most)
        self.exact = [
            torch.stack([part[row, :, length : length + WINDOW] for row, length in enumerate(self.lengths)])
            for part in (problem.keys, problem.values)
        ]

    def table(self, tokens: int) -> Tensor:
        """Choose pages for so many tokens of every request, in no order."""
        columns = -(-tokens // self.block_size)
        order = torch.randperm(len(self.lengths) * columns, generator=torch.Generator().manual_seed(0))
        return order.to(self.device, torch.int32).view(len(self.lengths), columns)

    def blocks(self, part: Tensor, tokens: int) -> Tensor:
        """Cut (batch, tokens, ...) into (batch * pages, block_size, ...), the last page filled up with zeros."""
        size = -(-tokens // self.block_size) * self.block_size
        padded = part.new_zeros(part.shape[0], size, *part.shape[2:])
        padded[:, :tokens] = part[:, :tokens]
        return padded.view(-1, self.block_size, *part.shape[2:])

    def truth(self, row: int, latents: Sequence[Tensor]) -> Tensor:
        """Return the reference's output of one request on latents of all, in fp32: (q_heads, head_dim)."""
        sealed = (PlainLatents(part[row : row + 1, : self.lengths[row]]) for part in latents)
        view = View(*(part[row : row + 1] for part in self.exact), *sealed)
        query, factors = self.problem.token.query[row : row + 1].float(), self.problem.factors.to(dtype=torch.float32)
        return reference.attention(query, AttentionInputs(view, factors, self.rope, self.problem.logits))[0, :, 0]

    def uncompressed(self, step: Callable[[], Tensor]) -> Method:
        """Make a method that reads keys and values."""
        kept = sum(self.lengths) + len(self.lengths) * WINDOW
        nbytes = 2 * self.problem.shape.kv_dim * self.problem.dtype.itemsize * kept
        return Method(step, nbytes, (self.problem.k_latents, self.problem.v_latents))


def ours(requests: Requests, bits: int | None) -> Method:
    """Attend to latents in pages by the Triton kernels."""
    problem, size, most = requests.problem, requests.block_size, requests.most
    grids: list[Grid | None] = [None, None]
    if bits is not None:
        ranks = problem.factors.k.rank, problem.factors.v.rank
        grids = [Grid.uniform(rank, bits, block) for rank, block in zip(ranks, ((GROUP, 1), (1, 32)))]
    layout = PageLayout(problem.factors.k.rank, problem.factors.v.rank, problem.dtype, *grids)
    table = requests.table(most)
    shape = (table.numel(), layout.page_bytes(size))
    pages = layout.pages(torch.zeros(shape, dtype=torch.uint8, device=requests.device), size)
    meant = [
        fill(part, requests.blocks(own, most), table)
        for part, own in zip(pages, (problem.k_latents, problem.v_latents))
    ]
    k, v = (PagedLatents(part, table, requests.sealed, most) for part in pages)
    query = problem.token.query
    inputs = AttentionInputs(View(*requests.exact, k, v), problem.factors, requests.rope, problem.logits)
    if (refused := launch.refusal(query, inputs)) is not None:
        raise RuntimeError(refused)
    read = sum(-(-length // size) for length in requests.lengths) * shape[1]
    return Method(partial(launch.attention, query, inputs), read + sum(part.nbytes for part in requests.exact), meant)


def fill(pages: Pages, blocks: Tensor, table: Tensor) -> Tensor:
    """Write blocks of latents into the pages that a table names; return what these mean, (batch, tokens, rank)."""
    names = table.flatten().long()
    if pages.grid is None:
        pages.data[names] = blocks
    else:
        packed = quantise(blocks, pages.grid)
        for part, own in zip((pages.data, pages.scales, pages.minima), packed):
            part[names] = own
        blocks = PackedLatents(*packed, pages.grid, pages.dtype).read()
    return blocks.reshape(len(table), -1, pages.rank)


def sdpa(requests: Requests) -> Method:
    """Attend to a contiguous cache. Query heads of a kv head are rows of one product, so that nothing is repeated."""
    problem, shape = requests.problem, requests.problem.shape
    tokens = requests.most + WINDOW
    keys, values = (part[:, :, :tokens].contiguous() for part in (problem.keys, problem.values))
    query = problem.token.query.view(len(requests.lengths), shape.kv_heads, -1, shape.head_dim)
    mask = None
    if min(requests.lengths) < requests.most:
        mask = (torch.arange(tokens, device=requests.device) < requests.total[:, None])[:, None, None]

    def step() -> Tensor:
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(query, keys, values, attn_mask=mask, scale=problem.logits.scaling).flatten(1, 2)[:, :, None]

    return requests.uncompressed(step)


def flash(requests: Requests) -> Method:
    """Attend by vLLM, which may not be there to be imported, to a cache in pages."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func
    from vllm.vllm_flash_attn.flash_attn_interface import is_fa_version_supported

    problem, tokens = requests.problem, requests.most + WINDOW
    table, batch = requests.table(tokens), len(requests.lengths)
    pages = []
    for part in (problem.keys, problem.values):
        blocks = requests.blocks(part.transpose(1, 2), tokens)
        pages.append(torch.empty_like(blocks).index_copy_(0, table.flatten().long(), blocks))
    query, starts = problem.token.query[:, :, 0].contiguous(), torch.arange(batch + 1, device=requests.device)

    step = partial(
        flash_attn_varlen_func,
        query,
        *pages,
        max_seqlen_q=1,
        cu_seqlens_q=starts.int(),
        max_seqlen_k=tokens,
        seqused_k=requests.total,
        softmax_scale=problem.logits.scaling,
        causal=True,
        block_table=table,
        fa_version=3 if is_fa_version_supported(3) else 2,
    )
    return requests.uncompressed(lambda: step()[:, :, None])


def methods(requests: Requests) -> dict[str, Method | str]:
    """Return methods by name; the reason, where one is left out."""
    found: dict[str, Method | str] = {SDPA: sdpa(requests)}
    try:
        found[FLASH] = flash(requests)
    except ImportError as error:
        found[FLASH] = f"vLLM's flash attention cannot be imported: {error}"
    return found | {name: ours(requests, bits) for name, bits in OURS.items()}


def check(name: str, method: Method, requests: Requests) -> float:
    """Return the largest error of the shortest and the longest request, as a share of the output.

    It raises `Wrong` if rounding does not explain that.
    """
    output, lengths = method.step(), requests.lengths
    errors = []
    for row in {lengths.index(min(lengths)), lengths.index(max(lengths))}:
        truth = requests.truth(row, method.latents)
        errors.append(float((output[row, :, 0].float() - truth).norm() / truth.norm()))
    if not max(errors) <= TOLERANCE[requests.problem.dtype]:
        raise Wrong(f"{name}, batch {len(lengths)}, up to {max(lengths)} tokens: error {max(errors):.3g}")
    return max(errors)


def measure(batch: int, context: int, mixed: bool, block_size: int, device: torch.device, shape: Shape = SHAPE) -> Row:
    """Measure a row: all methods on one batch; raise `Wrong` if a method's output is."""
    least = context // 8 if mixed and batch > 1 else context
    lengths = [context - (context - least) * row // max(1, batch - 1) for row in range(batch)]
    row: Row = {"batch": batch, "context": context, "mixed": mixed, "rank": shape.rank("joint"), "methods": {}}
    if reason := too_large(context * batch, shape, torch.bfloat16, device):
        return row | {"skipped": reason}
    with torch.inference_mode():
        problem = Problem("joint", shape, context + WINDOW, batch, torch.bfloat16, device)
        found = methods(requests := Requests(problem, lengths, block_size))
        ready = {name: method for name, method in found.items() if isinstance(method, Method)}
        row["methods"] = {name: {"skipped": reason} for name, reason in found.items() if isinstance(reason, str)}
        for name, method in ready.items():
            row["methods"][name] = {"error": check(name, method, requests), "nbytes": method.nbytes}
        calls = {(name, "eager"): method.step for name, method in ready.items()}
        if device.type == "cuda":
            calls |= {(name, "graph"): captured(method.step) for name, method in ready.items()}
        for (name, how), seconds in take_turns(calls, Stopwatch(device), budget=0.2, least=5, most=50).items():
            row["methods"][name][how] = summary(seconds)
    return row | {"ratios": ratios(row["methods"])}


def ratios(measured: Mapping[str, Row]) -> dict[str, float]:
    """Return how many times as fast ours are, by "ours / baseline"; by graphs, where there are any."""
    medians = {name: own.get("graph", own["eager"])["median"] for name, own in measured.items() if "skipped" not in own}
    return {
        f"{name} / {baseline}": medians[baseline] / medians[name]
        for baseline in (SDPA, FLASH)
        for name in OURS
        if baseline in medians and name in medians
    }


def table_of(results: Mapping[str, Any]) -> Table:
    """Show microseconds and ratios of every row."""
    names = (SDPA, FLASH, *OURS)
    rows = []
    for name, row in results["rows"].items():
        own = (row["methods"].get(method, {}) for method in names)
        times = (part.get("graph", part.get("eager")) for part in own)
        cells = ("-" if part is None else f"{1e6 * part['median']:.0f}" for part in times)
        rows.append((name, *cells, "  ".join(f"{ratio:.2f}" for ratio in row.get("ratios", {}).values())))
    return Table("Decode attention of one layer, microseconds", ("row", *names, "ratios, by baseline"), tuple(rows))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is missing and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the results file")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS)
    parser.add_argument("--block-size", type=int, default=64, help=f"tokens of a page, a multiple of {GROUP}")
    asked = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no CUDA device: decode attention on pages is measured on a GPU alone", file=sys.stderr)
        return 2
    size, gpu = asked.block_size, torch.device("cuda")
    settings = {"block_size": size, "vllm": package_version("vllm"), "device": torch.cuda.get_device_name(0)}
    jobs = {
        f"{batch} x {context}{', mixed' if mixed else ''}": partial(measure, batch, context, mixed, size, gpu)
        for mixed in (False, True)
        for context in asked.contexts
        for batch in asked.batches
        if batch > 1 or not mixed
    }
    return run(asked.out, settings, jobs, lambda results: [table_of(results)])


if __name__ == "__main__":
    sys.exit(main())
