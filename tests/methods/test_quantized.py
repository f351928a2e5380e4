"""transformers' quantised cache in our measurements, and the bytes of any cache."""

from __future__ import annotations

import functools
import importlib.util
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import cskv
from cskv.attachment.cache_bytes import allocated_bytes
from cskv.compression.initialise import initialise
from cskv.config import CSKVConfig
from cskv.data.lines import make_case
from cskv.errors import CacheError, CSKVError
from cskv.evaluation.cache_size import cache_after_prefill
from cskv.evaluation.forward import forward
from cskv.evaluation.perplexity import perplexity
from cskv.evaluation.results import open_run
from cskv.evaluation.runner import evaluate
from cskv.evaluation.settings import EvaluationSettings
from cskv.evaluation.tasks import evaluate_cases
from cskv.methods import quantized as peers
from cskv.methods.quantized import BACKENDS, quantized_cache
from tests.evaluation.support import VOCABULARY, character_tokenizer, tiny_llama

GROUP = 32  # numbers that share a scale: a tiny Llama's keys, or values, of two tokens


def tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(5))


@pytest.fixture(params=sorted(BACKENDS))
def backend(request) -> str:
    pytest.importorskip(BACKENDS[request.param].module)
    try:
        quantized_cache(tiny_llama(), request.param)
    except CSKVError as error:  # quanto without a compiler
        pytest.skip(str(error))
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("nbits", [2, 4])
def test_allocated_bytes_are_payload_scales_and_zero_points(backend, nbits, dtype):
    model, prompt = tiny_llama().to(dtype), tokens(2, 64)
    new_cache = functools.partial(quantized_cache, model, backend, nbits=nbits, q_group_size=GROUP)
    report = cache_after_prefill(model, prompt, new_cache=new_cache)
    numbers = 2 * 2 * 2 * 64 * 16  # layers, keys and values, rows, tokens, channels
    assert (report.tokens, report.batch) == (64, 2)
    assert report.uncompressed_bytes == numbers * dtype.itemsize
    assert report.total_bytes == numbers * nbits // 8 + 2 * (numbers // GROUP) * dtype.itemsize


def test_three_bits_are_refused_since_hqq_unpacks_them_in_matrices_alone():
    pytest.importorskip("hqq")
    with pytest.raises(CSKVError, match="the hqq cache is asked for 3 bits; expected one of 1, 2, 4, 8"):
        peers.quantized(3)
    with pytest.raises(CSKVError, match="expected one of 1, 2, 4, 8"):
        quantized_cache(tiny_llama(), nbits=3)


@pytest.mark.parametrize("protocol", ["in-prefill", "context-first"])
@pytest.mark.parametrize("nbits", [4, 2])
def test_questions_of_any_length_are_answered(nbits, protocol, tmp_path):
    """Of 192 numbers a token, as SmolLM2 has, an odd number of tokens makes groups whose codes fill no whole bytes."""
    pytest.importorskip("hqq")
    sizes = {"hidden_size": 192, "num_attention_heads": 3, "num_key_value_heads": 3, "intermediate_size": 48}
    tokenizer = character_tokenizer()
    config = LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=1, bos_token_id=None, eos_token_id=None, **sizes)
    model = LlamaForCausalLM(config).eval()
    settings = EvaluationSettings(("passkey",), tokens=(301,), cases=3, protocols=(protocol,), max_new_tokens=2)
    run = open_run(tmp_path / "run.json", {}, {"name": "tiny", "type": "llama"}, {})
    evaluate(model, tokenizer, [peers.quantized(nbits)], settings, run)
    (row,) = run.rows
    assert row["n"] == 3
    per_token = 192 * 2 * (nbits / 8 + 2 * 4 / 64)  # keys and values: codes, and an fp32 scale and zero point of 64
    assert row["cache"]["bytes_per_token"] == per_token
    assert row["cache"]["tokens"] % 8 == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_four_bits_take_less_than_a_third_beyond_the_residual(backend, dtype):
    model, text = tiny_llama().to(dtype), tokens(1, 208)
    cache = quantized_cache(model, backend, q_group_size=64, residual_length=16)
    for chunk in (text[:, :192], text[:, 192:200]):
        _, cache = forward(model, chunk, cache)
    _, exact = forward(model, text[:, :192])
    residual = 2 * 2 * 8 * 16 * dtype.itemsize
    assert residual < allocated_bytes(cache) < allocated_bytes(exact) / 3 + residual
    forward(model, text[:, 200:], cache)
    assert allocated_bytes(cache) < allocated_bytes(exact) / 3 * 208 / 192


def test_eight_bits_give_the_text_of_the_ordinary_cache():
    pytest.importorskip("hqq")
    tokenizer = character_tokenizer()
    model = tiny_llama(vocab_size=len(tokenizer))
    cases = [make_case(2, seed).as_case() for seed in range(3)]
    new_cache = functools.partial(quantized_cache, model, "hqq", nbits=8, q_group_size=16, residual_length=8)
    exact = evaluate_cases(model, tokenizer, cases, batch_size=2, max_new_tokens=20)
    peer = evaluate_cases(model, tokenizer, cases, batch_size=2, max_new_tokens=20, new_cache=new_cache)
    assert [output.output for output in peer.outputs] == [output.output for output in exact.outputs]


