"""One forward pass in which single edges of the network carry another run's activation.

Every path is two rows of a batch, one behind the other: the *real* row is the run that is measured,
the *shadow* row only computes what receivers would read. With δ for what the senders add to the
residual stream in the other run minus what they add in the real row:

1. before a block with a receiver, shadow stream = real stream + δ of the senders so far;
2. query, key and value of receiving heads, and the MLP's output where the MLP receives, go from the
   shadow row to the real row;
3. attention's output in the shadow row becomes the real row's, with the block's own senders
   exchanged, so that the MLP of a sequential block reads the real stream + δ, these included;
4. the logits as a receiver: δ is added to the real stream behind the last block.

What lies behind a receiver is recomputed by the model in the real row. A sender's own output is
never changed there: only edges are. So with all receivers this equals exchanging the sender, and
with a receiver that the sender cannot reach nothing happens.

A row joins before the first block that it needs; δ of senders before it is made by `sender_deltas`,
from one block each. Senders that lie behind a receiver have their δ taken in the pass, as their own
output may have changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from base_run import BaseRun
from circuit_nodes import INPUTS, WRITERS, Group, Node, reads_at, writes_at
from forward_pass import (
    Hook,
    Site,
    attached,
    evaluate,
    recording,
    skip_blocks,
)
from growing_pass import WHOLE_CACHE, resume_growing
from interrupts import UndoStack, no_grad
from model_architecture import Architecture

SIDES = tuple(INPUTS.values())


class PathPlan(NamedTuple):
    """What one path needs, once what cannot matter has been left out."""

    number: int
    before: frozenset[Node]
    """Senders from which some receiver is reached, and whose δ is known when the rows join.

    They are of the kinds ``head``, ``attn``, ``mlp`` and ``embed``.
    """
    inside: frozenset[Node]
    """Those whose δ is taken in the pass."""
    receivers: frozenset[Node]
    """Those that some sender reaches."""
    join: int
    """The first block that must be run; n is behind the last."""
    through: range
    """Blocks whose MLPs pass a change on to the receivers."""


def plan_path(
    architecture: Architecture,
    number: int,
    senders: Group,
    receivers: Mapping[Node, int],
    through_mlps: bool,
) -> PathPlan | None:
    """What a path needs; None where no sender reaches a receiver.

    Args:
        architecture: The model.
        number: Its place among the paths.
        senders: Nodes as `circuit_nodes.parts_of` returns them.
        receivers: Nodes as `circuit_nodes.receiver_nodes` returns them, and when each reads
            (`circuit_nodes.reads_at`).
        through_mlps: Whether MLPs between pass a change on.
    """
    first = min(writes_at(node) for node in senders)
    reached = [node for node, time in receivers.items() if time > first]
    if not reached:
        return None
    last = max(receivers[node] for node in reached)
    sending = [node for node in senders if writes_at(node) < last]
    n_layers = architecture.n_layers
    join = min(n_layers if node.kind == "logits" else node.layer for node in reached)
    through = range(0)
    if through_mlps:
        carry = [
            layer
            for layer in range(n_layers)
            if architecture.missing(Site("mlp_out", layer)) is None
            and first < reads_at(architecture, Node("mlp", layer))
            and writes_at(Node("mlp", layer)) < last
        ]
        if carry:
            through = range(carry[0], carry[-1] + 1)
            join = min(join, carry[0])
    before = frozenset(node for node in sending if node.layer < join)
    inside = frozenset(sending) - before
    return PathPlan(number, before, inside, frozenset(reached), join, through)


@dataclass(frozen=True, eq=False)
class PathRuns:
    """The two runs that paths lie between, and which tokens are meant."""

    architecture: Architecture
    base: BaseRun
    """The run that is changed, with `sender_sites` recorded."""
    other: BaseRun
    """The run that activations come from, with the same."""
    start: int
    """Only positions from here on are run; before it the two runs are the same."""
    sending: Tensor
    """``[position]``, whether senders are exchanged there."""
    receiving: Tensor
    """``[position]``, whether receivers read the exchange there."""


def sender_sites(plans: Sequence[PathPlan]) -> list[Site]:
    """What has to be recorded of both runs."""
    nodes = (node for plan in plans for node in plan.before | plan.inside)
    sites = {Site(WRITERS[node.kind], node.layer) for node in nodes if node.kind != "embed"}
    return sorted(sites)


# --- What senders add that join with their rows ---------------------------------------------------


def sender_deltas(runs: PathRuns, plans: Sequence[PathPlan]) -> Tensor:
    """δ of each path's senders before the block where it joins.

    A head's is what attention adds with that head's z exchanged, minus what it adds without: so a
    norm behind attention, a multiplier and a bias are as the model has them. It takes one pass for
    all, in which a block's z is handed to it.

    Returns:
        ``[path, position - start, d_model]``, in float32 at least.
    """
    base, other, start = runs.base, runs.other, runs.start
    stream = base.streams[0][:, start:]
    dtype = torch.promote_types(stream.dtype, torch.float32)
    deltas = torch.zeros(len(plans), *stream.shape[1:], dtype=dtype, device=stream.device)
    chosen = runs.sending[start:, None].to(stream.device)
    heads: dict[int, dict[tuple[int, ...], list[int]]] = {}
    for row, plan in enumerate(plans):
        by_layer: dict[int, list[int]] = {}
        for node in plan.before:
            if node.kind == "head":
                by_layer.setdefault(node.layer, []).append(node.head)
                continue
            mine, theirs = (_written(run, node)[0, start:].to(deltas) for run in (base, other))
            deltas[row] += torch.where(chosen, theirs - mine, 0)
        for layer, numbers in by_layer.items():
            heads.setdefault(layer, {}).setdefault(tuple(sorted(numbers)), []).append(row)
    if heads:
        for layer, found in _head_deltas(runs, heads).items():
            for delta, rows in zip(found, heads[layer].values(), strict=True):
                deltas[rows] += delta.to(deltas)
    return deltas


def _written(run: BaseRun, node: Node) -> Tensor:
    """What a node adds to the stream in a recorded run, ``[1, position, d_model]``."""
    if node.kind == "embed":
        return run.streams[0]
    return run.sites[Site(WRITERS[node.kind], node.layer)]


def _head_deltas(
    runs: PathRuns, heads: Mapping[int, Mapping[tuple[int, ...], Sequence[int]]]
) -> dict[int, Tensor]:
    """For each block, what attention adds more with some heads exchanged, ``[set, pos, d]``."""
    arch, start = runs.architecture, runs.start
    count = 1 + max(len(sets) for sets in heads.values())
    sending = runs.sending[start:]

    def hand_over(layer: int) -> Hook:
        mine, theirs = (
            run.sites[Site("head_out", layer)][:, start:] for run in (runs.base, runs.other)
        )

        def exchange(value: Tensor) -> Tensor:
            new = mine.to(value).repeat(count, 1, 1, 1)
            where = sending.to(value.device)
            for row, numbers in enumerate(heads[layer], start=1):
                for head in numbers:
                    z = torch.where(where[:, None], theirs[0, :, head].to(value), new[row, :, head])
                    new[row, :, head] = z
            return new

        return exchange

    ids = runs.base.inputs["input_ids"][:, start:].expand(count, -1)
    hooks = [(arch.tap(Site("head_out", layer)), hand_over(layer)) for layer in heads]
    sites = [Site("attn_out", layer) for layer in heads]
    with UndoStack() as stack:
        skip_blocks(stack, arch, [i for i in range(arch.n_layers) if i not in heads])
        kept = stack.enter_context(recording(arch, sites))
        stack.enter_context(attached(hooks))
        arch.body(**arch.inputs(ids), use_cache=False)
    found = {}
    for site in sites:
        rows = kept[site].to(torch.promote_types(kept[site].dtype, torch.float32))
        found[site.layer] = rows[1 : 1 + len(heads[site.layer])] - rows[:1]
    return found


# --- The pass -------------------------------------------------------------------------------------


@no_grad()
def run_paths(runs: PathRuns, plans: Sequence[PathPlan], grows: bool) -> Tensor:
    """Run paths, each before its ``join``.

    Args:
        runs: The two runs.
        plans: What to run, in order of joining; all join before the same block unless ``grows``.
        grows: See `edited_runs.Abilities`.

    Returns:
        Logits of the real rows, ``[path, read, vocab]``, at the base's ``read`` from ``start`` on.
    """
    arch, start = runs.architecture, runs.start
    read = [position for position in runs.base.read if position >= start]
    pairs = [plan for plan in plans if plan.join < arch.n_layers]

    def joining(layer: int) -> Tensor | None:
        rows = [row for row, plan in enumerate(plans) if plan.join == layer]
        if not rows:
            return None
        stream = runs.base.streams[layer][:, start:]
        if layer < arch.n_layers:
            return stream.repeat(2 * len(rows), 1, 1)
        where = runs.receiving[start:, None].to(stream.device)
        added = torch.where(where, deltas[rows].to(stream.device), 0)
        return (stream + added).to(stream.dtype)

    prompts = torch.zeros(len(pairs) + len(plans), dtype=torch.long, device="cpu")
    with UndoStack() as stack:
        evaluate(stack, arch.model)
        deltas = sender_deltas(runs, plans)
        hooks = _Passing(runs, pairs, deltas[: len(pairs)]).hooks() if pairs else []
        logits = resume_growing(arch, runs.base, joining, hooks, prompts, start, read, grows)
    return torch.cat([logits[: 2 * len(pairs) : 2], logits[2 * len(pairs) :]])


class _Passing:
    """The hooks of one pass; δ of each pair of rows grows as the pass goes on."""

    def __init__(self, runs: PathRuns, plans: Sequence[PathPlan], deltas: Tensor) -> None:
        self.runs, self.plans, self.deltas = runs, plans, deltas
        self.arch = runs.architecture
        self.sending = runs.sending[runs.start :, None]

    def hooks(self) -> list[tuple[Site, Hook]]:
        """What happens in each block, and behind the last."""
        makers: dict[str, Callable[[int], Hook | None]] = {
            "resid_pre": self._shadow_stream,
            **{side: self._side(side) for side in SIDES},
            "head_out": self._heads,
            "attn_out": self._attention,
            "mlp_out": self._mlp,
        }
        found = []
        for layer in range(self.plans[0].join, self.arch.n_layers):
            for name, make in makers.items():
                hook = make(layer)
                if hook is not None:
                    found.append((Site(name, layer), hook))
        logits = self._receive("logits", -1)
        if bool(logits.any()):
            found.append((Site("resid_post", self.arch.n_layers - 1), self._logits(logits)))
        return found

    # Which rows are concerned, each ``[path]`` or ``[path, head]`` -----------------------------

    def _receive(self, kind: str, layer: int) -> Tensor:
        return torch.tensor(
            [Node(kind, layer) in plan.receivers for plan in self.plans], device="cpu"
        )

    def _receive_heads(self, kind: str, layer: int, count: int) -> Tensor:
        wanted = [Node(kind, layer, head) for head in range(count)]
        return torch.tensor(
            [[node in plan.receivers for node in wanted] for plan in self.plans], device="cpu"
        )

    def _send(self, kind: str, layer: int) -> Tensor:
        return torch.tensor([Node(kind, layer) in plan.inside for plan in self.plans], device="cpu")

    def _send_heads(self, layer: int) -> Tensor:
        wanted = [Node("head", layer, head) for head in range(self.arch.heads(layer)[0])]
        rows = [[node in plan.inside for node in wanted] for plan in self.plans]
        return torch.tensor(rows, device="cpu").view(len(rows), len(wanted))

    def _through(self, layer: int) -> Tensor:
        here = self.arch.missing(Site("mlp_out", layer)) is None
        return torch.tensor([here and layer in plan.through for plan in self.plans], device="cpu")

    def _mlp_reads(self, layer: int) -> bool:
        return bool((self._receive("mlp", layer) | self._through(layer)).any())

    def _attention_reads(self, layer: int) -> bool:
        return any(
            node.layer == layer and node.kind in (*SIDES, "attn")
            for plan in self.plans
            for node in plan.receivers
        )

    # The hooks ---------------------------------------------------------------------------------

    def _delta(self, like: Tensor) -> Tensor:
        """δ of the pairs that have joined, on the device of ``like``."""
        return self.deltas[: len(like) // 2].to(like.device)

    def _receiving(self, columns: int) -> Tensor:
        """``[position]`` of the last so many columns, all of them where a cache is joined to."""
        return self.runs.receiving[-columns:]

    def _shadow_stream(self, layer: int) -> Hook | None:
        if not (self._mlp_reads(layer) or self._attention_reads(layer)):
            return None

        def shadow(value: Tensor) -> Tensor:
            new = value.clone()
            new[1::2] = (value[0::2] + self._delta(value)).to(value.dtype)
            return new

        return shadow

    def _side(self, kind: str) -> Callable[[int], Hook | None]:
        def make(layer: int) -> Hook | None:
            queries, stored = self.arch.heads(layer)
            heads = self._receive_heads(kind, layer, queries if kind == "query" else stored)
            if not bool(heads.any()):
                return None
            whole = kind in WHOLE_CACHE

            def receive(value: Tensor) -> Tensor:
                here = self._receiving(value.shape[1] if whole else len(self.sending))
                where = heads[: len(value) // 2, None, :] & here[None, :, None]
                new = value.clone()
                new[0::2] = torch.where(where[..., None].to(value.device), value[1::2], value[0::2])
                return new

            return receive

        return make

    def _heads(self, layer: int) -> Hook | None:
        heads = self._send_heads(layer)
        if not bool(heads.any()):
            return None
        theirs = self.runs.other.sites[Site("head_out", layer)][:, self.runs.start :]

        def exchange(value: Tensor) -> Tensor:
            where = heads[: len(value) // 2, None, :, None] & self.sending[None, :, None]
            new = value.clone()
            new[1::2] = torch.where(where.to(value.device), theirs.to(value), value[0::2])
            return new

        return exchange

    def _attention(self, layer: int) -> Hook | None:
        """The shadow row's attention becomes the real row's, with this block's senders."""
        receives, sends = self._receive("attn", layer), self._send("attn", layer)
        by_head = self._send_heads(layer).any(-1)
        if not bool((receives | sends | by_head).any()) and not self._mlp_reads(layer):
            return None
        node = Node("attn", layer)
        theirs = _written(self.runs.other, node)[:, self.runs.start :] if sends.any() else None

        def attend(value: Tensor) -> Tensor:
            count = len(value) // 2
            real, shadow = value[0::2], value[1::2]
            here = self._receiving(len(self.sending))[None, :, None]
            real = torch.where((receives[:count, None, None] & here).to(value.device), shadow, real)
            sent = torch.where(by_head[:count, None, None].to(value.device), shadow, real)
            if theirs is not None:
                where = (sends[:count, None, None] & self.sending).to(value.device)
                sent = torch.where(where, theirs.to(value), sent)
            self._add((sends | by_head)[:count], sent, real)
            return _interleaved(value, real, sent)

        return attend

    def _mlp(self, layer: int) -> Hook | None:
        receives, sends = self._receive("mlp", layer), self._send("mlp", layer)
        through = self._through(layer)
        if not bool((receives | sends | through).any()):
            return None
        node = Node("mlp", layer)
        theirs = _written(self.runs.other, node)[:, self.runs.start :] if sends.any() else None

        def transform(value: Tensor) -> Tensor:
            count = len(value) // 2
            real, shadow = value[0::2], value[1::2]
            here = self._receiving(len(self.sending))[None, :, None]
            real = torch.where((receives[:count, None, None] & here).to(value.device), shadow, real)
            sent = shadow
            if theirs is not None:
                where = (sends[:count, None, None] & self.sending).to(value.device)
                kept = torch.where(through[:count, None, None].to(value.device), shadow, real)
                sent = torch.where(where, theirs.to(value), kept)
            self._add((sends | through)[:count], sent, real)
            return _interleaved(value, real, shadow)

        return transform

    def _logits(self, receives: Tensor) -> Hook:
        def add(value: Tensor) -> Tensor:
            paired = value[: 2 * len(self.plans)]
            here = self._receiving(len(self.sending))[None, :, None]
            where = (receives[:, None, None] & here).to(value.device)
            new = value.clone()
            added = torch.where(where, self._delta(paired), 0)
            new[0 : len(paired) : 2] = (paired[0::2] + added).to(value.dtype)
            return new

        return add

    def _add(self, rows: Tensor, sent: Tensor, real: Tensor) -> None:
        """Let δ of some rows grow by what is sent instead of what is really there."""
        where = rows[:, None, None].to(self.deltas.device)
        more = (sent.to(self.deltas) - real.to(self.deltas)) * where
        self.deltas[: len(rows)] += more


def _interleaved(value: Tensor, real: Tensor, shadow: Tensor) -> Tensor:
    new = value.clone()
    new[0::2], new[1::2] = real, shadow
    return new
