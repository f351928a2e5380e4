"""Decoding in vLLM with a compressed cache and without: at equal batch, and at equal memory.

It needs vLLM (`make test-vllm` makes an environment). All engines run at once, each in a process of its own, and take
turns: the same pool of memory, the same random model in bfloat16 and random factors of the ranks that 80 % leaves. The
pool is just large enough for a few uncompressed requests. "Equal batch" decodes as many with every cache, "equal
memory" as many as each cache has room for. Only steps that decode are timed; prompts are read before.

Before anything is timed, log-probabilities after a short prompt are compared with those of the transformers path.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from functools import cache, partial
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

import torch

import cskv
from benchmarks.common import Jobs, Row, Wrong
from benchmarks.pages import Table, command, machine
from benchmarks.speed.generation import METHODS, TINY, UNCOMPRESSED, Settings, adapter, config_of
from benchmarks.speed.registry import Benchmark, Unavailable
from benchmarks.speed.timing import summary
from cskv.vllm.export import export

NAMES = [name for name in METHODS if not name.endswith("rebuild")]
KINDS = ("equal batch", "equal memory")
ROUNDS = 3
STEPS = 12
ROOM = 128  # tokens that a request may be longer than its prompt
MOST = 48  # requests
TOLERANCE = 0.1  # of a log-probability in bfloat16
SHAPES = {"2048 x 4": (2048, 4), "8192 x 1": (8192, 1)}  # tokens of a prompt, uncompressed requests in the pool
QUICK = {"96 x 2": (96, 2)}
CHECK = torch.randint(3, 100, (200,), generator=torch.Generator().manual_seed(1)).tolist()  # tokens of a prompt
Greedy = list[tuple[int, float]]  # tokens that are chosen one after the other, and their log-probabilities
Checkpoints = tuple[dict[str, Path], dict[str, Greedy]]


llm: Any = None  # the engine of the process, once `start` was called in it


def start(folder: str, options: dict[str, Any]) -> None:
    """Start an engine of vLLM in this process."""
    global llm
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from vllm import LLM

    plain = {"enable_prefix_caching": False, "enforce_eager": True, "disable_log_stats": True}
    here = {"skip_tokenizer_init": True, "distributed_executor_backend": "uni"}
    llm = LLM(model=folder, dtype="bfloat16", max_num_seqs=MOST, **plain, **here, **options)


def pool_tokens() -> int:
    """Return how many tokens the engine's pool holds."""
    return llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens


def greedy(tokens: int) -> Greedy:
    """Return what the engine chooses after the prompt that is checked."""
    from vllm import SamplingParams

    settings = SamplingParams(temperature=0, max_tokens=tokens, logprobs=0, ignore_eos=True, detokenize=False)
    (output,) = llm.generate([{"prompt_token_ids": CHECK}], settings, use_tqdm=False)
    answer = output.outputs[0]
    return [(token, step[token].logprob) for step, token in zip(answer.logprobs, answer.token_ids, strict=True)]


def error_of(name: str, found: Greedy, expected: Greedy) -> float:
    """Return the largest difference of a log-probability, as long as both chose the same: rounding may part them.

    Raises:
        Wrong: they part at the first token already, and nothing that was decoded is compared.
    """
    if found[0][0] != expected[0][0]:
        raise Wrong(
            f"{name}: token {found[0][0]} is chosen first, not {expected[0][0]}; nothing decoded can be compared"
        )
    error = 0.0
    for (ours, own), (theirs, other) in zip(found, expected, strict=True):
        error = max(error, abs(own - other))
        if ours != theirs:
            break
    return error


def decode(requests: int, tokens: int) -> list[float]:
    """Return the seconds of the engine's steps in which all requests decode, after prompts of so many tokens."""
    from vllm import SamplingParams

    settings = SamplingParams(temperature=0, max_tokens=1000, ignore_eos=True, detokenize=False)
    engine, names = llm.llm_engine, [f"decode-{i}" for i in range(requests)]
    for i, name in enumerate(names):
        engine.add_request(name, {"prompt_token_ids": [3 + (i + 7 * j) % 90 for j in range(tokens)]}, settings)
    begun: set[str] = set()
    while len(begun) < requests:
        begun |= {output.request_id for output in engine.step() if output.outputs[0].token_ids}
    seconds = []
    for _ in range(STEPS):
        began = time.perf_counter()
        answered = engine.step()
        seconds.append(time.perf_counter() - began)
        if len(answered) != requests:
            raise RuntimeError(f"{len(answered)} of {requests} requests decoded in a step: the pool is too small")
    engine.abort_request(names)
    while engine.has_unfinished_requests():
        engine.step()
    return seconds


def checkpoints(folder: Path, settings: Settings) -> Checkpoints:
    """Save a checkpoint of every method; return with them the log-probabilities that the transformers path gives."""
    model, base = settings.model(), folder / "base"
    model.save_pretrained(base)
    found, expected = {UNCOMPRESSED: base}, {}
    kv_dim = settings.kv_heads * settings.hidden // settings.heads
    for name in NAMES:
        if name == UNCOMPRESSED:
            expected[name] = _greedy(model)
            continue
        compressor = adapter(model, config_of(name, kv_dim))
        found[name] = folder / name.replace(" ", "-").replace(",", "")
        export(compressor, base, found[name])
        with cskv.attach(model, compressor):
            expected[name] = _greedy(model)
    return found, expected


