"""Training batches: rows of records with their questions, rows of text, and the positions that have loss."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
from tokenizer import BOS, CONTENT, EOS, FIRST_LINE, NEXT_LINE, TEXT_VOCABULARY
from transformers import PreTrainedTokenizerFast

from cskv.data import lines, offline

Row = tuple[list[int], list[float]]
TokenEntry = tuple[int, int, list[int]]
RECORD_LOSS = 0.4
FIRST_DIGIT = 2.0
QUESTION_ROOM = 200


@dataclass(frozen=True)
class Stage:
    """One row of the training table. Token counts are per sequence, `tokens` is the length of the stage."""

    name: str
    tokens: int
    length: int
    record_rows: int
    text_rows: int
    lines: tuple[int, int]
    official: float
    prefixed: float = 0.0
    shared_nouns: float = 0.0
    text_loss: float = 0.7
    align: bool = False
    keep_words: bool = False
    rate: tuple[float, float] = (1.0, 1.0)

    @property
    def tokens_per_step(self) -> int:
        return self.length * (self.record_rows + self.text_rows)


@dataclass(frozen=True)
class Batch:
    """Inputs, and for a fixed number of flat positions the next token and the weight of its loss."""

    inputs: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    num_record: int


class BatchMaker:
    """Makes the batch of any step; the same seed and step always give the same batch."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self.seed = seed
        self.text = _text_stream(tokenizer)
        adjectives, nouns = lines.key_words()
        self.adjectives = tokenizer.convert_tokens_to_ids([tokenizer.tokenize(f"{word}-kid")[0] for word in adjectives])
        self.nouns = tokenizer.convert_tokens_to_ids([tokenizer.tokenize(f"red-{word}: ")[1] for word in nouns])
        self.digits = tokenizer.convert_tokens_to_ids(list("0123456789"))
        encode = lambda text: tokenizer(text, add_special_tokens=False).input_ids  # noqa: E731
        self.bos, self.eos = tokenizer.convert_tokens_to_ids([BOS, EOS])
        (self.content,), (self.next_line,), (self.close,), (self.newline,) = map(
            encode, (CONTENT, NEXT_LINE, ">", "\n")
        )
        self.first_line = tokenizer.convert_tokens_to_ids(FIRST_LINE.replace(" ", "Ġ"))
        self.header = encode(lines.HEADER + "line red-kid")[:-3]
        before, after = lines.QUESTION.split("{key}")
        self.question = encode(before + "red-kid?")[:-3], encode("red-kid" + after)[2:]

    def key_words(self) -> list[int]:
        """The tokens that exist for keys alone: no text needs them."""
        return [token for token in (*self.nouns, *self.adjectives) if token >= TEXT_VOCABULARY]

    def batch(self, stage: Stage, step: int) -> Batch:
        """Record rows first, then text rows; only a part of the positions of each kind has loss."""
        rng = random.Random(f"{self.seed}-{stage.name}-{step}")
        rows = [self._record_row(stage, rng) for _ in range(stage.record_rows)]
        rows += [self._text_row(stage.length + 1, rng) for _ in range(stage.text_rows)]
        tokens = torch.tensor([row for row, _ in rows])
        weights = torch.tensor([row for _, row in rows])[:, 1:]
        split = stage.record_rows * stage.length
        flat = weights.reshape(-1)
        record = _choose(flat[:split], int(split * RECORD_LOSS), rng)
        text = _choose(flat[split:], int((flat.numel() - split) * stage.text_loss), rng) + split
        positions = torch.cat([record, text])
        targets = tokens[:, 1:].reshape(-1)[positions]
        return Batch(tokens[:, :-1].contiguous(), positions, targets, flat[positions], len(record))

    def _text_row(self, length: int, rng: random.Random) -> Row:
        start = rng.randrange(len(self.text) - length)
        row = self.text[start : start + length].tolist()
        if rng.random() < 0.5:
            row[0] = self.bos
        return row, [1.0] * length

    def _record_row(self, stage: Stage, rng: random.Random) -> Row:
        length = stage.length + 1
        official = rng.random() < stage.official
        tokens = [self.bos]
        if rng.random() < stage.prefixed:
            tokens += self._text_row(rng.randint(1, length // 2), rng)[0]
        tokens += self.header if official else []
        room = (length - len(tokens) - QUESTION_ROOM) // 10
        fewest, most = stage.lines
        num_lines = max(2, min(rng.randint(fewest, most), room))
        record = self._record(num_lines, rng.random() < stage.shared_nouns, rng)
        tokens.append(self.first_line)
        for entry in record:
            tokens += self._line(entry)
        tokens[-1:] = [self.close, self.newline] if official else [self.next_line]
        weights = [0.0] * len(tokens)
        ask = self._ask_official if official else self._ask_again
        while len(tokens) < length:
            ask(record, tokens, weights, rng)
        return tokens[:length], weights[:length]

    def _record(self, num_lines: int, share_nouns: bool, rng: random.Random) -> list[TokenEntry]:
        """Entries with different keys; with shared nouns it takes the adjective to tell many of them apart."""
        nouns = rng.sample(self.nouns, max(1, num_lines // 2) if share_nouns else num_lines)
        keys: dict[tuple[int, int], None] = {}
        while len(keys) < num_lines:
            noun = rng.choice(nouns) if share_nouns else nouns[len(keys)]
            keys[rng.choice(self.adjectives), noun] = None
        numbers = [str(rng.randint(1, lines.MAX_NUMBER)) for _ in keys]
        return [
            (*key, [self.digits[int(digit)] for digit in number]) for key, number in zip(keys, numbers, strict=True)
        ]

    def _line(self, entry: TokenEntry) -> list[int]:
        adjective, noun, digits = entry
        return [adjective, noun, self.content, *digits, self.next_line]

    def _ask_again(self, record: list[TokenEntry], tokens: list[int], weights: list[float], rng: random.Random) -> None:
        """The record's lines once more in another order, with loss on the nouns and the numbers."""
        for entry in rng.sample(record, len(record)):
            line = self._line(entry)
            tokens += line
            weights += [0.0, 1.0, 0.1, FIRST_DIGIT] + [1.0] * (len(line) - 4)

    def _ask_official(
        self, record: list[TokenEntry], tokens: list[int], weights: list[float], rng: random.Random
    ) -> None:
        """One official question with its answer, with loss on the answer."""
        adjective, noun, digits = rng.choice(record)
        question = [*self.question[0], adjective, noun, *self.question[1]]
        line = [adjective, noun, self.content, *digits, self.close]
        tokens += [*question, self.first_line, *line, self.newline, self.eos]
        weights += [0.0] * len(question) + [1.0] * 4 + [FIRST_DIGIT] + [1.0] * (len(line) - 2)


def _text_stream(tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    texts = [text for _, text in offline.documents("train")]
    order = random.Random(0).sample(range(len(texts)), len(texts))
    encoded = tokenizer([texts[index] for index in order]).input_ids
    return np.concatenate([np.array([*ids, tokenizer.eos_token_id], dtype=np.int32) for ids in encoded])


def _choose(weights: torch.Tensor, count: int, rng: random.Random) -> torch.Tensor:
    """`count` positions, those with loss first; the rest fills up and has weight 0."""
    with_loss = weights.nonzero().flatten().tolist()
    rng.shuffle(with_loss)
    chosen = with_loss[:count]
    if len(chosen) < count:
        chosen += (weights == 0).nonzero().flatten().tolist()[: count - len(chosen)]
    return torch.tensor(chosen, dtype=torch.long)
