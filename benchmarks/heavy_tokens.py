"""Tokens whose keys or values are unlike all others: how far sinks are out, and what is left when they are.

    python benchmarks/heavy_tokens.py --model models/smollm2 --text wikitext2 --text offline

Prints, of each text and of keys and values, distances from the mean of the tokens behind the sinks, over the median
distance: of the first token, of the next three, and of the farthest tokens behind these; and the largest share of a
layer's variance that one token in five hundred has.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from pages import Table
from real_models_text import Texts
from transformers import AutoModelForCausalLM, AutoTokenizer

from cskv.calibration.hooks import Teacher
from cskv.models.evaluation_mode import evaluation_mode
from cskv.models.survey import survey

SINKS, SAMPLES, TOKENS = 4, 4, 512


@torch.no_grad()
def rows(model_path: str, text: str) -> list[list[str]]:
    """Return a row for keys and one for values."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    teacher = Teacher(model, survey(model).sites)
    samples = torch.stack(Texts(tokenizer, TOKENS).samples(text, SAMPLES))
    with evaluation_mode(model), teacher.watching():
        seen = teacher.observe(samples)
    found = []
    for kind in ("k", "v"):
        first, following, farthest, shares = [], [], [], []
        for layer, observation in seen.items():
            y = getattr(observation, kind).float()
            squares = (y - y[:, SINKS:].mean((0, 1))).square().sum(-1)
            rest = squares[:, SINKS:]
            out = (squares / rest.median()).sqrt()
            first.append(float(out[:, 0].mean()))
            following.append(float(out[:, 1:SINKS].mean()))
            at = int(out[:, SINKS:].argmax())
            sample, place = divmod(at, TOKENS - SINKS)
            token = tokenizer.decode(samples[sample, place + SINKS])
            farthest.append((float(out[:, SINKS:].max()), f"{token!r} in layer {layer}"))
            shares.append(float(rest.flatten().topk(rest.numel() // 500).values.sum() / rest.sum()))
        most, name = max(farthest)
        figures = [sum(first) / len(first), sum(following) / len(following), most]
        cells = [f"{figure:.1f}" for figure in figures]
        found.append([Path(text).stem, "keys" if kind == "k" else "values", *cells, name, f"{max(shares):.1%}"])
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", action="append", required=True)
    given = parser.parse_args()
    headings = ("text", "of", "first token", "next three", "farthest", "which", "share of 0.2 %")
    cells = [row for text in given.text for row in rows(given.model, text)]
    Table("Distances over the median", headings, cells).print()


if __name__ == "__main__":
    main()