@torch.inference_mode()
def _greedy(model: Any) -> Greedy:
    """Return what the transformers path chooses after the prompt that is checked."""
    prompt = torch.tensor([CHECK])
    greedy = {"do_sample": False, "output_scores": True, "return_dict_in_generate": True, "eos_token_id": []}
    mask = torch.ones_like(prompt)
    output = model.generate(prompt, attention_mask=mask, max_new_tokens=4, pad_token_id=0, **greedy)
    chosen = output.sequences[0, len(CHECK) :].tolist()
    return [
        (token, float(torch.log_softmax(scores[0].float(), -1).max()))
        for token, scores in zip(chosen, output.scores, strict=True)
    ]


def measure(tokens: int, fit: int, made: Callable[[], Checkpoints], per_token: int) -> Row:
    """Measure a row: all methods with a pool in which `fit` uncompressed requests fit; raise `Wrong` if one is off."""
    folders, expected = made()
    options = {"kv_cache_memory_bytes": (fit * (tokens + ROOM) + 256) * per_token, "max_model_len": tokens + ROOM}
    row: Row = {"tokens": tokens, "fit": fit, "pool_bytes": options["kv_cache_memory_bytes"], "methods": {}}
    with ExitStack() as processes:
        spawn = multiprocessing.get_context("spawn")
        engines = {
            name: processes.enter_context(ProcessPoolExecutor(1, spawn, start, (str(folder), options)))
            for name, folder in folders.items()
        }
        for name, engine in engines.items():
            found = engine.submit(greedy, len(expected[name])).result()
            error = error_of(name, found, expected[name])
            if error > TOLERANCE:
                raise Wrong(f"{name}: log-probabilities are {error:.3g} off, at most {TOLERANCE:g}")
            held = engine.submit(pool_tokens).result()
            room = min(MOST, (held - 1) // (tokens + ROOM))  # vLLM counts a block that it gives to nobody
            row["methods"][name] = {"error": error, "pool_tokens": held, "requests": room}
        for kind in KINDS:
            speeds: dict[str, list[float]] = {name: [] for name in engines}
            for _ in range(ROUNDS):
                for name, engine in engines.items():
                    batch = fit if kind == "equal batch" else row["methods"][name]["requests"]
                    seconds = engine.submit(decode, batch, tokens).result()
                    speeds[name].append(batch / statistics.median(seconds))
            for name, values in speeds.items():
                row["methods"][name][kind] = summary(values)
    return row


def tables(results: dict[str, Any]) -> list[Table]:
    """Show ratios to the uncompressed cache."""
    cells = []
    for row in results["rows"].values():
        base = row["methods"][UNCOMPRESSED]
        for name in NAMES:
            method = row["methods"][name]
            ratios = (f"{method[kind]['median'] / base[kind]['median']:.2f} x" for kind in KINDS)
            held = f"{method['pool_tokens'] / base['pool_tokens']:.1f} x"
            cells.append([str(row["tokens"]), name.removesuffix(", sdpa"), held, str(method["requests"]), *ratios])
    headings = ("prompt", "cache", "tokens in the pool", "requests", *(f"tokens/s, {kind}" for kind in KINDS))
    return [Table("", headings, cells)]


def words(results: dict[str, Any]) -> str:
    """Say on what the table was measured."""
    of, where = results["settings"], results["environment"]
    versions = f"vLLM {of['vllm']}", f"torch {where['torch']}"
    return (
        f"Ratios of medians of {of['rounds']} turns of {of['steps']} steps; a random Llama in bfloat16 "
        f"({of['layers']} layers, hidden {of['hidden']}, {of['heads']} query and kv heads of "
        f"{of['hidden'] // of['heads']} channels), 20 % of the channels, window 32, groups of 32. "
        f"{machine(where, *versions)}. Reproduce with `{command('speed/serving')}`."
    )


def plan(asked: Any) -> tuple[Row, Jobs]:
    """Return the settings and a job per pool; the checkpoints are made by the first of them, and go with the last."""
    packages = packages_distributions()
    if "vllm" not in packages:
        raise Unavailable("vLLM is not installed; `make test-vllm` makes an environment that has it")
    settings = Settings(**(TINY | {"vocabulary": 256} if asked.quick else {}), steps=STEPS, rounds=ROUNDS)
    per_token = 2 * settings.layers * settings.kv_heads * (settings.hidden // settings.heads) * 2
    folder = tempfile.TemporaryDirectory()
    made = cache(lambda: checkpoints(Path(folder.name), settings))
    jobs = {
        name: partial(measure, tokens, fit, made, per_token)
        for name, (tokens, fit) in (QUICK if asked.quick else SHAPES).items()
    }
    where = {"device": "cuda" if torch.cuda.is_available() else "cpu", "threads": torch.get_num_threads()}
    return asdict(settings) | where | {"vllm": version(packages["vllm"][0])}, jobs


BENCHMARK = Benchmark(plan, tables, "a tiny model and short prompts")
