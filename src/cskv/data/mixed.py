"""The training text of the bundled model: offline text in turn with LongEval records."""

from __future__ import annotations

import random
from collections.abc import Iterator

from cskv.data.lines import line_text, make_case
from cskv.data.sources import TextSource, open_source

PIECE_CHARACTERS = 4_000
RECORD_SEEDS = 1_000_000_000  # far from the seeds of evaluation cases, which count from 0


def mixed_source(num_lines: int) -> TextSource:
    """Mix pieces of the offline training corpus with LongEval records and their answers.

    A record is about as long as a piece of text, in characters. Its questions are never those of the evaluation.

    Args:
        num_lines: the longest record.
    """

    def read(seed: int) -> Iterator[str]:
        rng = random.Random(f"demo-text-{seed}")
        for text in open_source("offline").read(seed):
            start = rng.randrange(max(1, len(text) - PIECE_CHARACTERS))
            yield text[start : start + PIECE_CHARACTERS]
            size = rng.randint(max(1, num_lines // 8), num_lines)
            case = make_case(size, RECORD_SEEDS + rng.randrange(RECORD_SEEDS))
            yield case.prompt + line_text(case.key, case.expected)

    return TextSource(f"offline text and LongEval records of up to {num_lines} lines", read)
