"""A patch, and its place in one model: what stands where, in which tokens of a pass.

An `ActivationPatch` says where (layer, site, head or neurons, positions) and what (a tensor, a
number, a function, a record of another run) shall stand there. `bind` resolves it, or a
`SteeringVector`, against a model: a wrong layer, site, head or width fails there; `Bound` makes the
engine's hook of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from activation_record import ActivationRecord
from block_trace import PROBE_LENGTH
from forward_pass import READ_ONLY, InputError, Site, SiteError, read_only_message, record
from model_architecture import Architecture, Layer
from module_devices import as_tensor
from pass_positions import PassPositions, Selection, SequenceClock, check_spec
from steering_vector import SteeringVector
from tokenization import resolve_positions

if TYPE_CHECKING:
    pass

PatchValue = Tensor | float | ActivationRecord | Callable[[Tensor], Tensor]
"""What a patch puts in place: see `ActivationPatch.value`."""

MODES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "replace": lambda activation, value: value.expand_as(activation),
    "add": lambda activation, value: activation + value,
    "subtract": lambda activation, value: activation - value,
    "scale": lambda activation, value: activation * value,
}
"""What becomes of an activation, given a value."""

WHOLE_CACHE = frozenset({"key", "value"})
"""Sites that in a cached step hold every position, not just the new ones."""


@dataclass(frozen=True, eq=False)
class ActivationPatch:
    """Something to put in the place of an activation.

    Raises:
        InputError: the mode or the positions are of no known kind.
    """

    layer_name: Layer
    """The block, in any spelling."""
    position: PassPositions
    """Which tokens: an index, a list, a slice, None (all), ``"prompt"``, ``"generated"``.

    Negative indices count from the end of the prompt (`pass_positions`).
    """
    value: PatchValue
    """What is put there, in the dtype and on the device of what was there:

    - a tensor ``[…]`` of one token's shape (``[d_model]``; ``[d_head]`` of one head), or
      ``[position, …]`` with one entry for each token that ``position`` names, in that order, or
      ``[batch, position, …]``; or a number;
    - a function: given the activation ``[batch, position, …]`` at those tokens, it returns another
      of that shape (``[1, n, …]`` where padded rows have different numbers of such tokens);
    - an `ActivationRecord` that holds this site: the same position of that run, negative ones
      counted from that prompt's end.
    """
    mode: str = "replace"
    """``replace``, ``add``, ``subtract`` or ``scale`` (multiply)."""
    site: str = "resid_post"
    """A name out of `forward_pass.SITES`."""
    head: int | None = None
    """One head of a site that has a head axis; None means all."""
    neuron: int | Sequence[int] | None = None
    """Some entries of the last axis; None means all."""

    def __post_init__(self) -> None:
        """Refuse what no model could do."""
        if self.mode not in MODES:
            raise InputError(f"mode {self.mode!r} is none of {', '.join(MODES)}")
        check_spec(self.position)

    def __repr__(self) -> str:
        part = "" if self.head is None else f", head {self.head}"
        part += "" if self.neuron is None else f", neuron {self.neuron}"
        where = f"{self.site} of layer {self.layer_name!r}{part}, position {self.position!r}"
        return f"ActivationPatch({self.mode} {where})"


# --- The shape of a site --------------------------------------------------------------------------

_SHAPES: WeakKeyDictionary[nn.Module, dict[Site, tuple[int, ...]]] = WeakKeyDictionary()


def token_shape(architecture: Architecture, site: Site) -> tuple[int, ...]:
    """What a site holds per token: ``(d_model,)``, ``(head, d_head)``, ``(head, key)``, ….

    Found by running five tokens once per model; the last entry of a pattern's is the number of keys
    there.

    Raises:
        SiteError: the model has no such site.
        LayerError: it has no such layer.
    """
    architecture.tap(site)
    return token_shapes(architecture)[site]


def token_shapes(architecture: Architecture) -> dict[Site, tuple[int, ...]]:
    """The shapes of all sites, found together, so that later no pass runs in an open context."""
    known = _SHAPES.get(architecture.model)
    if known is None:
        layers = range(architecture.n_layers)
        sites = [Site(n, i) for i in layers for n in architecture.available_sites(i)]
        run = [site for site in sites if site.name != "attn_pattern"]
        ids = torch.arange(1, PROBE_LENGTH + 1, device="cpu").remainder(
            architecture.config.vocab_size
        )[None]
        values = record(architecture, architecture.inputs(ids), run)
        known = {site: tuple(value.shape[2:]) for site, value in values.items()}
        for site in set(sites) - set(run):
            known[site] = (architecture.heads(site.layer)[0], PROBE_LENGTH)
        _SHAPES[architecture.model] = known
    return known


def by_token(value: Tensor, site: Site) -> Tensor:
    """A site's value with the position on axis 1: ``[batch, position, …]``."""
    return value.transpose(1, 2) if site.position_axis == 2 else value


