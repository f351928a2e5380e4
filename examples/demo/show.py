"""What the demo shows: one text generated from every cache, and the table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from jaxtyping import Int
from rich import box
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cskv.data.cases import Case
from cskv.evaluation.cache_size import cache_after_prefill
from cskv.evaluation.decoding import answer
from cskv.evaluation.pooling import pool
from cskv.evaluation.results import Run
from cskv.evaluation.tasks import in_chat
from cskv.methods.method import Method, label
from cskv.report.text import count_text, kl_text, percent_text, perplexity_text, whole_text
from demo.settings import DemoSettings

WIDTH = 80
DECODING = "decoding"  # in a row: how fast its cache decodes (`cskv.evaluation.speed`)
STORY = Path(__file__).with_name("story.txt")
# A small model is sure of how to do this, so that differences are the cache's.
TASK = "Copy this text word for word:\n\n"


def side_by_side(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    methods: Sequence[Method],
    prompt: Int[Tensor, "1 tokens"],
    settings: DemoSettings,
    advance: Callable[[float], None],
) -> list[Panel]:
    """Generate greedily from every method's cache, and return the texts, one below the other.

    Args:
        methods: the uncompressed one first.
        prompt: what a model that does not chat is to continue; others copy a story.
        advance: called with the share that has just been done.
    """
    if tokenizer.chat_template:
        paragraphs = STORY.read_text(encoding="utf-8").split("\n\n")
        case = in_chat(tokenizer, Case("text", 0, TASK + "\n\n".join(" ".join(p.split()) for p in paragraphs), "", ()))
    else:
        case = Case("text", 0, str(tokenizer.decode(prompt[0], skip_special_tokens=True)), "", ())
    ids = tokenizer(case.prompt, return_tensors="pt", verbose=False)["input_ids"]
    panels: list[Panel] = []
    first: list[str] = []
    for method in methods:
        with method.on(model) as new_cache:
            size = cache_after_prefill(model, ids, new_cache=new_cache)
            given = [case.context], [case.question], settings.answer_tokens, new_cache
            (text,) = answer(model, tokenizer, *given).texts
        words = text.split()
        first = first or words
        same = sum(match.size for match in SequenceMatcher(None, first, words, autojunk=False).get_matching_blocks())
        held = f"{size.total_bytes / 1e6:.2f} MB for {size.tokens} tokens"
        alike = f"; {same} of {len(words)} words are the same" if panels else ""
        panels.append(
            Panel(escape(text.strip()), title=f"{method.label}: {held}{alike}", title_align="left", width=WIDTH)
        )
        advance(1 / len(methods))
    return panels


def summary(run: Run) -> list[dict[str, Any]]:
    """Return a row of the table per method, in the order in which they were measured."""
    found: dict[str, dict[str, Any]] = {}
    for point in pool(run.rows):
        row = found.setdefault(label(point.method, point.budget), {})
        if point.score:
            row |= {"bytes_per_token": point.bytes_per_token, "ratio": point.ratio}
            row |= {"needles": point.score.mean, "needles_low": point.score.low, "needles_high": point.score.high}
        row |= {name: value.mean for name in ("kl", "perplexity") if (value := getattr(point, name))}
    for row in run.rows:
        if DECODING in row:
            found[label(row["method"], row["budget"])]["tokens_per_second"] = row[DECODING]["tokens_per_second"]
    return [{"cache": name} | row for name, row in found.items()]


def results_table(run: Run, rows: Sequence[dict[str, Any]], seconds: float) -> Table:
    """Make a table of at most 80 columns; the caption says on what it was measured."""
    of, where = run.settings, run.environment
    size, length = of["tokens"][0], of["text_tokens"][0]
    caption = (
        f"Bytes are all that the cache holds after {size} tokens, slack and the exact first and newest ones (36 to 67) "
        f"included, which weigh less in longer texts. "
        f"Needles: {of['cases']} numbers in texts of {size} tokens (niah-single), the text compressed before "
        f"the question is known, with 95 % intervals. KL from the uncompressed model, in nats per token, and "
        f"perplexity: {of['texts']} held-out texts of {length} tokens, read through the cache. Speed: decoding after "
        f"{length} tokens, batch 1; attention is a small part of that.\n"
        f"{where['accelerator'] or where['cpu']}, {where['threads']} thread(s), {run.model['dtype']}, torch "
        f"{where['torch']}, transformers {where['transformers']}; {seconds:.0f} s in all"
    )
    name = run.model["name"] or run.model["type"]
    table = Table(
        title=f"KV cache of {name}",
        caption=caption,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 0, 0, 1),
        width=WIDTH,
    )
    table.add_column("cache", ratio=1)
    for heading in ("bytes per\ntoken", "of all,\n%", "KL,\nnats", "perplexity", "needles\nfound, %", "tokens\nper s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["cache"],
            count_text(row["bytes_per_token"]),
            percent_text(row["ratio"]),
            kl_text(row["kl"]),
            perplexity_text(row["perplexity"]),
            f"{whole_text(row['needles'])} ({whole_text(row['needles_low'])}-{whole_text(row['needles_high'])})",
            f"{row['tokens_per_second']:.1f}",
        )
    return table
