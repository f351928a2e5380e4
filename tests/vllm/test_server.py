"""vLLM's own server on exported checkpoints, spoken to by the `openai` client as a user's program does.

Everything else in this folder runs engines in the test's process. What only a server has is tested here: that answers
under load are those that each request gets alone, that a process which dies takes no request with it into silence, and
that what cannot be served is refused in one line before anything is loaded.

A server takes twenty seconds to start, so tests share three of them. The last tests kill two.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import openai
import psutil
import pytest

from tests.vllm.servers import (
    BASE,
    COMMAND,
    NAME,
    Checkpoints,
    Ended,
    Server,
    has_vllm_command,
    serving,
    start_in_vain,
    texts,
)

LOAD_SECONDS = float(os.environ.get("CSKV_LOAD_SECONDS", "60"))
LONGEST_LOAD = 240.0
AT_ONCE = 32
LONGEST = 1024
MIB = 2**20
NEAR_TIE = 1e-3  # between the two likeliest tokens: sums in another order may turn that round
# A batch is summed in another order than one request. Log-probabilities were seen to differ by 7e-6.
SUMMING = 1e-3
BOUND = 30.0  # seconds until a process that was killed is noticed
SPECULATIVE = json.dumps({"method": "ngram", "num_speculative_tokens": 2})


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return Checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def packed(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Half the channels in four bits, behind a window.

    What a token of a prompt reads depends on how the prompt is cut: what earlier pieces held is read from latents, what
    its own piece holds exactly. Therefore prompts are not cut here, and all requests that run have room: none is
    preempted and read again, its answer so far with its prompt. Those that do not run wait.
    """
    options = ("--max-num-seqs", "16", "--max-num-batched-tokens", str(LONGEST), "--no-enable-chunked-prefill")
    pool = ("--kv-cache-memory-bytes", str(48 * MIB), "--max-model-len", str(LONGEST))
    with serving(checkpoints.packed, tmp_path_factory.mktemp("packed"), *options, *pool) as server:
        yield server


