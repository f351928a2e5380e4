"""Models in GGUF files: dequantised right, named by one string, and every damage is one line."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import cskv
from cskv.adapter.card import model_card
from cskv.errors import CSKVError
from cskv.models.gguf import checkpoint_name, find_gguf, load_gguf, load_gguf_tokenizer, save_dequantised
from cskv.models.survey import survey

pytest.importorskip("gguf")
import gguf

from tests.gguf_files import TEMPLATE, dequantised, quantise_, tiny_llama, write_gguf

TOKENS = torch.arange(5, 45)[None]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tiny_llama())


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(TOKENS).logits


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "F16"])
def test_weights_are_those_that_the_file_holds(tmp_path: Path, kind: str) -> None:
    original = tiny_llama()
    path = write_gguf(tmp_path / "a.gguf", original, kind)
    model = load_gguf(path, dtype=torch.float32)
    for layer, known in zip(model.model.layers, original.model.layers):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            weight = getattr(layer.self_attn, name).weight
            assert torch.equal(weight, dequantised(getattr(known.self_attn, name).weight, kind)), name
    torch.testing.assert_close(logits(model), logits(quantise_(original, kind)))


def test_a_loaded_model_is_a_plain_one_in_bfloat16(file: Path, tmp_path: Path) -> None:
    model = load_gguf(file)
    assert type(model) is LlamaForCausalLM
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.config.name_or_path == str(file)
    assert not hasattr(model.config, "quantization_config")
    save_dequantised(file, tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == torch.bfloat16
    assert torch.equal(logits(again), logits(model))
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == TEMPLATE


def test_the_tokenizer_is_in_the_file(file: Path) -> None:
    tokenizer = load_gguf_tokenizer(file)
    assert tokenizer.decode(tokenizer("the cache")["input_ids"]) == "the cache"
    assert tokenizer.eos_token == "<end>"
    said = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert said == "<user>hello"


def test_a_file_of_the_same_name_in_the_working_folder_is_not_taken(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tiny_llama()
    torch.nn.init.ones_(other.model.embed_tokens.weight)
    write_gguf(tmp_path / file.name, other)
    monkeypatch.chdir(tmp_path)
    assert float(load_gguf(file).model.embed_tokens.weight.detach().min()) < 0


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def llama3_divisors() -> np.ndarray:
    """Llama 3.1's, as transformers makes them."""
    plain = tiny_llama(rope_parameters={"rope_type": "default", "rope_theta": 5e5}).model.rotary_emb.inv_freq
    scaled = tiny_llama(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}).model.rotary_emb.inv_freq
    return (plain / scaled).numpy()


def test_rotary_frequencies_are_scaled_as_the_file_says(tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}
    extra = {"rope_freqs.weight": llama3_divisors()}
    path = write_gguf(tmp_path / "3.gguf", tiny_llama(rope_parameters=rope), extra=extra)
    model = load_gguf(path, dtype=torch.float32)
    assert {name: model.config.rope_parameters[name] for name in rope} == pytest.approx(rope)
    torch.testing.assert_close(logits(model), logits(quantise_(tiny_llama(rope_parameters=rope), "Q8_0")))
    rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0}
    said = {"llama__rope__scaling__type": "linear", "llama__rope__scaling__factor": 8.0}
    model = load_gguf(write_gguf(tmp_path / "l.gguf", tiny_llama(rope_parameters=rope), **said), dtype=torch.float32)
    torch.testing.assert_close(logits(model), logits(quantise_(tiny_llama(rope_parameters=rope), "Q8_0")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "clip"}, "transformers cannot read .*clip"),
        (
            {"without": "blk.1.attn_k.weight"},
            "lacks 1 weights of a llama, for instance model.layers.1.self_attn.k",
        ),
        ({"llama__rope__scaling__type": "yarn", "llama__rope__scaling__factor": 4.0}, "by yarn scaling"),
        ({"extra": {"rope_freqs.weight": np.full(8, 3.0, np.float32)}}, "rope_freqs.weight other than Llama 3.1's"),
        ({"extra": {"rope_factors_long.weight": np.ones(8, np.float32)}}, "by rope_factors_long.weight"),
        ({"split__count": 3}, "is one part of 3; join them"),
    ],
)
def test_a_model_that_would_be_read_wrong_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write_gguf(tmp_path / "a.gguf", tiny_llama(), **change)
    with pytest.raises(CSKVError, match=message):
        load_gguf(path)


