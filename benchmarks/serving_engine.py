"""The process of one engine of `serving.py`: it answers questions until it is told to end."""

from __future__ import annotations

import os
import time
from multiprocessing.connection import Connection
from typing import Any


def serve(folder: str, options: dict[str, Any], pipe: Connection) -> None:
    """Start an engine, send how many tokens its pool holds, and answer.

    Questions are ("logprobs", prompt, tokens) and ("decode", requests, tokens of each prompt, steps); the answers are
    log-probabilities of greedy tokens, and seconds of steps in which all requests decode. None ends the process.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from vllm import LLM

    llm = LLM(
        model=folder,
        dtype="bfloat16",
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        distributed_executor_backend="uni",
        enforce_eager=True,
        disable_log_stats=True,
        **options,
    )
    pipe.send(llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens)
    while (question := pipe.recv()) is not None:
        kind, *arguments = question
        pipe.send(logprobs(llm, *arguments) if kind == "logprobs" else decode(llm, *arguments))


def logprobs(llm: Any, prompt: list[int], tokens: int) -> list[float]:
    """Return those of greedy tokens after a prompt."""
    from vllm import SamplingParams

    settings = SamplingParams(temperature=0, max_tokens=tokens, logprobs=0, ignore_eos=True, detokenize=False)
    (output,) = llm.generate([{"prompt_token_ids": prompt}], settings, use_tqdm=False)
    answer = output.outputs[0]
    return [step[token].logprob for step, token in zip(answer.logprobs, answer.token_ids, strict=True)]


def decode(llm: Any, requests: int, tokens: int, steps: int) -> list[float]:
    """Seconds of steps in which all requests decode."""
    from vllm import SamplingParams

    settings = SamplingParams(temperature=0, max_tokens=1000, ignore_eos=True, detokenize=False)
    engine, names = llm.llm_engine, [f"decode-{i}" for i in range(requests)]
    for i, name in enumerate(names):
        prompt = [3 + (i + 7 * j) % 90 for j in range(tokens)]
        engine.add_request(name, {"prompt_token_ids": prompt}, settings)
    begun: set[str] = set()
    while len(begun) < requests:
        begun |= {output.request_id for output in engine.step() if output.outputs[0].token_ids}
    seconds = []
    for _ in range(steps):
        began = time.perf_counter()
        answered = engine.step()
        seconds.append(time.perf_counter() - began)
        if len(answered) != requests:
            raise RuntimeError(f"{len(answered)} of {requests} requests decoded in a step: the pool is too small")
    engine.abort_request(names)
    while engine.has_unfinished_requests():
        engine.step()
    return seconds