@pytest.fixture(scope="module")
def whole(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """All channels, so that nothing is lost and answers do not depend on how prompts are cut.

    They are cut small, and the pool is so small that requests are preempted.
    """
    options = ("--max-num-seqs", "16", "--max-num-batched-tokens", "128")
    pool = ("--kv-cache-memory-bytes", str(24 * MIB), "--max-model-len", str(LONGEST))
    with serving(checkpoints.whole, tmp_path_factory.mktemp("whole"), *options, *pool) as server:
        yield server


@pytest.fixture(scope="module")
def overridden(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The base model, with the adapter of `packed` named on the command line."""
    changes = {"architectures": ["CSKVLlamaForCausalLM"], "cskv": {"adapter": str(checkpoints.packed / "cskv")}}
    options = ("--hf-overrides", json.dumps(changes), "--no-enable-chunked-prefill", "--max-num-seqs", "16")
    pool = ("--kv-cache-memory-bytes", str(48 * MIB), "--max-model-len", str(LONGEST))
    with serving(BASE, tmp_path_factory.mktemp("overridden"), *options, *pool) as server:
        yield server


class Question(NamedTuple):
    """A prompt, and how many tokens are wanted."""

    prompt: list[int]
    tokens: int


class Answer(NamedTuple):
    """What a server said: tokens, their log-probabilities, and how far the second likeliest was behind."""

    tokens: list[str]
    logprobs: list[float]
    leads: list[float]


@pytest.fixture(scope="module")
def questions(checkpoints: Checkpoints) -> list[Question]:
    """Prompts of 20 to 740 tokens, answers of 8 to 56: some within the window, most beyond it."""
    lengths = (20, 60, 120, 200, 300, 420, 560, 700)
    pieces = [checkpoints.tokenizer(text).input_ids for text in texts("heldout", AT_ONCE, 4000)]
    return [
        Question(ids[: lengths[i % len(lengths)] + i], 8 + i * 19 % 49)
        for i, ids in enumerate(pieces)
    ]  # fmt: skip


def ask(server: Server, question: Question) -> Answer:
    """The greedy answer."""
    reply = server.client.completions.create(
        model=NAME,
        prompt=question.prompt,
        max_tokens=question.tokens,
        temperature=0,
        logprobs=2,
        extra_body={"ignore_eos": True, "return_tokens_as_token_ids": True},
    )
    logprobs = reply.choices[0].logprobs
    best = [sorted(step.values(), reverse=True) for step in logprobs.top_logprobs]
    return Answer(logprobs.tokens, logprobs.token_logprobs, [first - second for first, second, *_ in best])


def load(
    server: Server, questions: list[Question], seconds: float, until: Callable[[], bool] = lambda: True
) -> list[tuple[int, Answer]]:
    """Ask for a while, `AT_ONCE` at once, each time another mix of lengths; any error is raised.

    Go on until `until` is true as well, which takes a busy machine longer, for `LONGEST_LOAD` seconds at most.
    """
    begun = time.monotonic()

    def goes_on() -> bool:
        spent = time.monotonic() - begun
        return spent < seconds or (spent < LONGEST_LOAD and not until())

    def keep_asking(first: int) -> list[tuple[int, Answer]]:
        found, step = [], 2 * first + 1  # odd: each asker goes through all questions, in an order of its own
        while goes_on():
            i = (first + len(found) * step) % len(questions)
            found.append((i, ask(server, questions[i])))
        return found

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return [pair for pairs in pool.map(keep_asking, range(AT_ONCE)) for pair in pairs]


def compare(found: list[tuple[int, Answer]], expected: list[Answer]) -> None:
    """Answers are equal, up to the first near tie; in no more than one of a hundred does that matter."""
    turned = 0
    for i, answer in found:
        same = answer.tokens == expected[i].tokens
        ties = [place for place, lead in enumerate(expected[i].leads) if lead < NEAR_TIE]
        until = len(answer.tokens) if same or not ties else ties[0]
        turned += not same
        assert answer.tokens[:until] == expected[i].tokens[:until], f"question {i}"
        assert answer.logprobs[:until] == pytest.approx(expected[i].logprobs[:until], abs=SUMMING), f"question {i}"
    assert turned <= len(found) / 100, f"{turned} of {len(found)} answers differ"


def complete(server: Server, prompt: str | list[str] | list[int] = "import os\n", **more: Any) -> Any:
    """A completion, greedy unless told otherwise."""
    settings = {"model": NAME, "max_tokens": 40, "temperature": 0, "extra_body": {"ignore_eos": True}} | more
    return server.client.completions.create(prompt=prompt, **settings)


def chat(server: Server, *contents: str, **more: Any) -> Any:
    """What a model says after messages of a user and an assistant in turns."""
    roles = ("user", "assistant") * len(contents)
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    settings = {"model": NAME, "max_tokens": 24, "temperature": 0, "extra_body": {"ignore_eos": True}} | more
    return server.client.chat.completions.create(messages=messages, **settings)


def test_the_model_is_listed(packed: Server) -> None:
    (listed,) = packed.client.models.list().data
    assert (listed.id, listed.max_model_len) == (NAME, LONGEST)


def test_completions_say_what_they_took(packed: Server, checkpoints: Checkpoints) -> None:
    reply = complete(packed, "def add(a, b):\n")
    (choice,), usage = reply.choices, reply.usage
    assert (choice.finish_reason, usage.completion_tokens) == ("length", 40)
    assert usage.prompt_tokens == len(checkpoints.tokenizer("def add(a, b):\n").input_ids)
    assert usage.total_tokens == usage.prompt_tokens + 40
    assert choice.text


def test_a_stream_says_the_same(packed: Server) -> None:
    expected = complete(packed, max_tokens=100)
    pieces = list(complete(packed, max_tokens=100, stream=True, stream_options={"include_usage": True}))
    assert len(pieces) > 50
    assert "".join(piece.choices[0].text for piece in pieces if piece.choices) == expected.choices[0].text
    assert pieces[-1].usage == expected.usage


def test_several_prompts_and_answers_at_once(packed: Server) -> None:
    prompts = ["import os\n", "class A:\n"]
    alone = [complete(packed, prompt).choices[0].text for prompt in prompts]
    assert [choice.text for choice in complete(packed, prompts).choices] == alone
    drawn = complete(packed, prompts, n=3, temperature=1.0, seed=5, max_tokens=60).choices
    assert [choice.index for choice in drawn] == list(range(6))
    assert len({choice.text for choice in drawn}) == 6


def test_a_seed_repeats_a_draw(packed: Server) -> None:
    first, again, other = (complete(packed, temperature=1.0, seed=seed).choices[0].text for seed in (7, 7, 8))
    assert first == again != other


def test_log_probabilities_are_those_of_the_likeliest(packed: Server) -> None:
    logprobs = complete(packed, logprobs=3).choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 40
    for chosen, best in zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert chosen == max(best.values()) <= 0


def test_an_answer_ends_before_a_stop_string(packed: Server) -> None:
    whole = complete(packed).choices[0].text
    stop = whole[len(whole) // 2 :][:4]
    choice = complete(packed, stop=[stop]).choices[0]
    assert (choice.text, choice.finish_reason) == (whole[: whole.index(stop)], "stop")


def test_chat_reads_all_messages_by_the_template(packed: Server) -> None:
    expected = complete(packed, "user: import os\nassistant: import sys\nuser: why\nassistant:", max_tokens=24)
    reply = chat(packed, "import os", "import sys", "why")
    assert reply.choices[0].message.role == "assistant"
    assert reply.choices[0].message.content == expected.choices[0].text
    assert reply.usage == expected.usage
    pieces = chat(packed, "import os", "import sys", "why", stream=True)
    said = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert said == expected.choices[0].text


def test_a_request_that_cannot_be_answered_harms_no_other(packed: Server) -> None:
    expected = complete(packed).choices[0].text
    with pytest.raises(openai.BadRequestError, match=str(LONGEST)):
        complete(packed, [5] * (LONGEST + 8))
    for piece in complete(packed, max_tokens=900, stream=True):  # left in the middle
        assert piece.choices
        break
    assert complete(packed).choices[0].text == expected


def test_under_load_answers_are_those_that_each_gets_alone(packed: Server, questions: list[Question]) -> None:
    expected = [ask(packed, question) for question in questions]
    found = load(packed, questions, LOAD_SECONDS)
    assert {i for i, _ in found} == set(range(len(questions)))
    compare(found, expected)
    assert packed.metric("vllm:num_preemptions_total") == 0
    assert packed.health() == 200


def test_where_nothing_is_lost_cut_and_preempted_prompts_change_no_answer(
    whole: Server, questions: list[Question]
) -> None:
    expected = [ask(whole, question) for question in questions]

    def preempted() -> bool:
        return whole.metric("vllm:num_preemptions_total") > 0

    assert not preempted()
    compare(load(whole, questions, min(LOAD_SECONDS, 10), until=preempted), expected)
    assert preempted()


def test_an_adapter_can_be_named_beside_a_base_model(overridden: Server, packed: Server) -> None:
    assert "CSKVLlamaForCausalLM" in overridden.log.read_text()
    for prompt in ("import os\n" * 30, "def add(a, b):\n"):
        assert complete(overridden, prompt).choices[0].text == complete(packed, prompt).choices[0].text


REFUSALS: dict[str, tuple[str, tuple[str, ...], str]] = {
    # what it shows: (checkpoint, options, what the line says)
    "adapter of another base": ("foreign", (), "made for a model with hidden_size 64, this model has 256"),
    "truncated weights": ("truncated", (), "is truncated or corrupted"),
    "weights that are no numbers": ("not_finite", (), "holds NaN or infinite values"),
    "no adapter in the folder": ("without_adapter", (), "adapter folder 'cskv' is neither in"),
    "no adapter named": ("unnamed", (), "the model's config has 'cskv': None; expected"),
    "a group cut by blocks": ("packed", ("--block-size", "16"), "would cut groups of 32 that are packed together"),
    "speculative decoding": ("packed", ("--speculative-config", SPECULATIVE), "with speculative decoding"),
    "another cache dtype": ("packed", ("--kv-cache-dtype", "fp8"), "with kv_cache_dtype 'fp8'"),
    "LoRA": ("packed", ("--enable-lora",), "with LoRA"),
    "ranks that cost memory": ("half", ("--tensor-parallel-size", "4"), "take 2.00 times the bytes"),
}


@pytest.fixture(scope="module")
def refusals(checkpoints: Checkpoints) -> Iterator[dict[str, Future[Ended]]]:
    """All of them, as many at once as there are cores: each loads vLLM first, which takes seven seconds."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        started = {
            name: pool.submit(start_in_vain, getattr(checkpoints, checkpoint), *options)
            for name, (checkpoint, options, _) in REFUSALS.items()
        }
        yield started
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_not_served_is_refused_in_one_line(name: str, refusals: dict[str, Future[Ended]]) -> None:
    *_, message = REFUSALS[name]
    ended = refusals[name].result()
    print(ended.stdout, ended.stderr)
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert message in line
    assert ended.returncode == 2
    assert ended.stderr.rstrip().endswith(line)
    assert "Traceback" not in ended.stdout + ended.stderr
    assert "EngineCore" not in ended.stdout + ended.stderr


@pytest.mark.skipif(not has_vllm_command(), reason="the `vllm` command of vLLM's CPU build fails as it starts")
def test_the_vllm_command_refuses_as_its_module_does(checkpoints: Checkpoints) -> None:
    ended = start_in_vain(checkpoints.packed, "--enable-lora", command=COMMAND)
    assert (ended.returncode, ended.stderr.splitlines()[-1][:7]) == (2, "error: ")
    assert "Traceback" not in ended.stdout + ended.stderr


@pytest.mark.parametrize(("name", "title"), [("whole", "VLLM::Worker"), ("overridden", "VLLM::EngineCore")])
def test_a_killed_process_ends_requests_with_an_error(name: str, title: str, request: pytest.FixtureRequest) -> None:
    """Of the last tests, because it leaves no server. vLLM's own exit code is 0 even so."""
    server: Server = request.getfixturevalue(name)
    processes = server.descendants()
    with ThreadPoolExecutor(8) as pool:
        running = [pool.submit(interrupted, server, i) for i in range(8)]
        wait_for(lambda: server.metric("vllm:num_requests_running") == 8)
        (killed,) = server.descendants(title) or server.descendants("VLLM::EngineCore")  # a GPU's worker is the engine
        killed.kill()
        end = time.monotonic() + BOUND
        errors = [future.result(timeout=max(0.0, end - time.monotonic())) for future in running]
    assert all(isinstance(error, openai.APIError) for error in errors)
    with pytest.raises(openai.APIError):
        complete(server)
    server.process.wait(timeout=BOUND)
    _, left = psutil.wait_procs(processes, timeout=BOUND)
    assert not left
    assert server.health() is None
    assert "EngineDeadError" in server.log.read_text()


def interrupted(server: Server, i: int) -> Exception | None:
    """What ends a long request, streamed or not."""
    try:
        reply = complete(server, f"# {i}\nimport os\n", max_tokens=LONGEST - 64, stream=i % 2 == 0)
        return list(reply) and None
    except Exception as error:
        return error


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until something is so."""
    end = time.monotonic() + BOUND
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.1)
