"""Scores of a model on questions about long contexts, in either protocol."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cskv.data.cases import Case
from cskv.data.samples import begin_tokens
from cskv.errors import DataError
from cskv.evaluation.decoding import CONTEXT_FIRST, IN_PREFILL, PROTOCOLS, Answers, answer, question_tokens
from cskv.evaluation.forward import check_least
from cskv.evaluation.wilson import wilson_interval
from cskv.methods.method import NewCache
from cskv.models.evaluation_mode import evaluation_mode


@dataclass(frozen=True)
class ScoredOutput:
    """The model's answer to one case, and its score, from 0 to 1."""

    answers: tuple[str, ...]
    output: str
    score: float
    depth: float | None


@dataclass(frozen=True)
class TaskResult:
    """Scores over a number of cases.

    Attributes:
        n: cases.
        score: their mean score, from 0 to 1.
        low, high: its 95 % interval (Wilson).
        prompt_tokens: the mean length of a prompt.
        prefill_seconds: the mean time to the first token of a batch, per case.
        decode_tokens_per_second: tokens after the first, over all cases, per second of decoding.
        outputs: one per case, in order.
    """

    n: int
    score: float
    low: float
    high: float
    prompt_tokens: float
    prefill_seconds: float
    decode_tokens_per_second: float
    outputs: tuple[ScoredOutput, ...]

    def cells(self) -> list[dict[str, Any]]:
        """Return mean scores by depth, for a heat map; none where depths were drawn or make no sense."""
        by_depth: dict[float, list[float]] = defaultdict(list)
        for output in self.outputs:
            if output.depth is not None:
                by_depth[output.depth].append(output.score)
        return [{"depth": d, "n": len(s), "score": sum(s) / len(s)} for d, s in sorted(by_depth.items())]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return asdict(self)


def evaluate_cases(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cases: Sequence[Case],
    *,
    protocol: str = IN_PREFILL,
    batch_size: int = 1,
    multiple: int = 1,
    max_new_tokens: int = 64,
    new_cache: NewCache | None = None,
    on_case: Callable[[int], None] | None = None,
) -> TaskResult:
    """Answer every case greedily and score the answers.

    Args:
        model: attached or not; it is put in evaluation mode for the time of the call.
        tokenizer: the model's; prompts are encoded as they are (see `in_chat`).
        protocol: "in-prefill" or "context-first" (`cskv.evaluation.decoding`).
        batch_size: cases answered together, left-padded. With "context-first" those of a batch have questions of equal
            length, so batches may be smaller.
        multiple: prompts are padded to a multiple of so many tokens.
        max_new_tokens: the longest answer. A row also stops at end-of-sequence and where `Case.is_over` says so.
        new_cache: makes the empty cache of each batch; the model's own when None.
        on_case: called with the number of cases just finished, for a progress bar.

    Raises:
        DataError: no cases, no such protocol, or a batch size or answer length below 1.
    """
    if not cases:
        raise DataError("no cases to answer; give at least one")
    if protocol not in PROTOCOLS:
        raise DataError(f"protocol is {protocol!r}; expected one of {', '.join(PROTOCOLS)}")
    check_least(1, batch_size=batch_size, max_new_tokens=max_new_tokens)
    texts: dict[int, str] = {}
    batches: list[Answers] = []
    with evaluation_mode(model):
        for indices in _batches(tokenizer, cases, protocol, batch_size):
            batch = [cases[index] for index in indices]
            made = answer(
                model,
                tokenizer,
                [case.context for case in batch],
                [case.question for case in batch],
                max_new_tokens,
                new_cache,
                protocol=protocol,
                endings=[case.is_over for case in batch],
                multiple=multiple,
            )
            texts.update(zip(indices, made.texts, strict=True))
            batches.append(made)
            if on_case is not None:
                on_case(len(batch))
    return _summarise(cases, [texts[index] for index in range(len(cases))], batches)


def in_chat(tokenizer: PreTrainedTokenizerBase, case: Case) -> Case:
    """Return the case as one message of a user, in the tokenizer's chat template, with the prompt for an answer.

    The begin token's text is left out, since encoding adds it.

    Raises:
        DataError: the tokenizer has no chat template, or it changes the message.
    """
    if not tokenizer.chat_template:
        raise DataError("this model's tokenizer has no chat template; ask without one")
    messages = [{"role": "user", "content": case.prompt.strip()}]
    text = str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    if begin_tokens(tokenizer):
        text = text.removeprefix(str(tokenizer.bos_token))
    before, context, rest = text.partition(case.context.strip())
    if not context:
        raise DataError("the chat template changes the message; its question cannot be told from its context")
    return replace(case, context=before + context, question=rest)


def _batches(
    tokenizer: PreTrainedTokenizerBase, cases: Sequence[Case], protocol: str, batch_size: int
) -> Iterable[list[int]]:
    """Yield indices of cases that are alike, where it matters, in the question's length."""
    groups: dict[int, list[int]] = defaultdict(list)
    for index, case in enumerate(cases):
        groups[len(question_tokens(tokenizer, case.question)) if protocol == CONTEXT_FIRST else 0].append(index)
    for group in groups.values():
        yield from (group[start : start + batch_size] for start in range(0, len(group), batch_size))


def _summarise(cases: Sequence[Case], texts: Sequence[str], batches: Sequence[Answers]) -> TaskResult:
    outputs = tuple(
        ScoredOutput(case.answers, text, case.score(text), case.depth) for case, text in zip(cases, texts, strict=True)
    )
    total = sum(output.score for output in outputs)
    low, high = wilson_interval(total, len(outputs))
    tokens, seconds = (sum(getattr(b, name) for b in batches) for name in ("decode_tokens", "decode_seconds"))
    return TaskResult(
        n=len(outputs),
        score=total / len(outputs),
        low=low,
        high=high,
        prompt_tokens=sum(batch.prompt_tokens for batch in batches) / len(outputs),
        prefill_seconds=sum(batch.prefill_seconds for batch in batches) / len(outputs),
        decode_tokens_per_second=tokens / seconds if tokens else 0.0,
        outputs=outputs,
    )