def garbled(content: bytes) -> bytes:
    """The length of the first string becomes a number beyond the file."""
    return content[:24] + b"\xff" * 8 + content[32:]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: b"", "is no GGUF file"),
        (lambda content: b"\x80\x02" + content, "is no GGUF file"),
        (lambda content: content[:4], "truncated or damaged in its header"),
        (lambda content: content[:300], "truncated or damaged in its header"),
        (garbled, "truncated or damaged in its header"),
        (lambda content: content[:4] + b"\x09" + content[5:], "is of GGUF version 9; expected 2 or 3"),
        (lambda content: content[:-700], "is truncated: it has .* bytes of"),
    ],
)
def test_a_damaged_file_is_refused(file: Path, tmp_path: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    path = tmp_path / "damaged.gguf"
    path.write_bytes(damage(file.read_bytes()))
    with pytest.raises(CSKVError, match=message):
        load_gguf(path)
    with pytest.raises(CSKVError, match=message):
        load_gguf_tokenizer(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for name in (tmp_path / "a.gguf", "a.gguf", "./b/c/a.gguf"):
        with pytest.raises(CSKVError, match=r"GGUF file '.*a.gguf' does not exist"):
            find_gguf(name)
    with pytest.raises(CSKVError, match="no GGUF file 'owner/name/a.gguf' here, and the hub gave none"):
        find_gguf("owner/name/a.gguf")


def test_without_the_package_the_extra_is_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("cskv.models.gguf.find_spec", lambda name: None if name == "gguf" else find(name))
    with pytest.raises(CSKVError, match=r"needs the package gguf: pip install 'cskv\[gguf\]'"):
        load_gguf(file)


def test_one_name_for_a_model(file: Path, tmp_path: Path) -> None:
    assert checkpoint_name(str(file)) == str(file)
    assert checkpoint_name(str(file.parent)) == str(file)
    assert checkpoint_name(f"{file.parent}/", file.name) == str(file)
    assert checkpoint_name("owner/name", "a.gguf") == "owner/name/a.gguf"
    assert checkpoint_name("owner/name") == "owner/name"
    (tmp_path / "a.gguf").touch()
    (tmp_path / "b.gguf").touch()
    with pytest.raises(CSKVError, match="holds 2 GGUF files; name one with --gguf-file: a.gguf, b.gguf"):
        checkpoint_name(str(tmp_path))
    with pytest.raises(CSKVError, match="give a folder or hub id with it"):
        checkpoint_name(str(file), "a.gguf")
    (tmp_path / "config.json").touch()
    assert checkpoint_name(str(tmp_path)) == str(tmp_path)


def test_an_adapter_finds_its_gguf_base_again(file: Path, tmp_path: Path) -> None:
    model = load_gguf(file)
    adapter = cskv.initialise(model, cskv.CSKVConfig(0.5, 0.5, window=4, group=4, init="svd"))
    adapter.save_pretrained(tmp_path / "adapter")
    assert cskv.CSKVAdapter.from_pretrained(tmp_path / "adapter").base.name == str(file)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert found.dtype == torch.bfloat16
    cskv.detach(found)
    assert torch.equal(logits(found), logits(model))


def test_an_adapter_of_the_original_goes_with_its_gguf_and_no_other_model_does(tmp_path: Path) -> None:
    original, file = tiny_llama(), write_gguf(tmp_path / "a.gguf", tiny_llama(), "Q4_0")
    settings = cskv.CSKVConfig(0.5, 0.5, window=4, group=4, init="svd")
    cskv.attach(load_gguf(file), cskv.initialise(original, settings)).detach()
    cskv.attach(original, cskv.initialise(load_gguf(file), settings)).detach()
    torch.nn.init.normal_(original.model.layers[1].self_attn.k_proj.weight)
    with pytest.raises(cskv.AdapterError, match="key and value weights differ by"):
        cskv.attach(original, cskv.initialise(load_gguf(file), settings))


def test_a_model_that_transformers_loaded_is_named_by_its_file(file: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    name = survey(model).base.name
    assert checkpoint_name(name) == str(file)


def test_a_card_names_the_repository_on_the_hub() -> None:
    base = cskv.BaseModelInfo("owner/name/a.gguf", "llama", 64, 2)
    description = {"base_model": vars(base), "compression": cskv.CSKVConfig().to_dict(), "ranks": {}, "metrics": {}}
    assert "base_model: owner/name\n" in model_card(description)
    assert "compressor for owner/name/a.gguf" in model_card(description)


def test_projections_left_packed_are_read_through_their_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = pytest.importorskip("transformers.integrations.gguf.kernels")
    from transformers.integrations.gguf.utils import GgufLinear

    class Kernel:
        @staticmethod
        def mul_mat_vec(blocks: Any, x: Any, kind: int, rows: int) -> Any:
            return x.float() @ kernels.dequantize(blocks, kind, torch.float32).reshape(rows, -1).T

    monkeypatch.setattr(kernels, "_gguf_kernel", Kernel)
    form = gguf.GGMLQuantizationType.Q4_0
    packed, plain = tiny_llama(), quantise_(tiny_llama(), "Q4_0")
    for layer, known in zip(packed.model.layers, plain.model.layers):
        for name in ("k_proj", "v_proj"):
            linear = getattr(layer.self_attn, name)
            left = GgufLinear(linear.in_features, linear.out_features, int(form))
            left.weight.data = torch.from_numpy(gguf.quantize(linear.weight.detach().numpy(), form))
            setattr(layer.self_attn, name, left)
            torch.testing.assert_close(getattr(known.self_attn, name).weight, dequantised(linear.weight, "Q4_0"))
    config = cskv.CSKVConfig(0.5, 0.5, window=4, group=4, init="svd")
    adapters = [cskv.initialise(model, config) for model in (packed, plain)]
    for index in (0, 1):
        for kind in ("k", "v"):
            ours, theirs = (getattr(adapter.factors(index), kind) for adapter in adapters)
            torch.testing.assert_close(ours.up @ ours.down, theirs.up @ theirs.down, rtol=1e-3, atol=1e-5)
    assert adapters[0].base.signature is not None
    assert adapters[0].base.signature.packed
    with cskv.attach(packed, adapters[0]):
        assert packed.generate(TOKENS, max_new_tokens=3, do_sample=False).shape == (1, TOKENS.shape[1] + 3)


def test_a_file_on_the_hub_is_named_with_its_commit(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "snapshots" / ("a" * 40)
    (snapshot / "sub").mkdir(parents=True)
    (snapshot / "sub" / "tiny.gguf").symlink_to(file)

    def download(repository: str, _refusal: str, *, allow_patterns: list[str], revision: str) -> Path:
        assert (repository, allow_patterns, revision) == ("owner/name", ["sub/tiny.gguf"], "main")
        return snapshot

    monkeypatch.setattr("cskv.models.gguf.download", download)
    model = load_gguf("owner/name/sub/tiny.gguf", revision="main")
    base = survey(model).base
    assert (base.name, base.revision) == ("owner/name/sub/tiny.gguf", "a" * 40)
    with pytest.raises(CSKVError, match="owner/name on the hub has no file 'b.gguf'"):
        monkeypatch.setattr("cskv.models.gguf.download", lambda *_args, **_kwargs: snapshot)
        load_gguf("owner/name/b.gguf")
