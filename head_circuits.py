"""What heads do, read off their weights alone: copying, composition, tokens, directions.

    copying_scores(architecture)                         # does a head say what it looks at?
    composition_scores(architecture)                     # which head reads which earlier head?
    circuit_tokens(architecture, tokenizer, "4.4")       # which token makes it say which?
    head_directions(architecture, tokenizer, "4.4")      # what it reads and writes, by strength

No ``[d_model, d_model]`` circuit and no ``[vocab, vocab]`` matrix is ever made: everything is
worked out on the d_head × d_head inside of a product (`factored_matrix`). Biases, rotation by
position, gates, and a norm between attention and the stream (Gemma 2, OLMo 2) are in none of it;
what a head does on a prompt, all of these included, is told by `head_writing`.

References: Elhage et al. (2021), "A Mathematical Framework for Transformer Circuits"; Millidge &
Black (2022), "The Singular Value Decompositions of Transformer Weight Matrices are Highly
Interpretable".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from circuit_nodes import parse_node
from factored_matrix import FactoredMatrix
from forward_pass import InputError, SiteError
from head_circuit_result import (
    KINDS,
    SIGNS,
    CircuitTokens,
    CompositionScores,
    HeadDirections,
    HeadScores,
    padded,
)
from head_weights import HeadWeights, all_head_weights, each_head_weights, head_weights
from model_architecture import Architecture, Layer
from model_inspection import weight_of
from norm_gain import final_norm_gain
from sites import is_count
from tokenization import token_id, token_strings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CIRCUITS = ("ov", "qk")

CHUNK = 8192
"""Rows of the vocabulary that are brought to float32 at once."""

# --- Embedding and unembedding --------------------------------------------------------------------


def embedding(architecture: Architecture) -> Tensor:
    """``W_E [vocab, d_model]``: the token embedding as it is stored, without positions.

    Raises:
        SiteError: it does not have the width of the residual stream.
    """
    module: Any = architecture.model.get_input_embeddings()
    return _checked(architecture, weight_of(module), "embedding")


def unembedding(architecture: Architecture) -> Tensor:
    """``[vocab, d_model]``, the transpose of W_U: the head's weight as it is stored.

    Raises:
        ArchitectureError: the model has no head.
        SiteError: it does not have the width of the residual stream.
    """
    architecture.require_head("what a head writes to the logits")
    module: Any = architecture.model.get_output_embeddings()
    return _checked(architecture, weight_of(module), "output embedding")


def _checked(architecture: Architecture, weight: Any, name: str) -> Tensor:
    width = architecture.d_model
    usable = isinstance(weight, Tensor) and weight.is_floating_point() and weight.dim() == 2
    if not usable or weight.shape[1] != width:
        came = list(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
        raise SiteError(
            f"the {name} of {type(architecture.model).__name__} is no [vocab, {width}] matrix of "
            f"the residual stream's width; came {came}"
        )
    return weight


def _chunks(weight: Tensor, wide: torch.dtype) -> Iterator[Tensor]:
    """``[token, d_model]`` pieces of a vocabulary's matrix, in float32 or wider."""
    return (chunk.to(wide) for chunk in weight.split(CHUNK))


def through_vocabulary(weight: Tensor, vectors: Tensor) -> Tensor:
    """``[vocab, d_model]`` times ``[…, d_model]``: ``[…, vocab]``."""
    vectors = vectors.to(weight.device)
    return torch.cat([vectors @ chunk.mT for chunk in _chunks(weight, vectors.dtype)], dim=-1)


def _written_through(architecture: Architecture, fold_norm: bool, matrix: Tensor) -> Tensor:
    """``[…, d_model]`` rows as the unembedding shall see them: through the final norm's gain."""
    norm = final_norm_gain(architecture) if fold_norm else None
    return matrix if norm is None else norm.linear(matrix).to(matrix)


def _overlap(left: Tensor, right: Tensor) -> Tensor:
    """``leftᵀ right`` of two vocabularies' matrices ``[vocab, d_model]``, in float32 or wider."""
    wide = torch.promote_types(left.dtype, torch.float32)
    if left.shape[0] != right.shape[0]:
        raise SiteError(
            f"embedding and output embedding have {right.shape[0]} and {left.shape[0]} tokens"
        )
    right = right.to(left.device)
    total = torch.zeros(left.shape[1], right.shape[1], dtype=wide, device=left.device)
    for a, b in zip(_chunks(left, wide), _chunks(right, wide), strict=True):
        total += a.mT @ b
    return total


# --- Copying --------------------------------------------------------------------------------------


