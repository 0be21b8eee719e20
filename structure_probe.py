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

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attention_internals import AttentionCall, AttentionFinder
from block_trace import (
    PROBE_LENGTH,
    BlockTrace,
    SeenModule,
    running_module,
    trace_block,
    trace_module,
)
from expert_routing import Routing
from forward_pass import PLAIN, ArchitectureError, StreamShape, evaluate
from interrupts import UndoStack, no_grad
from model_shards import count_parts, find_mesh
from module_devices import exact


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
    outputs: int = 0
    """Entries of the tuple that the block returns; 0 for a tensor."""
    attention_calls: int = 0
    """How often attention was computed; with any other number than 1 its heads are not found."""
    gated: bool = False
    """Whether z is changed (by a gate or a norm) between attention and its output projection."""
    normed_sum: bool = False
    """Whether what the block returns is a norm of the sum, so that no parts add up to it."""
    hands_on: bool = True
    """Whether the next block receives just what this one returns."""
    router: tuple[str, Routing] | None = None
    """The module that chooses among the experts of a mixture, and what it returns."""
    head_parts: int = 1
    """Over how many processes the query heads are split (`model_shards`); `n_heads` are all."""
    kv_head_parts: int = 1
    """The same of key/value heads."""
    neuron_parts: int = 1
    """The same of the MLP's neurons."""


@dataclass(frozen=True)
class ModelStructure:
    """What a model is made of."""

    blocks: tuple[BlockStructure, ...]
    final_norm: str | None
    """Path of the final norm in the body; None where there is none (OPT-350m)."""
    width: int
    """Entries of the residual stream per token, of all its streams together."""
    stream: StreamShape = PLAIN
    """How blocks hand the residual stream on."""
    needs_every_block: bool = False
    """Whether blocks hand each other more than that: routing, or keys and values that later blocks
    use again.
    """
    reads_earlier: bool = False
    """Whether blocks are given what earlier blocks were given or gave, beside the stream."""
    widened: bool = False
    """Whether the stream is float32 in a model of half precision (Mamba's)."""


@no_grad()
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
    with UndoStack() as stack:
        evaluate(stack, model)
        clock = itertools.count()
        traces = [trace_block(stack, block, clock) for block in blocks]
        around = BlockTrace(body, clock)
        inner = {id(module) for block in blocks for module in block.modules()}
        for name, child in body.named_modules():
            if name and id(child) not in inner:
                trace_module(stack, around, name, child)
        running = running_module(stack, blocks)
        finder = stack.enter_context(AttentionFinder(PROBE_LENGTH, running, clock))
        body(**inputs, use_cache=False)
    _require_blocks(body, traces)
    for trace in traces:
        inside = {id(module) for module in trace.block.modules()}
        trace.calls = [call for call in finder.calls if id(call.module) in inside]
    stream = _find_stream(traces[0].pre)
    multiplier = getattr(config, "residual_multiplier", None)
    scales = [1.0] if multiplier in (None, 1.0) else [1.0, float(multiplier)]
    last = traces[-1].post
    following = [*(trace.pre for trace in traces[1:]), last]
    earlier = _read_earlier(traces)
    found = tuple(
        replace(
            _describe_block(trace, config, scales, stream),
            hands_on=_same(trace.post, after) and not earlier,
        )
        for trace, after in zip(traces, following, strict=True)
    )
    more = earlier or _hand_more(traces)
    width = stream.show(last).shape[-1]
    widened = last.dtype == torch.float32 != getattr(model, "dtype", last.dtype)
    norm = _find_final_norm(around, last)
    return ModelStructure(found, norm, width, stream, more, earlier, widened)


def _require_blocks(body: nn.Module, traces: Sequence[BlockTrace]) -> None:
    """Refuse what is no chain of blocks, each run once, handing on a residual stream."""
    name = type(body).__name__
    runs = {trace.runs for trace in traces}
    if 0 in runs:
        idle = [i for i, trace in enumerate(traces) if trace.runs == 0]
        raise ArchitectureError(
            f"{name} does not run its blocks {idle} on a text (they may read images); "
            "this toolkit needs blocks that all run"
        )
    if runs != {1}:
        raise ArchitectureError(
            f"{name} runs its blocks {', '.join(map(str, sorted(runs)))} times in a forward pass; "
            "this toolkit needs blocks that run once each (no recurrent depth)"
        )
    if traces[0].names:
        raise ArchitectureError(
            f"{name}'s blocks return {' and '.join(traces[0].names[:2])} beside each other "
            "(reversible blocks), not one residual stream"
        )
    shapes = {tuple(trace.post.shape) for trace in traces}
    linked = [_same(one.post, other.pre) for one, other in itertools.pairwise(traces)]
    if len(shapes) > 1 or (linked and not any(linked)):
        raise ArchitectureError(
            f"{name} has no chain of blocks: what one of {type(traces[0].block).__name__} gives "
            "is not what the next one takes, so there is no residual stream to read"
        )


