"""Whether what autograd calls a model's gradient is the slope of its output.

A layer whose kernel has no backward pass (quantized weights, a custom operation) may cut the graph
without an error: the residual stream goes around it, and gradients come out, silently wrong.
`check_gradient` finds that in two ways:

- *cuts*: a module inside a block gives something that depends on the prompt's embeddings, but
  autograd does not know it. In any precision.
- *slope*: along a short line through a probe's embeddings, what the output changes by is the
  integral of the gradient. In single and double precision; half rounds too much for that.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, ref

import numpy as np
import torch
from torch import Tensor, nn

from embedding_pass import EmbeddingPass, Measure, differentiable, embedding_pass
from forward_pass import ArchitectureError, Hook, Tap, attached, read_hidden
from gradient_scale import autocast_dtype
from interrupts import enable_grad, no_grad
from model_architecture import Architecture
from module_devices import exact, modules_of
from module_taps import Turn, hook_in_turn
from tokenization import context_length
from weighted_gradients import GradientPlan, weighted_gradients

PROBE_TOKENS = 6

NODES = 4

LINES = ((0.0, 1e-2), (0.5, 1e-3), (0.5, 1e-2), (1.0, 1e-3), (1.0, 1e-2))
"""Where each line lies: how far from the probe's embeddings, and how long, against their own
length. They are tried until one agrees: on some, a mixture of experts jumps from one to another."""

ALLOWED = 0.03
"""Relative difference of slope and gradient."""

ASIDE = 0.3
"""How far the embeddings move, against their own length, to see what depends on them."""

_CHECKED: WeakKeyDictionary[nn.Module, tuple[Any, str]] = WeakKeyDictionary()


def check_gradient(
    architecture: Architecture, instead: str = "method='occlusion' needs no gradient"
) -> None:
    """Compare a model's gradient with its slope on a few tokens, once for a model as it is.

    A module, a hook, a dtype or an implementation of attention that was exchanged since, or
    autocast that was switched, is another model.

    Args:
        architecture: The model, with a head.
        instead: What does without a gradient, for the error.

    Raises:
        ArchitectureError: the model has no gradient, or one that is not its slope.
    """
    model = architecture.model
    state = _state(architecture)
    known = _CHECKED.get(model)
    if known is None or known[0] != state:
        known = (state, _fault(architecture))
        _CHECKED[model] = known
    if known[1]:
        raise ArchitectureError(
            f"the gradient of {type(model).__name__} is not the slope of its output: {known[1]} "
            f"(quantized weights, or a kernel without a backward pass). {instead}; "
            "check_gradients=False goes on regardless"
        )


def _state(architecture: Architecture) -> Any:
    """What a verdict belongs to; equal as long as nothing was exchanged."""
    modules = modules_of(architecture.model)
    hooks = [key for m in modules for key in (*m._forward_pre_hooks, *m._forward_hooks)]
    kind = getattr(architecture.config, "_attn_implementation", None)
    return kind, architecture.model.dtype, _autocast(architecture), hooks, [*map(ref, modules)]


def _autocast(architecture: Architecture) -> torch.dtype | None:
    return autocast_dtype(architecture.input_device.type)


def _fault(architecture: Architecture) -> str:
    """What is wrong with a model's gradient, in words; "" where nothing is."""
    cut = cut_modules(architecture)
    if cut:
        names = ", ".join(cut[:3]) + (f" and {len(cut) - 3} more" if len(cut) > 3 else "")
        return f"autograd does not see through {names}"
    if torch.finfo(architecture.model.dtype).bits < 32 or _autocast(architecture):
        return ""
    apart = slope_difference(architecture)
    return "" if apart <= ALLOWED else f"they differ by {apart:.0%} on a probe"


def _probe(architecture: Architecture) -> list[int]:
    room = context_length(architecture.config) or PROBE_TOKENS
    ids = torch.arange(3, 3 + min(PROBE_TOKENS, room), device="cpu")
    return ids.remainder(architecture.config.vocab_size).tolist()


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _directions(like: Tensor, count: int, seed: int) -> list[Tensor]:
    """Random tensors of the same shape and length."""
    draws = torch.randn(
        count, *like.shape, generator=torch.Generator().manual_seed(seed), device="cpu"
    )
    return [each * like.norm() / each.norm() for each in draws.to(like)]


