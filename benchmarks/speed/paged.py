"""One layer's decode attention on latents in pages, against an uncompressed cache, contiguous and in pages.

Requests of a batch are all as long as the context, or between an eighth of it and all of it ("mixed"). Every method is
captured in a CUDA graph, as a server does; without one it is timed as well. Before a method is timed its output is
compared with the reference in fp32; if one is wrong nothing is reported of its row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import Jobs, Row, Wrong
from benchmarks.pages import Table
from benchmarks.speed.decode import TOLERANCE, relative_error, too_large
from benchmarks.speed.problem import GROUP, WINDOW, Problem, Shape
from benchmarks.speed.registry import Benchmark, Unavailable
from benchmarks.speed.tables import median, speedup
from benchmarks.speed.timing import Stopwatch, Turns, time_calls
from cskv.attention import reference
from cskv.attention.inputs import AttentionInputs
from cskv.attention.triton import launch
from cskv.evaluation.environment import package_version
from cskv.latents.pages import PagedLatents, PageLayout
from cskv.latents.view import PackedLatents, PlainLatents, View
from cskv.quantization.grid import quantise

SDPA, FLASH = "sdpa", "vllm flash, paged"
BITS = {"20 %": 16, "20 % x int8": 8, "20 % x int4": 4}
# Multiples of 8 latents, as kernels load 16 bytes at a time.
SHAPE, TINY = Shape(density=208 / 1024), Shape(8, 4, 32, density=32 / 128)


@dataclass(frozen=True)
class Method:
    """One way to attend: `step` gives (batch, q_heads, 1, head_dim), and `latents` are those that are meant."""

    step: Callable[[], Tensor]
    nbytes: int  # of the cache that it reads
    latents: Sequence[Tensor]  # of keys and of values, (batch, tokens, rank)


class Requests:
    """A problem's batch as requests of lengths of their own, their exact tokens behind the sealed ones."""

    def __init__(self, problem: Problem, lengths: Sequence[int], block_size: int) -> None:
        self.problem, self.lengths, self.block_size = problem, list(lengths), block_size
        self.device, self.most = problem.device, max(lengths)
        self.sealed = torch.tensor(self.lengths, dtype=torch.int32, device=self.device)
        self.total = self.sealed + WINDOW
        self.rope = problem.rotation(self.most)
        self.exact = [
            torch.stack([part[row, :, length : length + WINDOW] for row, length in enumerate(self.lengths)])
            for part in problem.cached[2:]
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
        query, factors = self.problem.query[row : row + 1].float(), self.problem.factors.to(dtype=torch.float32)
        return reference.attention(query, AttentionInputs(view, factors, self.rope, self.problem.logits))[0, :, 0]

    def uncompressed(self, step: Callable[[], Tensor]) -> Method:
        """Make a method that reads keys and values."""
        kept = sum(self.lengths) + len(self.lengths) * WINDOW
        nbytes = 2 * self.problem.shape.kv_dim * self.problem.dtype.itemsize * kept
        return Method(step, nbytes, self.problem.cached[:2])


def ours(requests: Requests, bits: int) -> Method:
    """Attend to latents in pages by the Triton kernels."""
    problem, size, most = requests.problem, requests.block_size, requests.most
    layout = PageLayout(problem.factors.k.rank, problem.factors.v.rank, problem.dtype, *problem.grids(bits))
    table = requests.table(most)
    shape = (table.numel(), layout.page_bytes(size))
    pages = layout.pages(torch.zeros(shape, dtype=torch.uint8, device=requests.device), size)
    meant = []
    for part, latents in zip(pages, problem.cached[:2]):
        blocks = requests.blocks(latents, most)
        packed = (blocks,) if part.grid is None else quantise(blocks, part.grid)
        for held, own in zip((part.data, part.scales, part.minima), packed):
            held[table.flatten().long()] = own
        means = blocks if part.grid is None else PackedLatents(*packed, part.grid, part.dtype).read()
        meant.append(means.reshape(len(table), -1, part.rank))
    k, v = (PagedLatents(part, table, requests.sealed, most) for part in pages)
    inputs = AttentionInputs(View(*requests.exact, k, v), problem.factors, requests.rope, problem.logits)
    if (refused := launch.refusal(problem.query, inputs)) is not None:
        raise Unavailable(refused)
    read = sum(-(-length // size) for length in requests.lengths) * shape[1]
    return Method(
        partial(launch.attention, problem.query, inputs), read + sum(part.nbytes for part in requests.exact), meant
    )


def sdpa(requests: Requests) -> Method:
    """Attend to a contiguous cache. Query heads of a kv head are rows of one product, so that nothing is repeated."""
    problem, shape = requests.problem, requests.problem.shape
    tokens = requests.most + WINDOW
    keys, values = (part[:, :, :tokens].contiguous() for part in problem.cached[2:])
    query = problem.query.view(len(requests.lengths), shape.kv_heads, -1, shape.head_dim)
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
    for part in problem.cached[2:]:
        blocks = requests.blocks(part.transpose(1, 2), tokens)
        pages.append(torch.empty_like(blocks).index_copy_(0, table.flatten().long(), blocks))
    query, starts = problem.query[:, :, 0].contiguous(), torch.arange(batch + 1, device=requests.device)

    version = 3 if is_fa_version_supported(3) else 2
    lengths = {"max_seqlen_q": 1, "cu_seqlens_q": starts.int(), "max_seqlen_k": tokens, "seqused_k": requests.total}
    how = {"softmax_scale": problem.logits.scaling, "causal": True, "block_table": table, "fa_version": version}
    return requests.uncompressed(lambda: flash_attn_varlen_func(query, *pages, **lengths, **how)[:, :, None])


METHODS: dict[str, Callable[[Requests], Method]] = {SDPA: sdpa, FLASH: flash}
METHODS |= {name: partial(ours, bits=bits) for name, bits in BITS.items()}


def check(name: str, method: Method, requests: Requests) -> float:
    """Return the largest error of the shortest and the longest request, as a share of the output.

    It raises `Wrong` if rounding does not explain that.
    """
    output, lengths = method.step(), requests.lengths
    ends = {lengths.index(min(lengths)), lengths.index(max(lengths))}
    errors = [relative_error(output[row, :, 0], requests.truth(row, method.latents)) for row in ends]
    if not max(errors) <= TOLERANCE[requests.problem.dtype]:
        raise Wrong(f"{name}, batch {len(lengths)}, up to {max(lengths)} tokens: error {max(errors):.3g}")
    return max(errors)


def measure(batch: int, context: int, mixed: bool, asked: Any) -> Row:
    """Measure a row: all methods on one batch; raise `Wrong` if a method's output is."""
    least = context // 8 if mixed else context
    lengths = [context - (context - least) * row // max(1, batch - 1) for row in range(batch)]
    shape, device = TINY if asked.quick else SHAPE, torch.device(asked.device)
    row: Row = {"batch": batch, "context": context, "mixed": mixed}
    if reason := too_large(context * batch, shape, torch.bfloat16, device):
        return row | {"skipped": reason}
    with torch.inference_mode():
        problem = Problem("joint", shape, context + WINDOW, batch, torch.bfloat16, device)
        requests, calls, row["methods"] = Requests(problem, lengths, asked.block_size), {}, {}
        for name in asked.methods:
            try:
                method = METHODS[name](requests)
            except ImportError as error:
                row["methods"][name] = {"skipped": f"it cannot be imported: {error}"}
                continue
            calls[name] = method.step
            row["methods"][name] = {"error": check(name, method, requests), "nbytes": method.nbytes}
        turns = Turns(0.02, least=1, most=2) if asked.quick else Turns(0.2, least=5, most=50)
        for name, found in time_calls(calls, Stopwatch(device), turns).items():
            row["methods"][name] |= found
    return row


def tables(results: dict[str, Any]) -> list[Table]:
    """Show microseconds, and how many times as fast as the baselines ours are; by graphs, where there are any."""

    def show(values: Iterable[float | None], form: str) -> list[str]:
        return ["-" if value is None else format(value, form) for value in values]

    headings, lines = ["row", *METHODS, *(f"times as fast as {name}" for name in (SDPA, FLASH))], []
    for cell, row in results["rows"].items():
        if "skipped" in row:
            lines.append((cell, row["skipped"], *[""] * (len(headings) - 2)))
            continue
        seconds = (median(row, name, "graph") for name in METHODS)
        times = show((None if value is None else 1e6 * value for value in seconds), ".0f")
        ratios = (show((speedup(row, name, to, "graph") for name in BITS), ".2f") for to in (SDPA, FLASH))
        lines.append((cell, *times, *("  ".join(of_one) for of_one in ratios)))
    return [Table("Decode attention of one layer, microseconds", headings, lines)]


def plan(asked: Any) -> tuple[Row, Jobs]:
    """Return the settings, and a job per batch of requests of mixed lengths, first, and as long as each other."""
    shape, size = TINY if asked.quick else SHAPE, asked.block_size
    settings = {"shape": asdict(shape), "block_size": size, "vllm": package_version("vllm"), "device": asked.device}
    jobs = {
        f"{batch} x {context}{', mixed' if mixed else ''}": partial(measure, batch, context, mixed, asked)
        for mixed in (True, False)
        for batch, context in asked.cells
        if batch > 1 or not mixed
    }
    return settings, jobs


BENCHMARK = Benchmark(
    plan,
    tables,
    "a tiny layer, two requests of 256 tokens",
    whole=((2048, 8192, 32_768), (1, 8, 32)),
    small=((256,), (2,)),
    methods=tuple(METHODS),
    options={"--block-size": {"type": int, "default": 64, "help": f"tokens of a page, a multiple of {GROUP}"}},
)
