from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.cli.conftest import Run
from tests.cli.support import TEXT, last_json, mistake, save_llama

PROMPT = TEXT[:200]


@pytest.fixture(scope="module")
def full_rank(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained adapter that loses nothing."""
    import cskv
    from cskv.compression.initialise import initialise

    folder = tmp_path_factory.mktemp("adapters") / "full"
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    config = cskv.CSKVConfig(k_density=1.0, v_density=1.0, window=8, group=4, init="svd")
    initialise(model, config).save_pretrained(folder)
    return folder


def expected_text(model_folder: Path, tokens: int) -> str:
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def test_full_rank_says_what_the_plain_model_says(run: Run, model_folder: Path, full_rank: Path) -> None:
    result = run("generate", "--adapter", full_rank, "--prompt", PROMPT, "--max-new-tokens", 20)
    report = last_json(result)
    assert report["text"] == expected_text(model_folder, 20)
    assert report["compressed"] is True
    assert result.stdout.startswith(report["text"])
    assert report["prompt_tokens"] == len(PROMPT.encode())


@pytest.mark.parametrize("attention", ["torch", "reference", "rebuild"])
def test_any_attention_says_the_same(run: Run, model_folder: Path, full_rank: Path, attention: str) -> None:
    options = ["--adapter", full_rank, "--prompt", PROMPT, "--max-new-tokens", 20, "--attention", attention]
    assert last_json(run("generate", *options))["text"] == expected_text(model_folder, 20)


def test_unknown_attention_is_one_line(run: Run, full_rank: Path) -> None:
    options = ["--adapter", full_rank, "--prompt", PROMPT, "--attention", "flash"]
    assert "expected one of auto, triton, cpu, torch, reference" in mistake(run("generate", *options))


def test_bytes_are_those_of_the_tensors(run: Run, model_folder: Path) -> None:
    options = ["--model-path", model_folder, "--prompt", PROMPT, "--max-new-tokens", 20]
    report = last_json(
        run("generate", *options, "--use-init-params", "--init", "svd", "--k-density", 0.25, "--v-density", 0.25)
    )
    cache = report["cache"]
    assert report["new_tokens"] == 20
    assert cache["tokens"] == 219  # the last token that was generated has not been fed back
    assert cache["payload_bytes"] == 219 * 2 * (4 + 4) * 4  # layers x ranks x bytes of fp32
    assert cache["uncompressed_bytes"] == 219 * 2 * (16 + 16) * 4
    assert cache["position_bytes"] >= 219 * 4
    assert cache["scale_bytes"] == cache["minimum_bytes"] == 0
    assert cache["total_bytes"] == sum(
        cache[f"{kind}_bytes"] for kind in ("payload", "window", "position", "slack", "other")
    )


def test_origin_model_is_uncompressed(run: Run, model_folder: Path) -> None:
    report = last_json(run("generate", "-m", model_folder, "--use_origin_model", "-p", PROMPT, "-n", 12))
    assert report["compressed"] is False
    assert report["cache"]["total_bytes"] == report["cache"]["uncompressed_bytes"]
    assert report["text"] == expected_text(model_folder, 12)


def test_window_options_replace_the_adapters_own(run: Run, full_rank: Path) -> None:
    base = ["generate", "--adapter", full_rank, "--prompt", PROMPT, "--max-new-tokens", 2]
    own = last_json(run(*base))["cache"]["window_bytes"]
    wide = last_json(run(*base, "--window", 64, "--group", 4))["cache"]["window_bytes"]
    token = 2 * (32 + 32) * 4  # layers x (keys and values, and at full rank as many latents to come) x bytes of fp32
    assert own <= (8 + 4) * token < 64 * token <= wide


def test_sinks_replace_the_adapters_own_and_stay_with_another_window(run: Run, full_rank: Path) -> None:
    base = ["generate", "--adapter", full_rank, "--prompt", PROMPT, "--max-new-tokens", 2, "--window", 0, "--group", 1]
    sizes = [last_json(run(*base, *more))["cache"]["window_bytes"] for more in ([], ["--sinks", 5], ["--sinks", 0])]
    own = last_json(run("inspect", full_rank))["settings"]["sinks"]
    token = 2 * 2 * 16 * 4  # layers x keys and values of 16 channels x bytes of fp32: sinks have no latents to come
    assert sizes[1] - sizes[2] == 5 * token
    assert sizes[0] - sizes[2] == own * token


def test_an_adapter_folder_stands_for_its_base_model(run: Run, full_rank: Path) -> None:
    by_model = last_json(run("generate", "--model-path", full_rank, "--prompt", PROMPT, "-n", 4))
    by_adapter = last_json(run("generate", "--adapter", full_rank, "--prompt", PROMPT, "-n", 4))
    assert by_model["compressed"] is True
    assert by_model["text"] == by_adapter["text"]
    assert by_model["cache"] == by_adapter["cache"]


def test_sampling_depends_on_the_seed_alone(run: Run, model_folder: Path) -> None:
    options = ["generate", "-m", model_folder, "--use-origin-model", "--prompt", PROMPT, "-n", 16, "--temperature", 1]
    first, again, other = (last_json(run(*options, "--seed", seed))["text"] for seed in (1, 1, 2))
    assert first == again != other


def test_without_a_prompt_a_record_is_asked(run: Run, model_folder: Path) -> None:
    pytest.importorskip("wonderwords")
    result = run("generate", "-m", model_folder, "--use-origin-model", "--lines", 1, "-n", 2)
    report = last_json(result)
    assert report["correct"] is False
    assert f"expected {report['expected']}: wrong" in result.stderr


def test_a_prompt_file(run: Run, model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("naïve – prompt", encoding="utf-8")
    report = last_json(
        run("generate", "-m", model_folder, "--use-origin-model", "--prompt-file", "prompt.txt", "-n", 1)
    )
    assert report["prompt_tokens"] == len("naïve – prompt".encode())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--prompt", "  "], "the prompt is empty"),
        (["--prompt", "a", "--prompt-file", "b"], "not both"),
        (["--prompt-file", "absent.txt"], "absent.txt"),
        (["--prompt", "a", "--k_density", "0"], "k_density is 0.0"),
        (["--prompt", "a", "--v-density", "1.5"], "v_density is 1.5"),
        (["--prompt", "a", "--k-density", "0.01", "--use-init-params", "--init", "svd"], "rounds to rank 0"),
        (["--prompt", "a", "--k_bits", "1"], "k_bits is 1; expected 2 to 8, or 16"),
        (["--prompt", "a", "--use-window", "--window", "3"], "not both"),
        (["--prompt", "a", "--use-init-params", "--use-asvd"], "there are no calibration statistics"),
        (
            ["--prompt", "a", "--use-init-params", "--init", "svd", "--cache-implementation", "static"],
            "cannot hold compressed tokens",
        ),
        (["--prompt", "a"], "no adapter at outputs/adapters/tiny/k0.2-v0.2-fisher-pca-window0-group1"),
        (["--prompt", "a", "--use-origin-model", "--chat"], "no chat template"),
        (["--prompt", "a", "--use-origin-model", "--device", "cuda:99"], "cannot be used here"),
        (["--prompt", "a", "--use-origin-model", "--dtype", "int3"], "expected one of auto"),
        (["--prompt", "a", "--use-origin-model", "--attn-impl", "telepathy"], "cannot load the model"),
        (["--prompt", "a", "--use-origin-model", "-n", "0"], "expected at least 1"),
        (["--lines", "0", "--use-origin-model"], "at least 1 line"),
        (["--prompt", "a", "--model-id", "a/b"], "without slashes"),
        (["--prompt", "a", "--logging-level", "LOUD"], "logging level is 'LOUD'"),
    ],
)
def test_mistakes_are_one_line(run: Run, model_folder: Path, options: list[str], says: str) -> None:
    assert says in mistake(run("generate", "--model-path", model_folder, *options))


@pytest.mark.parametrize("path", ["./no/such/model", "/no/such/model", "nobody-has-this-model"])
def test_unknown_model(run: Run, path: str) -> None:
    line = mistake(run("generate", "--model-path", path, "--use-origin-model", "--prompt", "a"))
    assert path in line


def test_unknown_adapter(run: Run) -> None:
    for name in ("./nowhere", "nobody/has-this-adapter"):
        assert name in mistake(run("generate", "--adapter", name, "--prompt", "a"))


def test_adapter_of_another_model(run: Run, full_rank: Path, tmp_path: Path) -> None:
    other = save_llama(tmp_path / "other", seed=1, hidden_size=64)
    line = mistake(run("generate", "--adapter", full_rank, "--model-path", other, "--prompt", "a"))
    assert "hidden_size 32, this model has 64" in line


def test_adapter_that_is_cut_short(run: Run, full_rank: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in full_rank.iterdir():
        data = file.read_bytes()
        (damaged / file.name).write_bytes(data[: len(data) // 2] if file.suffix == ".safetensors" else data)
    assert "truncated or corrupted" in mistake(run("generate", "--adapter", damaged, "--prompt", "a"))
    assert "truncated or corrupted" in mistake(run("inspect", damaged))


def test_base_model_that_is_cut_short(run: Run, model_folder: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in model_folder.iterdir():
        data = file.read_bytes()
        (damaged / file.name).write_bytes(data[: len(data) // 2] if file.suffix == ".safetensors" else data)
    line = mistake(run("generate", "--model-path", damaged, "--use-origin-model", "--prompt", "a"))
    assert "truncated or corrupted" in line


def test_unsupported_architecture(run: Run, model_folder: Path, tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path / "gpt2"
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=300)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(folder)
    line = mistake(run("generate", "--model-path", folder, "--use-init-params", "--init", "svd", "--prompt", "a"))
    assert "GPT2LMHeadModel has no attention module" in line


def test_the_last_line_is_json_even_when_text_is_streamed(run: Run, full_rank: Path) -> None:
    result = run("generate", "--adapter", full_rank, "--prompt", PROMPT, "-n", 5)
    *_, last = result.stdout.splitlines()
    assert json.loads(last)["command"] == "generate"
