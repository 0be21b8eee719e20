"""The cells of a patching sweep: which there are, and what is exchanged in each.

`make_options` checks what is asked for against the model; `CellPlanner` makes the edit of a cell,
or says that the cell is one of the two runs, so that nothing has to be run for it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from base_run import BaseRun
from edited_runs import BEHIND_MIXING
from forward_pass import InputError, Site, SiteError
from growing_pass import Edit
from intervention_handler import by_token, token_shape
from logit_metrics import reads_of
from model_architecture import Architecture, Layer
from prompt_pairs import PromptPair
from sweep_result import AXES
from tokenization import as_ids

STREAM_SITES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
HEAD_SITES = ("head_out", "query", "key", "value", "attn_pattern")

DEFAULT_AXES: dict[str, tuple[str, ...]] = dict.fromkeys(STREAM_SITES, ("layer", "position"))
DEFAULT_AXES |= dict.fromkeys(HEAD_SITES, ("layer", "head"))
DEFAULT_AXES |= {"mlp_neurons": ("layer", "neuron")}
"""Axes of a sweep over a site, unless others are asked for."""


@dataclass(frozen=True, eq=False)
class SweepOptions:
    """What `patching_sweep` was asked, checked against the model."""

    site: str
    axes: tuple[str, ...]
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    neurons: tuple[int, ...]
    direction: str
    metric: Any
    normalize: bool


class Cell(NamedTuple):
    """One number of a sweep."""

    layer: int
    position: int | None
    head: int | None
    neuron: int | None


def make_options(
    architecture: Architecture,
    site: str,
    axes: Sequence[str] | None,
    direction: str,
    metric: Any,
    layers: Sequence[Layer] | None,
    heads: Sequence[int] | None,
    neurons: Sequence[int] | None,
    normalize: bool,
) -> SweepOptions:
    """Check what a sweep is asked for; arguments and errors as in `patching_sweep.patching_sweep`.

    Raises:
        InputError: an unknown direction, metric or axis, an entry that does not exist, or heads or
            neurons of a sweep that has no such axis.
        SiteError: no layer has the site, or one that was named has not.
    """
    if site not in DEFAULT_AXES:
        raise SiteError(f"a sweep exchanges one of {', '.join(DEFAULT_AXES)}; came {site!r}")
    if direction not in ("denoising", "noising"):
        raise InputError(f"direction is 'denoising' or 'noising'; came {direction!r}")
    reads_of(metric)
    chosen = DEFAULT_AXES[site] if axes is None else tuple(axes)
    allowed = {"layer", "position", "head" if site in HEAD_SITES else "neuron"}
    if "layer" not in chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= allowed:
        raise InputError(
            f"axes of a sweep over {site!r} are 'layer' and any of "
            f"{sorted(allowed - {'layer'})}; came {list(chosen)}"
        )
    found = _layers(architecture, site, layers)
    shapes = [token_shape(architecture, Site(site, layer)) for layer in found]
    return SweepOptions(
        site=site,
        axes=tuple(axis for axis in AXES if axis in chosen),
        layers=found,
        heads=_entries("head", site, chosen, heads, min(shape[0] for shape in shapes)),
        neurons=_entries("neuron", site, chosen, neurons, min(shape[-1] for shape in shapes)),
        direction=direction,
        metric=metric,
        normalize=normalize,
    )


def _layers(
    architecture: Architecture, site: str, layers: Sequence[Layer] | None
) -> tuple[int, ...]:
    single = isinstance(layers, str) or not isinstance(layers, Iterable)
    asked: Any = range(architecture.n_layers) if layers is None else [layers] if single else layers
    found = tuple(dict.fromkeys(architecture.resolve(layer) for layer in asked))
    why = {layer: architecture.missing(Site(site, layer)) for layer in found}
    reasons = [reason for reason in why.values() if reason]
    if not found or (reasons and (layers is not None or len(reasons) == len(found))):
        raise SiteError(reasons[0] if reasons else "layers is empty; None means all")
    return tuple(layer for layer in found if not why[layer])


def _entries(
    kind: str, site: str, axes: Sequence[str], asked: Sequence[int] | None, count: int
) -> tuple[int, ...]:
    """The heads or neurons of a sweep; none where they are no axis of it."""
    if kind not in axes:
        _refuse_entries(kind, site, axes, asked)
        return ()
    if asked is None:
        return tuple(range(count))
    several: Any = [asked] if isinstance(asked, int | np.integer) else asked
    try:
        numbers = as_ids(several)
    except (InputError, TypeError):
        raise InputError(
            f"{kind}s are whole numbers out of 0..{count - 1}, as in {kind}s=[0, 1]; came {asked!r}"
        ) from None
    for number in numbers:
        if not -count <= number < count:
            raise InputError(f"{kind} {number} is out of range: valid are 0..{count - 1}")
    if not numbers:
        raise InputError(f"{kind}s is empty; None means all")
    return tuple(dict.fromkeys(number % count for number in numbers))


def _refuse_entries(kind: str, site: str, axes: Sequence[str], asked: Sequence[int] | None) -> None:
    """Refuse heads or neurons of a sweep that has no such axis, and would exchange all alike."""
    if asked is None:
        return
    holds = site in HEAD_SITES
    if holds != (kind == "head"):
        fitting = HEAD_SITES if kind == "head" else [*STREAM_SITES, "mlp_neurons"]
        raise InputError(
            f"{kind}s={asked!r} was given, and {site!r} has no {kind}s: leave it out, or take one "
            f"of {', '.join(fitting)} by itself"
        )
    raise InputError(
        f"{kind}s={asked!r} was given, and the axes {list(axes)} have no {kind!r}: leave it out, "
        f"or give axes={[*axes, kind]}"
    )


def list_cells(options: SweepOptions, places: Sequence[tuple[int, ...]]) -> list[Cell]:
    """Every cell, in the order of the axes; ``places`` are the positions of each pair."""
    choices = {
        "layer": options.layers,
        "position": places[0],
        "head": options.heads,
        "neuron": options.neurons,
    }
    axes = [choices[axis] if axis in options.axes else (None,) for axis in AXES]
    return [Cell(*found) for found in itertools.product(*axes)]  # type: ignore[arg-type]


def _check_patterns(pair: PromptPair) -> None:
    """A pattern's keys are positions too, so that it means the same only where it stood."""
    if len(pair.base) != len(pair.source):
        raise InputError("patterns of prompts with different lengths cannot be exchanged")
    if any(position != other for position, other in pair.mapping.items()):
        raise InputError("patterns of other positions cannot be exchanged: leave align out")


