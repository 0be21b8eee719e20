"""An induction circuit built by hand: the answer is known to every tool that looks for heads."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

VOCABULARY = POSITIONS = 32
PREVIOUS, INDUCTION = (0, 1), (1, 2)
"""Layer and head of the two heads that do anything."""


def induction_circuit(copies=False):
    """GPT-2 with a previous-token head 0.1 and an induction head 1.2, and nothing else.

    The stream holds the token (32 entries), the position (32) and what head 0.1 writes: the token
    before (32). Head 1.2 asks for tokens whose previous one is the token itself.

    Args:
        copies: Let head 1.2 also say the token that it looks at.
    """
    width, heads, size = 96, 3, 32
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=POSITIONS, n_embd=width, n_layer=2, n_head=heads,
        n_inner=4, layer_norm_epsilon=1e-5, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    token, place, before = slice(0, 32), slice(32, 64), slice(64, 96)
    eye, strong = torch.eye(32), 4.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "ln_" in name and name.endswith("weight") else 0.0)
        model.transformer.wte.weight[:, token] = eye
        model.transformer.wpe.weight[:, place] = eye
        first = model.transformer.h[0].attn
        of = slice(size, 2 * size)  # head 1: a place asks for the place before
        first.c_attn.weight[place, of] = strong * eye.roll(-1, dims=1)
        first.c_attn.weight[place, width + size : width + 2 * size] = strong * eye
        first.c_attn.weight[token, 2 * width + size : 2 * width + 2 * size] = eye
        first.c_proj.weight[of, before] = eye
        second = model.transformer.h[1].attn
        of = slice(2 * size, 3 * size)
        second.c_attn.weight[token, of] = strong * eye
        second.c_attn.weight[before, width + 2 * size : width + 3 * size] = strong * eye
        if copies:
            second.c_attn.weight[token, 2 * width + 2 * size : 2 * width + 3 * size] = eye
            second.c_proj.weight[of, token] = eye
    return model
