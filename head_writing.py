"""What heads write on a prompt: how much, from where, and what it says.

    value_weighted_patterns(architecture, tokenizer, prompt)   # attention times what is moved
    head_writes(architecture, tokenizer, prompt, " Paris")     # each head's effect on a logit

A pattern alone overstates a head that looks at a token and takes nothing from it: Kobayashi et al.
(2020), "Attention is Not Only a Weight: Analyzing Transformers with Vector Norms".

A head's output is read through the model's own final norm and unembedding, the norm's scale held at
the value that it has on this prompt (likewise a norm between attention and the stream). So the
effects of all heads, of everything else and of the biases add up to the logit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from forward_pass import (
    Hook,
    InputError,
    ModuleTap,
    Site,
    SiteError,
    attached,
    evaluate,
    record,
    recording,
    take_positions,
)
from head_circuit_result import padded
from head_circuits import texts_of, through_vocabulary, token_ids_of, unembedding
from head_weights import OutputWeights, layers_with_heads, output_weights
from head_writing_result import HeadWrites, WeightedPatterns
from interrupts import UndoStack, no_grad
from model_architecture import Architecture, Layer
from model_inspection import weight_of
from module_devices import exact
from norm_gain import NormGain, final_norm_gain, norm_gains
from sites import is_count
from tokenization import (
    Prompt,
    check_ids,
    encode,
    resolve_positions,
    token_strings,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# --- Value-weighted patterns ----------------------------------------------------------------------


def value_weighted_patterns(
    architecture: Architecture,
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: Prompt,
    layers: Sequence[Layer] | Layer | None = None,
) -> WeightedPatterns:
    """Attention patterns times the length of what each token's value writes.

    Kobayashi et al. (2020), section 3: ‖α · f(x)‖ with f(x) = v W_O.

    Args:
        architecture: The model.
        tokenizer: For a text.
        prompt: Text, a chat, or token ids.
        layers: Blocks, in any spelling; None is all that have heads.

    Raises:
        InputError: the prompt cannot be run.
        LayerError: there is no such block.
        SiteError: a block has no heads, or its output weights could not be proven.
    """
    ids = encode(tokenizer, prompt)
    check_ids(ids, architecture.config)
    chosen = layers_with_heads(architecture, layers)
    weights = output_weights(architecture, chosen)
    sites = [Site(name, layer) for layer in chosen for name in ("attn_pattern", "value")]
    kept = record(architecture, architecture.inputs(torch.tensor([ids], device="cpu")), sites)
    heads, length = max(len(w.W_O) for w in weights.values()), len(ids)
    patterns = np.full((len(chosen), heads, length, length), np.nan, dtype=np.float32)
    lengths = np.full((len(chosen), heads, length), np.nan, dtype=np.float32)
    for row, layer in enumerate(chosen):
        found = kept.pop(Site("attn_pattern", layer))[0, :, :, :length].float().cpu().numpy()
        patterns[row, : len(found)] = found
        values = kept.pop(Site("value", layer))[0]
        if values.shape[-1] != weights[layer].W_O.shape[1]:
            raise SiteError(
                f"in layer {layer} of {type(architecture.model).__name__} the values have "
                f"{values.shape[-1]} numbers and the output projection takes "
                f"{weights[layer].W_O.shape[1]} per head, so no value has a length of its own"
            )
        lengths[row, : len(found)] = _lengths(values, weights[layer]).cpu().numpy()
    return WeightedPatterns(patterns, lengths, tuple(chosen), tuple(token_strings(tokenizer, ids)))


def _lengths(values: Tensor, weights: OutputWeights) -> Tensor:
    """‖v W_O‖ by head, from ``[position, kv_head, d_value]``, through d_value × d_value Grams."""
    grams = weights.W_O @ weights.W_O.mT
    by_head = values.to(grams)[:, list(weights.kv_of_head)].movedim(0, 1)
    return ((by_head @ grams) * by_head).sum(-1).clamp(min=0).sqrt()


# --- What heads say -------------------------------------------------------------------------------


@dataclass(eq=False)
class _Point:
    """What a prompt's pass has at the position that is read."""

    z: dict[int, Tensor] = field(default_factory=dict)
    """By layer, ``[head, d_value]``."""
    added: dict[int, Tensor] = field(default_factory=dict)
    """By layer, ``[d_model]``: what attention added to the stream."""
    around: dict[nn.Module, list[Tensor]] = field(default_factory=dict)
    """What norms took and gave, ``[d_model]`` each."""
    stream: Tensor | None = None
    head: Tensor | None = None
    """What the output embedding gave, ``[vocab]``; None where the model does not call it."""
    logits: Tensor | None = None

    def of_norm(self, norm: nn.Module) -> tuple[Tensor, Tensor]:
        """What a norm took and gave.

        Raises:
            SiteError: it did not run exactly once.
        """
        seen = self.around.get(norm, [])
        if len(seen) != 2:
            raise SiteError(
                f"a {type(norm).__name__} through which heads are read ran {len(seen) // 2} times "
                "in one pass, not once, so its scale cannot be held"
            )
        return seen[0], seen[1]


