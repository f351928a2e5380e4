"""A head start: the first two layers begin as the induction circuit that small models otherwise take long to find.

Layer 0: head h looks h + 1 tokens back and writes what stands there into a slot of its own in the hidden state.
Layer 1: head h looks for the place whose slot h + 1 holds what slot h holds here (slot 0 is the token itself), and
copies the token at that place. Everything is trained afterwards; the usual random weights are added everywhere.
"""

from __future__ import annotations

import math

import torch
from transformers import LlamaForCausalLM

SLOT = 32
TOKEN_STD = 0.1
CONSTANT = 16 * TOKEN_STD
OFFSET_SHARPNESS = 40.0
OFFSET_FREQUENCIES = 12
MATCH_SHARPNESS = 3.4
ALIGNMENT = 0.5


@torch.no_grad()
def align_outputs(model: LlamaForCausalLM, tokens: list[int]) -> None:
    """Give the output rows of these tokens the differences that their input embeddings have.

    A rare word's output row learns little but noise; with the row that belongs to its embedding it can be copied.
    """
    inputs, outputs = model.model.embed_tokens.weight, model.lm_head.weight
    outputs[tokens] = outputs[tokens].mean(0) + ALIGNMENT * (inputs[tokens] - inputs[tokens].mean(0))


@torch.no_grad()
def start_with_induction(model: LlamaForCausalLM) -> None:
    """Overwrite the embeddings, and add the circuit to layers 0 and 1."""
    embedding = model.model.embed_tokens.weight
    torch.nn.init.normal_(embedding, std=TOKEN_STD)
    model.lm_head.weight.copy_(embedding)
    model.lm_head.weight[:, 0] = 0.0
    embedding[:, 0] = CONSTANT
    width, heads = model.config.hidden_size, model.config.num_attention_heads
    basis = torch.zeros(width, width)
    basis[1:, 1:] = torch.linalg.qr(torch.randn(width - 1, width - 1)).Q
    token, *slots = (basis[:, 1 + SLOT * i : 1 + SLOT * (i + 1)].T for i in range(heads + 1))
    for head in range(heads):
        _look_back(model, head, token, slots[head])
        _match(model, head, token, slots[head - 1] if head else token, slots[head])


def _look_back(model: LlamaForCausalLM, head: int, token: torch.Tensor, slot: torch.Tensor) -> None:
    """Layer 0: attend to `head + 1` tokens back, by a query and a key that are the same for every token."""
    attention, size = model.model.layers[0].self_attn, model.config.head_dim
    start, half = head * size, size // 2
    frequencies = model.model.rotary_emb.inv_freq[:OFFSET_FREQUENCIES]
    constant = CONSTANT / math.sqrt(TOKEN_STD**2 + CONSTANT**2 / model.config.hidden_size)
    scale = math.sqrt(OFFSET_SHARPNESS * math.sqrt(size) / OFFSET_FREQUENCIES) / constant
    attention.k_proj.weight[start : start + OFFSET_FREQUENCIES, 0] += scale
    turn = frequencies * (head + 1)
    attention.q_proj.weight[start : start + OFFSET_FREQUENCIES, 0] += scale * turn.cos()
    attention.q_proj.weight[start + half : start + half + OFFSET_FREQUENCIES, 0] -= scale * turn.sin()
    attention.v_proj.weight[start : start + SLOT] += token
    attention.o_proj.weight[:, start : start + SLOT] += 0.28 * slot.T


def _match(model: LlamaForCausalLM, head: int, token: torch.Tensor, here: torch.Tensor, there: torch.Tensor) -> None:
    """Layer 1: attend where the slot `there` holds what `here` holds at this place; copy the token found."""
    attention, size = model.model.layers[1].self_attn, model.config.head_dim
    slow = torch.arange(SLOT // 2) + size // 2 - SLOT // 2
    rows = head * size + torch.cat([slow, slow + size // 2])
    scale = math.sqrt(MATCH_SHARPNESS)
    attention.q_proj.weight[rows] += scale * here * (2.0 if here is token else 1.0)
    attention.k_proj.weight[rows] += scale * there
    attention.v_proj.weight[rows] += token
    attention.o_proj.weight[:, rows] += token.T
