"""One forward pass of a Hugging Face causal language model, and three verbs: record, edit, resume.

Everything in the toolkit is one of these, or a loop over them. No other module attaches a hook.

- ``record(wiring, inputs, sites)`` runs the model and keeps what the sites produced.
- ``edit(wiring, edits)`` is a context manager: while it is open, functions change what sites
  produce, also inside ``model.generate``.
- ``resume(wiring, inputs, layer, residual)`` runs the model from block ``layer`` on, from a
  residual stream that you hand it. The blocks before it are skipped; masks, rotary embeddings,
  final norm, head, soft-cap and logit scale are made by the model's own ``forward``. ``resume`` at
  ``n_layers`` is therefore the logit lens, exactly, on every architecture.

A *site* is a place in the network, named in the vocabulary of TransformerLens (`SITES` lists them
with their axes). A *wiring* says which module of a given model carries which site;
`model_architecture` finds it from the model's structure, so that this file knows no model family.

What this file promises, whatever happens inside a context (an exception, Ctrl-C, a second site that
does not exist): the hooks attached here are removed on leaving, no other hook is touched, nothing
is written onto the model, no tensor of the model is edited in place.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from interrupts import UndoStack, interrupts_held, until_closed
from memory_limits import explain
from model_lock import ModelLock, hold, lock_of
from module_devices import modules_of
from module_taps import (
    PLAIN,
    ModuleTap,
    StreamShape,
    Tap,
    WithinBlock,
    read_hidden,
    read_input,
    replaced,
    write_hidden,
    write_input,
)
from sites import (
    READ_ONLY,
    SITES,
    ArchitectureError,
    Hook,
    InputError,
    LayerError,
    RecordFileError,
    Site,
    SiteError,
    read_only_message,
)

__all__ = [
    "PLAIN",
    "READ_ONLY",
    "SITES",
    "ArchitectureError",
    "Clock",
    "Hook",
    "InputError",
    "LayerError",
    "ModuleTap",
    "PositionIndex",
    "RecordFileError",
    "Recording",
    "Site",
    "SiteError",
    "StreamShape",
    "Tap",
    "Wiring",
    "WithinBlock",
    "attached",
    "edit",
    "evaluate",
    "read_hidden",
    "read_input",
    "read_only_message",
    "record",
    "recording",
    "replaced",
    "resume",
    "run_every_position",
    "skip_blocks",
    "take_positions",
    "write_hidden",
    "write_input",
]


class Wiring(Protocol):
    """What the engine needs to know of a model (see `model_architecture.Architecture`)."""

    @property
    def model(self) -> nn.Module:
        """The model that is called for logits."""

    @property
    def body(self) -> nn.Module:
        """The module that owns the blocks; calling it runs everything but the head."""

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The blocks, in order."""

    @property
    def block_outputs(self) -> Sequence[int]:
        """Entries of the tuple that a block returns, the first its hidden state; 0 for a tensor."""

    @property
    def stream(self) -> StreamShape:
        """How blocks hand the residual stream on."""

    @property
    def needs_every_block(self) -> bool:
        """Whether blocks hand each other more than the residual stream, so none can be skipped."""

    def tap(self, site: Site) -> Tap:
        """How to reach a site; raises SiteError where this model has none."""


# --- The clock: absolute positions through the KV cache -------------------------------------------


