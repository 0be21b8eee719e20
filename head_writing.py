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
from contextlib import ExitStack
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
from head_circuits import through_vocabulary, unembedding
from head_weights import OutputWeights, layers_with_heads, output_weights
from head_writing_result import HeadWrites, WeightedPatterns
from model_architecture import Architecture, Layer
from norm_gain import NormGain, final_norm_gain, norm_gains
from tokenization import (
    Prompt,
    check_ids,
    encode,
    resolve_positions,
    token_id,
    token_strings,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# --- Value-weighted patterns ----------------------------------------------------------------------


def value_weighted_patterns(
    architecture: Architecture,
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: Prompt,
    layers: Sequence[Layer] | None = None,
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
    kept = record(architecture, architecture.inputs(torch.tensor([ids])), sites)
    heads, length = max(len(w.W_O) for w in weights.values()), len(ids)
    patterns = np.full((len(chosen), heads, length, length), np.nan, dtype=np.float32)
    lengths = np.full((len(chosen), heads, length), np.nan, dtype=np.float32)
    for row, layer in enumerate(chosen):
        found = kept.pop(Site("attn_pattern", layer))[0, :, :, :length].float().cpu().numpy()
        patterns[row, : len(found)] = found
        values = kept.pop(Site("value", layer))[0]
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
    around: dict[nn.Module, list[Tensor]] = field(default_factory=dict)
    """What norms took and gave, ``[d_model]`` each."""
    stream: Tensor | None = None
    logits: Tensor | None = None


@torch.no_grad()
def head_writes(
    architecture: Architecture,
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: Prompt,
    targets: Sequence[str | int] | str | int | None = None,
    *,
    position: int = -1,
    layers: Sequence[Layer] | None = None,
    k: int = 5,
) -> HeadWrites:
    """Each head's direct effect on logits, and the tokens that its output says.

    The output of a head (z W_O, times the block's multiplier, through a norm after attention with
    its scale held) goes through the final norm, its scale held at its value on this prompt, and the
    unembedding: the logit lens of one head's part of the stream (nostalgebraist 2020; Elhage et
    al. 2021, "direct paths"). The output projection's bias belongs to no head.

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
    (place,) = resolve_positions(position, len(ids))
    chosen = layers_with_heads(architecture, layers)
    matrix = unembedding(architecture)
    if not 1 <= k <= len(matrix):
        raise InputError(f"k is 1 to {len(matrix)} tokens; came {k}")
    for layer in chosen:
        why = architecture.missing(Site("attn_out", layer))
        if why:
            raise SiteError(why)
    asked = None if targets is None else _targets(architecture, tokenizer, targets)
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
    values, lengths, best, places = (_padded(list(each)) for each in zip(*rows, strict=True))
    best_ids = np.where(np.isnan(places), -1, places).astype(np.int64)
    return HeadWrites(
        values=values,
        lengths=lengths,
        top_values=best,
        top_ids=best_ids,
        top_tokens=_texts(tokenizer, best_ids),
        targets=tuple(token_strings(tokenizer, wanted)),
        logits=tuple(point.logits[wanted].tolist()),
        layers=tuple(chosen),
        tokens=tuple(token_strings(tokenizer, ids)),
        position=place,
        before_cap=unembed.before_cap,
    )


def _targets(
    architecture: Architecture,
    tokenizer: PreTrainedTokenizerBase | None,
    targets: Sequence[str | int] | str | int,
) -> list[int]:
    several: Any = (
        [targets] if isinstance(targets, str) or hasattr(targets, "__index__") else targets
    )
    if not len(several):
        raise InputError("there is no target in an empty list; None is the model's best token")
    return [token_id(tokenizer, each, architecture.config) for each in several]


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
    point, index = _Point(), torch.tensor([place])
    last = Site("resid_post", architecture.n_layers - 1)

    def keep(norm: nn.Module) -> Hook:
        def hook(value: Tensor) -> None:
            point.around.setdefault(norm, []).append(take_positions(value, index, 1)[0, 0])

        return hook

    with ExitStack() as stack:
        evaluate(stack, architecture.model)
        sites = [*(Site("head_out", layer) for layer in layers), last]
        kept = stack.enter_context(recording(architecture, sites, index))
        for norm in norms:
            taps = [(ModuleTap(norm, at_input=True), keep(norm)), (ModuleTap(norm), keep(norm))]
            stack.enter_context(attached(taps, last=True))
        inputs = architecture.inputs(torch.tensor([ids]))
        point.logits = architecture.model(**inputs, use_cache=False).logits[0, place]
    point.z = {layer: kept[Site("head_out", layer)][0, 0] for layer in layers}
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
    if weights.normed:
        norm = _writer(architecture, layer)
        taken, given = point.around[norm]
        written = norms[norm].linear(written) * norms[norm].factor(taken, given)
    return written * architecture.structure[layer].scale


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
        self.matrix, self.factor = matrix, torch.ones(1)
        self.norm: NormGain | None = None
        straight = point.stream.to(torch.promote_types(matrix.dtype, torch.float32))
        final = architecture.final_norm
        if final is not None:
            taken, given = point.around[final]
            self.norm = norms[final]
            self.factor = self.norm.factor(taken, given)
            straight = given.to(straight)
        bias = getattr(architecture.model.get_output_embeddings(), "bias", None)
        plain = through_vocabulary(matrix, straight[None])[0].double()
        plain = plain if bias is None else plain + bias.detach().to(plain)
        logits = point.logits.to(plain)
        self.scale = float(plain @ logits / (plain @ plain).clamp(min=1e-300))
        rounding = 256 * max(torch.finfo(point.logits.dtype).eps, torch.finfo(torch.float32).eps)
        off = float((logits - self.scale * plain).abs().max())
        self.before_cap = off > rounding * float(logits.abs().max())
        if self.before_cap:
            self._require_cap(architecture, plain, logits)
            self.scale = 1.0

    def _require_cap(self, architecture: Architecture, plain: Tensor, logits: Tensor) -> None:
        """Refuse logits that do not rise with the head's own numbers: they are no soft-cap."""
        order = plain.argsort()
        steps = logits[order].diff()
        rounding = 256 * max(torch.finfo(self.matrix.dtype).eps, torch.finfo(torch.float32).eps)
        if not bool((steps >= -rounding * logits.abs().max()).all()):
            raise SiteError(
                f"the logits of {type(architecture.model).__name__} are not what its head makes of "
                "the final norm's output, so a part of the stream cannot be read through it"
            )

    def __call__(self, parts: Tensor) -> Tensor:
        """``[part, d_model]`` to logits added, ``[part, vocab]``."""
        if self.norm is not None:
            parts = self.norm.linear(parts) * self.factor.to(self.norm.gain)
        wide = torch.promote_types(self.matrix.dtype, torch.float32)
        return self.scale * through_vocabulary(self.matrix, parts.to(wide))


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
    first, second, third, fourth = (each.double().cpu().numpy() for each in found)
    return first, second, third, fourth


def _padded(rows: list[np.ndarray]) -> np.ndarray:
    """Stack tables whose first axes differ; NaN behind the shorter."""
    most = max(map(len, rows))
    table = np.full((len(rows), most, *rows[0].shape[1:]), np.nan)
    for line, row in zip(table, rows, strict=True):
        line[: len(row)] = row
    return table


def _texts(tokenizer: PreTrainedTokenizerBase | None, ids: np.ndarray) -> Any:
    """Token ids of any shape as nested tuples of text; nothing for -1."""
    if ids.ndim == 1:
        texts = token_strings(tokenizer, [max(int(i), 0) for i in ids])
        return tuple(text if i >= 0 else "" for text, i in zip(texts, ids, strict=True))
    return tuple(_texts(tokenizer, row) for row in ids)
