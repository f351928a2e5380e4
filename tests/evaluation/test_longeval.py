from __future__ import annotations

import json

import pytest
import torch

from cskv.data.cases import Case
from cskv.data.lines import make_case
from cskv.errors import DataError
from cskv.evaluation.decoding import left_pad
from cskv.evaluation.tasks import evaluate_cases
from tests.evaluation.support import character_tokenizer, parrot, tiny_llama

TOKENIZER = character_tokenizer()
SIZE = len(TOKENIZER)


def ids(text: str) -> list[int]:
    return TOKENIZER(text)["input_ids"]


def case(prompt: str, expected: int) -> Case:
    return Case("lines", 1, prompt, "", (str(expected),), last_integer=True)


CASES = [case("short a", 123), case("a longer prompt b", 45), case("c c c c", 7)]


def model_that_answers(a: str, b: str, c: str):
    return parrot(SIZE, {ids("a")[0]: ids(a), ids("b")[0]: ids(b), ids("c")[0]: ids(c)})


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_accuracy_and_outputs_do_not_depend_on_the_batch(batch_size):
    model = model_that_answers("<123>", "it is <46>", "line 3 is 7")
    result = evaluate_cases(model, TOKENIZER, CASES, batch_size=batch_size)
    assert [output.output for output in result.outputs] == ["<123>", "it is <46>", "line 3 is 7"]
    assert [output.score for output in result.outputs] == [1.0, 0.0, 1.0]
    assert result.score == pytest.approx(2 / 3)
    # Wilson: (2/3 + z^2/6 -+ z sqrt(2/27 + z^2/36)) / (1 + z^2/3), z = 1.959964
    assert (result.low, result.high) == (pytest.approx(0.2077, abs=1e-4), pytest.approx(0.9385, abs=1e-4))
    assert result.prompt_tokens == pytest.approx((7 + 17 + 7) / 3)
    assert result.decode_tokens_per_second > 0
    assert result.prefill_seconds > 0


def test_a_row_ends_at_the_newline_after_its_digits_and_not_before_them():
    model = model_that_answers("\n12\n99", "45\n\n", "7\nand more")
    result = evaluate_cases(model, TOKENIZER, CASES, batch_size=3)
    assert [output.output for output in result.outputs] == ["\n12\n", "45\n", "7\n"]
    assert [output.score for output in result.outputs] == [0.0, 1.0, 1.0]


def test_generation_stops_when_every_row_has_ended():
    model = model_that_answers("1\n" + "x" * 40, "2", "3")
    forwards = []
    model.model.register_forward_hook(lambda *_: forwards.append(1))
    evaluate_cases(model, TOKENIZER, CASES, batch_size=3, max_new_tokens=40)
    assert len(forwards) == 2


def test_the_longest_answer_is_bounded():
    model = model_that_answers("x" * 50, "y" * 50, "z" * 50)
    result = evaluate_cases(model, TOKENIZER, CASES, max_new_tokens=5)
    assert [output.output for output in result.outputs] == ["xxxxx", "yyyyy", "zzzzz"]


def test_a_single_token_answer_has_no_decoding_speed():
    result = evaluate_cases(model_that_answers("1", "2", "7"), TOKENIZER, CASES, max_new_tokens=1)
    assert result.decode_tokens_per_second == 0.0
    assert result.outputs[2].score == 1.0


def test_progress_and_json():
    done = []
    result = evaluate_cases(model_that_answers("1", "2", "7"), TOKENIZER, CASES, batch_size=2, on_case=done.append)
    assert done == [2, 1]
    assert json.loads(json.dumps(result.to_dict()))["outputs"][2]["score"] == 1.0


def test_a_real_generation_is_the_same_alone_and_left_padded():
    model = tiny_llama(vocab_size=SIZE)
    cases = [make_case(num_lines, seed=3).as_case() for num_lines in (2, 5)]
    alone = evaluate_cases(model, TOKENIZER, cases, batch_size=1, max_new_tokens=8)
    padded = evaluate_cases(model, TOKENIZER, cases, batch_size=2, max_new_tokens=8)
    assert [output.output for output in alone.outputs] == [output.output for output in padded.outputs]


def test_left_padding():
    assert left_pad([[5, 6, 7], [8]], pad=0, multiple=4)[0].tolist() == [[0, 5, 6, 7], [0, 0, 0, 8]]
    assert left_pad([[5, 6, 7, 8], [9]], pad=0, multiple=4)[0].shape == (2, 4)
    padded, mask = left_pad([[5, 6, 7], [8]], pad=0)
    assert torch.equal(padded, torch.tensor([[5, 6, 7], [0, 0, 8]]))
    assert torch.equal(mask, torch.tensor([[1, 1, 1], [0, 0, 1]]))


@pytest.mark.parametrize(
    ("cases", "kwargs", "message"),
    [
        ([], {}, "no cases"),
        (CASES, {"batch_size": 0}, "batch_size"),
        (CASES, {"max_new_tokens": 0}, "max_new"),
    ],
)
def test_what_cannot_be_measured_is_refused(cases, kwargs, message):
    with pytest.raises(DataError, match=message):
        evaluate_cases(tiny_llama(vocab_size=SIZE), TOKENIZER, cases, **kwargs)
