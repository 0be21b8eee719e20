"""Which module is what: found in a model's structure, proved by numbers, with no table of families.

The blocks are the outermost ``ModuleList`` with as many entries as the config has hidden layers;
what they are made of is found by watching one short forward pass (`structure_probe`), once per
model, when first needed. `Architecture` binds what was found to the live model, and is what the
engine (`forward_pass`) runs on. `resolve_layer` is the one helper that understands every spelling
of a layer. `architecture_check.check_architecture` proves the result by numbers.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from attention_internals import PARTS, AttentionTap
from block_finding import (
    attention_configs,
    base_prefix,
    find_blocks,
    find_body,
    find_head,
    text_config,
)
from block_trace import PROBE_LENGTH
from decoder_check import refuse_encoder, refuse_encoder_decoder
from expert_routing import ROUTING, RoutingTap
from forward_pass import (
    SITES,
    ArchitectureError,
    InputError,
    LayerError,
    ModuleTap,
    Site,
    SiteError,
    StreamShape,
    Tap,
    WithinBlock,
)
from memory_limits import share_passes
from model_lock import unwrap
from model_shards import ShardedTap, find_mesh, own_part
from module_devices import compute_device, modules_of
from structure_probe import BlockStructure, ModelStructure, probe_structure

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Layer = int | str
"""A block: an index (negative from the end), or its dotted name with or without leading parts."""


# --- Layers and their spellings -------------------------------------------------------------------


def resolve_layer(layer: Layer, names: Sequence[str]) -> int:
    """The index of a block, however it is spelled.

    Args:
        layer: ``5``, ``"5"``, ``-1``, ``"h.5"``, ``"transformer.h.5"``.
        names: The blocks' full names, in order.

    Returns:
        0 to ``len(names) - 1``.

    Raises:
        LayerError: there is no such block; the message names the valid range and the nearest name.
    """
    n_layers = len(names)
    index: int | None
    if isinstance(layer, bool) or not isinstance(layer, int | str):
        index = _as_index(layer)
    else:
        index = int(layer) if re.fullmatch(r"[+-]?\d+", str(layer).strip()) else None
    if index is not None:
        if -n_layers <= index < n_layers:
            return index % n_layers
        raise LayerError(
            f"layer {index} is out of range: this model has {n_layers} blocks, "
            f"valid are 0..{n_layers - 1} or -{n_layers}..-1 "
            f"(0 is the first block, named {names[0]!r}; the embedding is the site 'embed')"
        )
    spelled = str(layer).strip()
    matches = [i for i, name in enumerate(names) if f".{name}".endswith(f".{spelled}")]
    if spelled and len(matches) == 1:
        return matches[0]
    raise LayerError(
        f"no layer {spelled!r}: valid are 0..{n_layers - 1} "
        f"or a name from {names[0]!r} to {names[-1]!r}; "
        f"the nearest is {_nearest(spelled, names)!r}"
    )


def _as_index(layer: Any) -> int:
    """Integers that are not ``int`` (NumPy's, a tensor's); anything else is an error."""
    if not isinstance(layer, bool):
        try:
            return int(layer.__index__())
        except (AttributeError, TypeError):
            pass
    raise LayerError(f"a layer is an index or a name, not {type(layer).__name__} ({layer!r})")


def _nearest(spelled: str, names: Sequence[str]) -> str:
    """The name most like what was typed: the same number if there is one, else by letters."""
    number = re.search(r"\d+", spelled)
    if number and int(number.group()) < len(names):
        return names[int(number.group())]
    return max(names, key=lambda name: difflib.SequenceMatcher(None, spelled, name).ratio())


# --- The architecture of a live model -------------------------------------------------------------


class Architecture:
    """A model and the knowledge of which module is what. Implements `forward_pass.Wiring`.

    Making one is cheap; what was found is remembered per model for as long as the model lives.

    Args:
        model: A causal language model, or its base model without a head; of what
            ``torch.compile`` returned, the model inside.

    Raises:
        ArchitectureError: it is an encoder-decoder, or no list of blocks is found.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        model = unwrap(model)
        self.model = model
        self.config = text_config(model.config)
        refuse_encoder_decoder(model.config, type(model).__name__)
        self.blocks_path, blocks = find_blocks(model, self.config)
        self.blocks = cast(Sequence[nn.Module], blocks)
        self.body: nn.Module = find_body(model, self.blocks_path)
        self.has_head: bool = find_head(model) is not None
        self.name_prefix = "" if self.has_head else base_prefix(model)
        self.layer_names = [
            f"{self.name_prefix}{self.blocks_path}.{i}" for i in range(len(self.blocks))
        ]

    def __repr__(self) -> str:
        where = f"{self.n_layers} blocks at {self.blocks_path!r}"
        return f"Architecture({type(self.model).__name__}, {where})"

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def d_model(self) -> int:
        """Width of the residual stream (of all its streams together, where it has several)."""
        return self._found.width

    @cached_property
    def _found(self) -> ModelStructure:
        """What the probe found, remembered until a module or the dtype of the model changes."""
        fingerprint = hash((self.model.dtype, *map(id, modules_of(self.model))))
        known = _KNOWN.get(self.model)
        if known is None or known[0] != fingerprint:
            ids = torch.arange(1, PROBE_LENGTH + 1, device="cpu").remainder(self.config.vocab_size)
            inputs = self.inputs(ids[None])
            refuse_encoder(self.model, self.body, inputs)
            if find_mesh(self.model) is not None:
                share_passes(self.model)
            found = probe_structure(self.model, self.body, self.blocks, self.config, inputs)
            known = (fingerprint, found)
            _KNOWN[self.model] = known
        return known[1]

    @property
    def structure(self) -> tuple[BlockStructure, ...]:
        """What each block is made of, found by one short forward pass when first asked for."""
        return self._found.blocks

    @property
    def final_norm(self) -> nn.Module | None:
        """The norm between the last block and the head; None where there is none."""
        path = self._found.final_norm
        return None if path is None else self.body.get_submodule(path)

    @property
    def block_outputs(self) -> list[int]:
        """Entries of the tuple that each block returns; 0 for a tensor."""
        return [block.outputs for block in self.structure]

    @property
    def stream(self) -> StreamShape:
        """How blocks hand the residual stream on."""
        return self._found.stream

    @property
    def reads_earlier_streams(self) -> bool:
        """Whether later parts read earlier blocks' streams too, so that a stream is not all."""
        return self._found.reads_earlier

    @property
    def needs_every_block(self) -> bool:
        """Whether blocks hand each other more than the residual stream: none can be skipped."""
        return self._found.needs_every_block

    @property
    def input_device(self) -> torch.device:
        """Where token ids must lie: where the embedding computes."""
        return compute_device(self.model.get_input_embeddings())

    @property
    def stream_device(self) -> torch.device:
        """Where the residual stream leaves the last block."""
        return compute_device(self.blocks[-1])

    @property
    def stream_dtype(self) -> torch.dtype:
        """The stream's dtype: the model's, or float32 where half precision keeps it so (Mamba)."""
        return torch.float32 if self._found.widened else self.model.dtype

    @cached_property
    def forward_parameters(self) -> set[str]:
        """Names of the arguments that the body's ``forward`` takes."""
        return set(inspect.signature(self.body.forward).parameters)

    def resolve(self, layer: Layer) -> int:
        """The index of a block in any spelling. See `resolve_layer`."""
        return resolve_layer(layer, self.layer_names)

    def inputs(self, token_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        """What the model's ``forward`` takes, with the right positions for a padded batch.

        Args:
            token_ids: ``[batch, position]``.
            attention_mask: ``[batch, position]``, 0 at padding; None where there is none.

        Returns:
            ``input_ids``, and where there is padding ``attention_mask`` and, if the model takes
            them, ``position_ids`` counted from each row's first real token.

        Raises:
            InputError: there is padding, and the model would make NaN of it: float64, with the
                eager attention of transformers.
        """
        inputs = {"input_ids": token_ids.to(self.input_device)}
        if attention_mask is not None and not bool(attention_mask.all()):
            self._require_padding()
            mask = attention_mask.to(self.input_device)
            inputs["attention_mask"] = mask
            if "position_ids" in self.forward_parameters:
                inputs["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)
        return inputs

    def _require_padding(self) -> None:
        """Refuse what eager attention makes of float64: its softmax is float32, and overflows."""
        eager = getattr(self.config, "_attn_implementation", None) == "eager"
        attends = any(found.attention_calls for found in self.structure)
        if eager and attends and self.model.dtype == torch.float64:
            raise InputError(
                "transformers' eager attention makes NaN of padding in float64; load the model in "
                "float32 or with attn_implementation='sdpa', or run one prompt at a time "
                "(batch_size=1)"
            )

    def require_head(self, purpose: str) -> None:
        """Raise ArchitectureError if the model was loaded without its language-model head."""
        if not self.has_head:
            raise ArchitectureError(
                f"{purpose} needs the language-model head, and {type(self.model).__name__} has "
                "none: load it with load_for_generation=True (AutoModelForCausalLM)"
            )

    def require_stream(self, purpose: str) -> None:
        """Raise ArchitectureError if what follows a block reads more than the residual stream."""
        if self.reads_earlier_streams:
            raise ArchitectureError(
                f"{purpose} reads one residual stream, and {type(self.model).__name__} reads those "
                "of earlier blocks beside it"
            )

    # Names of parts, one per block ------------------------------------------------------------

    def part_name(self, layer: int, part: str) -> str | None:
        """Full dotted name of one of a block's parts; None if the block has no such part.

        Args:
            layer: The block's index.
            part: ``attention``, ``mlp``, ``out_proj`` or ``down_proj``.
        """
        path = getattr(self.structure[layer], part)
        return None if path is None else f"{self.layer_names[layer]}.{path}".rstrip(".")

    def heads(self, layer: int) -> tuple[int, int]:
        """How many query heads and key/value heads a block has (0, 0 where it does not attend)."""
        return self.structure[layer].n_heads, self.structure[layer].n_kv_heads

    def project_head(self, z: Tensor, layer: int, head: int) -> Tensor:
        """What one head writes: its z through its slice of the output projection, without the bias.

        Args:
            z: ``[…, head, d_head]``, the site ``head_out`` of this layer.
            layer: The block.
            head: Which head, from 0.

        Returns:
            ``[…, d_model]``; in a block with a norm after attention, before that norm.

        Raises:
            SiteError: the block has no output projection of heads.
        """
        projection = self.output_projection(layer)
        only = torch.zeros_like(z)
        only[..., head, :] = z[..., head, :]
        nothing = projection(torch.zeros_like(z[..., :1, :]).expand_as(z).flatten(-2))
        return projection(only.flatten(-2)) - nothing

    def output_projection(self, layer: int) -> Callable[[Tensor], Tensor]:
        """What makes all of a block's z, ``[…, head·d_head]``, into what attention writes.

        Raises:
            SiteError: the block has no output projection of heads.
        """
        found, block = self.structure[layer], self.blocks[layer]
        if found.out_proj is None:
            raise SiteError(self.missing(Site("head_out", layer)))
        projection, mesh = block.get_submodule(found.out_proj), find_mesh(block)
        if found.head_parts == 1 or mesh is None:
            return projection
        return lambda z: projection(own_part(z, mesh, -1))

    # Sites -------------------------------------------------------------------------------------

    def tap(self, site: Site) -> Tap:
        """How to reach a site. See `forward_pass.Wiring`.

        Raises:
            SiteError: there is no such site, or this model does not have it; the message says why.
            LayerError: there is no such block.
        """
        name, layer = site
        if name not in SITES:
            raise SiteError(f"no site {name!r}; sites are {', '.join(SITES)}")
        if not 0 <= layer < self.n_layers:
            resolve_layer(layer, self.layer_names)
            raise LayerError(
                f"a Site counts layers from 0 to {self.n_layers - 1}; resolve {layer} first"
            )
        block = self.blocks[layer]
        if name == "resid_post":
            return ModuleTap(block, stream=self.stream)
        if name == "resid_pre" or (name == "embed" and layer == 0):
            return ModuleTap(block, at_input=True, stream=self.stream)
        if name == "embed":
            raise SiteError("the site 'embed' is the input of block 0; it has no other layer")
        why = self.missing(site)
        if why:
            raise SiteError(why)
        tap = self._whole(name, self.structure[layer], block)
        if id(tap.module) in self._shared_modules:
            return WithinBlock(tap, block)
        return tap

    @cached_property
    def _shared_modules(self) -> set[int]:
        """Modules that are part of more than one block (Zamba's attention)."""
        counts = Counter(id(module) for block in self.blocks for module in block.modules())
        return {module for module, count in counts.items() if count > 1}

    def _whole(self, name: str, found: BlockStructure, block: nn.Module) -> Tap:
        """A tap on a site inside a block, gathered where each process holds a part of it."""
        tap = self._inner_tap(name, found, block)
        sizes = {
            **dict.fromkeys(
                ("query", "attn_pattern", "head_out"), (found.head_parts, found.n_heads)
            ),
            **dict.fromkeys(("key", "value"), (found.kv_head_parts, found.n_kv_heads)),
            "mlp_neurons": (found.neuron_parts, getattr(tap.module, "in_features", 0)),
        }
        parts, size = sizes.get(name, (1, 0))
        mesh = None if parts == 1 else find_mesh(block)
        if mesh is None:
            return tap
        return ShardedTap(tap, mesh, 1 if name == "attn_pattern" else 2, size)

    def _inner_tap(
        self, name: str, found: BlockStructure, block: nn.Module
    ) -> ModuleTap | AttentionTap | RoutingTap:
        if name in PARTS:
            attention = block.get_submodule(found.attention or "")
            configs = attention_configs(self.model)
            stored = found.n_kv_heads // found.kv_head_parts
            return AttentionTap(attention, name, found.attention_route, stored, configs)
        if name in ROUTING:
            assert found.router is not None
            path, routing = found.router
            return RoutingTap(block.get_submodule(path), name, routing, block)
        paths = {
            "mlp_out": found.mlp_writer,
            "head_out": found.out_proj,
            "mlp_neurons": found.down_proj,
        }
        path = paths.get(name, found.attn_writer) or ""
        at_input = name in ("head_out", "mlp_neurons")
        return ModuleTap(
            block.get_submodule(path),
            at_input=at_input,
            heads=found.n_heads // found.head_parts if name == "head_out" else None,
            scale=1.0 if at_input else found.scale,
            block=block if name == "resid_mid" or path in found.flattened else None,
            adds_block_input=name == "resid_mid",
        )

    def missing(self, site: Site) -> str | None:
        """Why this model does not have a site, in a sentence; None if it has it."""
        if site.name in ("resid_pre", "resid_post", "embed"):
            return None
        found = self.structure[site.layer]
        heads = _no_heads(found)
        reasons = {
            "attn_out": (found.attn_writer, self._no_writer(found)),
            "mlp_out": (
                found.mlp_writer,
                "it has a single writer into the residual stream (read it as 'attn_out')"
                if found.attn_writer is not None
                else self._no_writer(found),
            ),
            "resid_mid": (
                found.has_resid_mid or None,
                "nothing in it reads the stream between attention and MLP "
                "(a parallel block, or a single writer)"
                if found.attn_writer is not None
                else self._no_writer(found),
            ),
            "head_out": (found.out_proj, heads or "attention has no output projection"),
            "mlp_neurons": (
                found.down_proj,
                "no single down projection makes what the MLP adds "
                "(a mixture of experts, or no MLP)",
            ),
            **{part: (found.attention, heads) for part in PARTS},
            **{part: _routing_reason(part, found) for part in ROUTING},
        }
        value, reason = reasons[site.name]
        if value is not None:
            return None
        return (
            f"{type(self.model).__name__} has no site {site.name!r} in layer {site.layer}: {reason}"
        )

    def _no_writer(self, found: BlockStructure) -> str:
        if self.stream.streams > 1:
            return f"its blocks carry {self.stream.streams} streams, which they mix as they write"
        if found.normed_sum:
            return "what the block returns is a norm of the sum (post-norm), so no parts add up"
        return "no two modules were found whose outputs are all that the block adds"

    def available_sites(self, layer: int) -> list[str]:
        """Names of the sites that a block has, in the order of `forward_pass.SITES`."""
        return [
            name
            for name in SITES
            if not (name == "embed" and layer != 0) and self.missing(Site(name, layer)) is None
        ]


_KNOWN: WeakKeyDictionary[nn.Module, tuple[int, ModelStructure]] = WeakKeyDictionary()


# --- Step 1: blocks, head, names ------------------------------------------------------------------


def _no_heads(found: BlockStructure) -> str:
    """Why a block has no heads."""
    if found.attention_calls > 1:
        return f"it computes attention {found.attention_calls} times in a pass"
    return "it computes no attention"


def _routing_reason(part: str, found: BlockStructure) -> tuple[object | None, str]:
    """Whether a block has a site of `ROUTING`, and why not."""
    if found.router is None:
        return None, "no router of experts was found"
    _, routing = found.router
    if part == "router_logits":
        return (None if routing.logits is None else True), "its router returns no logits"
    if part == "router_probs":
        reason = "its weights are neither a softmax nor a sigmoid of the router's logits"
        return routing.scores, reason
    return True, ""