def test_few_bits_change_the_perplexity_but_not_in_one_forward(backend):
    model, text = tiny_llama(), tokens(3, 101)
    new_cache = functools.partial(quantized_cache, model, backend, nbits=2, q_group_size=16)
    exact = perplexity(model, text, chunk=4, batch_size=2)
    assert abs(perplexity(model, text, chunk=4, batch_size=2, new_cache=new_cache).nll - exact.nll) > 1e-3
    assert perplexity(model, text, chunk=100, new_cache=new_cache).nll == pytest.approx(exact.nll, rel=1e-5)


def test_the_prompt_is_quantised_at_once_and_the_residual_is_exact(backend):
    model, text = tiny_llama(), tokens(1, 48)
    _, exact = forward(model, text)
    _, cache = forward(model, text[:, :32], quantized_cache(model, backend, q_group_size=16))
    assert cache.layers[0].keys.numel() == 0
    _, cache = forward(model, text[:, 32:], cache)
    assert torch.equal(cache.layers[0].keys, exact.layers[0].keys[:, :, 32:])  # deeper layers have read lossy tokens


def test_each_batch_gets_a_cache_of_its_own():
    tokenizer, made = character_tokenizer(), []
    model = tiny_llama(vocab_size=len(tokenizer))

    def new_cache() -> DynamicCache:
        made.append(DynamicCache(config=model.config))
        return made[-1]

    cases = [make_case(2, seed).as_case() for seed in range(3)]
    exact = evaluate_cases(model, tokenizer, cases, batch_size=2, max_new_tokens=4)
    given = evaluate_cases(model, tokenizer, cases, batch_size=2, max_new_tokens=4, new_cache=new_cache)
    assert [output.output for output in given.outputs] == [output.output for output in exact.outputs]
    text = tokens(3, 20)
    assert perplexity(model, text, chunk=8, batch_size=2, new_cache=new_cache) == perplexity(
        model, text, chunk=8, batch_size=2
    )
    assert len(made) == 4
    assert all(cache.get_seq_length() for cache in made)


def test_the_bytes_of_an_ordinary_and_of_a_compressed_cache_are_those_of_its_report():
    model, prompt = tiny_llama(), tokens(2, 64)
    ordinary = cache_after_prefill(model, prompt, new_cache=DynamicCache)
    assert ordinary == cache_after_prefill(model, prompt)
    config = CSKVConfig(k_density=0.25, v_density=0.25, window=8, group=8, init="svd")
    with cskv.attach(model, initialise(model, config)):
        _, cache = forward(model, prompt)
        _, cache = forward(model, tokens(2, 1), cache)
        assert allocated_bytes(cache) == cskv.cache_report(cache, model).total_bytes
        assert cache_after_prefill(model, prompt, new_cache=DynamicCache) == cache_after_prefill(model, prompt)


def test_a_storage_counts_once_and_whole_and_weights_do_not_count():
    class Slotted:
        __slots__ = ("held",)

    slotted, storage = Slotted(), torch.zeros(100)
    slotted.held = {"view": storage[:10], "nested": [(storage[50:], torch.zeros(3, dtype=torch.uint8))]}
    cache = SimpleNamespace(layers=[slotted, slotted], model=torch.nn.Linear(9, 9), unset=None, kind=torch.nn.Linear)
    cache.itself = cache
    assert allocated_bytes(cache) == 400 + 3


def test_a_compressed_model_refuses_the_peer(backend):
    model = tiny_llama()
    with cskv.attach(model, initialise(model, CSKVConfig(init="svd"))), pytest.raises(CacheError, match="quantized"):
        cache_after_prefill(model, tokens(1, 8), new_cache=functools.partial(quantized_cache, model, backend))


@pytest.mark.parametrize("name", sorted(BACKENDS))
@pytest.mark.parametrize("parent_missing", [True, False])
def test_a_missing_package_is_named_with_its_extra(monkeypatch, name, parent_missing):
    def find_spec(module: str) -> None:
        if parent_missing:
            raise ModuleNotFoundError(module)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    with pytest.raises(CSKVError) as caught:
        quantized_cache(tiny_llama(), name)
    assert str(caught.value) == f"the {name} cache needs {BACKENDS[name].package}: pip install 'cskv[peers]'"


def test_a_kernel_that_cannot_be_built_is_told_in_one_line(monkeypatch):
    pytest.importorskip("optimum.quanto")

    def unpack(*_args: object) -> None:
        raise RuntimeError("Error building extension 'quanto_cpp'\n" + "c++: not found\n" * 9)

    monkeypatch.setattr(peers.torch.ops.quanto, "unpack", unpack)
    with pytest.raises(CSKVError, match=r"ninja and g\+\+, and could not \(Error building extension 'quanto_cpp'\)"):
        quantized_cache(tiny_llama(), "quanto")


def test_an_unknown_backend_is_refused():
    with pytest.raises(CSKVError, match="backend is 'gptq'; expected one of hqq, quanto"):
        quantized_cache(tiny_llama(), "gptq")


def test_what_transformers_refuses_gives_its_reason(backend, monkeypatch):
    def refuses(**_):
        raise ValueError("its layers\nhave no keys")

    monkeypatch.setattr(peers, "QuantizedCache", refuses)
    with pytest.raises(CacheError, match=f"no {backend} cache for this model: its layers have no keys"):
        quantized_cache(tiny_llama(), backend)
