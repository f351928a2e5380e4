"""A whole evaluation of tiny methods: rows, resuming, and that nothing is mixed."""

from __future__ import annotations

import dataclasses
import functools
import json

import pytest

from cskv.attachment.attach import attachment_of
from cskv.compression.initialise import initialise
from cskv.config import CSKVConfig
from cskv.errors import DataError
from cskv.evaluation import material, runner
from cskv.evaluation.identity import model_facts
from cskv.evaluation.reference import Reference
from cskv.evaluation.results import KEY, open_run, read_run
from cskv.evaluation.runner import evaluate, todo
from cskv.evaluation.settings import EvaluationSettings
from cskv.methods.method import compressed, uncompressed
from tests.data.support import texts_source
from tests.evaluation.support import character_tokenizer, tiny_llama

pytest.importorskip("wonderwords")

TOKENIZER = character_tokenizer()
TEXT = "".join(f"sentence {index} of a text to be read.\n" for index in range(200))
SETTINGS = EvaluationSettings(
    tasks=("lines", "niah-single", "perplexity", "continuation"),
    lines=(2,),
    tokens=(700,),
    depths=(0.0, 1.0),
    cases=3,
    texts=2,
    text_tokens=(80,),
    continued=16,
    max_new_tokens=3,
)


@pytest.fixture(autouse=True)
def _short_texts(monkeypatch):
    source = texts_source([TEXT, TEXT[::-1], TEXT.upper()])
    monkeypatch.setattr(material, "open_source", lambda name, split: source)


@pytest.fixture(scope="module")
def model():
    return tiny_llama(vocab_size=len(TOKENIZER))


def svd(model, density: float = 0.25, name: str = "SVD"):
    return compressed(
        initialise(model, CSKVConfig(density, density, init="svd", window=8, group=8, sinks=0)), name, density
    )


def timeless(rows):
    return [{name: value for name, value in row.items() if name != "speed"} for row in rows]


def start(model, path, settings=SETTINGS):
    return open_run(path, settings.to_dict(), model_facts(model), {"cpu": "any"})


def test_rows_of_all_tasks(model, tmp_path):
    shares = []
    run = start(model, tmp_path / "run.json")
    evaluate(
        model, TOKENIZER, [uncompressed(), svd(model)], SETTINGS, run, on_work=lambda _, share: shares.append(share)
    )
    rows = read_run(run.path).rows
    assert sum(shares) == pytest.approx(2 * 6)  # methods x (2 tasks x 2 protocols + 2 texts)
    assert len(rows) == 2 * 7  # perplexity gives two
    assert len({tuple(row[name] for name in KEY) for row in rows}) == len(rows)
    for row in rows:
        expected = {"lines": {"n", "score", "low", "high"}, "niah-single": {"n", "score", "cells"}}
        expected |= {"perplexity": {"perplexity", "nll"}, "agreement": {"top1", "kl", "positions"}}
        expected |= {"continuation": {"perplexity", "top1", "kl", "positions"}}
        assert expected[row["task"]] <= row.keys()
        assert row["cache"]["ratio"] == (1.0 if row["method"] == "uncompressed" else pytest.approx(0.35, abs=0.15))
        assert row["speed"]["device"] == "cpu"
        assert 0 < row["speed"]["seconds"] < 60
        assert row["speed"]["tokens_per_second"] > 0
        assert ("reading" in row) == (row["task"] not in ("lines", "niah-single"))
    assert {row["method"]: row["reading"] for row in rows if "reading" in row} == {
        "uncompressed": "pieces", "SVD": "whole"
    }  # fmt: skip
    cells = next(row["cells"] for row in rows if row["task"] == "niah-single")
    assert [(cell["depth"], cell["n"]) for cell in cells] == [(0.0, 2), (1.0, 1)]
    outputs = next(row["outputs"] for row in rows if row["task"] == "lines")
    assert len(outputs) == 3
    assert run.methods["SVD 25 %"]["kind"] == "cskv"


def test_an_interrupted_run_measures_only_what_is_missing(model, tmp_path):
    methods = [uncompressed(), svd(model)]
    whole, cut = start(model, tmp_path / "whole.json"), start(model, tmp_path / "cut.json")
    evaluate(model, TOKENIZER, methods, SETTINGS, whole, keep_outputs=False)

    class Stop(Exception):
        pass

    def stop(what: str, _share: float) -> None:
        if "niah" in what and "SVD" in what:
            raise Stop

    with pytest.raises(Stop):
        evaluate(model, TOKENIZER, methods, SETTINGS, cut, keep_outputs=False, on_work=stop)
    again = start(model, tmp_path / "cut.json")
    assert 0 < len(again.rows) < len(whole.rows)
    measured = []
    evaluate(
        model, TOKENIZER, methods, SETTINGS, again, keep_outputs=False, on_work=lambda what, _: measured.append(what)
    )
    assert not any("lines" in what for what in measured)
    assert timeless(json.loads(json.dumps(again.rows))) == timeless(whole.rows)
    assert todo(again, methods, SETTINGS) == []


