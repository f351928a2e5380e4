"""The harness's model `cskv` against its own `hf`, on local tasks, and against `cskv.evaluation`."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import cskv
from cskv.evaluation.perplexity import perplexity
from cskv.models.compat import cache_kwarg, output_cache
from tests.harness.conftest import GROUP, SINKS, WINDOW
from tests.harness.support import CHECKPOINT, TASKS

pytest.importorskip("lm_eval")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from cskv.harness.model import CSKVLM

SCORED = TASKS[:2]
TOLERANCE = 2e-3  # of sums over some hundred tokens in fp32

Run = dict[str, Any]


@pytest.fixture(scope="module")
def evaluate(tasks: Path) -> Any:
    """Run the tasks with a model of the harness."""
    manager = TaskManager(include_path=str(tasks), include_defaults=False)

    @cache
    def run(model: str, *names: str, batch_size: int = 1, **args: Any) -> Run:
        args = {"dtype": "float32", "device": "cpu"} | args
        return simple_evaluate(
            model, args, list(names or TASKS), batch_size=batch_size, task_manager=manager, bootstrap_iters=0
        )

    return run


@pytest.fixture(scope="module")
def exact(evaluate: Any) -> Run:
    return evaluate("hf", pretrained=CHECKPOINT)


def loglikelihoods(run: Run) -> torch.Tensor:
    """All of them, of both tasks."""
    choices = [response[0] for sample in run["samples"]["local_choice"] for response in sample["filtered_resps"]]
    return torch.tensor(choices + [sample["filtered_resps"][0] for sample in run["samples"]["local_rolling"]])


def answers(run: Run) -> list[str]:
    return [sample["resps"][0][0] for sample in run["samples"]["local_lines"]]


def rolling(lm: HFLM, texts: list[str]) -> list[float]:
    return lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts])


def model(adapter: Any, **kwargs: Any) -> CSKVLM:
    kwargs = {"pretrained": CHECKPOINT, "dtype": "float32", "device": "cpu"} | kwargs
    return CSKVLM(adapter=adapter, **kwargs)


@pytest.mark.parametrize("reading", ["chunks", "parallel"])
def test_a_full_rank_adapter_gives_the_numbers_of_the_uncompressed_model(
    evaluate: Any, exact: Run, adapters: dict[str, str], reading: str
) -> None:
    got = evaluate("cskv", adapter=adapters["full"], reading=reading, batch_size=2)
    assert (loglikelihoods(got) - loglikelihoods(exact)).abs().max() < TOLERANCE
    assert answers(got) == answers(exact)  # of left-padded prompts
    assert exact["results"]["local_lines"]["exact_match,last"] == 1.0


def test_no_adapter_is_the_uncompressed_model_under_the_same_reading(evaluate: Any, exact: Run) -> None:
    got = evaluate("cskv", adapter="none", pretrained=CHECKPOINT)
    assert (loglikelihoods(got) - loglikelihoods(exact)).abs().max() < TOLERANCE
    assert answers(got) == answers(exact)
    assert got["config"]["cskv"]["adapter"] == "none"


@pytest.mark.parametrize("name", ["low", "packed"])
def test_a_batch_gives_what_single_texts_give(evaluate: Any, exact: Run, adapters: dict[str, str], name: str) -> None:
    # In fp64: in fp32 a number that rounding puts on the other side of a code shows in the sum of a text.
    single, batch = (
        evaluate("cskv", *SCORED, adapter=adapters[name], batch_size=size, dtype="float64") for size in (1, 4)
    )
    assert (loglikelihoods(batch) - loglikelihoods(single)).abs().max() < TOLERANCE
    # and the compression is seen
    assert ((loglikelihoods(single) - loglikelihoods(exact)).abs() > 0.05).float().mean() > 0.5


def test_both_readings_agree(evaluate: Any, adapters: dict[str, str]) -> None:
    chunks, parallel = (
        loglikelihoods(evaluate("cskv", *SCORED, adapter=adapters["low"], batch_size=4, reading=reading))
        for reading in ("chunks", "parallel")
    )
    assert (chunks - parallel).abs().max() < TOLERANCE


def test_rolling_perplexity_is_that_of_the_evaluation(adapters: dict[str, str], texts: list[str]) -> None:
    lm = model(adapters["low"])
    for text, got in zip(texts, rolling(lm, texts), strict=True):
        tokens = torch.tensor([[lm.prefix_token_id, *lm.tok_encode(text)]])
        expected = perplexity(lm.model, tokens, chunk=GROUP, first_chunk=SINKS + WINDOW + GROUP)
        assert got == pytest.approx(-expected.nll * expected.tokens, abs=TOLERANCE)


@pytest.mark.parametrize("sinks", [0, 4])
def test_it_is_what_token_by_token_decoding_gives(adapters: dict[str, str], texts: list[str], sinks: int) -> None:
    lm = model(adapters["low"], window=3, group=5, sinks=sinks)
    (got,) = rolling(lm, texts[2:3])
    tokens = torch.tensor([[lm.prefix_token_id, *lm.tok_encode(texts[2])]])
    expected = perplexity(lm.model, tokens, chunk=1)
    assert got == pytest.approx(-expected.nll * expected.tokens, abs=TOLERANCE)


def test_a_short_continuation_of_a_long_context_needs_no_logits_of_the_context(
    adapters: dict[str, str], texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, shapes = model(adapters["low"]), []
    call = lm._model_call

    def watched(*args: Any, **kwargs: Any) -> torch.Tensor:
        shapes.append((args[0].shape, call(*args, **kwargs)))
        return shapes[-1][1]

    monkeypatch.setattr(lm, "_model_call", watched)
    context, continuation = lm.tok_encode(texts[0]), lm.tok_encode(" return value")
    ((got, _),) = lm._loglikelihood_tokens([(("", ""), context, continuation)])
    ((fed, logits),) = shapes
    assert fed[1] == len(context) + len(continuation) - 1
    assert logits.shape[1] == len(continuation)
    both = torch.tensor([context + continuation])
    whole = perplexity(lm.model, both, chunk=GROUP, first_chunk=SINKS + WINDOW + GROUP)
    head = perplexity(lm.model, both[:, : len(context)], chunk=GROUP, first_chunk=SINKS + WINDOW + GROUP)
    assert got == pytest.approx(head.nll * head.tokens - whole.nll * whole.tokens, abs=TOLERANCE)


def test_continuations_of_contexts_of_very_different_lengths_share_a_batch(
    adapters: dict[str, str], texts: list[str]
) -> None:
    lm = model(adapters["low"], batch_size=2)
    continuation = lm.tok_encode(" return value")
    requests = [(("", ""), lm.tok_encode(text), continuation) for text in (texts[0], texts[3])]
    both = lm._loglikelihood_tokens(requests)
    for request, (got, _) in zip(requests, both, strict=True):
        ((alone, _),) = lm._loglikelihood_tokens([request])
        assert got == pytest.approx(alone, abs=TOLERANCE)


def test_a_question_can_be_read_through_the_cache(evaluate: Any, exact: Run, adapters: dict[str, str]) -> None:
    def run(name: str, **args: Any) -> list[str]:
        return answers(evaluate("cskv", "local_lines", adapter=adapters[name], **args))

    assert run("full", protocol="context-first", batch_size=2) == answers(exact)
    # Only the question is read from latents in the one, and nothing of the prompt in the other.
    assert run("low", protocol="context-first") != run("low")


def test_a_prefilled_context_leaves_the_question_to_the_cache(adapters: dict[str, str]) -> None:
    lm = model(adapters["low"], protocol="context-first", question_tokens=5)
    prompt = torch.randint(10, 2000, (2, 60), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(prompt)
    mask[1, :7] = 0
    first = lm._model_generate(prompt, 61, [], attention_mask=mask, output_logits=True, return_dict_in_generate=True)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        given = lm.model(prompt[:, :55], attention_mask=mask[:, :55], position_ids=positions[:, :55], use_cache=True)
        cached = {cache_kwarg(lm.model): output_cache(given)}
        expected = lm.model(prompt[:, 55:], attention_mask=mask, position_ids=positions[:, 55:], **cached).logits
        plain = lm.model(prompt, attention_mask=mask, position_ids=positions).logits
    assert (first.logits[0] - expected[:, -1]).abs().max() < TOLERANCE
    assert (first.logits[0] - plain[:, -1]).abs().max() > 0.1


def test_chat_templates_and_limits_are_the_harnesss(tasks: Path, adapters: dict[str, str]) -> None:
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    template = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}\n{% endfor %}<assistant>"
    runs = []
    for lm in (HFLM(CHECKPOINT, dtype="float32", device="cpu"), model(adapters["full"])):
        lm.tokenizer.chat_template = template
        runs.append(
            simple_evaluate(lm, tasks=list(TASKS), task_manager=manager, limit=1, apply_chat_template=True,
                            bootstrap_iters=0)
        )  # fmt: skip
    ours, theirs = runs
    assert ours["samples"]["local_lines"][0]["arguments"][0][0].startswith("<user> Below is a record")
    assert len(answers(ours)) == 1
    assert answers(ours) == answers(theirs)
    assert (loglikelihoods(ours) - loglikelihoods(theirs)).abs().max() < TOLERANCE


def test_results_carry_what_decides_them(adapters: dict[str, str]) -> None:
    import json

    facts = model(adapters["packed"], window=16, max_length=512).get_model_info()["cskv"]
    assert json.loads(json.dumps(facts)) == facts
    assert facts["version"] == cskv.__version__
    assert (facts["adapter"], facts["base_model"]) == (adapters["packed"], CHECKPOINT)
    assert (facts["settings"]["k_density"], facts["settings"]["v_bits"], facts["settings"]["window"]) == (0.5, 4, 16)
    assert (facts["window"], facts["group"], facts["reading"], facts["protocol"]) == (16, 8, "chunks", "in-prefill")
    assert facts["bits_per_latent"]["0"][0] > 4.0
    assert facts["cache"]["tokens"] == 512
    assert 0 < facts["cache"]["bytes_per_token"] < facts["cache"]["uncompressed_bytes"] / 512


def test_a_loaded_model_and_adapter_do_too(adapters: dict[str, str], texts: list[str]) -> None:
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype="float32")
    lm = model(cskv.CSKVAdapter.from_pretrained(adapters["low"]), pretrained=base)
    assert rolling(lm, texts[:1]) == pytest.approx(rolling(model(adapters["low"]), texts[:1]), abs=TOLERANCE)
    assert lm.facts()["base_model"] == CHECKPOINT
    with pytest.raises(cskv.CSKVError, match="a compressor is attached to this model"):
        model(adapters["low"], pretrained=base)


def test_a_gguf_base_is_read_dequantised(texts: list[str], tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from cskv.models.gguf import load_gguf
    from tests.gguf_files import tiny_llama, write_gguf

    file = write_gguf(tmp_path / "tiny.gguf", tiny_llama())
    base = load_gguf(file, dtype=torch.float32)
    config = cskv.CSKVConfig(0.5, 0.5, WINDOW, GROUP, init="svd")
    cskv.initialise(base, config).save_pretrained(tmp_path / "adapter")
    lm = model(str(tmp_path / "adapter"), pretrained=None)
    assert lm.facts()["base_model"] == str(file)
    known = model(cskv.CSKVAdapter.from_pretrained(tmp_path / "adapter"), pretrained=base, tokenizer=lm.tokenizer)
    assert rolling(lm, texts[1:2]) == pytest.approx(rolling(known, texts[1:2]), abs=TOLERANCE)
    named = CSKVLM(str(tmp_path), "none", gguf_file="tiny.gguf", device="cpu")
    assert named.model.dtype == torch.bfloat16
    with pytest.raises(cskv.CSKVError, match="GGUF file '.*nowhere.gguf' does not exist"):
        CSKVLM(str(tmp_path), "none", gguf_file="nowhere.gguf", device="cpu")


def test_mistakes_are_one_line(adapters: dict[str, str], tmp_path: Path) -> None:
    from tests.cli.support import save_llama

    other = str(save_llama(tmp_path / "other", seed=0))
    for given, message in (
        ({"pretrained": other}, "made for .* with hidden_size 256, this model has 32"),
        ({"pretrained": str(tmp_path / "absent")}, "cannot load the model"),
        ({"dtype": "float33"}, "cannot load the model"),
        ({"attention": "flash"}, "attention is 'flash'|flash"),
        ({"windw": 3}, "unknown argument windw=3"),
        ({"peft": "lora"}, "peft=lora does not go with"),
        ({"batch_size": "auto"}, "give a number"),
        ({"protocol": "context-last"}, "protocol is 'context-last'; expected in-prefill or context-first"),
    ):
        with pytest.raises(cskv.CSKVError, match=message) as error:
            model(adapters["low"], **given)
        assert "\n" not in str(error.value), given
    with pytest.raises(cskv.ConfigError, match="leave num_beams out"):
        lm = model(adapters["low"], protocol="context-first", question_tokens=2)
        lm._model_generate(torch.ones((1, 8), dtype=torch.long), 12, [], num_beams=2)


def test_encoder_decoders_are_refused() -> None:
    from transformers import T5Config

    lm = model("none")
    with pytest.raises(cskv.UnsupportedModelError, match="t5 is an encoder-decoder"):
        lm._config = T5Config()
        lm._get_backend(lm.config)
    with pytest.raises(cskv.UnsupportedModelError, match="encoder-decoders"):
        lm._model_call(torch.ones((1, 2)), attn_mask=torch.ones((1, 2)), labels=torch.ones((1, 2)))