@no_grad()
def head_writes(
    architecture: Architecture,
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: Prompt,
    targets: Sequence[str | int] | str | int | None = None,
    *,
    position: int = -1,
    layers: Sequence[Layer] | Layer | None = None,
    k: int = 5,
) -> HeadWrites:
    """Each head's direct effect on logits, and the tokens that its output says.

    The output of a head (z W_O, times the block's multiplier, through a norm after attention with
    its scale held) goes through the final norm, its scale held at its value on this prompt, and the
    unembedding: the logit lens of one head's part of the stream (nostalgebraist 2020; Elhage et
    al. 2021, "direct paths"). The output projection's bias belongs to no head.

    In every block it is checked that heads and bias add up to what attention added on this prompt.

    Args:
        architecture: The model.
        tokenizer: For texts.
        prompt: Text, a chat, or token ids.
        targets: Tokens whose logits are asked about; None is the model's own best.
        position: Of the token after which they would come.
        layers: Blocks, in any spelling; None is all that have heads.
        k: How many of the tokens that each head raises and lowers most.

    Raises:
        InputError: the prompt, a target, the position or ``k`` cannot be used.
        LayerError: there is no such block.
        SiteError: a block has no heads or adds no parts to the stream, or a norm or the way to the
            logits was not understood.
        ArchitectureError: the model has no head.
    """
    ids = encode(tokenizer, prompt)
    check_ids(ids, architecture.config)
    asked_at = resolve_positions(position, len(ids))
    if len(asked_at) != 1:
        raise InputError(
            f"heads are read at one position; position={position!r} is {len(asked_at)}"
        )
    place = asked_at[0]
    chosen = layers_with_heads(architecture, layers)
    matrix = unembedding(architecture)
    if not is_count(k, len(matrix)):
        raise InputError(f"k is 1 to {len(matrix)} tokens; came {k!r}")
    for layer in chosen:
        why = architecture.missing(Site("attn_out", layer))
        if why:
            raise SiteError(why)
    asked = None
    if targets is not None:
        empty = "there is no token in an empty list; None means the model's best token"
        asked = token_ids_of(architecture, tokenizer, targets, empty)
    weights = output_weights(architecture, chosen)
    norms = _norms(architecture, weights)
    point = _read_point(architecture, ids, place, chosen, list(norms))
    assert point.logits is not None
    unembed = _Unembed(architecture, matrix, norms, point)
    wanted = [int(point.logits.argmax())] if asked is None else asked
    rows = [
        _of_layer(unembed, wanted, k, _to_stream(architecture, layer, weights[layer], norms, point))
        for layer in chosen
    ]
    values, lengths, best, places = (padded(list(each)) for each in zip(*rows, strict=True))
    best_ids = np.where(np.isnan(places), -1, places).astype(np.int64)
    return HeadWrites(
        values=values,
        lengths=lengths,
        top_values=best,
        top_ids=best_ids,
        top_tokens=texts_of(tokenizer, best_ids),
        targets=tuple(token_strings(tokenizer, wanted)),
        logits=tuple(point.logits[wanted].tolist()),
        layers=tuple(chosen),
        tokens=tuple(token_strings(tokenizer, ids)),
        position=place,
        before_cap=unembed.before_cap,
    )


