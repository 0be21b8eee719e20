"""Clean and corrupted prompts: how the tokens of the two correspond, and which are meant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from forward_pass import InputError
from model_architecture import Architecture
from tokenization import Positions, check_ids, encode, resolve_positions, token_strings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class PromptPair:
    """Two prompts and how their tokens correspond."""

    clean: list[int]
    corrupted: list[int]
    base: list[int]
    source: list[int]
    mapping: dict[int, int]
    """Position in the base → position in the source, for those that have one."""
    answer: Any = None
    foil: Any = None

    @property
    def shape(self) -> tuple[Any, ...]:
        """Pairs of one shape are run together."""
        return len(self.base), len(self.source), tuple(self.mapping.items())


def is_dataset(prompt: Any) -> bool:
    """Whether several prompts are given: a list of texts, of chats or of lists of token ids."""
    if isinstance(prompt, str | Mapping) or not isinstance(prompt, Sequence) or not prompt:
        return False
    first = prompt[0]
    return isinstance(first, str | Sequence | Tensor | np.ndarray) and not (
        isinstance(first, Tensor | np.ndarray) and first.ndim == 0
    )


def make_pairs(
    architecture: Architecture,
    tokenizer: PreTrainedTokenizerBase | None,
    clean: Any,
    corrupted: Any,
    direction: str,
    align: str | Mapping[int, int] | None,
    answer: Any,
    foil: Any,
) -> list[PromptPair]:
    """Token ids and correspondence of one pair of prompts, or of several.

    Args:
        architecture: The model.
        tokenizer: For prompts given as text.
        clean: A prompt, or a list of them.
        corrupted: The same.
        direction: ``"denoising"``: the corrupted prompt is edited; ``"noising"``: the clean one.
        align: See `align_tokens`.
        answer: The metric's token, or one for each pair.
        foil: The same.

    Raises:
        InputError: they do not come in pairs, or their tokens do not correspond.
    """
    several = is_dataset(clean)
    if several != is_dataset(corrupted) or (several and len(clean) != len(corrupted)):
        raise InputError("clean and corrupted prompts come in pairs: give two lists of one length")
    count = len(clean) if several else 1
    pairs = []
    for i in range(count):
        texts = (clean[i], corrupted[i]) if several else (clean, corrupted)
        ids = [encode(tokenizer, text) for text in texts]
        for each in ids:
            check_ids(each, architecture.config)
        base, source = (ids[1], ids[0]) if direction == "denoising" else (ids[0], ids[1])
        mapping = align_tokens(tokenizer, base, source, align)
        pairs.append(
            PromptPair(
                clean=ids[0],
                corrupted=ids[1],
                base=base,
                source=source,
                mapping=mapping,
                answer=_of_pair(answer, i, count),
                foil=_of_pair(foil, i, count),
            )
        )
    return pairs


def _of_pair(token: Any, index: int, count: int) -> Any:
    if token is None or isinstance(token, str) or not isinstance(token, Sequence):
        return token
    if len(token) != count:
        raise InputError(f"{len(token)} tokens for {count} pairs: give one, or one for each pair")
    return token[index]


def align_tokens(
    tokenizer: PreTrainedTokenizerBase | None,
    base: Sequence[int],
    source: Sequence[int],
    align: str | Mapping[int, int] | None = None,
) -> dict[int, int]:
    """Which position of the one prompt corresponds to which of the other.

    Args:
        tokenizer: To show the tokens in an error.
        base: Token ids of the prompt that is edited.
        source: Token ids of the one that activations are taken from.
        align: None for prompts of one length, ``"end"``, or a mapping from base to source.

    Returns:
        Base position → source position, ascending.

    Raises:
        InputError: the lengths differ and nothing says how they correspond.
    """
    n_base, n_source = len(base), len(source)
    if align == "end":
        return {p: p + n_source - n_base for p in range(n_base) if p + n_source >= n_base}
    if isinstance(align, Mapping):
        return _mapped(align, n_base, n_source)
    if align is not None:
        raise InputError(f"align is None, 'end' or a mapping of positions; came {align!r}")
    if n_base != n_source:
        raise InputError(
            f"the prompts have {n_base} and {n_source} tokens, so their positions do not "
            f"correspond: {token_strings(tokenizer, base)} and {token_strings(tokenizer, source)}. "
            "Write them with as many tokens each, or pass align='end' or a mapping of positions"
        )
    return {position: position for position in range(n_base)}


def _mapped(align: Mapping[int, int], n_base: int, n_source: int) -> dict[int, int]:
    found: dict[int, int] = {}
    for position, other in align.items():
        (here,), (there,) = resolve_positions(position, n_base), resolve_positions(other, n_source)
        if here in found:
            raise InputError(f"align names position {here} of the edited prompt twice")
        found[here] = there
    return dict(sorted(found.items()))


def pair_positions(
    pairs: Sequence[PromptPair], positions: Positions, is_axis: bool
) -> list[tuple[int, ...]]:
    """The positions of each pair that are patched.

    Args:
        pairs: The pairs.
        positions: Of the edited prompt; None means all that have a counterpart.
        is_axis: They shall be an axis of a table, so they must be the same for all pairs.

    Raises:
        InputError: a position has no counterpart, or means something else in each pair.
    """
    found = []
    for pair in pairs:
        asked = resolve_positions(positions, len(pair.base))
        known = [p for p in asked if p in pair.mapping]
        if not known or (positions is not None and len(known) < len(asked)):
            raise InputError(f"positions {asked} have no counterpart in the other prompt")
        found.append(tuple(known))
    if is_axis and len(set(found)) > 1:
        raise InputError(
            "the pairs of prompts differ in length, so a position means something else in each: "
            "sweep without the axis 'position' (axes=('layer',), positions='last'), or give "
            "prompts of one length"
        )
    return found