def _find_stream(hidden: Tensor) -> StreamShape:
    """How the stream of one row of `PROBE_LENGTH` tokens is shaped."""
    if hidden.dim() == 4 and hidden.shape[1:3] == (1, PROBE_LENGTH):
        return StreamShape(hidden.shape[0], first=True)
    if hidden.dim() == 4 and hidden.shape[:2] == (1, PROBE_LENGTH):
        return StreamShape(hidden.shape[2])
    if hidden.dim() == 3 and hidden.shape[:2] == (1, PROBE_LENGTH):
        return PLAIN
    raise ArchitectureError(
        f"blocks hand on a tensor of shape {tuple(hidden.shape)} for one row of {PROBE_LENGTH} "
        "tokens; [batch, position, d_model] was expected"
    )


def _read_earlier(traces: Sequence[BlockTrace]) -> bool:
    """Whether a block is given the streams of earlier blocks, all or some of them, as well."""
    known: list[Tensor] = []
    constant = [each for each in traces[0].handed if isinstance(each, Tensor)]
    for trace in traces:
        size, width = trace.pre.numel(), trace.pre.shape[-1]
        for given in trace.handed:
            if not isinstance(given, Tensor) or any(_same(given, each) for each in constant):
                continue  # given to all blocks alike (the embedding, in Zamba)
            if given.numel() and given.shape[-1:] == (width,):
                parts = given.reshape(PROBE_LENGTH, -1, width).unbind(1)
                whole = given.numel() % size == 0
                if whole and any(_same(part, one) for part in parts for one in known):
                    return True
        known += [trace.pre, trace.post]
    return False


def _hand_more(traces: Sequence[BlockTrace]) -> bool:
    """Whether a block is given what another block made, beside the residual stream."""
    made: set[int] = set()
    for trace in traces:
        if any(id(each) in made for each in trace.handed if isinstance(each, Tensor)):
            return True
        made |= {id(extra) for extra in trace.extras}
    return any(len(shared) > size for trace in traces for shared, size in trace.grown)


def _find_final_norm(around: BlockTrace, last: Tensor) -> str | None:
    """The body's part that takes the last block's output and changes its values, not its shape."""
    for seen in around.once:
        if _same(seen.entered, last) and seen.left is not None and seen.left.shape == last.shape:
            return None if _same(seen.left, last) else seen.path
    return None


def _describe_block(
    trace: BlockTrace, config: Any, scales: Sequence[float], stream: StreamShape
) -> BlockStructure:
    attn_writer, mlp_writer, scale = None, None, 1.0
    if stream.streams == 1:
        attn_writer, mlp_writer, scale = _find_writers(trace, scales)
    attention = trace.calls[0] if len(trace.calls) == 1 else None
    attention_path = next(
        (s.path for s in trace.seen if attention and s.module is attention.module), None
    )
    out_proj = _find_out_proj(trace, attention_path, attention)
    mlp, down_proj = _find_down_proj(trace, attention_path, mlp_writer)
    counts = _count_heads(trace, config, attention)
    return BlockStructure(
        attn_writer=attn_writer.path if attn_writer else None,
        mlp_writer=mlp_writer.path if mlp_writer else None,
        scale=scale,
        has_resid_mid=attn_writer is not None
        and mlp_writer is not None
        and _has_mid(trace, attn_writer, scale),
        attention=attention_path,
        attention_route=attention.route if attention else "",
        n_heads=counts.n_heads,
        n_kv_heads=counts.n_kv_heads,
        head_parts=counts.head_parts,
        kv_head_parts=counts.kv_head_parts,
        out_proj=out_proj,
        down_proj=down_proj,
        flattened=frozenset(s.path for s in trace.seen if _is_flat(s.left) or _is_flat(s.entered)),
        mlp=mlp,
        outputs=trace.outputs,
        attention_calls=len(trace.calls),
        gated=_is_gated(trace, attention, out_proj),
        normed_sum=attn_writer is None and _is_normed_sum(trace),
        router=next(((s.path, s.routing) for s in trace.once if s.routing is not None), None),
        neuron_parts=_neuron_parts(trace, down_proj),
    )