@dataclass(eq=False)
class Clock:
    """Where in the sequence the forward pass under way is.

    In a cached decode step the offset is not 0.
    """

    offset: int = 0
    """Absolute position of the first token of this pass."""
    length: int = 0
    """Number of tokens in this pass."""
    _lock: ModelLock | None = None

    def attach(self, stack: ExitStack, body: nn.Module) -> None:
        """Keep the clock right for every call of ``body`` until ``stack`` closes.

        Raises:
            InputError: an edit function of this model is under way.
        """
        self._lock = hold(stack, body)
        until_closed(stack, body.register_forward_pre_hook, self._tick, with_kwargs=True)

    def _tick(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._lock is not None:
            self._lock.refuse_reentry()
        tokens = next(
            (
                t
                for t in (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
                if isinstance(t, Tensor)
            ),
            None,
        )
        if tokens is None:
            raise ArchitectureError(
                "the model was called without input_ids and without inputs_embeds"
            )
        cache = next(
            (kwargs[k] for k in ("past_key_values", "cache_params") if kwargs.get(k) is not None),
            None,
        )
        held = 0 if cache is None else _cached_length(cache)
        self.offset = self.offset + self.length if held is None else held
        self.length = tokens.shape[1]


def _cached_length(cache: Any) -> int | None:
    """Tokens that a cache holds; None for one with a state that does not count (state spaces)."""
    try:
        length = int(cache.get_seq_length())
    except (AttributeError, ValueError, IndexError, TypeError):
        length = 0
    return None if length == 0 and _has_state(cache) else length


def _has_state(cache: Any) -> bool:
    flags = (getattr(layer, "has_previous_state", False) for layer in getattr(cache, "layers", ()))
    return any(any(flag.values()) if isinstance(flag, dict) else bool(flag) for flag in flags)


# --- The verbs ------------------------------------------------------------------------------------


@contextmanager
def attached(pairs: Iterable[tuple[Tap, Hook]], *, last: bool = False) -> Iterator[None]:
    """Hold hooks on taps while the context is open; they are removed however it ends.

    Args:
        pairs: What to attach, in order.
        last: These hooks only look, and shall see what all edits have made of a value.
    """
    chosen = [(tap, hook, lock_of(tap.module)) for tap, hook in pairs]
    with UndoStack() as stack:
        for tap in {id(lock): tap for tap, _, lock in chosen}.values():
            hold(stack, tap.module)
        with interrupts_held():
            for tap, hook, lock in chosen:
                tap.attach(stack, hook if last else lock.edits(hook), last)
        yield


@contextmanager
def edit(
    wiring: Wiring, edits: Mapping[Site, Hook] | Sequence[tuple[Site, Hook]]
) -> Iterator[Clock]:
    """While open, every forward pass of the model has its sites changed by the given functions.

    Args:
        wiring: The model's architecture.
        edits: What to change. Each function gets the site's value (axes as in `SITES`) and returns
            a tensor of the same shape, or None to leave it. Several edits of one site run in order.

    Yields:
        The clock: ``clock.offset`` is the absolute position of the first token of the pass under
        way.

    Raises:
        SiteError: the model has no such site, it can only be recorded, or an edit returned another
            shape.
    """
    pairs = list(edits.items() if isinstance(edits, Mapping) else edits)
    lock_of(wiring.model)
    _probe_first(wiring)
    taps = [(wiring.tap(site), hook) for site, hook in pairs]
    clock = Clock()
    with UndoStack() as stack:
        clock.attach(stack, wiring.body)
        run_every_position(stack, wiring)
        stack.enter_context(attached(taps))
        yield clock


def run_every_position(stack: ExitStack, wiring: Wiring) -> None:
    """Let every block see all tokens until ``stack`` closes, also where only some logits are kept.

    Blocks that use the keys and values of earlier ones may otherwise run the last token alone.
    """

    def keep_all(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return (args, {**kwargs, "logits_to_keep": 0}) if kwargs.get("logits_to_keep") else None

    if wiring.needs_every_block:
        until_closed(stack, wiring.body.register_forward_pre_hook, keep_all, with_kwargs=True)


def _probe_first(wiring: Wiring) -> None:
    """Let the model be understood before hooks that change it are attached."""
    len(wiring.block_outputs)


class Recording(dict[Site, Tensor]):
    """What a pass produced at each site asked for, and the logits where they were asked for."""

    logits: Tensor | None = None


PositionIndex = slice | Tensor | None
"""All positions (None), a slice, or indices: ``[k]`` for every row, ``[batch, k]`` for each."""


def take_positions(value: Tensor, index: PositionIndex, axis: int) -> Tensor:
    """A copy of ``value`` at some positions of one axis, in storage of its own.

    Args:
        value: Any tensor with a batch axis first.
        index: None, a slice, ``[k]`` or ``[batch, k]``.
        axis: The axis to index (1 or 2).
    """
    if index is None:
        return value.clone(memory_format=torch.contiguous_format)
    if isinstance(index, slice):
        return value[(slice(None),) * axis + (index,)].clone(memory_format=torch.contiguous_format)
    index = index.to(value.device)
    if index.dim() == 1:
        return value.index_select(axis, index)
    shape = [1] * value.dim()
    shape[0], shape[axis] = index.shape
    target = list(value.shape)
    target[axis] = index.shape[1]
    return value.gather(axis, index.view(shape).expand(target))


@contextmanager
def recording(
    wiring: Wiring, sites: Sequence[Site], positions: PositionIndex = None, *, detach: bool = True
) -> Iterator[Recording]:
    """While open, keep what each site produced in the latest forward pass.

    Args:
        wiring: The model's architecture.
        sites: What to keep.
        positions: Which tokens to keep; their bytes alone are held.
        detach: Keep copies outside the autograd graph. With False the tensors are kept through
            which the pass went on (at all ``positions``, or a selection from them).

    Raises:
        SiteError: the model has no such site.
    """
    kept = Recording()

    def keep(site: Site) -> Hook:
        def copy_out(value: Tensor) -> None:
            kept[site] = take_positions(value.detach(), positions, site.position_axis)

        def keep_graph(value: Tensor) -> Tensor:
            whole = positions is None
            kept[site] = value if whole else take_positions(value, positions, site.position_axis)
            return value.clone()  # the pass goes on with a copy: some models add to it in place

        return copy_out if detach else keep_graph

    with UndoStack() as stack:
        hold(stack, wiring.model)
        _probe_first(wiring)
        taps = [(wiring.tap(site), keep(site)) for site in sites]
        stack.enter_context(attached(taps, last=True))
        yield kept


def record(
    wiring: Wiring,
    inputs: Mapping[str, Tensor],
    sites: Sequence[Site],
    *,
    positions: PositionIndex = None,
    logits: bool = False,
) -> Recording:
    """Run the model once and keep what the sites produced.

    Blocks after the last one asked for are not run, and neither is the head, unless logits are
    wanted.

    Args:
        wiring: The model's architecture.
        inputs: What the model's ``forward`` takes (``input_ids [batch, position]``, …).
        sites: What to keep; axes as in `SITES`.
        positions: Which tokens to keep; their bytes alone are held.
        logits: Also keep the logits ``[batch, position, vocab]``, of the same positions.

    Returns:
        A dict from site to tensor, detached, each in storage of its own; ``.logits`` beside it.

    Raises:
        SiteError: the model has no such site. Nothing has been run then.
    """
    with UndoStack() as stack:
        stack.enter_context(torch.no_grad())
        kept = stack.enter_context(recording(wiring, sites, positions))
        evaluate(stack, wiring.model)
        if logits:
            kept.logits = _logits_at(wiring, inputs, positions)
        else:
            last = max((site.layer for site in sites), default=-1)
            skip_blocks(stack, wiring, range(last + 1, len(wiring.blocks)))
            wiring.body(**inputs, use_cache=False)
    missing = [site for site in sites if site not in kept]
    if missing:
        raise SiteError(
            f"the forward pass never reached {missing[0].name} of layer {missing[0].layer}"
        )
    return kept


def _logits_at(wiring: Wiring, inputs: Mapping[str, Tensor], positions: PositionIndex) -> Tensor:
    """The logits of some positions; where the model can, only those go through the head."""
    model = wiring.model
    # where blocks share keys and values, the last ones may run only the positions that are kept
    one_for_all = isinstance(positions, Tensor) and positions.dim() == 1
    one_for_all = one_for_all and not wiring.needs_every_block
    if one_for_all and "logits_to_keep" in inspect.signature(model.forward).parameters:
        return model(**inputs, use_cache=False, logits_to_keep=positions).logits.clone()
    return take_positions(model(**inputs, use_cache=False).logits, positions, 1)


def resume(
    wiring: Wiring,
    inputs: Mapping[str, Tensor],
    layer: int,
    residual: Tensor,
    **forward_kwargs: Any,
) -> Tensor:
    """Run the model from block ``layer`` on, from a residual stream handed to it.

    Args:
        wiring: The model's architecture.
        inputs: What the model's ``forward`` takes, for one row or for as many as ``residual`` has.
        layer: The first block to run, 0 to n; n runs none, only the final norm and the head.
        residual: ``[batch, position, d_model]``, what that block shall receive (``resid_pre``,
            before any edit of that site).
        **forward_kwargs: Passed on to the model's ``forward`` (``logits_to_keep`` where it has it).

    Returns:
        The logits ``[batch, position, vocab]``. Differentiable with respect to ``residual``.

    Raises:
        LayerError: ``layer`` is not in 0..n.
    """
    n_layers = len(wiring.blocks)
    if not 0 <= layer <= n_layers:
        raise LayerError(
            f"cannot resume at layer {layer}: valid are 0..{n_layers} "
            f"({n_layers} is final norm and head)"
        )
    rows = residual.shape[0]
    inputs = {name: _as_rows(value, rows) for name, value in inputs.items()}
    with UndoStack() as stack:
        evaluate(stack, wiring.model)
        if layer == n_layers:
            skip_blocks(stack, wiring, [layer - 1], result=residual)
        else:
            stored = wiring.stream.store(residual)

            def hand_over(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                return write_input(args, kwargs, stored)

            register = wiring.blocks[layer].register_forward_pre_hook
            until_closed(stack, register, hand_over, with_kwargs=True, prepend=True)
        skip_blocks(stack, wiring, range(min(layer, n_layers - 1)))
        return wiring.model(**inputs, use_cache=False, **forward_kwargs).logits


def _as_rows(value: Any, rows: int) -> Any:
    if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == 1 and rows > 1:
        return value.expand(rows, *value.shape[1:])
    return value


def evaluate(stack: ExitStack, model: nn.Module) -> None:
    """Have the model to oneself, dropout off, until ``stack`` closes.

    Each module's own mode is put back. An allocator's error becomes a NotEnoughMemoryError, which
    says what can be done.

    Raises:
        InputError: an edit function of this model is under way.
    """
    hold(stack, model)
    stack.push(explain)
    for module in modules_of(model):
        if module.training:
            stack.callback(setattr, module, "training", True)
            module.training = False


_HOOK_TABLES = ("_forward_hooks", "_forward_pre_hooks")


def skip_blocks(
    stack: ExitStack, wiring: Wiring, layers: Iterable[int], result: Tensor | None = None
) -> None:
    """Until ``stack`` closes, let blocks hand on what they get, or ``result``, without computing.

    A skipped block runs no hook, its own ``forward`` attribute (accelerate sets one when it
    offloads) is put back. Where `Wiring.needs_every_block`, blocks compute, except the last ones,
    which nothing follows; what they give is replaced by ``result`` all the same.

    Args:
        stack: Closes it.
        wiring: The model's architecture.
        layers: Which blocks.
        result: ``[batch, position, d_model]`` that they give; None hands on what they get.
    """
    chosen, n_layers = list(layers), len(wiring.blocks)
    if wiring.needs_every_block:
        chosen = [layer for layer in chosen if set(range(layer, n_layers)) <= set(chosen)]
    stored = None if result is None else wiring.stream.store(result)
    for layer in chosen:
        block = wiring.blocks[layer]
        entries = wiring.block_outputs[layer]

        def stand_in(*args: Any, _entries: int = entries, **kwargs: Any) -> Any:
            hidden = read_input(args, kwargs) if stored is None else stored
            return (hidden, *[None] * (_entries - 1)) if _entries else hidden

        before = {name: block.__dict__[name] for name in ("forward",) if name in block.__dict__}
        before |= {name: block.__dict__[name] for name in _HOOK_TABLES}
        stack.callback(_put_back, block, before)
        block.__dict__["forward"] = stand_in
        for name in _HOOK_TABLES:
            block.__dict__[name] = OrderedDict()


def _put_back(block: nn.Module, before: dict[str, Any]) -> None:
    block.__dict__.pop("forward", None)
    block.__dict__.update(before)
