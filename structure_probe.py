"""What a model's blocks are made of, found by watching one short forward pass.

1. *Who writes into the residual stream*: the two modules of a block with
   ``resid_pre + s·a + s·m == resid_post`` (s is 1 or the config's ``residual_multiplier``), within
   the rounding of those sums, are what attention and MLP really add. The last-executed such pair
   counts, so a norm after the sublayer (Gemma, OLMo 2) is found as the writer. A block with one
   writer is a mixer (Mamba). ``resid_mid`` exists where some later module's input equals
   ``resid_pre + s·a``.
2. *Attention*: the module that was seen attending (`attention_internals`), and its output
   projection: the last matrix in it. The MLP's down projection: the last matrix that makes what
   the MLP returns.
3. *The final norm*: the body's part that takes the last block's output and changes it.

No module is kept: what was found are dotted paths and numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from attention_internals import AttentionCall, AttentionFinder
from forward_pass import ArchitectureError, evaluate, read_hidden, read_input

PROBE_LENGTH = 5
"""Tokens in the pass that is watched."""


@dataclass(frozen=True)
class BlockStructure:
    """What one block is made of. Paths are relative to the block; ``""`` is the block itself."""

    attn_writer: str | None = None
    """Module whose output (times `scale`) attention adds to the residual stream.

    A mixer counts as attention.
    """
    mlp_writer: str | None = None
    """Module whose output (times `scale`) the MLP adds; None in a block with a single writer."""
    scale: float = 1.0
    has_resid_mid: bool = False
    """False in parallel blocks, whose MLP does not see what attention added."""
    attention: str | None = None
    """The module that computes attention; None in a block that has none."""
    attention_route: str = ""
    """How its inside is reached: see `attention_internals`."""
    n_heads: int = 0
    n_kv_heads: int = 0
    out_proj: str | None = None
    """Attention's output projection; its input, split by head, is ``head_out``."""
    down_proj: str | None = None
    """The MLP's last matrix; its input is ``mlp_neurons``."""
    mlp: str | None = None
    """The block's part that holds the MLP."""
    flattened: frozenset[str] = frozenset()
    """Modules that see ``[batch·position, d]`` instead of ``[batch, position, d]`` (OPT's MLP)."""
    returns_tuple: bool = False


@dataclass(frozen=True)
class ModelStructure:
    """What a model is made of."""

    blocks: tuple[BlockStructure, ...]
    final_norm: str | None
    """Path of the final norm in the body; None where there is none (OPT-350m)."""


@dataclass(frozen=True, eq=False)
class _Seen:
    """One module's call inside a block, as the probe saw it."""

    path: str
    module: nn.Module
    entered: Tensor | None
    left: Tensor | None
    order: int