def test_another_method_of_the_same_name_is_never_mixed_in(model, tmp_path):
    settings = dataclasses.replace(SETTINGS, tasks=("perplexity",))
    run = start(model, tmp_path / "run.json", settings)
    evaluate(model, TOKENIZER, [svd(model)], settings, run)
    again = start(model, tmp_path / "run.json", settings)
    evaluate(model, TOKENIZER, [svd(model)], settings, again)  # the same one
    with pytest.raises(DataError, match="holds figures of another method called SVD 25 %"):
        evaluate(model, TOKENIZER, [svd(tiny_llama(1, len(TOKENIZER)))], settings, again)


def test_two_methods_need_two_names(model, tmp_path):
    with pytest.raises(DataError, match="several methods are called SVD 25 %"):
        evaluate(model, TOKENIZER, [svd(model), svd(model)], SETTINGS, start(model, tmp_path / "run.json"))


def test_a_method_that_only_compresses_prompts_is_not_asked_to_read_a_growing_text(model, tmp_path):
    prompts_only = dataclasses.replace(svd(model), streams=False, pads=False)
    tasks = {job.task for _, job in todo(start(model, tmp_path / "run.json"), [prompts_only], SETTINGS)}
    assert tasks == {"lines", "niah-single", "continuation"}


def test_the_uncompressed_text_is_generated_once_for_all_methods(model, tmp_path, monkeypatch):
    settings = dataclasses.replace(SETTINGS, tasks=("departure",), generated=12, batch_size=2)
    made, shares = [], []
    original = runner.reference_texts
    monkeypatch.setattr(runner, "reference_texts", lambda *args, **kwargs: made.append(1) or original(*args, **kwargs))
    run = start(model, tmp_path / "run.json", settings)
    methods = [uncompressed(), svd(model), svd(model, 0.5)]
    evaluate(model, TOKENIZER, methods, settings, run, on_work=lambda _, share: shares.append(share))
    assert len(made) == 1
    assert sum(shares) == pytest.approx(3)
    rows = read_run(run.path).rows
    assert [row["method"] for row in rows] == ["uncompressed", "SVD", "SVD"]
    assert all((row["task"], row["size"], row["protocol"], row["n"]) == ("departure", 80, None, 2) for row in rows)
    plain, low, _ = rows
    assert plain["equal_tokens"] == [12, 12]
    assert (plain["top1"], plain["still_equal"]) == (1.0, 1.0)
    assert plain["kl"] == pytest.approx(0, abs=1e-6)
    assert plain["speed"]["tokens_per_second"] > 0
    assert low["kl"] > 0
    assert low["tokens"] == 2 * 12  # what is read is the generated text alone
    assert (low["positions"][0]["start"], low["positions"][-1]["stop"]) == (79, 91)
    assert all(text["reference"].startswith(text["output"][: text["equal"]]) for text in low["outputs"])
    assert "perplexity" not in low


def test_a_method_that_cannot_pad_generates_text_by_text(model, tmp_path):
    settings = dataclasses.replace(SETTINGS, tasks=("departure",), generated=4)
    alone = dataclasses.replace(svd(model), streams=False, pads=False)
    run = start(model, tmp_path / "run.json", settings)
    seen = []
    hook = model.model.register_forward_hook(lambda _module, _args, out: seen.append(out.last_hidden_state.shape[0]))
    try:
        evaluate(model, TOKENIZER, [alone], settings, run)
    finally:
        hook.remove()
    assert set(seen) == {1}


def test_the_uncompressed_model_reads_texts_and_prompts_once_for_all_methods(model, tmp_path, monkeypatch):
    settings = dataclasses.replace(SETTINGS, tasks=("perplexity", "continuation"))
    plain, read = model.forward, []

    @functools.wraps(plain)
    def counted(*args, **kwargs):
        read.append(attachment_of(model) is None)
        return plain(*args, **kwargs)

    states, made = Reference._read, []
    monkeypatch.setattr(Reference, "_read", lambda self, rows: made.append(rows.shape) or states(self, rows))
    monkeypatch.setattr(model, "forward", counted)
    methods = [svd(model, density, f"SVD {density}") for density in (0.25, 0.5, 0.75)]
    read.clear()  # what making them took
    evaluate(model, TOKENIZER, methods, settings, start(model, tmp_path / "run.json", settings))
    assert made == [(2, 79)]
    assert read.count(False) == 2 * 3  # a prompt of each job through every method's cache
    assert read.count(True) <= 2 + 1 + 1 + 1  # a prompt of each job, the head's check and the model's signature