def copying_scores(
    architecture: Architecture,
    layers: Sequence[Layer] | Layer | None = None,
    *,
    circuit: str = "ov",
    fold_norm: bool = False,
) -> HeadScores:
    """Whether each head says the token that it looks at: Σλ / Σ|λ| of its token-to-token circuit.

    The λ are the eigenvalues of ``W_E W_V W_O W_U`` (for ``qk`` of ``W_E W_Q W_Kᵀ W_Eᵀ``: does it
    look for the token at which it stands?). 1 means that all are positive: every mix of tokens
    raises itself; −1 the contrary. Elhage et al. (2021), "Summarizing OV/QK matrices".

    Args:
        architecture: The model.
        layers: Blocks, in any spelling; None is all that have heads.
        circuit: ``"ov"`` or ``"qk"``.
        fold_norm: Put the gains of the norm before attention (and of the final norm) in.

    Returns:
        ``[layer, head]``, from −1 to 1; 0 where a head's weights are 0.

    Raises:
        InputError: there is no such circuit.
        LayerError: there is no such block.
        SiteError: weights could not be proven, or have another width.
        ArchitectureError: the model has no head.
    """
    _check_circuit(circuit)
    starts = embedding(architecture)
    ends = unembedding(architecture) if circuit == "ov" else starts
    middle = _overlap(ends, starts)  # [d_model written, d_model read]
    norm = final_norm_gain(architecture) if circuit == "ov" and fold_norm else None
    middle = middle if norm is None else norm.fold_into(middle)
    shares: dict[int, np.ndarray] = {}
    for weights in each_head_weights(architecture, layers, fold_norm=fold_norm):
        product = weights.ov() if circuit == "ov" else weights.qk()
        inside = FactoredMatrix(middle.to(product.left) @ product.left, product.right)
        shares[weights.layer] = _positive_share(inside.eigenvalues())
    what = "copying" if circuit == "ov" else "matching"
    name = f"{what} score ({circuit.upper()}, −1 to 1)"
    return HeadScores(padded(list(shares.values())), tuple(shares), name, fold_norm)


def _positive_share(eigenvalues: Tensor) -> np.ndarray:
    moduli = eigenvalues.abs().sum(-1)
    share = eigenvalues.real.sum(-1) / moduli.clamp(min=1e-300)
    return share.cpu().numpy()


def _check_circuit(circuit: str) -> None:
    if circuit not in CIRCUITS:
        raise InputError(f"a circuit is 'ov' or 'qk'; came {circuit!r}")


# --- Composition ----------------------------------------------------------------------------------


def composition_scores(
    architecture: Architecture,
    kinds: str | Sequence[str] = KINDS,
    layers: Sequence[Layer] | Layer | None = None,
    *,
    fold_norm: bool = False,
) -> CompositionScores:
    """How strongly each head's weights read what each head of an earlier block writes.

    ``‖W_OV¹ M²‖ / (‖W_OV¹‖ ‖M²‖)`` in Frobenius norms, in the order of rows times matrices, with M²
    what the later head makes of its input: ``W_QK`` for ``"q"``, ``W_QKᵀ`` for ``"k"``, ``W_OV``
    for ``"v"``. Elhage et al. (2021), "Two-layer attention-only transformers". Two heads turned at
    random against each other have 1/√d_model in root mean square, whatever their ranks and spectra.
    Norms between the heads, rotary embeddings and the norm after attention are left out.

    Args:
        architecture: The model.
        kinds: Out of ``"q"``, ``"k"`` and ``"v"``.
        layers: Blocks, in any spelling; None is all that have heads.
        fold_norm: Put the gain of the norm before attention into the reading head.

    Raises:
        InputError: there is no such kind, one is named twice, or there are fewer than two blocks.
        LayerError: there is no such block.
        SiteError: weights could not be proven.
    """
    asked = tuple(kinds) if isinstance(kinds, Sequence) else ()
    if not asked or not set(asked) <= set(KINDS) or len(set(asked)) < len(asked):
        raise InputError(f"compositions are 'q', 'k' and 'v'; came {kinds!r}")
    found = sorted(
        all_head_weights(architecture, layers, fold_norm=fold_norm), key=lambda w: w.layer
    )
    if len(found) < 2:
        raise InputError("composition needs heads in two blocks or more; came one")
    heads, size = max(w.n_heads for w in found), len(found)
    values = np.full((len(asked), size, heads, size, heads), np.nan)
    written = [_compact(weights.ov()).right for weights in found]
    for index, kind in enumerate(asked):
        for later in range(1, size):
            taken = _compact(_made_of_input(found[later], kind).mT).right.mT
            for earlier in range(later):
                pairs = _ratios(written[earlier], taken)
                values[index, earlier, : len(pairs), later, : pairs.shape[1]] = pairs
    layer_numbers = tuple(weights.layer for weights in found)
    return CompositionScores(values, asked, layer_numbers, architecture.d_model**-0.5, fold_norm)