# --- An intervention bound to a model -------------------------------------------------------------


@dataclass(eq=False)
class Bound:
    """An intervention whose place in one model has been found."""

    source: ActivationPatch | SteeringVector
    site: Site
    positions: PassPositions
    change: Callable[[Tensor, Selection], Tensor]
    """What becomes of the activation of the tokens selected, ``[batch, k, …]``."""
    fitted: _Fitted | None = None
    """The patch's tensor, if it has one."""
    places: set[int] = field(default_factory=set)
    """Which of the tokens that are meant have been changed (`Selection.order`)."""

    def check(self, clock: SequenceClock) -> None:
        """Before the blocks of a pass run.

        Raises:
            InputError: the value, or a position, does not fit the tokens of the pass.
        """
        chosen = clock.select(self.positions)
        if self.fitted is not None:
            self.fitted.check(chosen, clock.batch)

    def check_done(self, clock: SequenceClock) -> None:
        """After all passes.

        Raises:
            InputError: some of what was asked for was never done.
        """
        if not self.places:
            ran = clock.offset + clock.length
            seen = f"the passes held {ran} tokens" if clock.passes else "no pass was run"
            raise InputError(f"{self.source} never took effect: {seen}")
        asked = self.positions if isinstance(self.positions, list) else []
        missed = [position for i, position in enumerate(asked) if i not in self.places]
        if missed:
            raise InputError(
                f"{self.source} never took effect at position {missed[0]}: the passes held "
                f"{clock.offset + clock.length} tokens"
            )
        if self.fitted is not None and not clock.generated:
            self.fitted.check_used(max(self.places) + 1)

    def hook(self, clock: SequenceClock) -> Callable[[Tensor], Tensor | None]:
        """The engine's hook for this intervention; it raises SiteError where rows are unclear."""

        def _hook(value: Tensor) -> Tensor | None:
            if len(value) != clock.batch:
                raise SiteError(
                    f"{self.site.name} holds {len(value)} rows in a pass of {clock.batch}: "
                    "an intervention cannot tell whose they are"
                )
            first = None
            if self.site.name in WHOLE_CACHE:  # a sliding window has forgotten the earliest
                first = max(0, clock.offset + clock.length - value.shape[1])
            chosen = clock.select(self.positions, first)
            if not chosen.rows.numel():
                return None
            old = by_token(value, self.site)
            if chosen.columns.shape == old.shape[:2]:  # every token of every row
                new = torch.empty_like(old)
                new.copy_(self.change(old, chosen))
            else:
                rows, columns = chosen.rows.to(value.device), chosen.columns.to(value.device)
                new = old.clone()
                new[rows, columns] = self.change(old[rows, columns], chosen).to(new)
            self.places.update(chosen.order.unique().tolist())
            return by_token(new, self.site)

        return _hook