class _BlockTrace:
    """What the probe saw in one block: its input, its output, its modules in order of leaving."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        self.pre: Tensor
        self.post: Tensor
        self.returns_tuple = False
        self.seen: list[_Seen] = []
        """In order of leaving."""
        self.calls: list[AttentionCall] = []

    @cached_property
    def once(self) -> list[_Seen]:
        """Those of ``seen`` that ran a single time, so that a tap on them is unambiguous."""
        counts = Counter(seen.path for seen in self.seen)
        return [seen for seen in self.seen if counts[seen.path] == 1]


@torch.no_grad()
def probe_structure(
    model: nn.Module,
    body: nn.Module,
    blocks: Sequence[nn.Module],
    config: Any,
    inputs: Mapping[str, Tensor],
) -> ModelStructure:
    """Run a few tokens and work out what every block is made of.

    Args:
        model: The model; dropout is off meanwhile.
        body: The module that owns the blocks, and is called.
        blocks: The blocks, in order.
        config: The text config, for a residual multiplier and numbers of heads.
        inputs: One row of `PROBE_LENGTH` tokens, as ``body`` takes them.
    """
    with ExitStack() as stack:
        evaluate(stack, model)
        traces = [_trace_block(stack, block) for block in blocks]
        around = _BlockTrace(body)
        for name, child in body.named_children():
            _trace_module(stack, around, name, child)
        running = _running_module(stack, blocks)
        finder = stack.enter_context(AttentionFinder(PROBE_LENGTH, running))
        body(**inputs, use_cache=False)
    for trace in traces:
        inside = {id(module) for module in trace.block.modules()}
        trace.calls = [call for call in finder.calls if id(call.module) in inside]
    multiplier = getattr(config, "residual_multiplier", None)
    scales = [1.0] if multiplier in (None, 1.0) else [1.0, float(multiplier)]
    found = tuple(_describe_block(trace, config, scales) for trace in traces)
    return ModelStructure(found, _find_final_norm(around, traces[-1].post))


def _find_final_norm(around: _BlockTrace, last: Tensor) -> str | None:
    """The body's part that takes the last block's output and changes its values, not its shape."""
    for seen in around.once:
        if _same(seen.entered, last) and seen.left is not None and seen.left.shape == last.shape:
            return None if _same(seen.left, last) else seen.path
    return None


def _trace_block(stack: ExitStack, block: nn.Module) -> _BlockTrace:
    trace = _BlockTrace(block)
    for path, module in block.named_modules():
        _trace_module(stack, trace, path, module)
    return trace


def _trace_module(stack: ExitStack, trace: _BlockTrace, path: str, module: nn.Module) -> None:
    """Note what a module takes and gives; ``""`` is the block itself."""
    under_way: list[Tensor | None] = []

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            hidden = read_input(args, kwargs).clone()
        except ArchitectureError:
            hidden = None
        under_way.append(hidden)
        if path == "" and hidden is not None:
            trace.pre = hidden

    def after(module: nn.Module, _args: Any, output: Any) -> None:
        hidden = read_hidden(output)
        hidden = hidden.clone() if isinstance(hidden, Tensor) else None
        entered = under_way.pop()
        if path:
            trace.seen.append(_Seen(path, module, entered, hidden, len(trace.seen)))
        elif hidden is not None:
            trace.post, trace.returns_tuple = hidden, isinstance(output, tuple | list)

    stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
    stack.callback(module.register_forward_hook(after).remove)


def _running_module(stack: ExitStack, blocks: Sequence[nn.Module]) -> Any:
    """A function that names the innermost module under way inside the blocks."""
    under_way: list[nn.Module] = []
    for block in blocks:
        for module in block.modules():
            stack.callback(
                module.register_forward_pre_hook(lambda m, _args: under_way.append(m)).remove
            )
            stack.callback(module.register_forward_hook(lambda *_: under_way.pop() and None).remove)
    return lambda: under_way[-1] if under_way else None


def _describe_block(trace: _BlockTrace, config: Any, scales: Sequence[float]) -> BlockStructure:
    attn_writer, mlp_writer, scale = _find_writers(trace, scales)
    attention = trace.calls[0] if len(trace.calls) == 1 else None
    attention_path = next(
        (s.path for s in trace.seen if attention and s.module is attention.module), None
    )
    out_proj = _find_out_proj(trace, attention_path, attention)
    mlp, down_proj = _find_down_proj(trace, attention_path, mlp_writer)
    kv_heads = 0
    if attention is not None:
        kv_heads = attention.kv_heads
        if attention.route == "products":
            configured = [
                getattr(config, name, None) for name in ("num_key_value_heads", "num_kv_heads")
            ]
            kv_heads = min([kv_heads, *(number for number in configured if number)])
    return BlockStructure(
        attn_writer=attn_writer.path if attn_writer else None,
        mlp_writer=mlp_writer.path if mlp_writer else None,
        scale=scale,
        has_resid_mid=attn_writer is not None
        and mlp_writer is not None
        and _has_mid(trace, attn_writer, scale),
        attention=attention_path,
        attention_route=attention.route if attention else "",
        n_heads=attention.query_heads if attention else 0,
        n_kv_heads=kv_heads,
        out_proj=out_proj,
        down_proj=down_proj,
        flattened=frozenset(s.path for s in trace.seen if _is_flat(s.left) or _is_flat(s.entered)),
        mlp=mlp,
        returns_tuple=trace.returns_tuple,
    )


def _rounding(dtype: torch.dtype) -> float:
    """Relative rounding of a model's own sums.

    Many models compute some parts in float32 whatever their dtype.
    """
    return max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)


def _find_writers(
    trace: _BlockTrace, scales: Sequence[float]
) -> tuple[_Seen | None, _Seen | None, float]:
    """The two modules (or the one) whose outputs are what the block adds to its input."""
    shape = trace.post.shape
    added = (trace.post.double() - trace.pre.double()).flatten()
    seen = [
        s
        for s in trace.once
        if s.left is not None and s.left.numel() == added.numel() and s.left.shape[-1] == shape[-1]
    ]
    outputs = [s.left.double().flatten() for s in seen if s.left is not None]
    rounding = _rounding(trace.post.dtype)
    ends = trace.pre.double().abs().flatten() + trace.post.double().abs().flatten()
    for pairwise in (True, False):
        best: tuple[float, int, int, float] | None = None
        for scale in scales:
            for j, later in enumerate(outputs):
                for i, earlier in (
                    enumerate(outputs[:j]) if pairwise else [(j, torch.zeros_like(later))]
                ):
                    off = (added - scale * (earlier + later)).abs()
                    error = float(off.max())
                    allowed = rounding * (ends + scale * (earlier.abs() + later.abs()))
                    # equal errors (a module and the dropout after it) go to the last executed
                    if (best is None or error <= best[0] * (1 + 1e-9)) and bool(
                        (off <= allowed).all()
                    ):
                        best = (error, i, j, scale)
        if best is not None:
            _, i, j, scale = best
            return seen[i], (seen[j] if pairwise else None), scale
    return None, None, 1.0


def _has_mid(trace: _BlockTrace, attn_writer: _Seen, scale: float) -> bool:
    """Whether some later module reads the stream right after attention has added to it."""
    if attn_writer.left is None:
        return False
    written = attn_writer.left.view_as(trace.pre) * scale
    mid = (trace.pre + written).flatten()
    allowed = _rounding(mid.dtype) * (trace.pre.abs() + written.abs()).flatten()
    later = [
        s.entered.flatten()
        for s in trace.seen
        if s.order > attn_writer.order and s.entered is not None
    ]
    return any(e.numel() == mid.numel() and bool(((e - mid).abs() <= allowed).all()) for e in later)


def _is_flat(hidden: Tensor | None) -> bool:
    return hidden is not None and hidden.dim() == 2 and hidden.shape[0] == PROBE_LENGTH


def _is_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return (
        isinstance(weight, Tensor) and weight.dim() == 2 and next(module.children(), None) is None
    )


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return (
        a is not None
        and b is not None
        and a.numel() == b.numel()
        and bool((a.flatten() == b.flatten()).all())
    )


def _find_out_proj(
    trace: _BlockTrace, attention: str | None, call: AttentionCall | None
) -> str | None:
    """The last matrix inside attention, if its input splits evenly into the heads."""
    if attention is None or call is None:
        return None
    inside = [s for s in trace.once if s.path.startswith(f"{attention}.") and _is_matrix(s.module)]
    if not inside or inside[-1].entered is None or inside[-1].entered.shape[-1] % call.query_heads:
        return None
    return inside[-1].path


def _find_down_proj(
    trace: _BlockTrace, attention: str | None, mlp_writer: _Seen | None
) -> tuple[str | None, str | None]:
    """The MLP's part of the block, and the last matrix in it that makes what this part returns."""
    if mlp_writer is None:
        return None, None
    outside = [
        s
        for s in trace.once
        if attention is None or not f"{s.path}.".startswith(f"{attention.split('.')[0]}.")
    ]
    upto = [s for s in outside if s.order <= mlp_writer.order]
    returned = [s for s in upto if "." not in s.path or s is mlp_writer]
    for matrix in reversed([s for s in upto if _is_matrix(s.module)]):
        part = matrix.path.split(".")[0]
        if any(_same(matrix.left, s.left) for s in returned if s.path.split(".")[0] == part):
            return part, matrix.path
    part = mlp_writer.path.split(".")[0]
    before = [
        s.path
        for s in returned
        if "." not in s.path and next(s.module.children(), None) is not None
    ]
    return (part if next(mlp_writer.module.children(), None) or not before else before[-1]), None
