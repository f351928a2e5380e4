from __future__ import annotations

import json

import pytest

from cskv.errors import ConfigError
from cskv.evaluation.settings import EvaluationSettings, Job


def test_jobs_are_all_tasks_sizes_and_protocols_seed_by_seed():
    settings = EvaluationSettings(
        tasks=("lines", "niah-single", "perplexity"), lines=(20, 50), tokens=(512,), text_tokens=(256,), seeds=(0, 1)
    )
    assert list(settings.jobs())[:7] == [
        Job("lines", 20, "in-prefill", 0),
        Job("lines", 20, "context-first", 0),
        Job("lines", 50, "in-prefill", 0),
        Job("lines", 50, "context-first", 0),
        Job("niah-single", 512, "in-prefill", 0),
        Job("niah-single", 512, "context-first", 0),
        Job("perplexity", 256, None, 0),
    ]
    assert len(list(settings.jobs())) == 14
    json.dumps(settings.to_dict())


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"tasks": ("lines", "chess")}, "tasks has 'chess'; expected some of lines, passkey"),
        ({"tasks": ()}, "tasks is empty"),
        ({"protocols": ("aloud",)}, "protocols has 'aloud'"),
        ({"wording": "polite"}, "wording is 'polite'; expected one of ruler, lines"),
        ({"cases": 0}, "cases has 0; expected at least 1"),
        ({"tokens": (512, 0)}, "tokens has 0"),
        ({"depths": (0.5, 2.0)}, "depths are 0.5, 2.0"),
        ({"lines_files": ("a.jsonl",), "seeds": (0, 1)}, "would count their questions twice; give one seed"),
        ({"tasks": ("code",), "chat": True}, "code is completed as a text, not in a chat"),
        ({"tasks": ("code",), "seeds": (0, 2)}, "code has functions for seeds 0 to 1 alone"),
        ({"generated": 0}, "generated has 0"),
        ({"tasks": ("continuation",), "text_tokens": (256,), "continued": 256}, "expected longer texts"),
    ],
)
def test_settings_out_of_range_are_refused(changes, complaint):
    with pytest.raises(ConfigError, match=complaint):
        EvaluationSettings(**changes)


def test_answers_are_as_long_as_the_task_has_them_unless_a_length_is_given():
    asked = ("lines", "vt", "cwe", "fwe", "code")
    assert [EvaluationSettings().longest_answer(task) for task in asked] == [64, 30, 120, 50, 320]
    assert EvaluationSettings(max_new_tokens=7).longest_answer("cwe") == 7


def test_the_work_of_a_job_goes_by_its_tokens():
    settings = EvaluationSettings(cases=10, texts=3)
    assert settings.tokens_of(Job("perplexity", 1024, None, 0)) == 3 * 1024
    assert settings.tokens_of(Job("niah-single", 1024, "in-prefill", 0)) == 10 * 1024
    assert 10 * 200 * 15 < settings.tokens_of(Job("lines", 200, "in-prefill", 0)) < 10 * 200 * 25
