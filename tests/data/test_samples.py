import itertools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from cskv.data.samples import TokenSamples
from cskv.data.sources import PIECE_CHARACTERS, TextSource
from cskv.errors import DataError
from tests.data.support import texts_source

END, BEGIN = 256, 257


def byte_tokenizer(begins: bool = False) -> PreTrainedTokenizerFast:
    """One token a byte; 256 ends a text, and 257 begins one where `begins`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate(alphabet)} | {"<end>": END, "<begin>": BEGIN}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<begin> $A", special_tokens=[("<begin>", BEGIN)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", bos_token="<begin>", clean_up_tokenization_spaces=False
    )


def row_of(samples: TokenSamples) -> list[int]:
    return [token for sample in samples for token in sample.tolist()]


def test_documents_are_laid_end_to_end_with_an_end_token_after_each() -> None:
    tokenizer = byte_tokenizer()
    a, b, c = tokenizer.convert_tokens_to_ids(["a", "b", "c"])
    samples = list(TokenSamples(texts_source(["ab", "", "  ", "c", "abc"]), tokenizer, 3, 3))
    assert [sample.tolist() for sample in samples] == [[a, b, END], [c, END, a], [b, c, END]]
    assert samples[0].dtype == torch.int64


def test_pieces_of_a_running_text_have_no_end_token_between_them() -> None:
    tokenizer = byte_tokenizer()
    samples = TokenSamples(texts_source(["a\n", "\n", "bc"], separate=False), tokenizer, 1, 5)
    assert tokenizer.decode(row_of(samples)) == "a\n\nbc"


def test_every_sample_begins_as_the_tokenizer_begins_a_text() -> None:
    tokenizer = byte_tokenizer(begins=True)
    a = tokenizer.convert_tokens_to_ids("a")
    samples = [sample.tolist() for sample in TokenSamples(texts_source(["a" * 20]), tokenizer, 4, 5)]
    assert samples == [[BEGIN, a, a, a, a]] * 4


@settings(max_examples=30, deadline=None)
@given(
    texts=st.lists(st.text(alphabet="ab\n c", max_size=30), min_size=1, max_size=20),
    sample_len=st.integers(2, 9),
    start=st.integers(0, 10),
)
def test_starting_later_gives_the_rest(texts: list[str], sample_len: int, start: int) -> None:
    tokens = sum(len(text) + 1 for text in texts if text.strip())
    number = tokens // sample_len
    if number == 0:
        return
    samples = TokenSamples(texts_source(texts), byte_tokenizer(), number, sample_len)
    every = list(samples)
    assert len(every) == len(samples) == number
    rest = list(samples.starting_at(min(start, number)))
    assert all(torch.equal(a, b) for a, b in itertools.zip_longest(rest, every[start:], fillvalue=torch.empty(0)))


def test_a_long_document_is_tokenised_in_pieces_without_loss() -> None:
    text = "".join(f"{i}\n" for i in range(40_000)) + "x" * (2 * PIECE_CHARACTERS)
    samples = TokenSamples(texts_source([text]), byte_tokenizer(), 1, len(text) + 1)
    assert byte_tokenizer().decode(row_of(samples)[:-1]) == text


def test_the_source_is_read_only_as_far_as_needed() -> None:
    read = 0

    def documents(_seed: int) -> Iterator[str]:
        nonlocal read
        while True:  # endless, and therefore a hang if samples were collected first
            read += 1
            yield "word " * 2000

    samples = TokenSamples(TextSource("endless", documents), byte_tokenizer(), 200, 1000)
    assert sum(1 for _ in samples) == 200
    assert read < 60


def test_the_seed_reaches_the_source() -> None:
    source = TextSource("seeded", lambda seed: iter([str(seed) * 4]))
    tokenizer = byte_tokenizer()
    assert tokenizer.decode(row_of(TokenSamples(source, tokenizer, 1, 4, seed=7))) == "7777"


@pytest.mark.parametrize("texts", [[], ["", " \n"]])
def test_no_text_is_refused(texts: list[str]) -> None:
    with pytest.raises(DataError, match="texts holds no text"):
        list(TokenSamples(texts_source(texts), byte_tokenizer(), 1, 4))


def test_text_shorter_than_one_sample_says_what_was_got_and_needed() -> None:
    with pytest.raises(DataError, match="texts has 4 tokens; one sample needs 10"):
        list(TokenSamples(texts_source(["abc"]), byte_tokenizer(), 1, 10))


def test_fewer_samples_than_asked_for_says_how_many_there_are() -> None:
    with pytest.raises(DataError, match=r"11 tokens, enough for 2 samples of 4; 3 were asked for \(12 tokens\)"):
        list(TokenSamples(texts_source(["a" * 10]), byte_tokenizer(), 3, 4))


@pytest.mark.parametrize(("number", "length"), [(0, 8), (1, 1)])
def test_numbers_out_of_range_are_refused(number: int, length: int) -> None:
    with pytest.raises(DataError, match="at least 1 sample of at least 2 tokens"):
        TokenSamples(texts_source(["abc"]), byte_tokenizer(), number, length)
