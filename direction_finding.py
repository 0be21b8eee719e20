"""Directions from contrastive prompts: what tells the positive examples from the negative ones.

1. `read_examples` runs the prompts in batches and keeps one vector per prompt and layer: the last
   token's, the mean over tokens, or those that are named.
2. A method (`METHODS`, or any function of two tables) makes one direction of them per layer.

With p and n the examples' activations, Δ = mean(p) − mean(n), the methods are

=========  =====================================================================================
``mean``   Δ (Rimsky et al. 2024, contrastive activation addition; Turner et al. 2023)
``pca``    first right singular vector of the differences p_i − n_i of pairs, *not* centred:
           centring them would throw Δ away (Zou et al. 2023, representation engineering)
``probe``  the normal of a logistic regression (Zou et al. 2023; Marks & Tegmark 2023)
``leace``  what least-squares concept erasure takes away (Belrose et al. 2023); for two classes
           that is along Δ, and what it reads is the whitened Δ (`leace_eraser` does both)
=========  =====================================================================================

All but ``mean`` find a line; its direction is that of Δ and its length the distance of the two
means along it, so that a coefficient of 1 means the same for each: it moves the average negative
example to where the average positive one lies along that line. Statistics are float64.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from activation_extraction import DEFAULT_BATCH, extract_batch
from activation_record import ActivationRecord
from extraction_request import Request, make_request
from forward_pass import InputError, SiteError
from model_architecture import Architecture, Layer
from module_devices import as_tensor, exact
from sites import check_batch_size
from steering_direction import Direction
from tokenization import Positions, Prompt, check_ids, encode, is_token_ids, resolve_positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Method = Callable[[Tensor, Tensor], Tensor]
"""Positive ``[n, d]`` and negative ``[m, d]`` examples, float64 → a direction ``[d]``."""

SINK = 10.0
"""A first token whose activation is this many times as long as the others' is a sink."""

ROUNDING = 1e-5
"""Relative difference of two activations that padding alone may cause in float32."""


# --- Methods --------------------------------------------------------------------------------------


def mean_difference(positive: Tensor, negative: Tensor) -> Tensor:
    """Mean of the positive examples minus mean of the negative ones, ``[d]``."""
    return positive.mean(0) - negative.mean(0)


def first_component(positive: Tensor, negative: Tensor) -> Tensor:
    """The line along which the differences of pairs are longest, not centred.

    Raises:
        InputError: there are not as many negative examples as positive ones.
    """
    if len(positive) != len(negative):
        raise InputError(
            f"method='pca' compares pairs: {len(positive)} positive and {len(negative)} negative "
            "prompts came; give as many, in the same order, or take method='mean'"
        )
    return _stretched(
        torch.linalg.svd(positive - negative, full_matrices=False).Vh[0], positive, negative
    )


def probe_normal(positive: Tensor, negative: Tensor) -> Tensor:
    """The normal of a logistic regression (scikit-learn's, L2 with C = 1).

    The activations are centred and scaled, all dimensions by one factor, to variance 1 on average.
    """
    from sklearn.linear_model import LogisticRegression

    both = torch.cat([positive, negative])
    both = both - both.mean(0)
    both = both / both.pow(2).mean().sqrt().clamp(min=torch.finfo(both.dtype).tiny)
    labels = [1] * len(positive) + [0] * len(negative)
    probe = LogisticRegression(C=1.0, max_iter=10_000).fit(both.numpy(), labels)
    return _stretched(torch.from_numpy(probe.coef_[0]), positive, negative)


def erased_direction(positive: Tensor, negative: Tensor) -> Tensor:
    """The line along which LEACE moves an activation to erase the concept.

    Raises:
        InputError: the examples do not differ, or are too few for a covariance.
    """
    return _stretched(_fit_leace(positive, negative)[0][:, 0], positive, negative)


METHODS: dict[str, Method] = {
    "mean": mean_difference,
    "pca": first_component,
    "probe": probe_normal,
    "leace": erased_direction,
}
"""By name; any function of the same kind can be given instead."""


def leace_eraser(positive: Tensor, negative: Tensor) -> Callable[[Tensor], Tensor]:
    """The least-squares eraser of what tells two sets of activations apart (Belrose et al. 2023).

    `concept_eraser.erase_concept` does more: several classes, numbers, a check in the model.

    Args:
        positive: ``[n, d]``, of one layer (`read_examples`).
        negative: ``[m, d]``.

    Returns:
        A function of activations ``[…, d]``: the same without what a linear probe could read of the
        concept, in their dtype. ``ActivationPatch(layer, None, eraser)`` puts it in force.

    Raises:
        InputError: the examples do not differ, or are too few.
    """
    fitted = _fit_leace(positive, negative)

    def _erase(activation: Tensor) -> Tensor:
        wide = torch.promote_types(activation.dtype, torch.float32)
        left, right, mean = (part.to(activation.device, wide) for part in fitted)
        h = activation.to(wide)
        return (h - (h - mean) @ right.T @ left.T).to(activation.dtype)

    return _erase


