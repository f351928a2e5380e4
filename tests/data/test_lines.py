"""The LongEval lines generator against the published format."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from cskv.data import lines
from cskv.errors import DataError

pytest.importorskip("wonderwords")

OFFICIAL_ROW = {
    "random_idx": ["quiet-lamp", 1],
    "expected_number": 7,
    "num_lines": 2,
    "prompt": "any text, kept as it is ",
}


def test_same_seed_same_case_other_seed_other_case():
    assert lines.make_case(20, seed=3) == lines.make_case(20, seed=3)
    assert lines.make_case(20, seed=3) != lines.make_case(20, seed=4)


@pytest.mark.parametrize("num_lines", [1, 25, 200])
def test_case_holds_one_line_per_key_and_the_answer(num_lines: int):
    case = lines.make_case(num_lines, seed=0)
    rows = re.findall(r"^line (.+): REGISTER_CONTENT is <(\d+)>$", case.prompt, flags=re.MULTILINE)
    record = dict(rows)
    assert len(rows) == len(record) == case.num_lines == num_lines
    assert int(record[case.key]) == case.expected
    assert all(1 <= int(number) <= lines.MAX_NUMBER for number in record.values())


def test_prompt_text_word_for_word():
    case = lines.make_case(1, seed=0)
    prompt = case.prompt
    assert prompt.startswith("Below is a record of lines I want you to remember. Each line begins with 'line <line")
    assert prompt.endswith(
        f"Now the record start:\n\nline {case.key}: REGISTER_CONTENT is <{case.expected}>\n\nNow the record is over. "
        f"Tell me what is the <REGISTER_CONTENT> in line {case.key}? I need the number. "
    )


def test_an_empty_record_is_refused():
    with pytest.raises(ValueError, match="at least one line"):
        lines.make_case(0, seed=0)


def test_read_official_keeps_the_prompt(tmp_path: Path):
    path = tmp_path / "lines.jsonl"
    path.write_text(json.dumps(OFFICIAL_ROW) + "\n\n", encoding="utf-8")
    assert lines.read_official(path) == [lines.LinesCase(OFFICIAL_ROW["prompt"], 7, "quiet-lamp", 2)]


@pytest.mark.parametrize(
    ("output", "right"),
    [
        ("line quiet-lamp: REGISTER_CONTENT is <2416>\n", True),
        ("It is 17, no, 2416.", True),
        ("2416 or 17", False),
        ("24161", False),
        ("no number", False),
        ("", False),
    ],
)
def test_score_reads_the_last_integer(output: str, right: bool):
    assert lines.score(output, 2416) is right


def test_a_case_knows_its_context_question_and_depth():
    case = lines.make_case(50, seed=2)
    whole = case.as_case()
    assert whole.prompt == case.prompt
    assert whole.question.startswith("\nNow the record is over. Tell me what is the <REGISTER_CONTENT> in line ")
    assert whole.answers == (str(case.expected),)
    assert (whole.task, whole.size, whole.last_integer) == ("lines", 50, True)
    line = whole.context[round(whole.depth * len(whole.context)) :]
    assert line.startswith(f"line {case.key}: REGISTER_CONTENT is <{case.expected}>")


def test_a_prompt_without_an_end_of_record_has_no_question_apart():
    with pytest.raises(DataError, match="does not contain 'Now the record is over.'"):
        lines.LinesCase("a prompt", 7, "a-b", 2).as_case()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "holds no LongEval case"),
        ("{}\n", "row 1 of .* is no LongEval case .KeyError: 'random_idx'"),
        (json.dumps(OFFICIAL_ROW) + "\n{", "row 2 of"),
        (json.dumps({**OFFICIAL_ROW, "expected_number": "seven"}), "row 1 of .*ValueError"),
    ],
)
def test_files_of_another_kind_are_refused(tmp_path, text, complaint):
    path = tmp_path / "cases.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=complaint):
        lines.read_official(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(DataError, match="cannot read"):
        lines.read_official(tmp_path / "none.jsonl")
