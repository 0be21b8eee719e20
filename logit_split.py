"""The parts of one forward pass, each read along the directions of some tokens' logits.

`LogitSplit` goes through the blocks in order and notes what each part adds; it checks that nothing
is left out: what a block adds beyond its writers is a part too, and the sum must be the logit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from forward_pass import ArchitectureError, Site, SiteError
from logit_attribution import NAMES
from logit_tail import LogitTail, norm_factor, not_read
from model_architecture import Architecture
from module_devices import exact
from stream_parts import Link, Recorded, Writer, find_link, find_matrix, matrix_bias

ALLOWED = 8
"""Roundings of everything that is summed by which a sum may differ from what it must be."""

WHOLE = {"head_out": ("head", "attn_bias"), "mlp_neurons": ("neuron", "mlp_bias")}
"""Kinds of what a writer's matrix splits into, by what it takes."""


class Rows(NamedTuple):
    """Parts of one kind and block."""

    kind: str
    layer: int
    """-1 where they belong to none."""
    values: Tensor
    """``[part, position, target]``, float64 on the CPU."""


class LogitSplit:
    """What each part adds to the logits ``[position, target]`` of some tokens, found in order.

    Args:
        architecture: The model.
        found: What its pass had.
        tail: The way from its stream to its logits.
        targets: Tokens, ``[position, target]``.
        foils: Tokens that are taken off; -1 is nothing.

    Raises:
        SiteError: the unembedding does not take a norm of the recorded stream.
    """

    def __init__(
        self,
        architecture: Architecture,
        found: Recorded,
        tail: LogitTail,
        targets: Tensor,
        foils: Tensor,
    ) -> None:
        self.architecture, self.found, self.capped = architecture, found, tail.capped
        self.stream = found.at(Site("resid_post", architecture.n_layers - 1))
        assert found.read is not None
        factor = norm_factor(tail.norm, self.stream, found.read)
        if factor is None:
            raise SiteError(not_read(type(architecture.model).__name__))
        self.factor = factor
        same = bool((targets == targets[:1]).all() and (foils == foils[:1]).all())
        wanted = targets[:1] if same else targets
        rows = tail.rows(wanted.flatten().tolist())
        directions, self.norm_bias, self.own_bias = (
            each.unflatten(0, wanted.shape) for each in rows
        )
        if bool((foils >= 0).any()):
            other = tail.rows(foils[: len(wanted)].flatten().tolist())
            off = [each.unflatten(0, wanted.shape) for each in other]
            directions = directions - off[0]
            self.norm_bias, self.own_bias = self.norm_bias - off[1], self.own_bias - off[2]
        self.directions = directions
        """``[1 or position, target, d_model]``."""
        assert found.unembedded is not None
        self.rounding = max(map(_rounding, (self.stream.dtype, found.read.dtype)))
        self.rounding = max(self.rounding, _rounding(found.unembedded.dtype))
        self.rows: list[Rows] = []
        self.size = self._read(self.stream.abs(), directions.abs()).abs()
        """Of everything that is summed: how large rounding can be, ``[position, target]``."""
        self.before_cap = self._read(self.stream) + self.norm_bias + self.own_bias
        self._require_unembedding(tail, targets, foils)

    def _require_unembedding(self, tail: LogitTail, targets: Tensor, foils: Tensor) -> None:
        """Refuse an unembedding whose own numbers are not those found for it."""
        given, sample = self.found.unembedded, list(self.found.sample)
        assert given is not None
        own = tail.uncapped(given, targets[sample]) - tail.uncapped(given, foils[sample])
        off = (own - self.before_cap[sample]).abs()
        sizes = self.size + self.norm_bias.abs() + self.own_bias.abs()
        if not bool((off <= ALLOWED * self.rounding * sizes[sample]).all()):
            raise SiteError(
                f"the unembedding of {type(self.architecture.model).__name__} does not give what "
                f"its matrix makes of the final norm's output (off by {float(off.max()):.1e} "
                "logits), so its logits cannot be split"
            )

    # Reading ----------------------------------------------------------------------------------

    def _read(self, vectors: Tensor, directions: Tensor | None = None) -> Tensor:
        """``[position or 1, d_model]`` of the stream as logits, ``[position, target]``."""
        along = self.directions if directions is None else directions
        along = along.to(vectors.device)
        products = (vectors.to(along.dtype)[:, None] * along).sum(-1)
        return exact(products).cpu() * self.factor

    def _read_inside(self, inside: Tensor, matrix: Tensor, link: Link) -> Tensor:
        """What a matrix's inputs ``[position, part, width]`` add: ``[part, position, target]``."""
        along = link.back(self.directions.to(matrix))
        pulled = (along @ matrix.mT).unflatten(-1, inside.shape[1:])
        products = (inside.to(pulled)[:, None] * pulled).sum(-1)
        by_part = exact(products).cpu() * (self.factor * link.factor)[:, :, None]
        return by_part.movedim(-1, 0)

    def _read_bias(self, bias: Tensor, link: Link) -> Tensor:
        """What a writer's biases add, ``[position, target]``."""
        along = link.back(self.directions)
        added = self._read(bias[None], along) * link.factor
        return added if link.bias is None else added + self._read(link.bias[None])

    def _note(self, kind: str, layer: int, values: Tensor) -> None:
        self.rows.append(Rows(kind, layer, values if values.dim() == 3 else values[None]))

    def _is_rounding(self, rest: Tensor, *summed: Tensor) -> bool:
        """Whether what is left of a sum of vectors is no more than its rounding."""
        eps = ALLOWED * _rounding(self.stream.dtype)
        allowed = sum(exact(each).cpu().abs() for each in summed) * eps
        return bool((rest.abs() <= allowed).all())

    # Parts ------------------------------------------------------------------------------------

    def add_embedding(self) -> None:
        """What enters block 0; positions apart where they are added to the tokens as they are."""
        start = self.found.at(Site("resid_pre", 0))
        self.size += self._read(start.abs(), self.directions.abs()).abs()
        tokens = self.found.embeddings.get(self.architecture.model.get_input_embeddings())
        for module, each in self.found.embeddings.items():
            if tokens is None or module is self.architecture.model.get_input_embeddings():
                continue
            if tokens.shape == start.shape == each.shape or each.shape[1:] == start.shape[1:]:
                rest = exact(start).cpu() - exact(tokens).cpu() - exact(each).cpu()
                if self._is_rounding(rest, start, tokens, each):
                    self._note("embed", -1, self._read(tokens))
                    self._note("position", -1, self._read(each))
                    return
        self._note("embed", -1, self._read(start))

    def add_block(self, layer: int, writers: list[Writer], neurons: bool) -> None:
        """What is added before a block (if anything is), by its writers, and beside them."""
        before, after = self._ends(layer)
        self.size += self._read(after.abs(), self.directions.abs()).abs()
        rest = exact(after).cpu() - exact(before).cpu()
        if not writers:
            self._note("block", layer, self._read(after) - self._read(before))
            return
        for writer in writers:
            rest = rest - exact(self.found.at(writer.out)).cpu()
            self._add_writer(writer, neurons, alone=len(writers) == 1)
        written = [self.found.at(writer.out) for writer in writers]
        if not self._is_rounding(rest, before, after, *written):
            self._note("other", layer, self._read(rest.to(after.device, self.directions.dtype)))

    def _ends(self, layer: int) -> tuple[Tensor, Tensor]:
        """The stream before and after a block; what comes between two blocks is noted."""
        after = self.found.at(Site("resid_post", layer))
        site = Site("resid_pre", layer)
        if layer == 0:
            return self.found.at(site), after
        handed = self.found.at(Site("resid_post", layer - 1))
        if site not in self.found.sites:
            return handed, after
        before = self.found.at(site)
        if not torch.equal(before, handed):
            self._note("other", layer, self._read(before) - self._read(handed))
        return before, after

    def _add_writer(self, writer: Writer, neurons: bool, alone: bool) -> None:
        layer, whole = writer.out.layer, self._read(self.found.at(writer.out))
        attends = writer.out.name == "attn_out"
        link = find_link(self.architecture, writer, self.found)
        pair = None
        if link is not None and (attends or neurons):
            pair = find_matrix(self.architecture, writer, self.found)
        if link is None or (pair is None and (attends or neurons)):
            mixes = alone or self.architecture.structure[layer].attention is None
            self._note("mlp" if not attends else "mixer" if mixes else "attn", layer, whole)
            return
        assert writer.inside is not None
        kind, bias_kind = WHOLE[writer.inside.name]
        if pair is None:
            bias = self._read_bias(matrix_bias(self.architecture, writer, self.found), link)
            self._note("mlp", layer, whole - bias)
        else:
            inside = self.found.at(writer.inside)
            inside = inside if inside.dim() == 3 else inside[..., None]
            self._note(kind, layer, self._read_inside(inside, pair[0], link))
            bias = self._read_bias(pair[1], link)
        if bool(bias.any()):
            self._note(bias_kind, layer, bias)

    def add_ends(self, logits: Tensor) -> None:
        """Biases behind the blocks, and a soft-cap.

        Args:
            logits: The model's own, ``[position, target]``.
        """
        for kind, bias in (("norm_bias", self.norm_bias), ("unembed_bias", self.own_bias)):
            if bool(bias.any()):
                self._note(kind, -1, bias.expand_as(logits))
            self.size += bias.abs()
        if self.capped:
            self._note("soft_cap", -1, logits - self.before_cap)

    # The sum ----------------------------------------------------------------------------------

    def require_sum(self, logits: Tensor) -> None:
        """Refuse parts that do not add up.

        Raises:
            ArchitectureError: their sum is not the model's logit, to rounding.
        """
        total = torch.cat([rows.values for rows in self.rows]).sum(0)
        off = (total - logits).abs()
        allowed = ALLOWED * self.rounding * (self.size + logits.abs())
        if not bool((off <= allowed).all()):
            worst = int((off / allowed).nan_to_num(torch.inf).argmax())
            raise ArchitectureError(
                f"the parts of {type(self.architecture.model).__name__} add up to "
                f"{float(total.flatten()[worst]):.6g}, and its logit is "
                f"{float(logits.flatten()[worst]):.6g}; rounding explains "
                f"{float(allowed.flatten()[worst]):.1e}. What of its structure was not understood, "
                "architecture_check.check_architecture says"
            )

    def tables(self) -> dict[str, Any]:
        """Fields of a `LogitAttribution`: ``values``, ``kinds``, ``layers``, ``indices``."""
        sizes = torch.tensor([len(rows.values) for rows in self.rows], device="cpu")
        single = {"head", "neuron"}
        indices = [
            torch.arange(len(rows.values), device="cpu")
            if rows.kind in single
            else torch.tensor([-1], device="cpu")
            for rows in self.rows
        ]
        kinds = torch.tensor([NAMES.index(rows.kind) for rows in self.rows], device="cpu")
        layers = torch.tensor([rows.layer for rows in self.rows], device="cpu")
        return {
            "values": torch.cat([rows.values for rows in self.rows]).numpy(),
            "kinds": kinds.repeat_interleave(sizes).numpy(),
            "layers": layers.repeat_interleave(sizes).numpy(),
            "indices": torch.cat(indices).numpy(),
        }


def _rounding(dtype: torch.dtype) -> float:
    """Relative rounding of a model's own sums; many compute some of them in float32."""
    return max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
