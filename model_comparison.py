"""A model and its fine-tune: what changed, where, in activations, lens, logits and weights.

`compare_models` runs the same tokens through both and goes through their layers side by side;
`compare_weights` needs no text. Row 0 of every table is the embedding (the input of block 0), row
``i + 1`` the output of block ``i``; the last row of the lens is the models' own prediction. KL is
KL(first ‖ second), in nats.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from comparison_result import ModelComparison, WeightChanges
from direction_finding import check_examples
from forward_pass import InputError, Site, record
from interrupts import no_grad
from lens_rows import CHUNK_VALUES
from logit_lens import LogitLens
from model_architecture import Architecture
from model_inspection import weight_of
from model_loader import ModelSource, load_model
from module_devices import exact
from similarity import BATCH_ROWS, CKAMeter
from tokenization import Prompt, check_ids, encode, token_strings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# --- Two models on the same texts -----------------------------------------------------------------


def compare_models(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    other: Any,
    texts: Sequence[Prompt],
    *,
    other_tokenizer: PreTrainedTokenizerBase | None = None,
    weights: bool = True,
) -> ModelComparison:
    """Compare a model with another of the same tokenizer and depth, layer by layer.

    Args:
        model: The first model; distances are relative to it.
        tokenizer: Its tokenizer.
        other: The second: a model, a folder or hub id, or something with ``.model`` and
            ``.tokenizer`` such as a `ModelAnalyzer`.
        texts: At least one. Every token counts as one example.
        other_tokenizer: The second model's tokenizer, where ``other`` brings none. Without any,
            that the vocabularies are equally large is all that can be checked.
        weights: Also compare the weights.

    Returns:
        A `ModelComparison`; the lens' columns are NaN if a model has no head.

    Raises:
        InputError: the tokenizers, the number of layers or the widths differ.
        ModelLoadError: there is no such model.
    """
    check_examples(texts, "texts")
    second, second_tokenizer = _second(other, other_tokenizer, model)
    arches = Architecture(model), Architecture(second)
    _check_tokenizers(arches, tokenizer, second_tokenizer)
    _check_shapes(*arches)
    rows = [_same_ids(arches, tokenizer, second_tokenizer, t, i) for i, t in enumerate(texts)]
    meter = _Meter(arches)
    for ids in tqdm(rows, desc="compare", unit="text", disable=not sys.stderr.isatty()):
        meter.add(ids)
    return meter.result(len(texts), compare_weights(model, second) if weights else None)


def _second(other: Any, tokenizer: Any, model: PreTrainedModel) -> tuple[PreTrainedModel, Any]:
    """The second model and its tokenizer."""
    if hasattr(other, "model") and hasattr(other, "architecture"):
        return other.model, tokenizer if tokenizer is not None else other.tokenizer
    source: ModelSource = other
    live = not isinstance(other, str) and not hasattr(other, "__fspath__")
    return load_model(source, None if live else model.device, tokenizer=tokenizer)


def _check_tokenizers(arches: tuple[Architecture, Architecture], one: Any, two: Any) -> None:
    """Refuse with InputError vocabularies that are not the same."""
    if one is None or two is None:
        sizes = [arch.config.vocab_size for arch in arches]
        if sizes[0] != sizes[1]:
            raise InputError(
                f"the models have {sizes[0]} and {sizes[1]} tokens: token ids mean different "
                "things; pass other_tokenizer= if they are the same up to padding"
            )
        return
    first, second = one.get_vocab(), two.get_vocab()
    differ = sorted(
        token
        for token in first.keys() | second.keys()
        if first.get(token, -1) != second.get(token, -1)
    )
    if differ:
        shown = ", ".join(
            f"{token!r} is {first.get(token, 'missing')} and {second.get(token, 'missing')}"
            for token in differ[:3]
        )
        raise InputError(
            f"the tokenizers differ in {len(differ)} of {len(first)} tokens ({shown}): logits and "
            "token positions cannot be compared; use layer_similarity on one text at a time"
        )


def _check_shapes(one: Architecture, two: Architecture) -> None:
    for name, a, b in (
        ("layers", one.n_layers, two.n_layers),
        ("dimensions", one.d_model, two.d_model),
    ):
        if a != b:
            raise InputError(
                f"the models have {a} and {b} {name}: they cannot be compared layer by layer; "
                "layer_similarity compares each layer with each by CKA"
            )


def _same_ids(
    arches: tuple[Architecture, Architecture], one: Any, two: Any, text: Prompt, number: int
) -> list[int]:
    """Token ids that both tokenizers give."""
    try:
        ids = encode(one, text)
        for arch in arches:
            check_ids(ids, arch.config)
        other = ids if two is None else encode(two, text)
    except InputError as error:
        raise InputError(f"texts[{number}]: {error}") from error
    if ids != other:
        pieces = [token_strings(one, ids)[:6], token_strings(two, other)[:6]]
        raise InputError(
            f"the tokenizers split texts[{number}] differently ({pieces[0]} and {pieces[1]}); "
            "pass token ids"
        )
    return ids


class _Meter:
    """Adds up what two models do with the same tokens, one text at a time."""

    def __init__(self, arches: tuple[Architecture, Architecture]) -> None:
        self.arches = arches
        n_layers = arches[0].n_layers
        self.sites = [Site("resid_pre", 0), *(Site("resid_post", i) for i in range(n_layers))]
        self.sums = {name: np.zeros(n_layers + 1) for name in _SUMS}
        self.tokens = 0
        empty = np.zeros((0, n_layers + 1, arches[0].d_model), dtype=np.float32)
        self.cka, self.waiting = CKAMeter(), [empty] * 2
        heads = all(arch.has_head for arch in arches)
        self.lenses = [LogitLens(arch.model) for arch in arches] if heads else []

    def add(self, ids: list[int]) -> None:
        """Run one text through both."""
        streams = []
        for arch in self.arches:
            kept = record(arch, arch.inputs(torch.tensor([ids], device="cpu")), self.sites)
            streams.append([kept[site][0] for site in self.sites])
        for row, (a, b) in enumerate(zip(*streams, strict=True)):
            self._distances(row, a.cpu().double(), b.cpu().double())
            if self.lenses:
                self._lens(row, a, b)
        self.tokens += len(ids)
        for side, stream in enumerate(streams):
            table = torch.stack([x.float().cpu() for x in stream], 1).numpy()
            self.waiting[side] = np.concatenate([self.waiting[side], table])
        while len(self.waiting[0]) >= 2 * BATCH_ROWS:
            self._flush(BATCH_ROWS)

    def _distances(self, row: int, a: Tensor, b: Tensor) -> None:
        self.sums["change"][row] += float((b - a).square().sum())
        self.sums["size"][row] += float(a.square().sum())
        lengths = a.norm(dim=1) * b.norm(dim=1)
        products = (a * b).sum(1) / lengths.clamp(min=1e-300)
        self.sums["cosine"][row] += float(products.sum())

    def _lens(self, row: int, a: Tensor, b: Tensor) -> None:
        vocabulary = min(arch.config.vocab_size for arch in self.arches)
        step = max(1, CHUNK_VALUES // vocabulary)
        for start in range(0, len(a), step):
            p, q = (
                lens.apply_lens_to_hidden_state(x[start : start + step])[:, :vocabulary]
                .to(self.arches[0].stream_device, torch.float32)
                .log_softmax(-1)
                for lens, x in zip(self.lenses, (a, b), strict=True)
            )
            kl = torch.linalg.vecdot(p.exp(), p - q).clamp(min=0)
            self.sums["kl"][row] += float(exact(kl).sum())
            same = (p.argmax(-1) == q.argmax(-1)) & ~kl.isnan()  # NaN has no best token
            self.sums["same"][row] += int(same.sum())

    def _flush(self, rows: int) -> None:
        """Add the first of the rows that wait, as one minibatch."""
        self.cka.add(*(part[:rows] for part in self.waiting))
        self.waiting = [part[rows:] for part in self.waiting]

    def result(self, texts: int, weights: WeightChanges | None) -> ModelComparison:
        """What was found."""
        left = len(self.waiting[0])
        if left > BATCH_ROWS:  # two halves: minibatches count alike, so none should be small
            self._flush(left // 2)
        if left >= 4:
            self._flush(len(self.waiting[0]))
        sums, none = self.sums, np.full(len(self.sites), np.nan)
        size = np.where(sums["size"] > 0, sums["size"], np.nan)
        return ModelComparison(
            distance=np.sqrt(sums["change"] / size),
            cosine=sums["cosine"] / self.tokens,
            cka=self.cka.values.diagonal().copy() if self.cka.rows else none,
            lens_kl=sums["kl"] / self.tokens if self.lenses else none,
            agreement=sums["same"] / self.tokens if self.lenses else none,
            row_labels=("embed", *(str(i) for i in range(len(self.sites) - 1))),
            models=tuple(_name(arch.model) for arch in self.arches),
            texts=texts,
            tokens=self.tokens,
            weights=weights,
        )


_SUMS = ("change", "size", "cosine", "kl", "same")


def _name(model: PreTrainedModel) -> str:
    return str(model.name_or_path or type(model).__name__)


# --- Weights --------------------------------------------------------------------------------------


def compare_weights(model: PreTrainedModel, other: PreTrainedModel) -> WeightChanges:
    """How far each parameter of a model has moved in another.

    Parameters are found by name. An adapter that has not been merged (a module with a
    ``base_layer`` and ``get_delta_weight``, as peft makes them) counts with what it adds.

    Args:
        model: The first model; changes are relative to it.
        other: The second.

    Returns:
        A `WeightChanges`; a tied matrix is listed once.

    Raises:
        InputError: no parameter has a counterpart of the same shape.
    """
    arch = Architecture(model)
    second = dict(_parameters(other))
    found: dict[str, tuple[int, str, float, float, int]] = {}
    unmatched = []
    for name, weight in _parameters(model):
        counterpart = second.pop(name, None)
        if counterpart is None or counterpart.shape != weight.shape:
            unmatched.append(name)
            continue
        a = weight.float()
        change = float(exact(counterpart.to(a.device).float() - a).norm())
        layer, part = _place(arch, name)
        found[name] = layer, part, float(exact(a).norm()), change, weight.numel()
    if not found:
        raise InputError("the two models have no parameter in common, by name and shape")
    layers, parts, norms, changes, sizes = zip(*found.values(), strict=True)
    return WeightChanges(
        tuple(found),
        np.array(changes),
        np.array(norms),
        tuple(layers),
        tuple(parts),
        tuple(sizes),
        tuple(sorted({*unmatched, *second})),
    )


def _parameters(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Every parameter in force by its name without adapters, a tied one once."""
    adapters = {
        path: module
        for path, module in model.named_modules()
        if hasattr(module, "base_layer") and hasattr(module, "get_delta_weight")
    }
    for name, _ in model.named_parameters():
        owner = next((path for path in adapters if name.startswith(f"{path}.")), None)
        path, _, own = name.rpartition(".")
        value = weight_of(model.get_submodule(path), own)
        assert value is not None
        if owner is not None:
            leaf = name.removeprefix(f"{owner}.")
            if not leaf.startswith("base_layer."):
                continue
            if leaf == "base_layer.weight":
                value = value + _added(adapters[owner]).to(value)
            name = f"{owner}.{leaf.removeprefix('base_layer.')}"
        if value.is_floating_point():
            yield name, value


@no_grad()
def _added(adapter: nn.Module) -> Tensor:
    """What a module's active adapters add to its weight."""
    module: Any = adapter
    if getattr(module, "merged", False) or getattr(module, "disable_adapters", False):
        return torch.zeros((), device="cpu")
    names = [name for name in module.active_adapters if name in module.lora_A]
    return sum((module.get_delta_weight(name) for name in names), torch.zeros((), device="cpu"))


def _place(arch: Architecture, name: str) -> tuple[int, str]:
    """A parameter's block (-1: none) and its part of the model."""
    for layer, block in enumerate(arch.layer_names):
        if name.startswith(f"{block}."):
            for part in ("attention", "mlp"):
                path = arch.part_name(layer, part)
                if path and path != block and name.startswith(f"{path}."):
                    return layer, part
            return layer, "rest of block"
    for part, module in (
        ("embedding", arch.model.get_input_embeddings()),
        ("head", arch.model.get_output_embeddings()),
    ):
        own = dict(arch.model.named_parameters()).get(name)
        if module is not None and any(own is parameter for parameter in module.parameters()):
            return -1, part
    return -1, "rest of model"
