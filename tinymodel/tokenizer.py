"""The tiny model's tokenizer: byte-level BPE for text, plus one token for every word of a LongEval lines key.

A record line costs about nine tokens: the start of the line, the adjective, the noun with its hyphen, the text before
the number, and one per digit. Everything else is byte-level BPE, so any text survives encode and decode unchanged.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from cskv.data import lines, offline

BOS, EOS, PAD = "<|begin|>", "<|end|>", "<|pad|>"
CONTENT = ": REGISTER_CONTENT is <"
NEXT_LINE = ">\nline "
FIRST_LINE = "line "
IN_LINE = " in line "
TEXT_VOCABULARY = 3_550
TEXT_PATTERN = r"-\p{L}+| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Train the BPE part on the offline corpus, then add the key words and the fixed fragments as whole tokens."""
    splitter = _pre_tokenizer()
    text_bpe = Tokenizer(models.BPE())
    text_bpe.pre_tokenizer = splitter
    trainer = trainers.BpeTrainer(
        vocab_size=TEXT_VOCABULARY,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text_bpe.train_from_iterator((text for _, text in offline.documents("train")), trainer)
    tokenizer = _with_whole_tokens(text_bpe)
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([BOS, EOS, PAD])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Load the tokenizer of this folder, building it first where there is none."""
    if not (folder / "tokenizer.json").exists():
        build_tokenizer().save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    adjectives, nouns = lines.key_words()
    compound_adjectives = "|".join(re.escape(word) for word in adjectives if not word.isalpha())
    compound_nouns = "|".join(re.escape(word) for word in nouns if not word.isalpha())
    alternatives = [
        re.escape(CONTENT),
        re.escape(NEXT_LINE),
        re.escape(IN_LINE),
        rf"{re.escape(FIRST_LINE)}(?=\p{{L}})",
        rf"(?:{compound_adjectives})(?=-\p{{L}})",
        rf"-(?:{compound_nouns})(?=[:?])",
        TEXT_PATTERN,
    ]
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("|".join(alternatives)), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _with_whole_tokens(text_bpe: Tokenizer) -> Tokenizer:
    """The same BPE with more vocabulary: pieces that are in the vocabulary as a whole are never taken apart."""
    trained = json.loads(text_bpe.to_str())["model"]
    vocabulary: dict[str, int] = dict(trained["vocab"])
    adjectives, nouns = lines.key_words()
    wholes = [CONTENT, NEXT_LINE, FIRST_LINE, IN_LINE, *adjectives, *(f"-{noun}" for noun in nouns)]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for whole in wholes:
        (piece, _), *_ = byte_level.pre_tokenize_str(whole)
        vocabulary.setdefault(piece, len(vocabulary))
    merges = [tuple(pair) for pair in trained["merges"]]
    return Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
