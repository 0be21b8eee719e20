"""Activations with the gradient of a number that the logits give: one forward pass, its graph.

- `run_plain` runs prompts without a graph and keeps sites and logits.
- `run_with_graph` does the same and keeps the graph: a `Tape`, from which gradients at every site
  can be had, more than once, also with one block's contribution dropped.

The graph begins at the first block that is asked for. Weights are out of it, so that it holds
less memory; whether they require a gradient is put back, and nothing is left on the model.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from base_run import logits_at, read_only
from embedding_pass import freeze
from forward_pass import Hook, InputError, Recording, Site, edit, evaluate, recording
from gradient_scale import GradientScale
from interrupts import UndoStack
from model_architecture import Architecture


def run_plain(
    architecture: Architecture, ids: Tensor, sites: Sequence[Site], read: Sequence[int]
) -> Recording:
    """Run prompts and keep what the sites produced.

    Args:
        architecture: The model, with a head.
        ids: ``[row, position]``, without padding.
        sites: What to keep, at all positions.
        read: Absolute positions whose logits are kept, ascending.

    Returns:
        A dict from site to tensor, detached; ``.logits [row, read, vocab]`` beside it.
    """
    with UndoStack() as stack:
        stack.enter_context(torch.no_grad())
        evaluate(stack, architecture.model)
        kept = stack.enter_context(recording(architecture, sites))
        kept.logits = _logits(stack, architecture, ids, read)
    return kept


def _logits(
    stack: ExitStack, architecture: Architecture, ids: Tensor, read: Sequence[int]
) -> Tensor:
    read_only(stack, architecture, read)
    logits = architecture.model(**architecture.inputs(ids), use_cache=False).logits
    return logits_at(logits, read)


@dataclass(eq=False)
class Tape:
    """A forward pass with its graph; it is freed with the last `gradients` that does not keep it.

    Every tensor has a row per prompt (or point) that was run.
    """

    values: dict[Site, Tensor]
    """What each site produced, axes as in `forward_pass.SITES`; part of the graph."""
    logits: Tensor
    """``[row, read, vocab]``, of at least float32; part of the graph."""
    _dropped: list[int]
    _scale: GradientScale

    def gradients(
        self, total: Tensor, *, drop: int | None = None, keep: bool = False
    ) -> dict[Site, Tensor]:
        """The gradient of a number at every site.

        Args:
            total: A scalar made of ``logits``.
            drop: A block through which no gradient shall flow but along the residual stream. The
                pass must have been run with ``droppable``.
            keep: Whether the graph is needed again.

        Returns:
            Like ``values`` (float32 where the model is float16); zeros where the number does not
            depend on a site.
        """
        sites = list(self.values)
        self._dropped[:] = [] if drop is None else [drop]
        try:
            slopes = torch.autograd.grad(
                total, [self.values[site] for site in sites], retain_graph=keep,
                allow_unused=True, materialize_grads=True,
            )  # fmt: skip
        finally:
            self._dropped.clear()
        return dict(zip(sites, map(self._scale.undo, slopes), strict=True))


def run_with_graph(
    architecture: Architecture,
    ids: Tensor,
    sites: Sequence[Site],
    read: Sequence[int],
    *,
    replace: Mapping[Site, Tensor] | None = None,
    droppable: bool = False,
) -> Tape:
    """Run prompts and keep what the sites produced, with the graph that leads to the logits.

    Args:
        architecture: The model, with a head.
        ids: ``[row, position]``, without padding.
        sites: What to keep, at all positions.
        read: Absolute positions whose logits are kept, ascending.
        replace: Values that shall stand at sites instead of the model's own, for all rows.
        droppable: Let `Tape.gradients` drop blocks.

    Returns:
        A `Tape`. The model is as it was; no hook is left.
    """
    first = min((site.layer for site in sites), default=0)
    dropped: list[int] = []
    scale = GradientScale(architecture.model)
    edits: list[tuple[Site, Hook]] = [(Site("resid_pre", first), _begin_graph)]
    edits += [(site, _put(value)) for site, value in (replace or {}).items()]
    if droppable:
        for layer in range(first, architecture.n_layers):
            edits += _bypass(layer, dropped)
    with UndoStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        evaluate(stack, architecture.model)
        freeze(stack, architecture.model)
        kept = stack.enter_context(recording(architecture, sites, detach=False))
        stack.enter_context(edit(architecture, edits))
        logits = scale.widen(_logits(stack, architecture, ids.clone(), read))
    return Tape(dict(kept), logits, dropped, scale)


def _begin_graph(value: Tensor) -> Tensor:
    return value.detach().clone().requires_grad_()


def _put(value: Tensor) -> Hook:
    def put(shown: Tensor) -> Tensor:
        return value.to(shown).expand_as(shown).detach().clone().requires_grad_()

    return put


# --- Dropping a block from a gradient -------------------------------------------------------------


class _Bypass(torch.autograd.Function):
    """What leaves a block; while it is dropped, its gradient goes to what entered instead."""

    @staticmethod
    def forward(ctx: Any, entered: Tensor, left: Tensor, layer: int, dropped: list[int]) -> Tensor:
        ctx.layer, ctx.dropped, ctx.device = layer, dropped, entered.device
        return left.clone()

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        (slope,) = slopes
        if ctx.layer in ctx.dropped:
            return slope.to(ctx.device), torch.zeros_like(slope), None, None
        return None, slope, None, None


def _bypass(layer: int, dropped: list[int]) -> list[tuple[Site, Hook]]:
    """Edits that let a block's Jacobian be the identity whenever ``dropped`` holds it."""
    entered: list[Tensor] = []

    def remember(value: Tensor) -> None:
        entered[:] = [value]

    def leave(value: Tensor) -> Tensor:
        return _Bypass.apply(entered.pop(), value, layer, dropped)

    return [(Site("resid_pre", layer), remember), (Site("resid_post", layer), leave)]


# --- Metrics --------------------------------------------------------------------------------------


def differentiable(
    metrics: Sequence[Callable[[Tensor], Tensor]], logits: Tensor, name: str
) -> Tensor:
    """Metrics of a pass, in its graph.

    Args:
        metrics: One per row.
        logits: ``[row, read, vocab]``, part of a graph.
        name: What the metric is called, for the error.

    Returns:
        ``[row]``.

    Raises:
        InputError: the metric leaves the graph, so that it has no gradient.
        RuntimeError: any other error of a metric, as it came.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Converting a tensor with requires_grad")
            values = torch.cat([m(logits[row : row + 1]) for row, m in enumerate(metrics)])
    except RuntimeError as err:
        if "requires grad" not in str(err):  # what .numpy() says
            raise
        raise InputError(_no_gradient(name)) from None
    if not values.requires_grad:
        raise InputError(_no_gradient(name))
    return values


def _no_gradient(name: str) -> str:
    return (
        f"the metric {name!r} has no gradient: return a tensor that was computed from the logits "
        "with torch (no float(), .item() or .numpy()), or use 'logit_diff', 'log_prob' or 'prob'"
    )