def _fit_leace(positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``left [d, 1]``, ``right [1, d]`` and ``mean [d]``, float64.

    There are fewer examples than features as a rule, so the covariance is shrunk towards a multiple
    of 1 by the oracle approximating share (Chen et al. 2010, "Shrinkage Algorithms for MMSE
    Covariance Estimation", equation 23), as scikit-learn computes it.

    Raises:
        InputError: there are not two of each, or they do not differ.
    """
    from sklearn.covariance import OAS

    x = exact(torch.cat([positive, negative])).cpu()
    z = torch.zeros(len(x), 1, dtype=x.dtype, device="cpu")
    z[: len(positive)] = 1
    if len(positive) < 2 or len(negative) < 2:
        raise InputError(
            f"LEACE needs a covariance, so two examples of each kind or, better, a few dozen; came "
            f"{len(positive)} + {len(negative)}: give more of them"
        )
    share = OAS(store_precision=False).fit(x.numpy()).shrinkage_
    return erasing_projection(x, z, float(share))


NOTHING = 1e-10
"""Eigenvalues and singular values below this share of the largest count as 0."""


def erasing_projection(x: Tensor, z: Tensor, shrinkage: float) -> tuple[Tensor, Tensor, Tensor]:
    """``left [d, rank]``, ``right [rank, d]`` and ``mean [d]``; `concept_eraser` has the formula.

    Args:
        x: Activations ``[example, d]``, float64.
        z: What is erased, ``[example, k]``, float64.
        shrinkage: 0 is LEACE, 1 the mean projection.

    Raises:
        InputError: ``x`` and ``z`` are not correlated.
    """
    mean = x.mean(0)
    centred, wanted = x - mean, z - z.mean(0)
    covariance = centred.T @ centred / len(x)
    cross = centred.T @ wanted / len(x)
    level = covariance.diagonal().mean()
    if not float(cross.norm()) > NOTHING * float(level.sqrt() * wanted.square().mean().sqrt()):
        raise InputError("the labels make no difference to these activations: nothing to erase")
    size = torch.eye(len(mean), dtype=x.dtype, device="cpu") * level
    values, vectors = torch.linalg.eigh((1 - shrinkage) * covariance + shrinkage * size)
    kept = values > NOTHING * values[-1]
    values, vectors = values[kept].sqrt(), vectors[:, kept]
    u, s, _ = torch.linalg.svd((vectors / values) @ (vectors.T @ cross), full_matrices=False)
    u = u[:, s > NOTHING**0.5 * s[0]]
    inside = vectors.T @ u
    return vectors @ (values[:, None] * inside), (inside / values[:, None]).T @ vectors.T, mean


def _stretched(line: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """A line's direction towards the positive mean, as long as the means are apart along it."""
    unit = line / line.norm().clamp(min=torch.finfo(line.dtype).tiny)
    return unit * (mean_difference(positive, negative) @ unit)


def method_named(method: str | Method) -> tuple[str, Method]:
    """A method and its name.

    Raises:
        InputError: there is none of that name.
    """
    if callable(method):
        return getattr(method, "__name__", type(method).__name__), method
    if method not in METHODS:
        raise InputError(
            f"method {method!r} is none of {', '.join(METHODS)}, nor a function of "
            "(positive [n, d], negative [m, d])"
        )
    return method, METHODS[method]


# --- Directions -----------------------------------------------------------------------------------


def find_direction(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    positive_prompts: Sequence[Prompt],
    negative_prompts: Sequence[Prompt],
    layer: Layer,
    **options: Any,
) -> Direction:
    """The direction of one layer; arguments, result and errors as in `find_directions`.

    Raises:
        InputError: see `find_directions`.
        LayerError: there is no such layer.
    """
    (found,) = find_directions(
        model, tokenizer, positive_prompts, negative_prompts, [layer], **options
    ).values()
    return found


def find_directions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    positive_prompts: Sequence[Prompt],
    negative_prompts: Sequence[Prompt],
    layers: Layer | Sequence[Layer] | None = None,
    *,
    method: str | Method = "mean",
    read: Positions = "last",
    site: str = "resid_post",
    normalize: bool = False,
    label: str = "",
    batch_size: int = DEFAULT_BATCH,
) -> dict[int, Direction]:
    """What tells positive from negative examples, at each of several layers, in one pass over them.

    Args:
        model: The model; it needs no head.
        tokenizer: For text and chats.
        positive_prompts: Texts, chats or lists of token ids, at least one. A chat goes through the
            tokenizer's template, with the opening of the assistant's answer at its end.
        negative_prompts: The same; as many, in the same order, for ``method="pca"``.
        layers: In any spelling; None means all that have the site.
        method: A name out of `METHODS`, or a function of ``[n, d]`` and ``[m, d]``.
        read: Which tokens; see `read_examples`.
        site: A site that holds one vector per token.
        normalize: Scale to length 1.
        label: What the direction stands for.
        batch_size: Prompts per forward pass.

    Returns:
        ``{layer: Direction}``, vectors ``[d_model]`` float32 on the CPU.

    Raises:
        InputError: a list is empty or no list, a prompt or position cannot be used, or the examples
            do not differ where they are read.
        LayerError: there is no such layer.
        SiteError: the model has no such site, or it has a head axis.
    """
    name, find = method_named(method)
    architecture = Architecture(model)
    rows = [
        _encoded(architecture, tokenizer, prompts, read, kind)
        for prompts, kind in (
            (positive_prompts, "positive_prompts"),
            (negative_prompts, "negative_prompts"),
        )
    ]
    request = make_request(architecture, layer_indices=_layer_list(layers), sites=(site,))
    uneven = len({len(ids) for ids in (*rows[0], *rows[1])}) > 1
    positive, negative = (
        _read(architecture, tokenizer, ids, request, read, batch_size, uneven) for ids in rows
    )
    found = {}
    for place, where in enumerate(request.sites):
        examples = exact(positive[:, place]), exact(negative[:, place])
        vector = exact(as_tensor(find(*examples)).detach())
        _refuse_nothing(vector, examples, architecture, f"{where.name} of layer {where.layer}")
        vector = vector / vector.norm() if normalize else vector
        about = {"site": site, "method": name, "label": label}
        model_type = str(getattr(architecture.model.config, "model_type", ""))
        found[where.layer] = Direction(vector.float(), where.layer, model=model_type, **about)
    return found


def _layer_list(layers: Any) -> Any:
    """One layer as a list; make_request takes lists."""
    return [layers] if isinstance(layers, str) else layers


def _refuse_nothing(
    vector: Tensor, examples: tuple[Tensor, Tensor], architecture: Architecture, where: str
) -> None:
    """Raise InputError where the examples do not differ by more than rounding."""
    width = examples[0].shape[1]
    if tuple(vector.shape) != (width,) or not bool(vector.isfinite().all()):
        raise InputError(
            f"the method must return a finite direction [{width}]; "
            f"it returned {list(vector.shape)} at {where}"
        )
    size = torch.cat(examples).norm(dim=1).mean()
    if vector.norm() <= max(torch.finfo(architecture.model.dtype).eps, ROUNDING) * size:
        raise InputError(
            f"the positive and negative prompts have the same activation at {where}, where they "
            "are read: read tokens in which, or after which, they differ (read='last' or 'mean')"
        )


# --- Reading --------------------------------------------------------------------------------------


def read_examples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prompts: Sequence[Prompt],
    layers: Layer | Sequence[Layer] | None = None,
    *,
    read: Positions = "last",
    site: str = "resid_post",
    batch_size: int = DEFAULT_BATCH,
) -> Tensor:
    """One vector per prompt and layer; batches are padded, the result is that of one by one.

    Args:
        model: The model; it needs no head.
        tokenizer: For text and chats.
        prompts: Texts, chats or lists of token ids, at least one.
        layers: In any spelling, taken in the order of depth; None means all that have the site.
        read: ``"last"``: the last token; an index (negative from the end): that token;
            ``"mean"``: the mean over all tokens that are not special; a list or slice: the mean
            over those tokens. The first token of many models is an attention sink, with an
            activation far longer than all others; where prompts differ in length it spoils a
            mean, and a warning says so.
        site: A site that holds one vector per token.
        batch_size: Prompts per forward pass.

    Returns:
        ``[prompt, layer, d]``, float32, on the CPU.

    Raises:
        InputError: the list is empty or no list, or a prompt or position cannot be used.
        LayerError: there is no such layer.
        SiteError: the model has no such site, or it has a head axis.
    """
    architecture = Architecture(model)
    rows = _encoded(architecture, tokenizer, prompts, read, "prompts")
    request = make_request(architecture, layer_indices=_layer_list(layers), sites=(site,))
    uneven = len({len(ids) for ids in rows}) > 1
    return _read(architecture, tokenizer, rows, request, read, batch_size, uneven)


