"""Measure a checkpoint: `python tinymodel/evaluate.py FOLDER` prints lines accuracy and held-out perplexity."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from cskv.data import lines, offline

BATCH_SIZE = 10
ANSWER_TOKENS = 24


@torch.inference_mode()
def answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cases: list[lines.LinesCase]) -> list[str]:
    """Greedy answers to the official prompts, in batches."""
    outputs = []
    for start in range(0, len(cases), BATCH_SIZE):
        prompts = [case.prompt for case in cases[start : start + BATCH_SIZE]]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True)
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=ANSWER_TOKENS)
        outputs += tokenizer.batch_decode(tokens[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return outputs


def lines_accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cases: list[lines.LinesCase]
) -> tuple[float, list[str]]:
    """The share of right answers by the official scoring, and the answers."""
    outputs = answers(model, tokenizer, cases)
    right = [lines.score(output, case.expected) for output, case in zip(outputs, cases, strict=True)]
    return sum(right) / len(right), outputs


@torch.inference_mode()
def heldout_perplexity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, window: int) -> dict[str, float]:
    """Perplexity per token and bits per byte over all held-out documents, in windows that share no token."""
    total_loss, total_tokens, total_bytes = 0.0, 0, 0
    for _, text in offline.documents("heldout"):
        tokens = tokenizer(text, return_tensors="pt", verbose=False).input_ids
        total_bytes += len(text.encode("utf-8"))
        for part in tokens.split(window, dim=1):
            if part.shape[1] > 1:
                logits = model(part).logits[0, :-1].float()
                total_loss += functional.cross_entropy(logits, part[0, 1:], reduction="sum").item()
                total_tokens += part.shape[1] - 1
    return {
        "window": window,
        "tokens": total_tokens,
        "perplexity": round(math.exp(total_loss / total_tokens), 3),
        "bits_per_byte": round(total_loss / total_bytes / math.log(2), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--lines", type=int, nargs="*", default=[25, 50, 100, 200])
    parser.add_argument("--cases", type=int, default=50)
    parser.add_argument("--official", type=Path, help="also answer the cases of this published file")
    parser.add_argument("--windows", type=int, nargs="*", default=[1024, 4096])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tokenizer = AutoTokenizer.from_pretrained(arguments.folder)
    model = AutoModelForCausalLM.from_pretrained(arguments.folder, dtype=arguments.dtype).eval()
    for num_lines in arguments.lines:
        cases = [lines.make_case(num_lines, seed) for seed in range(arguments.cases)]
        accuracy, outputs = lines_accuracy(model, tokenizer, cases)
        result = {"lines": num_lines, "cases": len(cases), "accuracy": round(accuracy, 4), "example": outputs[0]}
        print(json.dumps(result), flush=True)
    if arguments.official:
        cases = lines.read_official(arguments.official)
        accuracy, _ = lines_accuracy(model, tokenizer, cases)
        print(json.dumps({"official": arguments.official.name, "cases": len(cases), "accuracy": accuracy}), flush=True)
    for window in arguments.windows:
        print(json.dumps(heldout_perplexity(model, tokenizer, window)), flush=True)


if __name__ == "__main__":
    main()
