"""The cells of an attribution sweep: change of an activation times gradient, summed as was asked.

`CellEstimates` is given the activations of two runs; from the gradients of one backward pass it
makes the estimate of every cell, for queries and keys through the softmax where that is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from attention_correction import Attention, ScoreRule, fit_scores, key_effects, query_effects
from forward_pass import Site
from intervention_handler import by_token
from model_architecture import Architecture
from module_devices import exact
from sweep_cells import HEAD_SITES, SweepOptions

CORRECTED = ("query", "key")
"""Sites that the attention correction is for."""


class CellEstimates:
    """The estimates of every cell, given a gradient.

    Args:
        architecture: The model.
        asked: What is asked of each site.
        base: Activations of the run that is patched, at every site that is needed, a row per pair.
        source: The same of the run that activations are taken from.
        places: Positions that are patched.
        there: Those of the other run that correspond to them.
        corrected: Whether queries and keys go through the softmax.
    """

    def __init__(
        self,
        architecture: Architecture,
        asked: Sequence[SweepOptions],
        base: Mapping[Site, Tensor],
        source: Mapping[Site, Tensor],
        places: Sequence[int],
        there: Sequence[int],
        corrected: bool,
    ) -> None:
        self.architecture, self.asked, self.corrected = architecture, asked, corrected
        self.base, self.source = base, source
        self.places, self.there = (
            torch.tensor(places, device="cpu"),
            torch.tensor(there, device="cpu"),
        )
        self.rules: dict[int, ScoreRule] = {}

    def effects(self, slopes: Mapping[Site, Tensor]) -> dict[str, np.ndarray]:
        """Estimates of each site, ``[pair, *axes]``, float64.

        Raises:
            ArchitectureError: the model's attention cannot be corrected.
        """
        found = {}
        for options in self.asked:
            layers = []
            for layer in options.layers:
                site = Site(options.site, layer)
                if self.corrected and site.name in CORRECTED:
                    cells = self._corrected(options, layer, slopes[Site("attn_pattern", layer)])
                else:
                    cells = self._linear(options, site, slopes[site])
                layers.append(_reduced(cells, options))
            found[options.site] = torch.stack(layers, 1).numpy()
        return found

    def _taken(self, site: Site) -> Tensor:
        """What the other run holds at the places of each position that is patched."""
        value = by_token(self.source[site], site)
        return value[:, self.there.to(value.device)]

    def _linear(self, options: SweepOptions, site: Site, slope: Tensor) -> Tensor:
        """Change times gradient, ``[pair, place, …]``; the last axis summed unless it is asked."""
        base, slopes = by_token(self.base[site], site), by_token(slope, site)
        index = self.places.to(base.device)
        wide = torch.promote_types(base.dtype, torch.float32)
        change = self._taken(site).to(base.device, wide) - base[:, index].to(wide)
        product = change * slopes[:, index].to(wide)
        return exact(product if "neuron" in options.axes else product.sum(-1)).cpu()

    def _corrected(self, options: SweepOptions, layer: int, slope: Tensor) -> Tensor:
        """What the patched query or key does through the softmax, ``[pair, place, head]``."""
        run = self._attention(self.base, layer)
        if layer not in self.rules:
            self.rules[layer] = self._rule(layer, run)
        rule, site = self.rules[layer], Site(options.site, layer)
        if site.name == "query":
            found = query_effects(rule, run, slope, self._taken(site), self.places)
        else:
            together = "position" not in options.axes
            found = key_effects(rule, run, slope, self._taken(site), self.places, together)
        return found.cpu()

    @staticmethod
    def _attention(run: Mapping[Site, Tensor], layer: int) -> Attention:
        return Attention(*(run[Site(name, layer)] for name in ("query", "key", "attn_pattern")))

    def _rule(self, layer: int, run: Attention) -> ScoreRule:
        other = self._attention(self.source, layer)
        length = min(run.pattern.shape[-1], other.pattern.shape[-1])
        cap = getattr(self.architecture.config, "attn_logit_softcapping", None)
        name = self.architecture.layer_names[layer]
        return fit_scores((run.first(length), other.first(length)), cap, name)


def _reduced(cells: Tensor, options: SweepOptions) -> Tensor:
    """``[pair, place, head or neuron]`` or ``[pair, place]`` with the axes that were asked for."""
    if options.site in HEAD_SITES:
        chosen = torch.tensor(options.heads, device="cpu")
        cells = cells[..., chosen] if "head" in options.axes else cells.sum(-1)
    elif "neuron" in options.axes:
        cells = cells[..., torch.tensor(options.neurons, device="cpu")]
    return cells if "position" in options.axes else cells.sum(1)