def _encoded(
    architecture: Architecture,
    tokenizer: PreTrainedTokenizerBase | None,
    prompts: Sequence[Prompt],
    read: Positions,
    kind: str,
) -> list[list[int]]:
    """Token ids of each prompt, checked, so that an error names the list and the prompt."""
    check_examples(prompts, kind)
    rows = []
    for number, prompt in enumerate(prompts):
        try:
            ids = encode(tokenizer, prompt)
            check_ids(ids, architecture.config)
            resolve_positions(None if _is_mean(read) else read, len(ids))
        except InputError as error:
            raise InputError(f"{kind}[{number}]: {error}") from error
        rows.append(ids)
    return rows


def check_examples(prompts: Any, kind: str) -> None:
    """Refuse what is no list of prompts.

    Raises:
        InputError: it is one text, one chat, one list of token ids, empty, or something else.
    """
    one = isinstance(prompts, str) or (
        isinstance(prompts, Sequence) and len(prompts) > 0 and isinstance(prompts[0], Mapping | int)
    )
    if one:
        example = f"[{prompts!r}]" if isinstance(prompts, str) else "[[…], […]]"
        raise InputError(f"{kind} is a list of prompts; a single one came: write {kind}={example}")
    if not isinstance(prompts, Sequence) and not is_token_ids(prompts):
        raise InputError(f"{kind} is a list of prompts; came {type(prompts).__name__}")
    if not len(prompts):
        raise InputError(f"{kind} is empty; give at least one prompt")