def _writer(architecture: Architecture, layer: int) -> nn.Module:
    return architecture.blocks[layer].get_submodule(architecture.structure[layer].attn_writer or "")


def _norms(
    architecture: Architecture, weights: dict[int, OutputWeights]
) -> dict[nn.Module, NormGain]:
    """The norms through which heads are read: those after attention, and the final one."""
    writers = {n: _writer(architecture, n) for n, found in weights.items() if found.normed}
    gains = dict(zip(writers, norm_gains(architecture, list(writers.values())), strict=True))
    found: dict[nn.Module, NormGain] = {}
    for layer, gain in gains.items():
        if gain is None:
            raise SiteError(
                f"what attention's output goes through in layer {layer} of "
                f"{type(architecture.model).__name__} is neither a root-mean-square nor a layer "
                "norm, so its heads cannot be read apart"
            )
        found[writers[layer]] = gain
    final = final_norm_gain(architecture)
    if final is not None and architecture.final_norm is not None:
        found[architecture.final_norm] = final
    return found


def _read_point(
    architecture: Architecture,
    ids: list[int],
    place: int,
    layers: Sequence[int],
    norms: Sequence[nn.Module],
) -> _Point:
    """Run the prompt once, and keep what is needed at one position."""
    point, index = _Point(), torch.tensor([place], device="cpu")
    last = Site("resid_post", architecture.n_layers - 1)

    def keep(norm: nn.Module) -> Hook:
        def hook(value: Tensor) -> None:
            point.around.setdefault(norm, []).append(take_positions(value, index, 1)[0, 0])

        return hook

    with UndoStack() as stack:
        evaluate(stack, architecture.model)
        sites = [Site(name, layer) for layer in layers for name in ("head_out", "attn_out")]
        sites.append(last)
        kept = stack.enter_context(recording(architecture, sites, index))
        for norm in norms:
            taps = [(ModuleTap(norm, at_input=True), keep(norm)), (ModuleTap(norm), keep(norm))]
            stack.enter_context(attached(taps, last=True))
        head: Any = architecture.model.get_output_embeddings()
        stack.enter_context(attached([(ModuleTap(head), keep(head))], last=True))
        inputs = architecture.inputs(torch.tensor([ids], device="cpu"))
        point.logits = architecture.model(**inputs, use_cache=False).logits[0, place]
    point.z = {layer: kept[Site("head_out", layer)][0, 0] for layer in layers}
    point.added = {layer: kept[Site("attn_out", layer)][0, 0] for layer in layers}
    point.head = next(iter(point.around.pop(head, [])), None)
    point.stream = kept[last][0, 0]
    return point


def _to_stream(
    architecture: Architecture,
    layer: int,
    weights: OutputWeights,
    norms: dict[nn.Module, NormGain],
    point: _Point,
) -> Tensor:
    """What each head of a block adds to the residual stream, ``[head, d_model]``."""
    written = torch.einsum("hd,hdm->hm", point.z[layer].to(weights.W_O), weights.W_O)
    parts = torch.cat([written, weights.b_O[None]])
    if weights.normed:
        module = _writer(architecture, layer)
        norm, (taken, given) = norms[module], point.of_norm(module)
        parts = norm.linear(parts) * norm.factor(taken, given)
        parts[-1] += norm.bias.to(parts)
    parts = parts * architecture.structure[layer].scale
    added = point.added[layer].reshape(-1).to(parts)
    off = float((parts.sum(0) - added).abs().max())
    if not off <= _rounding(point.added[layer]) * float(parts.abs().sum(0).max()):
        raise SiteError(
            f"the heads of layer {layer} of {type(architecture.model).__name__} do not add up to "
            "what attention adds to the stream, so something unknown is between"
        )
    return parts[:-1]


