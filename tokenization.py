"""From what a user types to token ids, and back to readable tokens; positions; padded batches.

A prompt is text, a chat (a list of messages), or token ids. Text is tokenized as the tokenizer does
by default; a chat goes through its template once, so that no second BOS appears. Nothing is written
onto the tokenizer: where it has no pad token, padding is any token under an attention mask of 0.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from forward_pass import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Prompt = str | Sequence[int] | Tensor | np.ndarray | Sequence[Mapping[str, str]]
"""Text, token ids (a list, a 1-D tensor or array), or a chat (``[{"role": …, "content": …}]``)."""

Positions = str | int | slice | Sequence[int] | Tensor | np.ndarray | None
"""Which tokens: ``"last"``, an index (negative from the end), a slice, a list, ``"all"``, None."""


def is_token_ids(prompt: Any) -> bool:
    """Whether a prompt is given as token ids."""
    if isinstance(prompt, Tensor | np.ndarray):
        return True
    return (
        isinstance(prompt, Sequence)
        and not isinstance(prompt, str | bytes)
        and not _is_chat(prompt)
    )


def _is_chat(prompt: Any) -> bool:
    return isinstance(prompt, Sequence) and len(prompt) > 0 and isinstance(prompt[0], Mapping)


def encode(tokenizer: PreTrainedTokenizerBase | None, prompt: Prompt) -> list[int]:
    """Token ids of a prompt.

    Args:
        tokenizer: Needed unless the prompt is token ids.
        prompt: Text, a chat, or token ids.

    Returns:
        The ids, at least one.

    Raises:
        InputError: no token comes out, there is no tokenizer, or the prompt is of no known kind.
    """
    if is_token_ids(prompt):
        ids = as_ids(prompt)  # type: ignore[arg-type]
        if not ids:
            raise InputError("an empty list of token ids cannot be run; give at least one")
        return ids
    if tokenizer is None:
        raise InputError(
            "text needs a tokenizer: pass tokenizer=, or give token ids instead of text"
        )
    if isinstance(prompt, str):
        _refuse_surrogates(prompt)
        ids = list(tokenizer(prompt)["input_ids"])
    elif _is_chat(prompt):
        ids = _encode_chat(tokenizer, prompt)
    else:
        raise InputError(f"a prompt is text, a chat or token ids, not {type(prompt).__name__}")
    if not ids:
        bos = tokenizer.bos_token_id
        other = "" if bos is None else f", or pass the BOS token alone as token ids: [{bos}]"
        raise InputError(f"the prompt {prompt!r} gives no token; write some text{other}")
    return ids


TEXTS_AT_ONCE = 256
"""A tokenizer keeps kilobytes about each text that it is given, until all of them are done."""


def encode_texts(
    tokenizer: PreTrainedTokenizerBase | None, prompts: Sequence[Prompt]
) -> list[list[int] | None]:
    """Token ids of many texts in one call, several times faster than one by one.

    Args:
        tokenizer: None where there is none.
        prompts: Of any kind.

    Returns:
        For each prompt its ids; None where it is no text, or one that `encode` refuses.
    """
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    if tokenizer is None or not texts:
        return [None] * len(prompts)
    good = [text for text in texts if text.isascii() or not _SURROGATE.search(text)]
    ids: dict[str, list[int]] = {}
    for start in range(0, len(good), TEXTS_AT_ONCE):
        some = good[start : start + TEXTS_AT_ONCE]
        ids.update(zip(some, tokenizer(some)["input_ids"], strict=True))
    return [list(ids.get(p, ())) or None if isinstance(p, str) else None for p in prompts]


_SURROGATE = re.compile("[\ud800-\udfff]")


def _refuse_surrogates(text: str, what: str = "the prompt") -> None:
    try:
        text.encode()
    except UnicodeEncodeError as err:
        raise InputError(
            f"{what} is not valid Unicode: {text[err.start]!r} at character {err.start} "
            "is half of a surrogate pair"
        ) from err


def as_ids(ids: Sequence[int] | Tensor | np.ndarray) -> list[int]:
    """Token ids as a list: of a list, or of a tensor or array ``[position]`` or ``[1, position]``.

    Raises:
        InputError: they have another shape, or are no integers.
    """
    if isinstance(ids, Tensor | np.ndarray):
        row = ids[0] if ids.ndim == 2 and len(ids) == 1 else ids
        if row.ndim != 1:
            raise InputError(f"token ids of one text are [position]; came {tuple(ids.shape)}")
        ids = row.tolist()
    try:
        return [_as_integer(token) for token in ids]
    except TypeError:
        raise InputError(f"token ids must be integers; came {ids!r}") from None


def _as_integer(value: Any) -> int:
    """An integer of any library; TypeError for all else, truth values (0 and 1) too."""
    if isinstance(value, bool) or getattr(value, "dtype", None) == torch.bool:
        raise TypeError("a truth value is no integer")
    return operator.index(value)


def _encode_chat(tokenizer: PreTrainedTokenizerBase, chat: Any) -> list[int]:
    if not getattr(tokenizer, "chat_template", None):
        raise InputError("this tokenizer has no chat template; write the chat as one text")
    for message in chat:
        _refuse_surrogates("".join(map(str, message.values())))
    encoded: Any = tokenizer.apply_chat_template(
        list(chat), tokenize=True, add_generation_prompt=True, return_dict=True
    )
    return list(encoded["input_ids"])


def check_ids(ids: Sequence[int], config: Any, extra: int = 0) -> None:
    """Refuse ids that the model has no embedding for, and more tokens than it has positions for.

    Args:
        ids: Token ids.
        config: The model's text config.
        extra: Tokens that shall still be generated after these.

    Raises:
        InputError: with the numbers.
    """
    vocabulary = config.vocab_size
    wrong = [token for token in ids if not 0 <= token < vocabulary]
    if wrong:
        raise InputError(
            f"token id {wrong[0]} is outside the model's vocabulary of {vocabulary} "
            f"(0..{vocabulary - 1})"
        )
    context = context_length(config)
    if context is not None and len(ids) + extra > context:
        more = f" and {extra} to generate" if extra else ""
        raise InputError(
            f"the prompt has {len(ids)} tokens{more}; the model's context holds {context}: "
            f"shorten it{_how_to_cut(context - extra)} (nothing is cut off by itself)"
        )


def _how_to_cut(room: int) -> str:
    return f", for example to its last {room} tokens, as token ids" if room > 0 else ""


def context_length(config: Any) -> int | None:
    """How many tokens a model has positions for; None where its config sets no limit."""
    found = (getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len"))
    return next((length for length in found if isinstance(length, int) and length > 0), None)


def token_id(tokenizer: PreTrainedTokenizerBase | None, token: str | int, config: Any) -> int:
    """The id of a token given by text (which must be exactly one token) or by id.

    Args:
        tokenizer: Needed for a text.
        token: Text, with its leading space where it has one, or an id.
        config: The model's text config, to check an id.

    Raises:
        InputError: it is no token, or several.
    """
    if not isinstance(token, str):
        (number,) = as_ids([token])
        check_ids([number], config)
        return number
    if tokenizer is None:
        raise InputError("a token given as text needs a tokenizer; give its id instead")
    _refuse_surrogates(token, "the token")
    ids, spaced = (
        tokenizer(written, add_special_tokens=False)["input_ids"]
        for written in (token, f" {token}")
    )
    if len(ids) != 1:
        pieces = token_strings(tokenizer, ids)
        hint = f"; {' ' + token!r} is one token" if len(spaced) == 1 else ""
        raise InputError(f"{token!r} is {len(ids)} tokens ({pieces}), not one{hint}")
    return int(ids[0])


_TOKEN_STRINGS: WeakKeyDictionary[PreTrainedTokenizerBase, dict[int, str]] = WeakKeyDictionary()
_ANCHORS: WeakKeyDictionary[Any, tuple[list[int], str]] = WeakKeyDictionary()


def token_strings(tokenizer: PreTrainedTokenizerBase | None, ids: Iterable[int]) -> list[str]:
    """Each token as readable text with its leading space (``" Paris"``), for any kind of tokenizer.

    A token that is only a part of a character is shown as the tokenizer's own piece; without a
    tokenizer a token is shown as its id, ``"<17>"``.
    """
    if tokenizer is None:
        return [f"<{token}>" for token in ids]
    known = _TOKEN_STRINGS.setdefault(tokenizer, {})
    return [known.get(i) or known.setdefault(i, _token_string(tokenizer, i)) for i in ids]


def _token_string(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """What the token adds to a text that already holds a letter."""
    if not 0 <= token < 2**32:  # tokenizers count in 32 bits
        return f"<{token}>"
    anchor, alone = _anchor(tokenizer)
    both = _decoded(tokenizer, [*anchor, token])
    text = both[len(alone) :] if both.startswith(alone) else _decoded(tokenizer, [token])
    if text and "\ufffd" not in text:
        return text
    piece = tokenizer.convert_ids_to_tokens(token)
    return f"<{token}>" if piece is None else str(piece)


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def _anchor(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], str]:
    """A letter's ids and text, found once per tokenizer."""
    found = _ANCHORS.get(tokenizer)
    if found is None:
        ids = list(tokenizer("a", add_special_tokens=False)["input_ids"])
        found = _ANCHORS[tokenizer] = (ids, _decoded(tokenizer, ids))
    return found