class _HeadCounts(NamedTuple):
    """How many heads there are in all processes, and over how many these are split."""

    n_heads: int = 0
    n_kv_heads: int = 0
    head_parts: int = 1
    kv_head_parts: int = 1


def _count_heads(trace: BlockTrace, config: Any, call: AttentionCall | None) -> _HeadCounts:
    if call is None:
        return _HeadCounts()
    parts = count_parts(trace.block, call.query)
    kv_parts = count_parts(trace.block, call.key)
    kv_heads = call.kv_heads * kv_parts
    if call.route == "products":
        configured = [
            getattr(config, name, None) for name in ("num_key_value_heads", "num_kv_heads")
        ]
        kv_heads = min([kv_heads, *(number for number in configured if number)])
    return _HeadCounts(call.query_heads * parts, kv_heads, parts, kv_parts)


def _neuron_parts(trace: BlockTrace, down_proj: str | None) -> int:
    """Over how many processes the down projection's input is split."""
    mesh = find_mesh(trace.block)
    if mesh is None or down_proj is None:
        return 1
    seen = next(s for s in trace.once if s.path == down_proj)
    width = None if seen.entered is None else seen.entered.shape[-1]
    return 1 if width == getattr(seen.module, "in_features", width) else mesh.size()


def _is_gated(trace: BlockTrace, call: AttentionCall | None, out_proj: str | None) -> bool:
    """Whether the output projection takes something else than what attention made."""
    if call is None or call.output is None or out_proj is None:
        return False
    return not any(_same(s.entered, call.output) for s in trace.once if s.path == out_proj)


def _is_normed_sum(trace: BlockTrace) -> bool:
    """Whether the block returns what a norm makes of a sum (Vaswani et al. 2017)."""
    return any(
        _same(s.left, trace.post) and "norm" in type(s.module).__name__.lower() for s in trace.once
    )


def _rounding(dtype: torch.dtype) -> float:
    """Relative rounding of a model's own sums.

    Many models compute some parts in float32 whatever their dtype.
    """
    return max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)


def _find_writers(
    trace: BlockTrace, scales: Sequence[float]
) -> tuple[SeenModule | None, SeenModule | None, float]:
    """The two modules (or the one) whose outputs are what the block adds to its input."""
    shape = trace.post.shape
    added = (exact(trace.post) - exact(trace.pre)).flatten()
    seen = [
        s
        for s in trace.once
        if s.left is not None and s.left.numel() == added.numel() and s.left.shape[-1] == shape[-1]
    ]
    outputs = [exact(s.left).flatten() for s in seen if s.left is not None]
    rounding = _rounding(trace.post.dtype)
    ends = exact(trace.pre).abs().flatten() + exact(trace.post).abs().flatten()
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


def _has_mid(trace: BlockTrace, attn_writer: SeenModule, scale: float) -> bool:
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
    """Whether a module is one matrix, or an adapter around one (LoRA), which has a weight too."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 2


def _outermost(path: str, matrices: Sequence[SeenModule]) -> str:
    """The adapter around a matrix, if there is one."""
    around = [s.path for s in matrices if f"{path}.".startswith(f"{s.path}.")]
    return min(around, key=len)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return (
        a is not None
        and b is not None
        and a.numel() == b.numel()
        and bool((a.flatten() == b.flatten()).all())
    )


def _find_out_proj(
    trace: BlockTrace, attention: str | None, call: AttentionCall | None
) -> str | None:
    """The matrix that takes what attention made; where a gate or norm is between, the last one.

    Its input must split evenly into the heads.
    """
    if attention is None or call is None:
        return None
    matrices = [s for s in trace.once if s.order > call.order and _is_matrix(s.module)]
    for seen in matrices:
        if _same(seen.entered, call.output):
            return _outermost(seen.path, matrices)
    inside = [s for s in matrices if s.path.startswith(f"{attention}.")]
    if not inside or inside[-1].entered is None or inside[-1].entered.shape[-1] % call.query_heads:
        return None
    return _outermost(inside[-1].path, matrices)


def _find_down_proj(
    trace: BlockTrace, attention: str | None, mlp_writer: SeenModule | None
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
