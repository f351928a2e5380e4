from __future__ import annotations

import json
from dataclasses import replace

import pytest

from cskv.data.cases import Case
from cskv.errors import DataError
from cskv.evaluation.tasks import evaluate_cases, in_chat
from tests.evaluation.support import character_tokenizer, parrot

TOKENIZER = character_tokenizer()
SIZE = len(TOKENIZER)


def ids(text: str) -> list[int]:
    return TOKENIZER(text)["input_ids"]


def case(question: str, *answers: str, depth: float | None = None) -> Case:
    return Case("niah-single", 32, "context " * (1 + len(question) % 3), question, answers, depth)


CASES = [
    case("one a", "11", depth=0.0),
    case("the second b", "22", depth=1.0),
    case("two c", "33", depth=0.0),
    case("several d", "1", "2", "3", "4"),
]
REPLIES = {"a": "<11>\nand more 99", "b": "2", "c": "33", "d": "1 and\n3"}


def model():
    return parrot(SIZE, {ids(key)[0]: ids(reply) for key, reply in REPLIES.items()})


@pytest.mark.parametrize("protocol", ["in-prefill", "context-first"])
@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_scores_outputs_and_cells(protocol, batch_size):
    done = []
    result = evaluate_cases(
        model(), TOKENIZER, CASES, protocol=protocol, batch_size=batch_size, max_new_tokens=20, on_case=done.append
    )
    assert [output.output for output in result.outputs] == ["<11>\n", "2", "33", "1 and\n3"]
    assert [output.score for output in result.outputs] == [1.0, 0.0, 1.0, 0.5]
    assert result.n == sum(done) == 4
    assert result.score == pytest.approx(2.5 / 4)
    assert result.low < 2.5 / 4 < result.high
    assert result.prompt_tokens == pytest.approx(sum(len(ids(c.prompt)) for c in CASES) / 4)
    assert result.cells() == [{"depth": 0.0, "n": 2, "score": 1.0}, {"depth": 1.0, "n": 1, "score": 0.0}]
    json.dumps(result.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"cases": []}, "no cases"),
        ({"protocol": "aloud"}, "protocol is 'aloud'; expected one of in-prefill, context-first"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ],
)
def test_mistakes_are_said(changes, complaint):
    with pytest.raises(DataError, match=complaint):
        evaluate_cases(model(), TOKENIZER, **({"cases": CASES} | changes))


def test_the_chat_template_wraps_context_and_question():
    tokenizer = character_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}[{{ message.role }}] {{ message.content }}{% endfor %}"
        "{% if add_generation_prompt %} [assistant] {% endif %}"
    )
    wrapped = in_chat(tokenizer, replace(CASES[0], context="the context\n", question="\nwhat? "))
    assert wrapped.context == "[user] the context"
    assert wrapped.question == "\n\nwhat? [assistant] "
    assert wrapped.answers == CASES[0].answers


def test_a_template_that_adds_the_begin_token_does_not_add_it_twice():
    tokenizer = character_tokenizer()
    tokenizer.chat_template = "<end>{{ messages[0].content }}"
    tokenizer.bos_token = "<end>"
    plain = in_chat(tokenizer, CASES[0])
    assert plain.context.startswith("<end>")  # this tokenizer adds none, so the template has to
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<end> $A", special_tokens=[("<end>", tokenizer.bos_token_id)]
    )
    assert in_chat(tokenizer, CASES[0]).context.startswith("context")


def test_a_tokenizer_without_a_template_cannot_chat():
    with pytest.raises(DataError, match="no chat template"):
        in_chat(TOKENIZER, CASES[0])
