"""Needles are where they are said to be, in prompts that fit."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cskv.data.needles import KINDS, PASSKEY_TASK, SEVERAL, Haystack, NeedleMaker
from cskv.data.wording import WORDINGS
from cskv.errors import DataError
from tests.evaluation.support import character_tokenizer

pytest.importorskip("wonderwords")

TOKENIZER = character_tokenizer()  # a token is a character
HAY = [f"hay {index} stalks\n" for index in range(200)]
SINGLE = [task for task, kind in KINDS.items() if kind.has_depth]


def haystack() -> Haystack:
    return Haystack(["".join(HAY)], TOKENIZER, 1000)


def tokens(text: str) -> int:
    return len(TOKENIZER(text)["input_ids"])


@pytest.mark.parametrize("task", KINDS)
@pytest.mark.parametrize("wording", WORDINGS)
def test_every_answer_is_hidden_in_the_context_and_not_in_the_question(task, wording):
    case = NeedleMaker(task, TOKENIZER, haystack(), wording).make(2500, seed=3)
    assert 2000 < tokens(case.prompt) <= 2500
    assert len(case.answers) == {"niah-multivalue": SEVERAL, "niah-multiquery": SEVERAL}.get(task, 1)
    assert len(set(case.answers)) == len(case.answers)
    for answer in case.answers:
        assert answer in case.context
        assert answer not in case.question
    assert (case.depth is None) == (task in ("niah-multivalue", "niah-multiquery"))


@pytest.mark.parametrize("task", SINGLE)
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_the_needle_lies_at_its_depth(task, depth):
    maker = NeedleMaker(task, TOKENIZER, haystack())
    case = maker.make(4000, seed=1, depth=depth)
    body = case.context.removeprefix(maker.wording.header)
    place = body.index(case.answers[0]) / len(body)
    assert case.depth == depth
    assert place == pytest.approx(depth, abs=0.12)  # other needles and the sentence itself move it a little


def test_of_several_keys_the_one_that_is_asked_for_answers():
    case = NeedleMaker("niah-multikey", TOKENIZER, haystack(), "ruler").make(3000, seed=5)
    needles = [line for line in case.context.splitlines() if line.startswith("One of the special magic numbers for")]
    assert len(needles) == SEVERAL
    (hit,) = [line for line in needles if line.endswith(f": {case.answers[0]}.")]
    key = hit.removeprefix("One of the special magic numbers for ").partition(" is:")[0]
    assert f"special magic number for {key} mentioned" in case.question
    assert sum(f"for {key} is" in line for line in needles) == 1


def test_a_haystack_of_needles_repeats_no_key():
    case = NeedleMaker("niah-single", TOKENIZER, "needles", "lines").make(3000, seed=0)
    keys = [line.partition(":")[0] for line in case.context.splitlines() if line.startswith("line ")]
    assert len(keys) > 20
    assert len(set(keys)) == len(keys)


def test_the_same_seed_gives_the_same_case_and_another_another():
    maker = NeedleMaker("niah-single", TOKENIZER, haystack())
    assert maker.make(2000, 7) == maker.make(2000, 7)
    assert maker.make(2000, 7) != maker.make(2000, 8)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), wanted=st.integers(0, 3000))
def test_a_stretch_of_hay_is_consecutive_and_as_long_as_fits(seed, wanted):
    taken = haystack().take(wanted, random.Random(seed))
    length = sum(map(tokens, taken))
    assert length <= wanted < length + max(map(tokens, HAY)) + 1
    start = HAY.index(taken[0]) if taken else 0
    assert taken == [HAY[(start + index) % len(HAY)] for index in range(len(taken))]


def test_text_without_newline_and_empty_lines_make_lines():
    stack = Haystack(["a\n\n  \nb"], TOKENIZER, 4)
    assert stack.lines == ["a\n", "b\n"]
    assert stack.counts == [2, 2]


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: NeedleMaker("niah", TOKENIZER), "task is 'niah'; expected one of passkey"),
        (lambda: NeedleMaker("niah-single", TOKENIZER, wording="polite"), "wording is 'polite'"),
        (lambda: NeedleMaker(PASSKEY_TASK, TOKENIZER, "needles"), "haystack is 'needles' for passkey"),
        (lambda: NeedleMaker("niah-single", TOKENIZER).make(50, 0), "without any haystack; expected room for it in 50"),
        (lambda: NeedleMaker("niah-single", TOKENIZER).make(900, 0, 1.5), "depth is 1.5"),
        (lambda: NeedleMaker("niah-multivalue", TOKENIZER).make(900, 0, 0.5), "only where one needle is asked for"),
        (lambda: Haystack(["short\n"], TOKENIZER, 100), "the haystack has 6 tokens; expected at least 100"),
    ],
)
def test_mistakes_are_said(make, complaint):
    with pytest.raises(DataError, match=complaint):
        make()
