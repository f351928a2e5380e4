"""Tasks whose data is local, and models of the harness on the bundled checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = str(ROOT / "tinymodel" / "checkpoint")
TASKS = ("local_choice", "local_rolling", "local_lines")
LINES = 16  # a record of about 200 tokens

CHOICES = {
    "question": "The capital of the country is not",
    "choices": [" a", " known to the caller", " here, and it is returned", ": see the documentation of the module"],
}


def write_tasks(folder: Path, texts: list[str], lines: list[tuple[str, int]]) -> Path:
    """One multiple choice, one rolling perplexity and one exact match, each with its data beside it."""
    questions = [text[-length:] for text, length in zip(texts, (600, 60, 300, 30), strict=False)]
    choices = [{"question": question, "choices": CHOICES["choices"], "answer": 1} for question in questions]
    _write(folder, "local_choice", choices, output_type="multiple_choice", doc_to_text="{{question}}",
           doc_to_choice="{{choices}}", doc_to_target="{{answer}}", metric_list=[{"metric": "acc"}])  # fmt: skip
    _write(folder, "local_rolling", [{"text": text} for text in texts], output_type="loglikelihood_rolling",
           doc_to_text="", doc_to_target="{{text}}", metric_list=[{"metric": "word_perplexity"}])  # fmt: skip
    answers = [{"prompt": prompt, "expected": str(expected)} for prompt, expected in lines]
    _write(folder, "local_lines", answers, output_type="generate_until", doc_to_text="{{prompt}}",
           doc_to_target="{{expected}}", metric_list=[{"metric": "exact_match"}],
           generation_kwargs={"max_gen_toks": 24, "do_sample": False, "until": [">"]},
           filter_list=[{"name": "last", "filter": [
               {"function": "regex", "regex_pattern": r"(\d+)", "group_select": -1}, {"function": "take_first"}]}],
           )  # fmt: skip
    return folder


def _write(folder: Path, name: str, rows: list[dict[str, Any]], **task: Any) -> None:
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task |= {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task, sort_keys=False), encoding="utf-8")
