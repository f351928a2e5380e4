"""Functions to be completed: cut out of their modules, asked for in a context, and put back with an answer."""

from __future__ import annotations

import re
import sys
from collections import Counter

import pytest

from cskv.data import code, offline
from cskv.data.code import CODE, PARTS, Function, functions, make, part
from cskv.errors import DataError
from tests.evaluation.support import character_tokenizer

TOKENIZER = character_tokenizer()  # a token is a character
SOURCE = '''"""A module of a few functions."""

import math


def half(value):
    """Halve a number.

    >>> half(3)
    1.5
    """
    divisor = 2
    return value / divisor


def without_examples(value):
    """Nothing to see."""
    return value


class Circle:
    """A circle.

    >>> Circle(1).area() > 3
    True
    """

    def __init__(self, radius):
        self.radius = radius

    @property
    def area(self):
        """Return the area.

        >>> round(Circle(1).area, 2)
        3.14
        """
        return math.pi * self.radius**2


def one_line(x): """>>> one_line(1)"""; return x


def all_examples():
    """
    >>> all_examples()
    """
'''
OTHERS = {"stdlib/other.py": "other = 1\n" * 100, "stdlib/more/__init__.py": "more = 2\n" * 100}


@pytest.fixture(autouse=True)
def _library(monkeypatch):
    documents = {"train": {"topics/if": "If >>> else", "stdlib/small/__init__.py": SOURCE}, "heldout": OTHERS}
    monkeypatch.setattr(offline, "documents", lambda split: iter(documents[split].items()))
    for cached in (functions, code._heldout):
        cached.cache_clear()
    yield
    sys.modules.pop("small", None)  # programs of these tests are run here
    for cached in (functions, code._heldout):
        cached.cache_clear()


def found() -> dict[str, Function]:
    return {function.name: function for function in functions()}


def run(program: str) -> bool:
    try:
        exec(program, {"__name__": "__main__"})
    except (SystemExit, SyntaxError):
        return False
    return True


def test_functions_and_methods_with_examples_and_a_body_are_found():
    assert list(found()) == ["half", "Circle.area"]


def test_the_parts_of_a_function_are_its_module():
    for function in functions():
        assert function.before + function.head + function.body + function.after == SOURCE
    area = found()["Circle.area"]
    assert area.head.splitlines()[0] == "    def area(self):"
    assert area.head.endswith('"""\n')
    assert area.body == "        return math.pi * self.radius**2\n"
    assert area.indent == 8
    assert area.before.endswith("@property\n")
    assert area.module == "small"


@pytest.mark.parametrize(
    ("document", "module"), [("stdlib/json/decoder.py", "json.decoder"), ("stdlib/json/__init__.py", "json")]
)
def test_modules_are_called_as_they_are_imported(document, module):
    assert Function(document, "f", "", "", "", "", "", 4).module == module


@pytest.mark.parametrize("name", ["half", "Circle.area"])
def test_the_librarys_own_body_passes_and_others_fail(name, capsys):
    function = found()[name]
    assert run(function.program("\n" + function.body))
    space = "\n" + " " * function.indent
    assert not run(function.program(f"{space}pass"))
    assert not run(function.program(f"{space}return 7"))
    assert not run(function.program(f"{space}return ("))


def test_an_answer_ends_where_it_leaves_the_function():
    half = found()["half"]
    assert half.body_in("\n    if value:\n\n        return 1\n") == ("\n    if value:\n\n        return 1\n", False)
    assert half.body_in("\n    return 1\n\n\ndef next(") == ("\n    return 1\n\n\n", True)
    assert half.body_in("\n    return 1\n# done") == ("\n    return 1\n", True)
    assert half.body_in("  # halves\n    return 1") == ("  # halves\n    return 1", False)
    assert found()["Circle.area"].body_in("\n        return 1\n\n    def") == ("\n        return 1\n\n", True)
    assert half.body_in("") == ("", False)


def test_a_case_asks_in_its_context_and_scores_what_passes(capsys):
    half = found()["half"]
    case = make(half, TOKENIZER, run, 900, seed=0)
    assert (case.task, case.size, case.answers) == (CODE, 900, ("small.half",))
    assert case.question == half.head
    assert case.context.endswith(half.before)
    assert "# stdlib/small/__init__.py\n" in case.context
    assert len({"other = 1\n", "more = 2\n"} & set(case.context.splitlines(keepends=True))) == 1
    assert 880 < len(TOKENIZER(case.prompt)["input_ids"]) <= 900
    assert case.score("    return value / 2\n\n\ndef next():\n    nonsense(") == 1
    assert case.score("    return value / 3\n") == 0
    assert case.score("") == 0
    assert case.score("return value / 2") == 0  # not in the function
    assert case.is_over("    return value / 2\n\n\ndef")
    assert not case.is_over("    return value / 2\n")


def test_a_newline_that_is_part_of_a_token_with_spaces_is_the_models_to_write(capsys):
    def tokenizer(text: str, **_options: bool) -> dict[str, list[str]]:
        return {"input_ids": re.findall(r"\n +|.|\n", text)}

    half = found()["half"]
    case = make(half, tokenizer, run, 900, seed=0)
    assert case.question == half.head.rstrip()
    assert case.score("\n    return value / 2\n\n\ndef") == 1
    assert case.score("  # halves\n    return value / 2") == 1
    assert case.is_over("\n    return value / 2\n\n\ndef")


def test_a_short_context_is_the_end_of_the_module():
    case = make(found()["Circle.area"], TOKENIZER, run, 250, seed=0)
    assert case.context
    assert SOURCE.partition("    def area")[0].endswith(case.context)
    assert len(TOKENIZER(case.prompt)["input_ids"]) <= 250


def test_the_same_seed_gives_the_same_case():
    half = found()["half"]
    assert make(half, TOKENIZER, run, 1500, 1) == make(half, TOKENIZER, run, 1500, 1)


def test_seeds_share_no_function_and_take_modules_in_turns():
    many = [Function(f"stdlib/m{index % 3}.py", f"f{index}", "", "", "", "", "", 4) for index in range(30)]
    parts = [part(many, seed) for seed in range(PARTS)]
    assert sorted(function.name for chosen in parts for function in chosen) == sorted(f.name for f in many)
    assert part(many, 0) == parts[0]
    assert all(set(Counter(f.document for f in chosen[:6]).values()) == {2} for chosen in parts)


@pytest.mark.parametrize(
    ("tokens", "complaint"),
    [
        (30, r"small.half takes \d+ tokens without any context; expected room for it in 30"),
        (99_999, r"the held-out sources have \d+ tokens; expected at least 99999"),
    ],
)
def test_prompts_that_cannot_be_made_are_said(tokens, complaint):
    with pytest.raises(DataError, match=complaint):
        make(found()["half"], TOKENIZER, run, tokens, 0)