# --- Cuts -----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _OutputTap:
    """Looks at the tensor that a module gives, where it gives one."""

    module: nn.Module

    def attach(self, stack: ExitStack, hook: Hook, last: bool = False) -> None:
        def after(_module: nn.Module, _args: Any, output: Any) -> None:
            empty = isinstance(output, tuple | list) and not output
            value: Any = None if empty else read_hidden(output)
            if isinstance(value, Tensor) and value.is_floating_point():
                hook(value)

        hook_in_turn(stack, self.module, after, Turn.of(last, False), before=False)


def cut_modules(architecture: Architecture) -> list[str]:
    """Names of modules in blocks that depend on the embeddings behind autograd's back.

    Args:
        architecture: The model, with a head.

    Raises:
        ArchitectureError: the model has no gradient at all.
    """
    parts = {
        module: f"{block}.{path}".rstrip(".")
        for block, whole in zip(architecture.layer_names, architecture.blocks, strict=True)
        for path, module in whole.named_modules()
    }
    ids = _probe(architecture)
    with embedding_pass(architecture, ids, [len(ids) - 1]) as opened:
        center = _wide(opened.embedding)
        (aside,) = _directions(center, 1, seed=0)
        before = _without_graph(opened, parts, center)
        after = _without_graph(opened, parts, center + ASIDE * aside) if before else {}
    return [name for name, value in before.items() if _moved(value, after.get(name))]


def _without_graph(
    opened: EmbeddingPass, parts: dict[nn.Module, str], embeddings: Tensor
) -> dict[str, Tensor]:
    """What modules give that needs no gradient, though the embeddings do."""
    found: dict[str, Tensor] = {}

    def looking(name: str) -> Hook:
        def look(value: Tensor) -> None:
            wanted = torch.is_grad_enabled()  # a model that picks indices wants none there
            if wanted and not value.requires_grad:
                found[name] = value.detach().clone()

        return look

    taps: list[tuple[Tap, Hook]] = [
        (_OutputTap(part), looking(name)) for part, name in parts.items()
    ]
    with enable_grad(), differentiable(opened.name), attached(taps, last=True):
        leaf = embeddings.to(opened.embedding.dtype)[None].requires_grad_()
        if not opened.logits(leaf).requires_grad:
            raise RuntimeError("the output does not require grad")
    return found


def _moved(before: Tensor, after: Tensor | None) -> bool:
    if after is None or before.shape != after.shape:
        return False
    apart = (exact(before) - exact(after)).norm()
    return bool(apart > 1e-3 * exact(before).norm())


# --- Slope ----------------------------------------------------------------------------------------


def slope_difference(architecture: Architecture) -> float:
    """Relative difference between change and integrated gradient, on the line where it is least.

    Args:
        architecture: The model, with a head.

    Raises:
        ArchitectureError: the model has no gradient at all.
    """
    found = []
    ids = _probe(architecture)
    with embedding_pass(architecture, ids, range(len(ids))) as opened:
        for number, (away, step) in enumerate(LINES):
            found.append(_along_line(opened, away, step, number))
            if found[-1] <= ALLOWED:
                break
    return min(found)


def _along_line(opened: EmbeddingPass, away: float, step: float, seed: int) -> float:
    """Relative difference between change and integrated gradient of some logits."""
    measure = _some_logits(opened)
    center = _wide(opened.embedding)
    aside, line = _directions(center, 2, seed)
    center, line = center + away * aside, step * line
    nodes, weights = np.polynomial.legendre.leggauss(NODES)

    def points(numbers: Sequence[int]) -> Tensor:
        shares = torch.tensor([nodes[number] for number in numbers], device="cpu").to(center)
        return (center + shares[:, None, None] * line).to(opened.embedding.dtype)

    plan = GradientPlan(points, torch.from_numpy(weights), line)
    slopes, _ = weighted_gradients(opened, measure, plan)
    with no_grad():
        ends = torch.stack([center - line, center + line]).to(opened.embedding.dtype)
        values = measure(opened.logits(ends)).cpu().double().numpy()
    change, integral = values[1] - values[0], slopes.sum(-1)
    size = float(np.linalg.norm(change))
    apart = float(np.linalg.norm(change - integral))
    if not np.isfinite(apart):
        return float("inf")
    return apart / size if size else apart


def _some_logits(opened: EmbeddingPass) -> Measure:
    """A few logits at a few positions."""
    last, vocabulary = opened.length - 1, opened.base.shape[-1]
    slots = torch.tensor([last // 2, last, last, last], device="cpu")
    tokens = torch.arange(1, 5, device="cpu").mul(vocabulary // 5)

    def values(logits: Tensor) -> Tensor:
        return logits[:, slots.to(logits.device), tokens.to(logits.device)]

    return Measure(values, tuple(slots.tolist()))
