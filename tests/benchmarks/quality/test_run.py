"""Suites on a tiny random model: what is measured, kept and reported."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from benchmarks.quality import run, subjects, suites
from benchmarks.quality.report import paragraphs
from benchmarks.quality.tables import Results
from cskv.evaluation.results import read_run
from tests.evaluation.support import character_tokenizer, tiny_llama

pytest.importorskip("wonderwords")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "book.txt"
    path.write_text("".join(f"sentence {index} of a text of one's own.\n" for index in range(4000)), encoding="utf-8")
    return str(path)


@pytest.fixture
def measured(tmp_path, monkeypatch, text):
    """Measures a suite on a tiny model, in a folder."""
    folder = tmp_path / "models" / "smollm2"
    model = tiny_llama(vocab_size=len(character_tokenizer()))
    model.save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    small = {"texts": 2, "text_tokens": (160,), "continued": 32, "cases": 1, "tokens": (700,), "max_new_tokens": 2}
    small["generated"] = 3
    tasks = {subjects.QUESTIONS: ("perplexity", "niah-single"), subjects.GENERATION: ("departure",)}
    subject = replace(subjects.SUBJECTS["smollm2"], settings=small, asked={}, tasks=tasks, training=2)
    monkeypatch.setattr(subjects, "MODELS", tmp_path / "models")
    monkeypatch.setitem(subjects.SUBJECTS, "smollm2", subject)
    monkeypatch.setattr(run, "ADAPTERS", tmp_path / "adapters")
    monkeypatch.setattr("benchmarks.quality.workshop.CALIBRATION", 2)
    monkeypatch.setattr("benchmarks.quality.workshop.SAMPLE_TOKENS", 160)
    monkeypatch.setattr("benchmarks.quality.workshop.TRAINING_TOKENS", 96)

    def measure(suite: str, *more: str) -> int:
        given = [suite, "--calibration", text, "--heldout", text, "--other", text, "--out", str(tmp_path), *more]
        return run.main(given)

    return measure


def test_a_suite_is_measured_once_and_goes_on(measured, tmp_path):
    assert measured("factors", "--only", "PCA 20 %", "--seed", "0") == 0
    path = tmp_path / "smollm2-factors.json"
    found = read_run(path)
    assert {(row["method"], row["budget"]) for row in found.rows} == {
        (name, 0.2) for name in ("PCA", "weighted PCA", "Fisher PCA")
    }
    assert found.settings["text"].startswith("book.txt, SHA-256 ")
    first = path.read_text()
    assert measured("factors", "--only", "PCA 20 %", "--seed", "0") == 0
    assert path.read_text() == first
    assert measured("factors", "--only", "uncompressed") == 0
    assert {row["seed"] for row in read_run(path).rows if row["method"] == "uncompressed"} == {0, 1}


def test_a_suite_with_questions_and_a_budget(measured, tmp_path):
    assert measured("caches", "--only", "CSKV 20 %", "--seed", "0") == 0
    assert measured("caches", "--only", "fp8", "--seed", "0") == 0
    rows = {(row["method"], row["task"]): row for row in read_run(tmp_path / "smollm2-caches.json").rows}
    assert {task for method, task in rows if method == "fp8"} == {"perplexity", "agreement", "niah-single"}
    assert rows["CSKV", "agreement"]["cache"]["ratio"] < 1
    block = "\n".join(paragraphs("main", Results(tmp_path)))
    assert "| CSKV, 20 % |" in block
    assert "SmolLM2-135M in float32; 2 texts of 160 tokens of book.txt, SHA-256 " in block
    assert "`python -m benchmarks.quality caches --model smollm2`" in block


def test_a_suite_of_generation(measured, tmp_path):
    assert measured("generation", "--only", "uncompressed", "--seed", "0") == 0
    (row,) = read_run(tmp_path / "smollm2-generation.json").rows
    assert (row["task"], row["generated"], row["mean_equal"]) == ("departure", 3, 3.0)
    block = "\n".join(paragraphs("generation", Results(tmp_path)))
    assert "| uncompressed | 100.0% | 3 (3-3) of 3 | 100 % (34-100) |" in block


def test_training_is_kept_with_its_adapter(measured, tmp_path):
    assert measured("widths", "--only", "4 bits, QAT layer by layer", "--seed", "0") == 0
    (folder,) = (tmp_path / "adapters" / "smollm2").glob("*/0")
    kept = sorted(path.name for path in folder.iterdir() if path.is_dir())
    assert len([name for name in kept if not name.endswith("-training")]) == 2  # before and after
    assert len([name for name in kept if name.endswith("-training")]) == 1
    configs = [json.loads((folder / name / "config.json").read_text()) for name in kept if "-" not in name]
    assert len(configs) == 2


def test_a_missing_model_is_said(measured, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(subjects, "MODELS", subjects.ROOT / "outputs" / "nowhere")
    assert measured("factors") == 2
    assert "get it with python scripts/fetch_model.py smollm2 outputs/nowhere/smollm2" in capsys.readouterr().err


@pytest.mark.parametrize("name", suites.SUITES)
def test_methods_of_a_suite_have_names_of_their_own(name):
    class Model:
        class config:
            num_key_value_heads = 2

            @classmethod
            def get_text_config(cls, decoder):
                return cls

    class Workshop:
        model = Model

    found = suites.SUITES[name].methods(Workshop())
    assert len(found) >= 6
    assert all(budget is None or 0 < budget <= 1 for _, budget in found)
