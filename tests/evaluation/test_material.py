from __future__ import annotations

import json

import pytest

from cskv.data.aggregation import make
from cskv.data.lines import make_case
from cskv.errors import DataError
from cskv.evaluation import material
from cskv.evaluation.material import Material
from cskv.evaluation.settings import EvaluationSettings
from tests.data.support import texts_source
from tests.evaluation.support import character_tokenizer

pytest.importorskip("wonderwords")

TOKENIZER = character_tokenizer()


def test_seeds_ask_different_questions_and_the_same_ones_again():
    settings = EvaluationSettings(lines=(5,), cases=4)
    first = Material(TOKENIZER, settings).cases("lines", 5, 0)
    assert first == Material(TOKENIZER, settings).cases("lines", 5, 0)
    assert not set(first) & set(Material(TOKENIZER, settings).cases("lines", 5, 1))
    assert first[2] == make_case(5, 2).as_case()


def test_published_files_take_the_place_of_generated_records(tmp_path):
    path = tmp_path / "lines.jsonl"
    cases = [make_case(3, seed) for seed in range(100, 106)]
    rows = (
        {"prompt": c.prompt, "expected_number": c.expected, "random_idx": [c.key, 0], "num_lines": 3} for c in cases
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = EvaluationSettings(lines=(3, 4), lines_files=(str(path),), cases=5)
    found = Material(TOKENIZER, settings)
    assert found.cases("lines", 3, 0) == [case.as_case() for case in cases[:5]]
    assert found.cases("lines", 4, 0) == [make_case(4, index).as_case() for index in range(5)]


def test_needles_are_dealt_out_over_depths(monkeypatch):
    monkeypatch.setattr(material, "open_source", lambda *_: texts_source(["words to hide in\n" * 500]))
    settings = EvaluationSettings(tokens=(900,), cases=7, depths=(0.0, 0.5, 1.0))
    cases = Material(TOKENIZER, settings).cases("niah-single", 900, 0)
    assert [case.depth for case in cases] == [0.0, 0.5, 1.0, 0.0, 0.5, 1.0, 0.0]
    assert all(case.depth is None for case in Material(TOKENIZER, settings).cases("niah-multiquery", 900, 0))


@pytest.mark.parametrize(
    ("haystack", "hay"), [("noise", "The grass is green."), ("needles", "special magic numbers for")]
)
def test_haystacks_that_need_no_text(haystack, hay):
    settings = EvaluationSettings(tokens=(900,), cases=1, haystack=haystack)
    (case,) = Material(TOKENIZER, settings).cases("niah-single", 900, 0)
    assert case.context.count(hay) > 3


def test_too_little_text_is_said(monkeypatch):
    monkeypatch.setattr(material, "open_source", lambda *_: texts_source(["few words\n"]))
    found = Material(TOKENIZER, EvaluationSettings(tokens=(900,)))
    with pytest.raises(DataError, match="the haystack has 10 tokens; expected at least 1800"):
        found.cases("niah-single", 900, 0)
    with pytest.raises(DataError, match="only 0 texts have 1024 tokens"):
        found.texts(1024, 0)


def test_a_file_is_cut_into_texts_of_any_length(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("".join(f"{index} words in a book.\n" for index in range(9000)))  # longer than a piece of reading
    settings = EvaluationSettings(text=str(path), texts=2, text_tokens=(80_000,))
    texts = Material(TOKENIZER, settings).texts(80_000, 0)
    assert texts.shape == (2, 80_000)
    whole = path.read_text()
    assert TOKENIZER.decode(texts[1]) == whole[80_000:160_000]


def test_every_seed_reads_another_stretch_of_a_file(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("".join(f"{index} words in a book.\n" for index in range(300)))
    found = Material(TOKENIZER, EvaluationSettings(text=str(path), texts=2, text_tokens=(900,)))
    read = "".join(TOKENIZER.decode(row) for seed in (0, 1, 2) for row in found.texts(900, seed))
    assert read == path.read_text()[:5400]
    with pytest.raises(
        DataError, match="enough for 6 samples of 900; 8 were asked for .*; seed 3 takes the texts 6 to 7"
    ):
        found.texts(900, 3)


def test_tasks_of_aggregation_are_made_seed_by_seed():
    found = Material(TOKENIZER, EvaluationSettings(tokens=(3000,), cases=3))
    cases = found.cases("fwe", 3000, 1)
    assert [case.task for case in cases] == ["fwe"] * 3
    assert cases[2] == make("fwe", TOKENIZER, 3000, 1002)