class CellPlanner:
    """Makes the edit of a cell, or says that the cell is one of the two runs."""

    def __init__(
        self,
        options: SweepOptions,
        pair: PromptPair,
        places: Sequence[int],
        base: BaseRun,
        source: BaseRun,
        row: int,
        local_end: bool,
    ) -> None:
        self.options, self.pair, self.base, self.local_end = options, pair, base, local_end
        self.there: dict[int, Tensor] = {}
        self.differs: dict[int, Tensor] = {}
        index = torch.tensor([pair.mapping[p] for p in places], device="cpu")
        self.places = torch.tensor(places, device="cpu")
        self.column = {position: i for i, position in enumerate(places)}
        for layer in options.layers:
            site = Site(options.site, layer)
            mine, other = (by_token(run.sites[site], site)[row] for run in (base, source))
            if site.name == "attn_pattern":
                _check_patterns(pair)
            other = other[index.to(other.device)]
            unlike = other != mine[self.places.to(mine.device)]
            if site.name == "attn_pattern" or "neuron" not in options.axes:
                unlike = unlike.any(-1)
            self.there[layer], self.differs[layer] = other, unlike.cpu()

    def edit(self, cell: Cell) -> Edit | str:
        """The exchange of a cell; ``"base"`` where it changes nothing, ``"source"`` where all."""
        columns = [*self.column.values()] if cell.position is None else [self.column[cell.position]]
        unlike = self.differs[cell.layer][columns]
        if cell.head is not None:
            unlike = unlike[:, cell.head]
        elif cell.neuron is not None:
            unlike = unlike[..., cell.neuron]
        changed = unlike.reshape(len(columns), -1).any(-1)
        chosen = [column for column, is_new in zip(columns, changed, strict=True) if is_new]
        positions = [int(self.places[column]) for column in chosen]
        site = Site(self.options.site, cell.layer)
        is_last = cell.layer == len(self.base.streams) - 2
        if is_last and self.local_end and site.name in BEHIND_MIXING:
            kept = [i for i, position in enumerate(positions) if position in self.base.read]
            chosen, positions = [chosen[i] for i in kept], [positions[i] for i in kept]
        if not chosen:
            return "base"
        whole = cell.head is None and cell.neuron is None
        if is_last and site.name == "resid_post" and whole and self._is_all(positions):
            return "source"
        value = self.there[cell.layer][chosen]
        if cell.head is not None:
            value = value[:, cell.head]
        elif cell.neuron is not None:
            value = value[..., cell.neuron]
        if len(positions) == 1:
            return Edit(site, value[0], positions[0], cell.head, cell.neuron)
        return Edit(site, value, torch.tensor(positions, device="cpu"), cell.head, cell.neuron)

    def _is_all(self, positions: Sequence[int]) -> bool:
        """Whether the metric reads exactly what the source's last stream says, token for token."""
        read = self.base.read
        ends = [p == len(self.pair.base) - 1 for p in read]
        last = self.pair.mapping.get(len(self.pair.base) - 1) == len(self.pair.source) - 1
        return list(read) == list(positions) and all(ends) and last
