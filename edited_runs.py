"""Many edited runs of one prompt in few passes: the engine behind patching, ablation and tracing.

A *run* is the unmodified forward pass of a prompt with a few activations exchanged. Run one at a
time, each costs a forward pass. `run_edited` gives the same logits for a fraction of that:

1. *Resume.* A run joins before its first edited block, from the recorded residual stream.
2. *One growing batch.* Block after block, the runs that begin there join the batch, so that all
   runs together take one pass, whichever layers they edit.
3. *Suffix.* Positions before a run's first edited one are as in the unmodified run: their keys and
   values come from its cache. Runs are grouped by that position where this pays.
4. *Head.* Only the positions that are read go through the head.

What of this a model allows is found by trying it on six tokens (`abilities`), once per model, and
comparing with plain hooked forwards; what does not give the same numbers is left out.

The work that cannot be avoided is ``Σ (blocks left) × (positions left)`` over all runs; `Work`
counts it, and what was done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from base_run import BaseRun, run_base
from forward_pass import ArchitectureError, InputError, Site, evaluate
from growing_pass import Edit, edit_rows, put_edit, resume_growing
from interrupts import UndoStack, no_grad
from memory_limits import free_bytes, in_batches, in_words, is_out_of_memory
from model_architecture import Architecture
from model_shards import smallest
from module_devices import modules_of

PROBE_TOKENS = 6
"""Tokens on which `abilities` are tried."""


# --- Runs -----------------------------------------------------------------------------------------


class Run(NamedTuple):
    """A prompt of the base, and what is exchanged in it."""

    edits: tuple[Edit, ...]
    base: int = 0
    """Which prompt of the base."""


@dataclass
class Work:
    """What was computed, in blocks × positions, and the least that would do."""

    passes: int = 0
    done: int = 0
    needed: int = 0


class _Planned(NamedTuple):
    """A run, where it begins, and the edits that are left once it has joined."""

    number: int
    run: Run
    layer: int
    """It joins before this block; n is behind the last."""
    start: int
    """First position that differs from the base."""


def _plan(number: int, run: Run, architecture: Architecture) -> _Planned:
    n_layers = architecture.n_layers
    layers = [
        edit.site.layer + (edit.site.name == "resid_post" and _is_handed_on(edit, architecture))
        for edit in run.edits
    ]
    starts = [
        0
        if edit.position is None
        else int(edit.position if isinstance(edit.position, int) else edit.position.min())
        for edit in run.edits
    ]
    return _Planned(number, run, min(layers, default=n_layers), min(starts, default=0))


def _is_handed_on(edit: Edit, architecture: Architecture) -> bool:
    """Whether the next block receives what this one returns: no hook of others is in between."""
    after = edit.site.layer + 1
    if not architecture.structure[edit.site.layer].hands_on:
        return False
    return after == architecture.n_layers or not architecture.blocks[after]._forward_pre_hooks


Reduce = Callable[[Tensor, Tensor], Tensor]
"""Numbers of the runs ``[row]``, and logits ``[row, read, vocab]`` → a value each, ``[row, …]``."""


@no_grad()
def run_edited(
    architecture: Architecture,
    base: BaseRun,
    runs: Sequence[Run],
    reduce: Reduce,
    *,
    max_tokens: int | None = None,
    progress: Callable[[int], Any] | None = None,
    work: Work | None = None,
) -> Tensor:
    """Run every edited version of the base prompts and reduce its logits to a value.

    Args:
        architecture: The model.
        base: What the runs differ from.
        runs: The exchanges of each.
        reduce: Makes a value of each run's logits at ``base.read``.
        max_tokens: Tokens (runs × positions) per pass; None is what memory and processor like.
        progress: Called with the number of runs done since the last call.
        work: Filled in with what was computed.

    Returns:
        The values, ``[run, …]``, in the order given, on the CPU.

    Raises:
        InputError: there is no run.
        NotEnoughMemoryError: a single run does not fit into memory (more are halved until they
            do, with a `memory_limits.SmallerBatchWarning`).
    """
    if not runs:
        raise InputError("there is nothing to run: no cell is left")
    work = Work() if work is None else work
    values: list[Tensor | None] = [None] * len(runs)

    def run(group: Sequence[_Planned]) -> Tensor:
        logits = _run_batch(architecture, base, group, able, work)
        numbers = torch.tensor([each.number for each in group], device="cpu")
        return reduce(numbers, logits).cpu()

    with UndoStack() as stack:
        evaluate(stack, architecture.model)
        able = abilities(architecture)
        planned = [_plan(i, run, architecture) for i, run in enumerate(runs)]
        if not able.suffix or not base.cache:
            planned = [each._replace(start=0) for each in planned]
        limit = max_tokens or default_tokens(architecture, base)
        batches = in_batches(
            _batches(planned, base.length, architecture, able, limit),
            run,
            unit="edited runs",
            cost=lambda group: len(group) * (base.length - group[0].start),
            needs=lambda group: memory_needed(architecture, base, base.length - group[0].start),
        )
        for group, reduced in batches:
            for each, value in zip(group, reduced, strict=True):
                values[each.number] = value
            if progress is not None:
                progress(len(group))
    return torch.stack([value for value in values if value is not None])


# --- Batches --------------------------------------------------------------------------------------


def default_tokens(architecture: Architecture, base: BaseRun) -> int:
    """Tokens per pass that fit into half of the free memory, and that a processor likes.

    A token's activations inside a block, its logits where they are read, and a pattern's row are
    counted in the model's dtype.
    """
    device = architecture.input_device
    liked = 2**13 if device.type == "cpu" else 2**17
    fitting = int(free_bytes(device) / 2 / _bytes_per_token(architecture, base))
    return max(smallest(architecture.model, min(fitting, liked)), base.length)


def _bytes_per_token(architecture: Architecture, base: BaseRun) -> float:
    config, weight = architecture.config, next(architecture.model.parameters())
    inner = getattr(config, "intermediate_size", None) or 4 * architecture.d_model
    inner = max(inner) if isinstance(inner, list | tuple) else inner  # one for each layer
    heads = getattr(config, "num_attention_heads", None) or 1
    per_token = 16 * architecture.d_model + 4 * int(inner) + 2 * heads * base.length
    per_token += 4 * config.vocab_size * len(base.read) / base.length
    return per_token * max(weight.element_size(), 4)


def memory_needed(architecture: Architecture, base: BaseRun, tokens: int) -> str:
    """What a pass over some tokens of a base needs beside the weights, and what is free."""
    needed = in_words(tokens * _bytes_per_token(architecture, base))
    free = in_words(free_bytes(architecture.input_device))
    return f"{tokens} tokens in one pass need about {needed}, and {free} are free"


def _batches(
    planned: list[_Planned],
    length: int,
    architecture: Architecture,
    able: Abilities,
    max_tokens: int,
) -> Iterator[list[_Planned]]:
    """Runs that go through the model together: of like start, then of like layer."""
    n_layers = architecture.n_layers
    starts = _starts(planned, length, n_layers, _overhead(architecture))
    for start in starts:
        until = min((other for other in starts if other > start), default=length + 1)
        inside = [each._replace(start=start) for each in planned if start <= each.start < until]
        inside.sort(key=lambda each: each.layer)
        size = max(1, max_tokens // (length - start))
        batch: list[_Planned] = []
        for each in inside:
            apart = batch and not able.grows and batch[0].layer != each.layer
            if len(batch) == size or apart:
                yield batch
                batch = []
            batch.append(each)
        if batch:
            yield batch


def _overhead(architecture: Architecture) -> float:
    """Tokens whose computation in one block takes as long as calling the block does."""
    block = architecture.blocks[0]
    weights = sum(parameter.numel() for parameter in block.parameters())
    on_cpu = architecture.input_device.type == "cpu"
    return 32 + (1e7 if on_cpu else 4e9) / max(weights, 1)


def _starts(planned: list[_Planned], length: int, n_layers: int, overhead: float) -> list[int]:
    """At which positions the groups of runs shall start, so that the work is least."""
    weights: dict[int, int] = {}
    for each in planned:
        weights[each.start] = weights.get(each.start, 0) + n_layers - each.layer
    edges = sorted(weights)
    if len(edges) > 64:  # as good as all of them, and quick to choose from
        edges = edges[:: -(-len(edges) // 64)]
    cost, came = [0.0] * (len(edges) + 1), [0] * (len(edges) + 1)
    keys = sorted(weights)
    for end in range(1, len(edges) + 1):
        options = []
        for begin in range(end):
            until = edges[end] if end < len(edges) else length + 1
            blocks = sum(weights[key] for key in keys if edges[begin] <= key < until)
            work = blocks * (length - edges[begin]) + n_layers * overhead
            options.append((cost[begin] + work, begin))
        cost[end], came[end] = min(options)
    chosen, at = [], len(edges)
    while at:
        at = came[at]
        chosen.append(edges[at])
    return sorted(chosen)


# --- One pass -------------------------------------------------------------------------------------


def _run_batch(
    architecture: Architecture,
    base: BaseRun,
    group: Sequence[_Planned],
    able: Abilities,
    work: Work,
) -> Tensor:
    """Run a batch of runs that start at one position; logits ``[run, read, vocab]``."""
    start, n_layers = group[0].start, architecture.n_layers
    read = [position for position in base.read if position >= start]
    prompts = torch.tensor([each.run.base for each in group], device="cpu")
    before = base.logits[prompts.to(base.logits.device), : len(base.read) - len(read)]
    if not read:  # nothing is read behind the edits
        return before
    work.passes += 1
    for each in group:
        blocks = n_layers - each.layer
        work.done += blocks * (base.length - start)
        work.needed += blocks * (base.length - _plan(0, each.run, architecture).start)
    edits = _edits_by_site(group)
    hooks = [(site, edit_rows(found, start)) for site, found in edits.items()]

    def joining(layer: int) -> Tensor | None:
        rows = [row for row, each in enumerate(group) if each.layer == layer]
        if not rows:
            return None
        stream = base.streams[layer]
        new = stream[prompts[rows].to(stream.device), start:]
        for row, each in enumerate(group[i] for i in rows):
            for edit in each.run.edits:
                if _joins_with(edit, layer):
                    put_edit(new, row, edit, start)
        return new

    logits = resume_growing(architecture, base, joining, hooks, prompts, start, read, able.grows)
    return torch.cat([before, logits], 1)


def _edits_by_site(group: Sequence[_Planned]) -> dict[Site, list[tuple[int, Edit]]]:
    """Row and edit of every exchange that needs a hook."""
    edits: dict[Site, list[tuple[int, Edit]]] = {}
    for row, each in enumerate(group):
        for edit in each.run.edits:
            if not _joins_with(edit, each.layer):
                edits.setdefault(edit.site, []).append((row, edit))
    return edits


def _joins_with(edit: Edit, layer: int) -> bool:
    """Whether an edit is one of the stream in which the run joins, so that it needs no hook."""
    site = edit.site
    return (site.name == "resid_pre" and site.layer == layer) or (
        site.name == "resid_post" and site.layer + 1 == layer
    )


# --- What a model allows --------------------------------------------------------------------------


BEHIND_MIXING = frozenset(
    {"resid_mid", "resid_post", "attn_out", "mlp_out", "head_out", "mlp_neurons", "query",
     "attn_pattern"}
)  # fmt: skip
"""Sites of a block that lie behind its attention's mixing of tokens.

