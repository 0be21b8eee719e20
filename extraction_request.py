"""What an extraction asks for: which sites of which layers, checked before anything runs.

`make_request` resolves layers in any spelling, and sites by name, against one model. The `Request`
that comes out is what `activation_extraction` and `generation` record.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from forward_pass import SITES, Site, SiteError
from model_architecture import Architecture, Layer


@dataclass(frozen=True)
class Request:
    """Which sites of which layers, resolved and checked before anything runs."""

    sites: tuple[Site, ...]
    names: tuple[str, ...]
    """The sites' names, in the order asked for."""
    logits: bool = False


def make_request(
    architecture: Architecture,
    layer_names: Sequence[Layer] | None = None,
    layer_indices: Sequence[Layer] | None = None,
    include_attention: bool = False,
    return_logits: bool = False,
    sites: Sequence[str] = ("resid_post",),
) -> Request:
    """Resolve layers and sites of an extraction.

    Args:
        architecture: The model.
        layer_names: Layers by name (any spelling); with ``layer_indices``, both are taken.
        layer_indices: Layers by index (any spelling). Neither means all.
        include_attention: Also the site ``attn_pattern``.
        return_logits: Also the logits.
        sites: Names out of `forward_pass.SITES`.

    Raises:
        LayerError: there is no such layer.
        SiteError: there is no such site, a layer that was named does not have it, or none is asked.
        ArchitectureError: logits are wanted of a model without a head.
    """
    if isinstance(sites, str):
        sites = (sites,)
    names = dict.fromkeys([*sites, *(["attn_pattern"] if include_attention else [])])
    unknown = [name for name in names if name not in SITES]
    if unknown:
        raise SiteError(f"no site {unknown[0]!r}; sites are {', '.join(SITES)}")
    if return_logits:
        architecture.require_head("return_logits=True")
    asked = [*_as_list(layer_names), *_as_list(layer_indices)]
    all_layers = layer_names is None and layer_indices is None
    layers = (
        range(architecture.n_layers)
        if all_layers
        else sorted({architecture.resolve(x) for x in asked})
    )
    wanted = []
    for name in names:
        if name == "embed":
            wanted.append(Site("embed", 0))
            continue
        have = [
            Site(name, layer)
            for layer in layers
            if _has(architecture, Site(name, layer), all_layers)
        ]
        if not have and layers:
            raise SiteError(architecture.missing(Site(name, layers[0])) or f"no layer has {name!r}")
        wanted += have
    if not wanted and not return_logits:
        raise SiteError("nothing to extract: sites or layers are empty (layers: None means all)")
    return Request(tuple(wanted), tuple(names), return_logits)


def _as_list(layers: Any) -> list[Layer]:
    """One layer, several or None, as a list; a single one may be another library's integer."""
    if layers is None:
        return []
    single = isinstance(layers, str) or getattr(layers, "ndim", 1) == 0
    return list(layers) if isinstance(layers, Iterable) and not single else [layers]


def _has(architecture: Architecture, site: Site, skip_quietly: bool) -> bool:
    """Whether a layer has a site; a layer that was named and has not raises SiteError."""
    why = architecture.missing(site)
    if why and not skip_quietly:
        raise SiteError(why)
    return why is None
