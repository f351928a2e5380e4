from __future__ import annotations

import itertools
import re

import pytest

from cskv.data import offline
from cskv.data.lines import make_case
from cskv.data.mixed import PIECE_CHARACTERS, mixed_source


@pytest.fixture(autouse=True)
def few_documents(monkeypatch):
    documents = [(f"stdlib/{i}", f"def function_{i}():\n    return {i}\n" * 40) for i in range(8)]
    monkeypatch.setattr(offline, "documents", lambda split: iter(documents))


def test_text_and_records_take_turns_the_same_way_each_time():
    first = list(itertools.islice(mixed_source(20).read(3), 6))
    assert first == list(itertools.islice(mixed_source(20).read(3), 6))
    assert first != list(itertools.islice(mixed_source(20).read(4), 6))
    assert ["REGISTER_CONTENT" in text for text in first] == [False, True] * 3
    assert all(len(text) <= PIECE_CHARACTERS for text in first[::2])


def test_a_record_is_followed_by_the_answer_to_its_question():
    record = next(itertools.islice(mixed_source(20).read(0), 1, None))
    key = re.search(r"in line (\S+)\? I need", record)[1]
    line = re.search(rf"line {key}: REGISTER_CONTENT is <\d+>\n", record)[0]
    assert record.endswith(line)
    assert record.count(line) == 2
    assert 2 <= record.count("\nline ") <= 20


def test_no_record_is_an_evaluation_case():
    records = set(itertools.islice(mixed_source(2).read(0), 1, 60, 2))
    assert not any(record.startswith(make_case(2, seed).prompt) for record in records for seed in range(100))