def bind(architecture: Architecture, item: ActivationPatch | SteeringVector) -> Bound:
    """Find an intervention's place in a model.

    Raises:
        LayerError: there is no such layer.
        SiteError: the layer has no such site, head or neuron, or the site can only be recorded.
        InputError: the value does not fit what is there.
    """
    if isinstance(item, SteeringVector):
        return _bind_steering(architecture, item)
    if not isinstance(item, ActivationPatch):
        raise InputError(
            f"an intervention is an ActivationPatch or a SteeringVector, not {type(item).__name__}"
        )
    site = Site(item.site, architecture.resolve(item.layer_name))
    shape = token_shape(architecture, site)
    if site.name in READ_ONLY:
        raise SiteError(read_only_message(site.name))
    part = _Part(site, shape, item.head, item.neuron)
    positions = check_spec(item.position)
    value = item.value
    if isinstance(value, ActivationRecord):
        value = part.take(_from_record(value, site, positions))
    mode = MODES[item.mode]
    if callable(value) and not isinstance(value, Tensor):
        return Bound(item, site, positions, part.edit(_called(value, mode)))
    fitted = _Fitted(_as_tensor(value), part, item)
    change = part.edit(lambda old, chosen: mode(old, fitted.at(chosen, old)))
    return Bound(item, site, positions, change, fitted)