def _rounding(*tensors: Tensor) -> float:
    """Relative rounding to allow for in numbers that a model made, in the widest of its dtypes."""
    return 16 * max(
        torch.finfo(each.dtype).eps for each in (*tensors, torch.ones((), device="cpu"))
    )


class _Unembed:
    """The way from a part of the stream to what it adds to the logits, with scales held."""

    def __init__(
        self,
        architecture: Architecture,
        matrix: Tensor,
        norms: dict[nn.Module, NormGain],
        point: _Point,
    ) -> None:
        assert point.stream is not None and point.logits is not None
        self.matrix, self.factor = matrix, torch.ones(1, device="cpu")
        self.norm: NormGain | None = None
        straight = point.stream.to(torch.promote_types(matrix.dtype, torch.float32))
        final = architecture.final_norm
        if final is not None:
            taken, given = point.of_norm(final)
            self.norm = norms[final]
            self.factor = self.norm.factor(taken, given)
            straight = given.to(straight)
        bias = weight_of(architecture.model.get_output_embeddings(), "bias")
        plain = exact(through_vocabulary(matrix, straight[None])[0])
        plain = plain if bias is None else plain + bias.to(plain)
        model = type(architecture.model).__name__
        self.scale, self.before_cap = _bend(model, plain, point)

    def __call__(self, parts: Tensor) -> Tensor:
        """``[part, d_model]`` to logits added, ``[part, vocab]``."""
        if self.norm is not None:
            parts = self.norm.linear(parts) * self.factor.to(self.norm.gain)
        wide = torch.promote_types(self.matrix.dtype, torch.float32)
        return self.scale * through_vocabulary(self.matrix, parts.to(wide))


def _bend(model: str, plain: Tensor, point: _Point) -> tuple[float, bool]:
    """What the model makes of its head's numbers: a factor, or a soft-cap (factor 1, and True).

    Args:
        model: Its class, for messages.
        plain: The head's numbers as computed here, ``[vocab]``, float64.
        point: With what the head gave, and the logits.

    Raises:
        SiteError: they are no function of the head's numbers that rises.
    """
    assert point.logits is not None
    logits, head = point.logits.to(plain), plain
    rounding = _rounding(point.logits, point.logits if point.head is None else point.head)
    if point.head is not None:
        head = point.head.to(plain)
        same = head.shape == plain.shape == logits.shape
        if not same or bool((head - plain).abs().max() > rounding * plain.abs().max()):
            raise SiteError(_no_way(model))
    scale = float(head @ logits / (head @ head).clamp(min=1e-300))
    off = (logits - scale * head).abs()
    if point.head is None:
        straight = bool(off.max() <= rounding * logits.abs().max())
    else:
        straight = bool((off <= rounding / 4 * logits.abs()).all())
    if straight:
        return scale, False
    steps = logits[head.argsort()].diff()
    if not bool((steps >= -rounding * logits.abs().max()).all()):
        raise SiteError(_no_way(model))
    return 1.0, True


def _no_way(model: str) -> str:
    return (
        f"the logits of {model} are not what its head makes of the final norm's output, so a part "
        "of the stream cannot be read through it"
    )


def _of_layer(
    unembed: _Unembed, wanted: list[int], k: int, written: Tensor
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Values ``[head, target]``, lengths ``[head]``, best values and tokens ``[head, sign, k]``."""
    added = unembed(written)
    centred = added - added.mean(-1, keepdim=True)
    ends = [centred.topk(k, dim=-1, largest=largest) for largest in (True, False)]
    best = torch.stack([end.values for end in ends], dim=1)
    places = torch.stack([end.indices for end in ends], dim=1)
    found = (added[:, wanted], written.norm(dim=-1), best, places)
    first, second, third, fourth = (each.cpu().double().numpy() for each in found)
    return first, second, third, fourth
