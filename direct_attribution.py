"""Direct logit attribution: a logit as an exact sum over the parts of the model.

    result = logit_attribution(architecture, tokenizer, "The capital of France is", " Paris")
    result.top(5)                      # the heads, MLPs, … that add most to the logit
    result.total - result.logits       # rounding

Each block adds what its writers give to the residual stream, so the stream that leaves the last
block is a sum: the embedding, every head's z through its slice of the output projection, biases,
MLPs (or their neurons). The final norm, its scale held at the value that it has at this token, and
the unembedding are linear, so the logit is the same sum (Elhage et al. 2021, "A Mathematical
Framework for Transformer Circuits", section "The residual stream"; nostalgebraist 2020 for the lens
that `LogitAttribution.cumulative` is). A norm between a writer and the stream (Gemma 2) has its
scale held likewise; a residual multiplier and a logit scale multiply every part. Where logits are
soft-capped, the parts split the logit before the cap, and one more part, ``soft_cap``, is what the
cap takes off.

Parts act on later ones too: this is the direct effect alone, and raw logits, so that what raises
every token alike counts (a difference of two tokens is free of that). Weights are used as they are:
nothing is folded or centred. What a block writes beyond its parts is a part of its own (``other``),
never dropped, and a sum that is not the model's logit to rounding is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from forward_pass import InputError, Site, SiteError
from head_circuits import token_ids_of
from interrupts import no_grad
from logit_attribution import LogitAttribution
from logit_split import LogitSplit
from logit_tail import find_tail, require_one_stream
from model_architecture import Architecture, Layer
from module_devices import exact
from stream_parts import Writer, find_writers, record_parts
from tokenization import (
    Positions,
    Prompt,
    check_ids,
    encode,
    resolve_positions,
    token_strings,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tokens = Sequence[str | int] | str | int | None
"""A token as text or id, or several."""


@no_grad()
def logit_attribution(
    architecture: Architecture,
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: Prompt,
    tokens: Tokens = None,
    against: Tokens = None,
    positions: Positions = -1,
    *,
    neurons: bool | Sequence[Layer] | Layer = False,
    following: bool = False,
) -> LogitAttribution:
    """Split logits, or differences of two, over the parts of the model, in one forward pass.

    Args:
        architecture: The model.
        tokenizer: For texts.
        prompt: Text, a chat, or token ids.
        tokens: Whose logits; the same at every position. None is the model's own best token, at
            each position.
        against: A token whose logit is taken off, or one for each of ``tokens``.
        positions: After which tokens: an index, a list, a slice, or None for all.
        neurons: Split every MLP that ends in one matrix into its neurons, or those of these blocks
            (one or several, in any spelling).
        following: Instead of ``tokens``, at each position the token that does follow in the prompt.

    Returns:
        Parts whose sum is the model's logit, to rounding (`LogitAttribution.error`).

    Raises:
        InputError: the prompt, a token or a position cannot be used.
        LayerError: there is no such block.
        SiteError: a block has no neurons, or the model has several streams, or its logits are made
            of something else than a norm and a matrix.
        ArchitectureError: the model has no head, or its parts do not add up to its logits.
    """
    ids = encode(tokenizer, prompt)
    check_ids(ids, architecture.config)
    places = resolve_positions(positions, len(ids))
    asked = _Asked.of(architecture, tokenizer, ids, places, tokens, against, following)
    require_one_stream(architecture)
    chosen = _layers_with_neurons(architecture, neurons)
    writers = {n: find_writers(architecture, n) for n in range(architecture.n_layers)}
    every = [writer for found in writers.values() for writer in found]
    found = record_parts(architecture, ids, places, every, _sites(architecture, writers, chosen))
    assert found.logits is not None
    targets, foils = asked.tables(found.logits)
    last = found.at(Site("resid_post", architecture.n_layers - 1))
    tail = find_tail(architecture, last)
    split = LogitSplit(architecture, found, tail, targets, foils)
    split.add_embedding()
    for layer in range(architecture.n_layers):
        split.add_block(layer, writers[layer], layer in chosen)
    logits = _pick(found.logits, targets) - _pick(found.logits, foils)
    split.add_ends(logits)
    split.require_sum(logits)
    return LogitAttribution(
        **split.tables(),
        logits=logits.numpy(),
        target_ids=targets.numpy(),
        against_ids=foils.numpy(),
        targets=_texts(tokenizer, targets),
        against=_texts(tokenizer, foils),
        positions=tuple(places),
        tokens=tuple(token_strings(tokenizer, ids)),
        n_layers=architecture.n_layers,
    )


# --- What is asked about --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Asked:
    """Tokens by position and target, as far as they are known before the model has run."""

    targets: list[list[int]] | None
    """``[position][target]``; None is the model's best."""
    foils: list[int]
    """One per target, or one for all; none."""

    @classmethod
    def of(
        cls,
        architecture: Architecture,
        tokenizer: PreTrainedTokenizerBase | None,
        ids: list[int],
        places: list[int],
        tokens: Tokens,
        against: Tokens,
        following: bool,
    ) -> _Asked:
        """Check what was asked for.

        Raises:
            InputError: it cannot be answered.
        """
        wanted = _token_ids(architecture, tokenizer, tokens, "tokens")
        foils = _token_ids(architecture, tokenizer, against, "against") or []
        if following and wanted is not None:
            raise InputError("following=True asks about the prompt's own tokens: leave out tokens")
        if following and len(ids) - 1 in places:
            raise InputError(
                f"no token follows position {len(ids) - 1}, the prompt's last; pass "
                "positions=slice(0, -1), or following=False for the model's best token"
            )
        count = 1 if wanted is None else len(wanted)
        if len(foils) not in (0, 1, count):
            raise InputError(
                f"against is one token, or one for each of the {count} tokens; came {len(foils)}"
            )
        if wanted is not None:
            pairs = zip(wanted, foils * (count if len(foils) == 1 else 1), strict=False)
            same = next((a for a, b in pairs if a == b), None)
            if same is not None:
                text = token_strings(tokenizer, [same])[0]
                raise InputError(f"{text!r} against itself is 0: name another token")
        if following:
            return cls([[ids[place + 1]] for place in places], foils)
        return cls(None if wanted is None else [wanted] * len(places), foils)

    def tables(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Targets and what they are compared with, ``[position, target]``; -1 is nothing.

        Args:
            logits: ``[position, vocab]``.
        """
        best = logits.argmax(-1)[:, None].cpu()
        targets = best if self.targets is None else torch.tensor(self.targets, device="cpu")
        foils = torch.tensor(self.foils or [-1], device="cpu").expand_as(targets)
        return targets, foils


def _token_ids(
    architecture: Architecture,
    tokenizer: PreTrainedTokenizerBase | None,
    tokens: Tokens,
    name: str,
) -> list[int] | None:
    if tokens is None:
        return None
    empty = f"there is no token in {name}=[]; None is {_NONE[name]}"
    return token_ids_of(architecture, tokenizer, tokens, empty)


_NONE = {"tokens": "the model's best token", "against": "no comparison"}


def _layers_with_neurons(
    architecture: Architecture, neurons: bool | Sequence[Layer] | Layer
) -> set[int]:
    """Blocks whose MLP is split into neurons."""
    every = range(architecture.n_layers)
    if isinstance(neurons, bool):
        asked = list(every) if neurons else []
    else:
        one = isinstance(neurons, str) or not hasattr(neurons, "__len__")
        several: Any = [neurons] if one else neurons
        asked = [architecture.resolve(layer) for layer in several]
    missing = {n: architecture.missing(Site("mlp_neurons", n)) for n in asked}
    first = next((why for why in missing.values() if why), None)
    if first and (neurons is not True or all(missing.values())):
        raise SiteError(first)
    return {n for n, why in missing.items() if why is None}


def _sites(
    architecture: Architecture, writers: dict[int, list[Writer]], with_neurons: set[int]
) -> list[Site]:
    """What is kept: the stream where it can change, and what its writers add and are made of."""
    sites = []
    for layer, found in writers.items():
        if layer == 0 or not architecture.structure[layer - 1].hands_on:
            sites.append(Site("resid_pre", layer))
        sites.append(Site("resid_post", layer))
        for writer in found:
            sites.append(writer.out)
            heads = writer.inside is not None and writer.inside.name == "head_out"
            if writer.inside is not None and (heads or layer in with_neurons):
                sites.append(writer.inside)
    return sites


def _texts(tokenizer: PreTrainedTokenizerBase | None, table: Tensor) -> tuple[tuple[str, ...], ...]:
    """Tokens ``[position, target]`` as text; "" for -1."""
    return tuple(
        tuple("" if i < 0 else token_strings(tokenizer, [i])[0] for i in row)
        for row in table.tolist()
    )


def _pick(logits: Tensor, ids: Tensor) -> Tensor:
    """``[position, vocab]`` at tokens ``[position, target]``, float64 on the CPU; 0 for -1."""
    found = exact(logits.gather(1, ids.clamp(min=0).to(logits.device))).cpu()
    return torch.where(ids < 0, 0.0, found)