def _as_tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    try:
        return as_tensor(value, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(
            "a patch's value is a tensor, a number, a function or an ActivationRecord; came "
            f"{type(value).__name__}"
        ) from None


def _bind_steering(architecture: Architecture, item: SteeringVector) -> Bound:
    site = Site(item.site, architecture.resolve(item.layer_name))
    (*heads, width) = token_shape(architecture, site)
    if heads:
        raise SiteError(
            f"{site.name} does not hold one vector per token; steer a site of the residual stream, "
            "or register an ActivationPatch for a head"
        )
    if tuple(item.vector.shape) != (width,):
        raise InputError(
            f"a steering vector for {site.name} of layer {site.layer} is [{width}]; "
            f"came {list(item.vector.shape)}"
        )
    return Bound(item, site, check_spec(item.positions), lambda old, _chosen: item.apply(old))


def _called(
    function: Callable[[Tensor], Tensor], mode: Callable[[Tensor, Tensor], Tensor]
) -> Callable[[Tensor, Selection], Tensor]:
    by_token: Any = getattr(function, "of_tokens", None)

    def _change(old: Tensor, chosen: Selection) -> Tensor:
        value = function(old.clone()) if by_token is None else by_token(old.clone(), chosen)
        if not isinstance(value, Tensor) or not _fits(value.shape, old.shape):
            came = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise InputError(
                f"a patch's function was given {tuple(old.shape)} (batch, position, …) and must "
                f"return that shape; it returned {came}"
            )
        return mode(old, value.to(old))

    return _change


def _fits(shape: Sequence[int], target: Sequence[int]) -> bool:
    """Whether one shape broadcasts to the other without changing it."""
    try:
        return tuple(torch.broadcast_shapes(tuple(shape), tuple(target))) == tuple(target)
    except RuntimeError:
        return False


def _from_record(record: ActivationRecord, site: Site, positions: PassPositions) -> Tensor:
    """The same tokens of another run, ``[position, …]``."""
    value = by_token(record.at(site.name, site.layer), site)[0]
    if value.is_meta:
        raise InputError("this record holds shapes only, no values (it was loaded from json)")
    if isinstance(positions, str):
        raise InputError(f"position={positions!r} does not say which tokens of a record to take")
    wanted = resolve_positions(positions, len(record.tokens))
    missing = [p for p in wanted if p not in record.positions]
    if missing:
        raise InputError(f"the record does not hold position {missing[0]}, only {record.positions}")
    return value[[record.positions.index(p) for p in wanted]]


class _Part:
    """A head, some neurons, or all of what a site holds for one token."""

    def __init__(
        self,
        site: Site,
        shape: tuple[int, ...],
        head: int | None,
        neuron: int | Sequence[int] | None,
    ) -> None:
        self.site = site
        self.free = site.name == "attn_pattern"
        """The last axis has as many entries as there are keys."""
        rest = list(shape)
        if head is not None:
            if len(shape) < 2:
                raise SiteError(f"{site.name} has no head axis; leave head out")
            head = _index("head", head, shape[0], site)
            rest = rest[1:]
        neurons = None if neuron is None else as_tensor(neuron).reshape(-1)
        if neurons is not None and self.free:
            raise SiteError(
                "attn_pattern has keys on its last axis, not neurons: change the row of a head by "
                "a function of it"
            )
        if neurons is not None:
            if neurons.dtype.is_floating_point or neurons.dtype == torch.bool or not len(neurons):
                raise SiteError(f"neuron is an index, or a list of them; came {neuron!r}")
            whole = [_index("neuron", int(i), shape[-1], site) for i in neurons]
            neurons = torch.tensor(whole, device="cpu")
            rest = [*rest[:-1], len(whole)]
        self.head, self.neurons, self.shape = head, neurons, tuple(rest)

    def take(self, value: Tensor) -> Tensor:
        """This part of ``[…, *the site's shape]``."""
        if self.head is not None:
            value = value[..., self.head, :]
        return value if self.neurons is None else value[..., self.neurons.to(value.device)]

    def edit(
        self, change: Callable[[Tensor, Selection], Tensor]
    ) -> Callable[[Tensor, Selection], Tensor]:
        """A change of this part as a change of the whole, of which the rest is left."""
        if self.head is None and self.neurons is None:
            return change

        def change_part(old: Tensor, chosen: Selection) -> Tensor:
            whole = old.clone()
            rows = whole if self.head is None else whole[..., self.head, :]  # a view into it
            if self.neurons is None:
                rows.copy_(change(self.take(old), chosen))
            else:
                rows[..., self.neurons.to(old.device)] = change(self.take(old), chosen)
            return whole

        return change_part


def _index(kind: str, index: int, count: int, site: Site) -> int:
    if not -count <= index < count:
        raise SiteError(
            f"{kind} {index} is out of range: {site.name} of layer {site.layer} has {count}, "
            f"valid are 0..{count - 1}"
        )
    return index % count


class _Fitted:
    """A patch's tensor, and which of its entries belong to which token."""

    def __init__(self, value: Tensor, part: _Part, patch: ActivationPatch) -> None:
        self.value, self.part, self.patch = value, part, patch
        depth = len(part.shape)
        tail = tuple(value.shape[max(value.dim() - depth, 0) :])
        known = part.shape[:-1] if part.free else part.shape
        if part.free:
            tail = tail[:-1] if len(tail) == depth else ()
        if value.dim() > depth + 2 or not _fits(tail, known):
            raise InputError(
                f"{patch}: the value must be {list(part.shape)} for one token, or have the "
                f"positions, or batch and positions, in front; came {list(value.shape)}"
            )
        self.held = value.shape[-depth - 1] if value.dim() > depth else 1
        """Positions that the value has an entry for; 1 where all are given the same."""
        self.rows = value.shape[0] if value.dim() > depth + 1 else 1
        """Rows that it has an entry for; 1 where all are given the same."""
        asked = check_spec(patch.position)
        if isinstance(asked, int | list):
            self.check_used(1 if isinstance(asked, int) else len(asked))

    def check_used(self, count: int) -> None:
        """Raise InputError unless there is an entry for each of so many tokens, and no other."""
        if self.held not in (1, count):
            raise InputError(
                f"{self.patch}: the value holds {self.held} positions, and {count} "
                f"{'token is' if count == 1 else 'tokens are'} to be patched"
            )

    def check(self, chosen: Selection, batch: int) -> None:
        """Raise InputError where there is no entry for a token, or for a row."""
        if not chosen.rows.numel():
            return
        count = int(chosen.order.max()) + 1
        if count > self.held or self.patch.position == "prompt":
            self.check_used(count)
        if self.rows not in (1, batch):
            raise InputError(
                f"{self.patch}: the value holds {self.rows} rows, the batch has {batch}"
            )

    def at(self, chosen: Selection, old: Tensor) -> Tensor:
        """What belongs to the tokens selected, in the dtype of their activation; broadcasts to it.

        Raises:
            InputError: a pattern has another number of keys.
        """
        value, depth = self.value, len(self.part.shape)
        if value.dim() > depth:
            order = (chosen.order if self.held > 1 else 0 * chosen.order).to(value.device)
            rows = (chosen.rows if self.rows > 1 else 0 * chosen.rows).to(value.device)
            value = value[order] if value.dim() == depth + 1 else value[rows, order]
        if not _fits(value.shape, old.shape):
            raise InputError(
                f"{self.patch}: the value holds {value.shape[-1]} keys, and {old.shape[-1]} stand "
                "there"
            )
        return value.to(old)
