from __future__ import annotations

import pytest

from cskv.data.cases import Case


def case(*answers: str, last_integer: bool = False) -> Case:
    return Case("task", 1, "context ", "question", answers, last_integer=last_integer)


@pytest.mark.parametrize(
    ("output", "right"),
    [
        ("<46779>", 1),
        ("line 3 is 46779", 1),
        ("46779 or 46780", 0),
        ("467790", 0),
        ("0046779", 1),
        ("", 0),
        ("none", 0),
    ],
)
def test_longeval_scores_the_last_integer(output, right):
    assert case("46779", last_integer=True).score(output) == right


@pytest.mark.parametrize(
    ("output", "score"),
    [
        ("123, 456 and 789", 1.0),
        ("789 then 123", 2 / 3),
        ("123456789", 0.0),  # a number has to stand alone
        ("1234 and 0456", 0.0),
        ("<123>", 1 / 3),
        ("", 0.0),
    ],
)
def test_needles_score_the_share_of_answers_that_occur(output, score):
    assert case("123", "456", "789").score(output) == pytest.approx(score)


def test_words_are_found_whatever_their_case():
    assert case("San Francisco").score("it was SAN FRANCISCO.") == 1


def test_a_word_has_to_stand_alone():
    assert case("cat", "dog").score("1. Category 2. dog") == 0.5
    assert case("cat").score("concat cats") == 0


def test_a_line_ends_the_answer_where_one_number_is_asked_for():
    assert case("12").is_over("it is 12\n")
    assert not case("12").is_over("it is 12")
    assert not case("12").is_over("it is\n1")
    assert not case("12", "13").is_over("12\n")
    assert not case("word").is_over("3 words\n")
    assert case("12").prompt == "context question"