def _made_of_input(weights: HeadWeights, kind: str) -> FactoredMatrix:
    return {"q": weights.qk, "k": lambda: weights.qk().mT, "v": weights.ov}[kind]()


def _compact(product: FactoredMatrix) -> FactoredMatrix:
    """A stack whose left factor has orthonormal columns: all lengths are in the right one."""
    q, r = torch.linalg.qr(product.left)
    return FactoredMatrix(q, r @ product.right)


def _ratios(written: Tensor, taken: Tensor) -> np.ndarray:
    """Scores of ``[head, r, d_model]`` writers and ``[head, d_model, r]`` readers: writer × reader.

    0 where one of both is 0.
    """
    products = torch.einsum("wrd,mds->wmrs", written, taken.to(written))
    lengths = written.flatten(1).norm(dim=1)[:, None] * taken.flatten(1).norm(dim=1).to(written)
    return (products.flatten(2).norm(dim=2) / lengths.clamp(min=1e-30)).cpu().numpy()


# --- Tokens and directions ------------------------------------------------------------------------


_EMPTY = "there is no token in an empty list; None means the whole vocabulary"


def circuit_tokens(
    architecture: Architecture,
    tokenizer: PreTrainedTokenizerBase | None,
    head: Any,
    tokens: Sequence[str | int] | str | int | None = None,
    *,
    circuit: str = "ov",
    k: int = 10,
    fold_norm: bool = False,
) -> CircuitTokens:
    """The largest entries of a head's circuit through embedding and unembedding.

    ``ov``: where the head looks at a source token with weight 1, it adds ``W_E W_V W_O W_U`` of it
    to the logits (before the final norm divides). ``qk``: the score ``W_E W_Q W_Kᵀ W_Eᵀ`` with
    which a source token looks at a target token, of equal positions (before the model divides by
    √d_head). Biases are left out, and the model's multipliers of embeddings, queries, values and
    logits. Elhage et al. (2021), "Interpreting the full OV and QK circuits".

    Args:
        architecture: The model.
        tokenizer: Its tokenizer; None shows ids.
        head: ``"4.2"`` or ``(4, 2)``.
        tokens: Sources; None is the ``k`` largest entries of all vocab² of them, found by chunks.
        circuit: ``"ov"`` or ``"qk"``.
        k: How many targets of each source.
        fold_norm: Put the gains of the norm before attention (and of the final norm) in.

    Raises:
        InputError: there is no such head, circuit or token, or ``k`` is out of range.
        LayerError: there is no such block.
        SiteError: weights could not be proven, or have another width.
        ArchitectureError: the model has no head.
    """
    _check_circuit(circuit)
    layer, index = _head(architecture, head)
    starts = embedding(architecture)
    ends = unembedding(architecture) if circuit == "ov" else starts
    if not is_count(k, len(ends)):
        raise InputError(f"k is 1 to {len(ends)} tokens; came {k!r}")
    asked = None
    if tokens is not None:
        ids = token_ids_of(architecture, tokenizer, tokens, _EMPTY)
        asked = torch.tensor(ids, device="cpu")
    product = _circuit(architecture, layer, index, circuit, fold_norm)
    rows = starts if asked is None else starts[asked.to(starts.device)]
    left = torch.cat(
        [chunk @ product.left.to(chunk) for chunk in _chunks(rows, product.left.dtype)]
    )
    right = through_vocabulary(ends, product.right)
    whole = FactoredMatrix(left, right)
    if asked is None:
        found = whole.top_entries(k)
        values, targets = found.values[None], found.columns[None]
        sources = found.rows[None]
    else:
        values, targets = whole.full().topk(k, dim=1)
        sources = asked[:, None].expand_as(targets)
    source_ids, target_ids = sources.cpu().numpy().copy(), targets.cpu().numpy()
    return CircuitTokens(
        values=values.cpu().numpy(),
        source_ids=source_ids,
        target_ids=target_ids,
        sources=texts_of(tokenizer, source_ids),
        targets=texts_of(tokenizer, target_ids),
        head=f"{layer}.{index}",
        circuit=circuit,
        folded=fold_norm,
    )


