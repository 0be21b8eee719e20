"""What a text's embeddings are compared with: zero, a mean, a token, or what a user gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from embedding_pass import mean_embedding, token_embeddings
from forward_pass import InputError
from model_architecture import Architecture
from module_devices import as_tensor
from tokenization import token_id, token_strings


def baseline_embeddings(
    arch: Architecture, tokenizer: Any, asked: Any, length: int
) -> tuple[Tensor, str]:
    """A baseline, as what the embedding gives for a text.

    Args:
        arch: The model.
        tokenizer: For a token given as text, and for ``"pad"``.
        asked: ``"zero"``, ``"mean"`` of the vocabulary's embeddings, ``"pad"``, any other token by
            text or id, or a tensor ``[d]`` or ``[position, d]``.
        length: Tokens of the text.

    Returns:
        ``[position, d]``, and what to call it.

    Raises:
        InputError: it is no baseline.
    """
    if isinstance(asked, Tensor | np.ndarray):
        return _given_baseline(arch, as_tensor(asked), length), "given"
    if isinstance(asked, str) and asked == "zero":
        row, name = torch.zeros_like(token_embeddings(arch, [0])[0]), asked
    elif isinstance(asked, str) and asked == "mean":
        row, name = mean_embedding(arch), asked
    else:
        number = _baseline_token(arch, tokenizer, asked)
        row = token_embeddings(arch, [number])[0]
        name = f"token {token_strings(tokenizer, [number])[0]!r}"
    return row.expand(length, -1), name


def _baseline_token(arch: Architecture, tokenizer: Any, asked: Any) -> int:
    if not isinstance(asked, str) or asked != "pad":
        if not isinstance(asked, str) and not hasattr(asked, "__index__"):
            raise InputError(
                "a baseline is 'zero', 'mean', 'pad', a token by text or id, or a tensor [d] or "
                f"[position, d]; came {asked!r}"
            )
        return token_id(tokenizer, asked, arch.config)
    number = getattr(tokenizer, "pad_token_id", None)
    if number is None:
        raise InputError(
            "the tokenizer has no pad token: choose baseline='zero', 'mean', or a token by text "
            "or id"
        )
    return token_id(tokenizer, number, arch.config)


def _given_baseline(arch: Architecture, given: Tensor, length: int) -> Tensor:
    width = token_embeddings(arch, [0]).shape[-1]
    if given.shape not in ((width,), (length, width)):
        raise InputError(
            f"a baseline is [d] or [position, d], [{width}] or [{length}, {width}]; came "
            f"{list(given.shape)}"
        )
    if not given.is_floating_point() or not bool(torch.isfinite(given).all()):
        raise InputError("a baseline must hold finite floating-point numbers")
    return given.detach().to(arch.input_device).expand(length, -1)