Some blocks mix them again: a convolution after attention (Inkling), a state space (Zamba 2).
"""


class Abilities(NamedTuple):
    """Which shortcuts give the same numbers on a model."""

    grows: bool
    """One row of masks and positions serves a batch of any size."""
    suffix: bool
    """Attention is causal, and positions before an edit can come from a cache."""
    causal: bool
    """A later token changes nothing at an earlier position."""
    local_end: bool = False
    """In the last block a token reaches no other one's logits through sites of `BEHIND_MIXING`."""


_ABILITIES: WeakKeyDictionary[nn.Module, tuple[int, Abilities]] = WeakKeyDictionary()


def abilities(architecture: Architecture) -> Abilities:
    """Which shortcuts a model allows, found by trying them on `PROBE_TOKENS` tokens, once.

    Raises:
        ArchitectureError: the model has no head.
    """
    architecture.require_head("running edited prompts")
    model = architecture.model
    kind = getattr(architecture.config, "_attn_implementation", None), model.dtype
    fingerprint = hash((kind, *(id(module) for module in modules_of(model))))
    known = _ABILITIES.get(model)
    if known is None or known[0] != fingerprint:
        known = (fingerprint, _try_abilities(architecture))
        _ABILITIES[model] = known
    return known[1]


def _try_abilities(architecture: Architecture) -> Abilities:
    vocabulary = architecture.config.vocab_size
    ids = torch.arange(3, 3 + 2 * PROBE_TOKENS, device="cpu").remainder(vocabulary).view(2, -1)
    base = run_base(architecture, ids, cached=False)
    n_layers = architecture.n_layers
    runs = [
        Run((Edit(Site("resid_pre", layer), base.streams[layer][1 - prompt, position], position),),
            prompt)
        for prompt in (0, 1)
        for layer in sorted({0, n_layers // 2, n_layers - 1})
        for position in (2, PROBE_TOKENS - 1)
    ]  # fmt: skip
    causal = _is_causal(architecture, ids, base)
    truth = _probe(architecture, base, runs, Abilities(False, False, causal))
    if truth is None:
        raise ArchitectureError(
            f"{type(architecture.model).__name__} cannot be resumed from a residual stream"
        )
    grows = _agree(truth, _probe(architecture, base, runs, Abilities(True, False, causal)))
    local_end = _ends_alone(architecture, ids, causal)
    suffix = False
    if causal:
        try:
            base = run_base(architecture, ids, cached=True)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            return Abilities(grows, False, causal, local_end)
        tried = Abilities(grows, True, causal)
        suffix = bool(base.cache) and _agree(truth, _probe(architecture, base, runs, tried))
    return Abilities(grows, suffix, causal, local_end)


def _ends_alone(architecture: Architecture, ids: Tensor, causal: bool) -> bool:
    """Whether edits of one token in the last block leave the last token's logits as they are."""
    last = architecture.n_layers - 1
    names = BEHIND_MIXING & {*architecture.available_sites(last)} - {"attn_pattern"}
    sites = [Site(name, last) for name in sorted(names)]
    base = run_base(architecture, ids, sites, cached=False)
    edits = tuple(Edit(site, base.sites[site][1, 2], 2) for site in sites)
    edited = _probe(architecture, base, [Run(edits)], Abilities(False, False, causal))
    return _agree(base.logits[:1], edited)


def _is_causal(architecture: Architecture, ids: Tensor, base: BaseRun) -> bool:
    changed = ids.clone()
    changed[:, -1] = ids[:, 0]
    other = run_base(architecture, changed, cached=False)
    return _agree(base.streams[-1][:, :-1], other.streams[-1][:, :-1])


def _agree(truth: Tensor, other: Tensor | None) -> bool:
    """Whether two computations differ by no more than rounding."""
    if other is None or truth.shape != other.shape:
        return False
    allowed = torch.finfo(truth.dtype).eps ** 0.5 * float(truth.abs().max())
    return float((truth - other).abs().max()) <= allowed


def _probe(
    architecture: Architecture, base: BaseRun, runs: list[Run], tried: Abilities
) -> Tensor | None:
    """Logits of the probe's runs by some shortcuts; None where the model refuses."""
    planned = [_plan(i, run, architecture) for i, run in enumerate(runs)]
    groups: dict[Any, list[_Planned]] = {}
    for each in sorted(planned, key=lambda each: each.layer):
        start = each.start if tried.suffix else 0
        key = (start, 0 if tried.grows else each.layer)
        groups.setdefault(key, []).append(each._replace(start=start))
    values: dict[int, Tensor] = {}
    try:
        with UndoStack() as stack:
            stack.enter_context(torch.no_grad())
            evaluate(stack, architecture.model)
            for group in groups.values():
                logits = _run_batch(architecture, base, group, tried, Work())
                values |= {each.number: row for each, row in zip(group, logits, strict=True)}
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return None
    return torch.stack([values[i] for i in range(len(runs))])