def resolve_positions(positions: Positions, length: int) -> list[int]:
    """Absolute token positions, 0 to ``length - 1``, in the order asked for.

    Args:
        positions: See `Positions`.
        length: Number of tokens.

    Raises:
        InputError: a position is out of range, given twice, or of no known kind.
    """
    if positions is None or (isinstance(positions, str) and positions == "all"):
        return list(range(length))
    if isinstance(positions, str) and positions == "last":
        return [length - 1]
    try:
        if isinstance(positions, slice):
            chosen = _slice(positions, length)
        else:
            chosen = _in_range(_as_integers(positions), length)
    except TypeError:
        raise InputError(
            f"positions is 'last', 'all', an index, a slice, a list or None; came {positions!r}"
        ) from None
    if not chosen:
        raise InputError(f"positions={positions!r} selects none of the {length} tokens")
    return chosen


def _slice(positions: slice, length: int) -> list[int]:
    try:
        return list(range(length)[positions])
    except ValueError as error:  # a step of 0
        raise InputError(f"positions={positions!r} selects nothing: {error}") from None


def _as_integers(positions: Any) -> list[int]:
    if isinstance(positions, Tensor | np.ndarray):
        positions = positions.tolist()
    if hasattr(positions, "__index__"):
        positions = [positions]
    return [_as_integer(position) for position in positions]


def _in_range(asked: list[int], length: int) -> list[int]:
    for position in asked:
        if not -length <= position < length:
            raise InputError(
                f"position {position} is out of range: the prompt has {length} tokens, "
                f"valid are 0..{length - 1} or -{length}..-1"
            )
    chosen = [position % length for position in asked]
    if len(set(chosen)) != len(chosen):
        raise InputError(f"positions={asked} names a token twice")
    return chosen


def pad_left(rows: Sequence[Sequence[int]], pad_id: int = 0) -> tuple[Tensor, Tensor]:
    """A batch of token lists, padded on the left.

    Returns:
        Ids ``[batch, position]`` and the attention mask of the same shape, 0 at padding.
    """
    width = max(len(row) for row in rows)
    ids = torch.tensor([[pad_id] * (width - len(row)) + list(row) for row in rows], device="cpu")
    lengths = torch.tensor([len(row) for row in rows], device="cpu")
    mask = (torch.arange(width, device="cpu")[None] >= (width - lengths)[:, None]).long()
    return ids, mask