def _is_mean(read: Positions) -> bool:
    return isinstance(read, str) and read == "mean"


def _read(
    architecture: Architecture,
    tokenizer: PreTrainedTokenizerBase | None,
    rows: Sequence[list[int]],
    request: Request,
    read: Positions,
    batch_size: int,
    uneven: bool,
) -> Tensor:
    """``[prompt, layer, d]``; some prompts of like length at a time, so that little is held.

    ``uneven``: the prompts that are compared differ in length.

    Raises:
        InputError: ``batch_size`` is below 1, or a mean would be over special tokens alone.
    """
    check_batch_size(batch_size)
    special = set(getattr(tokenizer, "all_special_ids", ()))
    order = sorted(range(len(rows)), key=lambda row: -len(rows[row]))
    positions = None if _is_mean(read) else read
    pooled: dict[int, Tensor] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        records = extract_batch(
            architecture,
            None,
            [rows[row] for row in chosen],
            request,
            positions,
            batch_size=batch_size,
            show_progress=False,
        )
        for row, record in zip(chosen, records, strict=True):
            kept = [
                place
                for place, position in enumerate(record.positions)
                if not (_is_mean(read) and record.token_ids[position] in special)
            ]
            if not kept:
                raise InputError("read='mean' leaves out special tokens; a prompt has no others")
            pooled[row] = _pooled(record, request, kept, uneven)
    return torch.stack([pooled[row] for row in range(len(rows))])


def _pooled(
    record: ActivationRecord, request: Request, kept: Sequence[int], uneven: bool
) -> Tensor:
    """The mean over the tokens kept, ``[layer, d]``."""
    values = []
    for site in request.sites:
        value = record.at(site.name, site.layer)
        if value.dim() != 3:
            raise SiteError(
                f"{site.name} holds {list(value.shape[2:])} per token; a direction is read where "
                "there is one vector per token: resid_post, resid_mid, attn_out, mlp_out, …"
            )
        value = value[0, list(kept)].float().cpu()
        if uneven and len(kept) > 1 and record.positions[kept[0]] == 0:
            _warn_of_sink(value)
        values.append(value.mean(0))
    return torch.stack(values)


def _warn_of_sink(tokens: Tensor) -> None:
    """Warn where the first of these tokens is an attention sink; ``[position, d]``."""
    first, *others = tokens.norm(dim=1).tolist()
    ratio = first / max(sum(others) / len(others), torch.finfo(torch.float32).tiny)
    if ratio > SINK:
        warnings.warn(
            f"the first token's activation is {ratio:.0f} times as long as the others': the mean "
            "over prompts of different lengths measures their length; leave it out by "
            "read=slice(1, None)",
            stacklevel=5,
        )
