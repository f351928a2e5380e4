"""Problems that can be trusted: the library's own body passes in the sandbox, an empty one does not."""

from __future__ import annotations

import pytest

from cskv.data import code, offline
from cskv.errors import DataError
from cskv.evaluation.code import passes, problems
from cskv.evaluation.material import Material
from cskv.evaluation.settings import EvaluationSettings
from tests.evaluation.support import character_tokenizer

pytest.importorskip("resource")

WEAK = '''def nothing(value):
    """
    >>> nothing(3)
    """
    return None


def broken():
    """
    >>> broken()
    5
    """
    return 6
'''


@pytest.fixture(autouse=True)
def _library(monkeypatch):
    """Two real modules, and one whose examples say nothing."""
    texts = {name: (offline.root() / name).read_text(encoding="utf-8") for name in ("textwrap.py", "shutil.py")}
    documents = {"stdlib/weak.py": WEAK} | {f"stdlib/{name}": text for name, text in texts.items()}
    heldout = {"stdlib/held.py": "held = 1\n" * 400}
    monkeypatch.setattr(
        offline, "documents", lambda split: iter((heldout if split == "heldout" else documents).items())
    )
    for cached in (code.functions, code._heldout):
        cached.cache_clear()
    monkeypatch.setattr(code, "PARTS", 1)
    yield
    for cached in (code.functions, code._heldout):
        cached.cache_clear()


def test_functions_are_asked_for_where_a_right_body_passes_and_an_empty_one_does_not():
    assert {"nothing", "broken", "shorten"} <= {function.name for function in code.functions()}
    chosen = problems(1, 0, lambda function: function.module != "shutil")
    assert [function.name for function in chosen] == ["shorten"]
    assert passes(chosen[0].program("\n" + chosen[0].body))
    assert not passes(chosen[0].program("\n    return text\n"))


def test_too_few_functions_are_said():
    with pytest.raises(DataError, match="has 1 functions for seed 0 that fit .* expected 9 cases: ask for fewer"):
        problems(9, 0, lambda function: function.module != "shutil")


def test_cases_leave_half_of_the_prompt_to_the_context():
    tokenizer = character_tokenizer()
    (case,) = Material(tokenizer, EvaluationSettings(tokens=(3000,), cases=1)).cases("code", 3000, 0)
    assert case.answers[0].startswith(("textwrap.", "shutil."))
    assert 2 * len(case.question) <= 3000
    assert 2800 < len(case.prompt) <= 3000
    assert case.score(case.function.body) == 1
    assert case.score("    return None\n") == 0
    with pytest.raises(DataError, match="ask for fewer"):
        Material(tokenizer, EvaluationSettings(tokens=(100,), cases=1)).cases("code", 100, 0)
