"""Tiny models and tokenizers whose answers can be computed by hand."""

from __future__ import annotations

import functools

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 64


def tiny_llama(seed: int = 0, vocab_size: int = VOCABULARY, layers: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.2,  # large enough for attention to matter
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each printable ASCII character and for the newline; <end> is end-of-sequence."""
    characters = [*map(chr, range(32, 127)), "\n"]
    vocabulary = {"<end>": 0, "<unk>": 1, **{character: i + 2 for i, character in enumerate(characters)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<unk>")


class Parrot(LlamaForCausalLM):
    """A real tiny Llama that goes through its attention and cache, then says what it is told to.

    `replies` maps a prompt's last token to the tokens that follow; after them comes end-of-sequence (token 0).
    """

    replies: dict[int, list[int]]

    def reply_with(self, replies: dict[int, list[int]]) -> None:
        self.replies = replies
        self._pending: list[list[int]] = []

    @functools.wraps(LlamaForCausalLM.forward)
    def forward(self, input_ids=None, **kwargs):
        outputs = super().forward(input_ids=input_ids, **kwargs)
        if input_ids.shape[1] > 1:
            self._pending = [list(self.replies.get(int(row[-1]), [])) for row in input_ids]
        outputs.logits.zero_()
        for index, pending in enumerate(self._pending):
            outputs.logits[index, -1, pending.pop(0) if pending else 0] = 1.0
        return outputs


def parrot(vocab_size: int, replies: dict[int, list[int]], eos_token_id: int = 0) -> Parrot:
    config = tiny_llama(vocab_size=vocab_size).config
    config.eos_token_id = eos_token_id
    model = Parrot(config).eval()
    model.generation_config.eos_token_id = eos_token_id
    model.reply_with(replies)
    return model
