from __future__ import annotations

import io
import json

import pytest
from demo import adapters, run
from demo.run import run_demo, summary
from demo.settings import VARIANTS, DemoSettings
from rich.console import Console
from rich.progress import Progress

from tests.evaluation.support import character_tokenizer, tiny_llama

TOKENIZER = character_tokenizer()
SETTINGS = DemoSettings(
    num_lines=2,
    cases=2,
    batch_size=2,
    sample_len=72,  # so that some tokens are read from latents
    calibration_samples=3,
    train_samples=6,
    allocation_samples=2,
    byte_ratio=0.2,
    texts=2,
    text_tokens=70,
    speed_repeats=1,
)


@pytest.fixture(scope="module")
def model():
    return tiny_llama(vocab_size=len(TOKENIZER))


def progress() -> Progress:
    return Progress(console=Console(file=io.StringIO(), width=160))


def test_the_demo_compares_all_variants_and_writes_its_files(model, tmp_path):
    printed = progress()
    results = run_demo(model, TOKENIZER, tmp_path, SETTINGS, printed)
    rows = results["rows"]
    assert [row["name"] for row in rows] == [variant.name for variant in VARIANTS]
    assert rows[0]["ratio"] == 1.0
    # 2 layers, keys and values, 16 channels of 4 bytes
    assert rows[0]["bytes_per_token"] == 2 * 2 * 16 * 4
    assert rows[4]["ratio"] < rows[1]["ratio"] < 1.0
    assert rows[2]["bytes_per_token"] == rows[3]["bytes_per_token"] == rows[4]["bytes_per_token"]
    assert all(row["perplexity"] > 1 and row["tokens_per_second"] > 0 for row in rows)
    assert json.loads((tmp_path / "results.json").read_text())["rows"] == json.loads(json.dumps(rows))
    for name in ("demo.png", "training.png", "adapters/80-trained/model.safetensors", "adapters/80-svd/README.md"):
        assert (tmp_path / name).stat().st_size > 0
    log = (tmp_path / "training" / "80-trained" / "train_log.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in log]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    text = printed.console.file.getvalue()
    assert all(row["name"] in text for row in rows)
    assert results["example"]["expected"] in text
    last_line = json.loads(json.dumps(summary(results, tmp_path), allow_nan=False))
    assert [row["key"] for row in last_line["rows"]] == [variant.key for variant in VARIANTS]
    assert "details" not in last_line["rows"][0]


def test_an_interrupted_run_goes_on_without_doing_anything_twice(model, tmp_path, monkeypatch):
    measured = run.measure
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]

    def interrupted_measure(*args):
        if args[2].key == "80-svd":
            raise KeyboardInterrupt
        return measured(*args)

    monkeypatch.setattr(run, "measure", interrupted_measure)
    with pytest.raises(KeyboardInterrupt):
        run_demo(model, TOKENIZER, tmp_path, SETTINGS, progress())
    assert not (tmp_path / "results.json").exists()
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
    first = json.loads((tmp_path / "rows" / "50-trained.json").read_text())

    def refuse(*_args, **_kwargs):
        pytest.fail("done already")

    again = []
    monkeypatch.setattr(adapters, "train", refuse)
    monkeypatch.setattr(adapters, "calibrate", refuse)
    monkeypatch.setattr(run, "measure", lambda *args: again.append(args[2].key) or measured(*args))
    results = run_demo(model, TOKENIZER, tmp_path, SETTINGS, progress())
    assert again == ["80-svd", "80-asvd", "80-trained", "80-pca", "mixed"]
    assert results["rows"][1] == first
