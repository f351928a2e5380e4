"""The demo's steps on a tiny model: what is written, what is shown, and how an interrupted run goes on."""

from __future__ import annotations

import io
import json
import re
import shutil
from dataclasses import replace

import pytest
from demo import run
from demo.model import BUNDLED
from demo.run import Demo
from demo.settings import DemoSettings
from demo.show import results_table
from demo.stages import stage
from rich.console import Console

from cskv.adapter.adapter import CSKVAdapter
from cskv.compression.budget import ratio_of
from cskv.evaluation.results import Run, read_run
from cskv.methods import quantized
from cskv.report import gather, write_report
from tests.evaluation.support import character_tokenizer, tiny_llama

pytest.importorskip("matplotlib")
TOKENIZER = character_tokenizer()
BUDGETS = (0.5, 0.3)
NAMES = ["uncompressed", "CSKV 50 %", "CSKV 30 %"]
EVALUATION = DemoSettings.of("x", cases=2, seed=0).evaluation
SETTINGS = DemoSettings(
    replace(EVALUATION, tokens=(600,), texts=2, text_tokens=(90,), max_new_tokens=4),
    budgets=BUDGETS,
    samples=2,
    aside=2,
    sample_len=90,  # so that some tokens are read from latents
    answer_tokens=6,
    timed_steps=2,
)


@pytest.fixture(scope="module")
def model():
    return tiny_llama(vocab_size=len(TOKENIZER))


@pytest.fixture(autouse=True, scope="module")
def _no_peer():
    """Whether hqq is installed is another matter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(quantized.BACKENDS, "hqq", quantized.Backend("no_such_module", "hqq", 1, (4,)))
        yield


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory, few_documents):
    """Run the demo once; return it with what its last line says."""
    made = demo(model, tmp_path_factory.mktemp("demo"))
    return made, json.loads(json.dumps(made.run(), allow_nan=False))


def demo(model, out, settings=SETTINGS, **console) -> Demo:
    return Demo(model, TOKENIZER, settings, out, Console(file=io.StringIO(), width=80, highlight=False, **console))


def printed(made: Demo) -> str:
    return made.console.file.getvalue()


def test_the_demo_compresses_and_measures_a_model(finished):
    made, last = finished
    assert [row["cache"] for row in last["rows"]] == NAMES
    plain, *smaller = last["rows"]
    assert (plain["ratio"], plain["kl"]) == (1.0, 0.0)
    assert plain["bytes_per_token"] == 2 * 2 * 16 * 4  # layers, keys and values, channels, bytes
    assert 1.0 > smaller[0]["ratio"] > smaller[1]["ratio"]
    assert 0.0 < smaller[0]["kl"] < smaller[1]["kl"]
    assert all(row["tokens_per_second"] > 0 and row["perplexity"] > 1 for row in last["rows"])
    for name in ("50", "30"):
        adapter = CSKVAdapter.from_pretrained(made.out / "adapters" / name)
        assert ratio_of(adapter) <= int(name) / 100
        assert adapter.metrics["measured_kl"] >= 0


def test_without_a_terminal_every_stage_is_a_line_with_its_seconds(finished):
    text = printed(finished[0])
    found = re.findall(r"^(\w.*\S) +\d+\.\d s\b", text, re.MULTILINE)
    assert found == ["calibrate", "choose 50, 30 % of the bytes", "generate", "measure 3 caches"]
    assert "no row of transformers' quantised cache: the hqq cache needs hqq: pip install 'cskv[peers]'\n" in text
    panels = re.findall(r"^╭─ (.*?): [\d.]+ MB for 90 tokens(?:; \d+ of \d+ words are the same)? ─", text, re.MULTILINE)
    assert panels == NAMES
    assert "\x1b" not in text


def test_cskv_report_makes_a_page_of_the_result_file(finished, tmp_path):
    pytest.importorskip("jinja2")
    made, _ = finished
    assert (made.out / "kl.png").read_bytes().startswith(b"\x89PNG")
    written = write_report(gather([made.out / "results.json"]), tmp_path)
    assert "CSKV" in written.page.read_text(encoding="utf-8")
    assert written.rows == 3 * len(NAMES)  # needles, perplexity and agreement


def test_an_interrupted_run_goes_on_from_what_is_there(finished, model, tmp_path, monkeypatch):
    shutil.copytree(finished[0].out, tmp_path, dirs_exist_ok=True)
    (tmp_path / "kl.png").unlink()
    left = read_run(tmp_path / "results.json")
    left.rows = left.rows[:6]
    left.save()
    for name in ("calibrate", "allocate_each"):
        monkeypatch.setattr(run, name, lambda *_args, **_kwargs: pytest.fail("done already"))
    again = demo(model, tmp_path)
    last = again.run()
    assert "going on with the interrupted run" in printed(again)
    assert [row["cache"] for row in last["rows"]] == NAMES
    assert last["rows"][:2] == finished[1]["rows"][:2]


@pytest.mark.parametrize("changes", [{}, {"answer_tokens": 3}], ids=["finished", "other settings"])
def test_a_finished_run_and_one_of_other_settings_begin_anew_and_spare_other_files(
    changes, finished, model, tmp_path, monkeypatch
):
    shutil.copytree(finished[0].out, tmp_path, dirs_exist_ok=True)
    (tmp_path / "notes.txt").write_text("mine")
    if changes:
        (tmp_path / "kl.png").unlink()

    def interrupted(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "calibrate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo(model, tmp_path, replace(SETTINGS, **changes)).run()
    assert read_run(tmp_path / "results.json").rows == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "results.json"]


def test_the_table_fits_80_columns_and_breaks_no_word(monkeypatch):
    row = {
        "cache": "QuantizedCache (hqq) 25 %",
        "bytes_per_token": 123456.0,
        "ratio": 1.0,
        "kl": 0.01234,
        "perplexity": 12345.6,
        "needles": 1.0,
        "needles_low": 1.0,
        "needles_high": 1.0,
        "tokens_per_second": 1234.5,
    }
    where = {
        "accelerator": None,
        "cpu": "Intel(R) Xeon(R) Processor",
        "threads": 2,
        "torch": "2.13.0",
        "transformers": "5.24.0",
    }
    settings = EVALUATION.to_dict()
    found = Run(None, settings, {"name": "models/smollm2", "type": "llama", "dtype": "bfloat16"}, where, {}, [])
    console = Console(file=io.StringIO(), width=80)
    console.print(results_table(found, [row], 240.0))
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    words = ["QuantizedCache", "(hqq)", "123,456", "0.0123", "perplexity", "12,346", "(100-100)", "1234.5", "token,"]
    assert [word for word in words if word not in text] == []


def test_a_terminal_sees_bars_that_leave_the_same_lines():
    for terminal in (False, True):
        console = Console(file=io.StringIO(), width=80, force_terminal=terminal, color_system=None)
        with stage(console, "calibrate") as shown:
            shown.advance(0.5)
            shown.note = "16 samples"
        last = console.file.getvalue().splitlines()[-1]
        assert re.search(r"calibrate +0\.0 s  16 samples$", last)
        assert ("━" in console.file.getvalue()) == terminal


def test_the_bundled_model_is_asked_in_words_that_it_knows():
    bundled, other = DemoSettings.of(str(BUNDLED), 5, 1), DemoSettings.of("models/smollm2", 5, 1)
    assert (bundled.evaluation.wording, other.evaluation.wording) == ("lines", "ruler")
    assert "LongEval" in bundled.source.name
    assert other.source.name == "offline"