def _circuit(
    architecture: Architecture, layer: int, head: int, circuit: str, fold_norm: bool
) -> FactoredMatrix:
    """A head's circuit, its right side as embedding or unembedding shall see it."""
    weights = head_weights(architecture, layer, fold_norm=fold_norm)
    if circuit == "qk":
        return weights.qk(head)
    product = weights.ov(head)
    return FactoredMatrix(product.left, _written_through(architecture, fold_norm, product.right))


def _head(architecture: Architecture, head: Any) -> tuple[int, int]:
    node = parse_node(architecture, head)
    if node.kind != "head":
        raise InputError(f"a head is written '4.2' or (4, 2); came {head!r}")
    return node.layer, node.head


def token_ids_of(
    architecture: Architecture,
    tokenizer: PreTrainedTokenizerBase | None,
    tokens: Any,
    empty: str = "give at least one token",
) -> list[int]:
    """Ids of one token or several, each a text of one token or an id.

    Args:
        architecture: The model.
        tokenizer: For texts.
        tokens: Text or an id (of any library), or several in a list, a tensor or an array.
        empty: What to say of an empty list.

    Raises:
        InputError: one is no single token, or there is none.
    """
    row = isinstance(tokens, Sequence) or (isinstance(tokens, Tensor | np.ndarray) and tokens.ndim)
    several: Any = [tokens] if isinstance(tokens, str) or not row else tokens
    if not len(several):
        raise InputError(empty)
    return [token_id(tokenizer, each, architecture.config) for each in several]


def texts_of(tokenizer: PreTrainedTokenizerBase | None, ids: np.ndarray) -> Any:
    """Token ids of any shape as nested tuples of text; nothing for -1."""
    if ids.ndim == 1:
        texts = token_strings(tokenizer, [max(int(i), 0) for i in ids])
        return tuple(text if i >= 0 else "" for text, i in zip(texts, ids, strict=True))
    return tuple(texts_of(tokenizer, row) for row in ids)


def head_directions(
    architecture: Architecture,
    tokenizer: PreTrainedTokenizerBase | None,
    head: Any,
    *,
    circuit: str = "ov",
    directions: int = 4,
    k: int = 8,
    fold_norm: bool = False,
) -> HeadDirections:
    """What a head reads and writes along its strongest singular directions, as tokens.

    The circuit is a sum of ``singular value · read ⊗ written``; what is read is shown by the tokens
    whose embedding has the largest product with it, what is written by those whose logits it raises
    most. Millidge & Black (2022).

    Args:
        architecture: The model.
        tokenizer: Its tokenizer; None shows ids.
        head: ``"4.2"`` or ``(4, 2)``.
        circuit: ``"ov"`` or ``"qk"`` (read is then the query's side, written the key's).
        directions: How many, at most d_head (or d_model, if that is less).
        k: Tokens of each.
        fold_norm: Put the gains of the norm before attention (and of the final norm) in.

    Raises:
        InputError: there is no such head or circuit, or a number is out of range.
        LayerError: there is no such block.
        SiteError: weights could not be proven, or have another width.
        ArchitectureError: the model has no head.
    """
    _check_circuit(circuit)
    layer, index = _head(architecture, head)
    starts = embedding(architecture)
    ends = unembedding(architecture) if circuit == "ov" else starts
    product = head_weights(architecture, layer, fold_norm=fold_norm)
    matrix = product.ov(index) if circuit == "ov" else product.qk(index)
    most = min(matrix.rank, *matrix.shape)
    if not is_count(directions, most) or not is_count(k, len(ends)):
        raise InputError(
            f"directions is 1 to {most} and k 1 to {len(ends)}; came {directions!r} and {k!r}"
        )
    found = matrix.svd()
    read, written = found.left.mT[:directions], found.right[:directions]
    seen = written
    if circuit == "ov":
        seen = _written_through(architecture, fold_norm, written)
    products = torch.stack(
        [through_vocabulary(starts, read), through_vocabulary(ends, seen).to(starts.device)], dim=1
    )
    signed = torch.stack([sign * products for sign in SIGNS], dim=1)
    best = signed.topk(k, dim=-1)
    squares = found.values.square()
    return HeadDirections(
        singular_values=found.values[:directions].cpu().numpy(),
        share=(squares / squares.sum().clamp(min=1e-30))[:directions].cpu().numpy(),
        read=read.cpu().numpy().copy(),
        written=written.cpu().numpy().copy(),
        values=best.values.cpu().numpy(),
        token_ids=best.indices.cpu().numpy(),
        tokens=texts_of(tokenizer, best.indices.cpu().numpy()),
        head=f"{layer}.{index}",
        circuit=circuit,
        folded=fold_norm,
    )
