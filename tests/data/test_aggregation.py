"""Tasks of aggregation: prompts that fit, the same for the same seed, and answers that a solver finds in them."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from cskv.data.aggregation import AGGREGATION, make
from cskv.errors import DataError
from tests.evaluation.support import character_tokenizer

pytest.importorskip("wonderwords")

TOKENIZER = character_tokenizer()  # a token is a character
SIZES = {"vt": 4000, "cwe": 3900, "fwe": 3000}


def tokens(text: str) -> int:
    return len(TOKENIZER(text)["input_ids"])


def last(prompt: str, first_words: str) -> str:
    """The prompt without the solved example before it."""
    return first_words + prompt.rpartition(first_words)[2]


def solve_tracking(prompt: str) -> set[str]:
    text = last(prompt, "Memorize and track")
    (asked,) = set(re.findall(r"value (\d+)", text))
    value = {}
    for name, given in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", text):
        value[name] = value.get(given, given)
    return {name for name, found in value.items() if found == asked}


def solve_common(prompt: str) -> set[str]:
    counts = Counter(re.findall(r"\d+\. (\w+)", last(prompt, "Below is a numbered list")))
    return most(counts, 10)


def solve_frequent(prompt: str) -> set[str]:
    text = prompt.partition("coded words. ")[2].partition("\nQuestion")[0]
    return most(Counter(word for word in text.split() if word != "..."), 3)


def most(counts: Counter[str], number: int) -> set[str]:
    ranked = counts.most_common()
    assert ranked[number - 1][1] > ranked[number][1]  # no tie at the edge
    return {word for word, _ in ranked[:number]}


SOLVERS = {"vt": solve_tracking, "cwe": solve_common, "fwe": solve_frequent}


@pytest.mark.parametrize("task", AGGREGATION)
@pytest.mark.parametrize("seed", range(5))
def test_answers_are_those_that_a_solver_finds_in_the_prompt(task, seed):
    case = make(task, TOKENIZER, SIZES[task], seed)
    assert SOLVERS[task](case.prompt) == set(case.answers)
    assert len(case.answers) == {"vt": 5, "cwe": 10, "fwe": 3}[task]
    assert not any(answer in case.question for answer in case.answers)
    assert case.prompt.endswith(":")


@pytest.mark.parametrize("task", AGGREGATION)
def test_prompts_are_nearly_as_long_as_they_may_be(task):
    for size in (SIZES[task], SIZES[task] - 13):
        length = tokens(make(task, TOKENIZER, size, 3).prompt)
        assert size - 250 < length <= size


@pytest.mark.parametrize("task", AGGREGATION)
def test_the_same_seed_gives_the_same_case_and_another_another(task):
    size = SIZES[task]
    assert make(task, TOKENIZER, size, 7) == make(task, TOKENIZER, size, 7)
    assert set(make(task, TOKENIZER, size, 7).answers) != set(make(task, TOKENIZER, size, 8).answers)


@pytest.mark.parametrize("task", AGGREGATION)
def test_the_share_of_answers_that_occur_is_the_score(task):
    case = make(task, TOKENIZER, SIZES[task], 1)
    assert case.score(" ".join(f"{index}. {answer}" for index, answer in enumerate(case.answers, 1))) == 1
    assert case.score(f" {case.answers[0]}, {case.answers[-1]}.") == pytest.approx(2 / len(case.answers))
    assert case.score("".join(case.answers)) == 0  # not one of them stands alone
    assert case.score(case.question) == 0


@pytest.mark.parametrize(("task", "first_words"), [("vt", "Memorize and track"), ("cwe", "Below is a numbered list")])
def test_a_solved_example_comes_first(task, first_words):
    context = make(task, TOKENIZER, SIZES[task], 2).context
    assert context.count(first_words) == 2
    example = context.partition("\n\n" + first_words)[0]
    question, _, solution = example.rpartition(":")
    assert set(re.findall(r"[A-Za-z]+", solution)) == SOLVERS[task](question)


def test_words_of_long_lists_come_more_often():
    counts = Counter(re.findall(r"\d+\. (\w+)", last(make("cwe", TOKENIZER, 9000, 0).context, "Below is")))
    assert set(counts.values()) == {30, 3}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("cwf", 1000), "task is 'cwf'; expected one of vt, cwe, fwe"),
        (("vt", 300), r"the shortest prompt of vt takes \d+ tokens; expected room for it in 300"),
        (("cwe", 700), "the shortest prompt of cwe"),
        (("fwe", 100), "the shortest prompt of fwe"),
    ],
)
def test_mistakes_are_said(arguments, complaint):
    with pytest.raises(DataError, match=complaint):
        make(arguments[0], TOKENIZER, arguments[1], 0)


def test_more_words_than_there_are_is_said(monkeypatch):
    monkeypatch.setattr("cskv.data.aggregation._words", lambda: [f"{a}{b}" for a in "abcdef" for b in "ghijkl"])
    with pytest.raises(DataError, match=r"cwe has words for \d+ tokens at most; expected fewer than 3900"):
        make("cwe", TOKENIZER, 3900, 0)
