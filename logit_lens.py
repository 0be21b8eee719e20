"""The logit lens: what the model would say if it stopped at a layer.

The residual stream after each block is sent through the model's own way to the logits
(`forward_pass.resume` behind the last block: final norm, head, soft-cap and logit scale as the
model has them). So the last row is the model's own distribution, on every architecture.

1. One forward pass records the streams (or any other site that lies in the residual stream).
2. Chunk by chunk of positions, row by row, the full vocabulary's logits are made, reduced to top-k
   tokens and scalars, and thrown away: memory does not grow with the number of layers.

Row 0 of every table is the embedding (the input of block 0), row ``i + 1`` the output of block
``i``. KL is in nats, always KL(final ‖ layer).

Reference: nostalgebraist (2020), "interpreting GPT: the logit lens".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from forward_pass import InputError, ModuleTap, Recording, Site, SiteError, attached, record, resume
from interrupts import no_grad
from lens_metrics import DEFAULT_METRICS, RowMeter, check_metrics
from lens_result import TUNED_SITES, LensResult, previous_row, resolve_layers, row_sites
from lens_rows import logits_by_row, position_chunks
from model_architecture import Architecture, Layer
from model_loader import load_model
from tokenization import Prompt, check_ids, encode, token_id, token_strings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tuned_lens import TunedLens


class LogitLens:
    """A logit lens on one model.

    Args:
        model_or_path: A folder, a hub id or a live model with a head.
        device: Where a model that is loaded here shall lie.
        tokenizer: For a live model, or instead of the one beside it.
        tuned: Translators applied before the final norm (`tuned_lens.TunedLens`); None is the plain
            lens.

    Raises:
        ArchitectureError: the model has no head.
        ModelLoadError: there is no such model.
    """

    def __init__(
        self,
        model_or_path: str | Path | PreTrainedModel,
        device: str | torch.device | None = "cpu",
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        tuned: TunedLens | None = None,
    ) -> None:
        live = not isinstance(model_or_path, str | Path)
        self.model, self.tokenizer = load_model(
            model_or_path, None if live else device, tokenizer=tokenizer
        )
        self.architecture = Architecture(self.model)
        self.architecture.require_head("the logit lens")
        self.architecture.require_stream("the logit lens")
        self.tuned = tuned
        if tuned is not None:
            tuned.require_fit(self.architecture)

    def __repr__(self) -> str:
        kind = "LogitLens" if self.tuned is None else "LogitLens, tuned"
        return f"{kind}({self.architecture!r})"

    # --- From a hidden state to logits -----------------------------------------------------------

    def apply_lens_to_hidden_state(self, hidden: Tensor, apply_ln: bool = True) -> Tensor:
        """Logits of any hidden state: the model's final norm, head, soft-cap and scale.

        Args:
            hidden: ``[…, d_model]``.
            apply_ln: With False the final norm is left out; what comes after it stays.

        Returns:
            ``[…, vocab]``, in the model's dtype, on the device of its output.

        Raises:
            InputError: the last axis is not d_model, or there are no values.
        """
        arch, width = self.architecture, self.architecture.d_model
        if hidden.dim() == 0 or hidden.shape[-1] != width or hidden.numel() == 0:
            raise InputError(
                f"a hidden state is [..., {width}] (d_model), not empty; came {list(hidden.shape)}"
            )
        if hidden.is_meta:
            raise InputError(
                "these hidden states have no values (a record loaded from json holds shapes only)"
            )
        flat = hidden.reshape(-1, 1, width).to(arch.stream_device, arch.stream_dtype)
        with no_grad(), self._final_norm(apply_ln):
            logits = resume(arch, self._dummy_inputs(len(flat)), arch.n_layers, flat)
        return logits.view(*hidden.shape[:-1], logits.shape[-1])

    def _dummy_inputs(self, rows: int) -> dict[str, Tensor]:
        """Any token, once per row: no block runs, so nothing depends on it."""
        return self.architecture.inputs(torch.zeros(rows, 1, dtype=torch.long, device="cpu"))

    @contextmanager
    def _final_norm(self, apply_ln: bool) -> Iterator[None]:
        """While open, let the final norm hand on its input if it shall not be applied."""
        norm = None if apply_ln else self.architecture.final_norm
        if norm is None:
            yield
            return
        seen: list[Tensor] = []
        taps = [
            (ModuleTap(norm, at_input=True), seen.append),
            (ModuleTap(norm), lambda _out: seen.pop()),
        ]
        with attached(taps):
            yield

    # --- The engine: rows of hidden states to a result -------------------------------------------

    def run(
        self,
        text: Prompt,
        top_k: int = 10,
        *,
        site: str = "resid_post",
        head: int | None = None,
        layer_indices: Sequence[Layer] | None = None,
        apply_ln: bool = True,
        target: str | int | None = None,
        metrics: Sequence[str] = DEFAULT_METRICS,
    ) -> LensResult:
        """Read every layer at every position of a text.

        Args:
            text: Text, a chat, or token ids.
            top_k: Tokens kept per cell.
            site: ``resid_post`` (with the embedding as the first row), ``resid_pre``,
                ``resid_mid``, or what one component adds: ``attn_out``, ``mlp_out``, ``head_out``.
                Layers without it are left out. A tuned lens reads the first two alone.
            head: Which head, for ``head_out``: its z through its slice of the output projection,
                without the bias (and before a norm that follows attention).
            layer_indices: Blocks to read; None means all.
            apply_ln: Apply the final norm.
            target: A token, by text or id, whose probability and rank are added as metrics.
            metrics: Names out of `lens_metrics.METRICS`.

        Returns:
            A `LensResult`, with axes ``[row, position]``.

        Raises:
            InputError: the text, the target or another argument cannot be used.
            LayerError: there is no such layer.
            SiteError: no layer has such a site, or one that was named has not.
        """
        self.check_top_k(top_k)
        check_metrics(metrics)
        target_id = None if target is None else self.token_id(target)
        ids = self.encode(text)
        sites = self._row_sites(site, layer_indices, head)
        last = Site("resid_post", self.architecture.n_layers - 1)
        kept = self._record(ids, {*sites.values(), last})
        hidden = {row: self._hidden(kept, where, head) for row, where in sites.items()}
        return self.read(
            text, ids, range(len(ids)), hidden,
            lambda chunk: self.row_logits(kept[last][0, chunk], None),
            str(last.layer) if site == "resid_post" and apply_ln else None,
            site=site, top_k=top_k, apply_ln=apply_ln, target=target_id, metrics=metrics,
        )  # fmt: skip

    def encode(self, text: Prompt) -> list[int]:
        """Token ids of a prompt; InputError where the model cannot take them."""
        ids = encode(self.tokenizer, text)
        check_ids(ids, self.architecture.config)
        return ids

    def _record(self, ids: Sequence[int], sites: Iterable[Site], logits: bool = False) -> Recording:
        inputs = self.architecture.inputs(torch.tensor([ids], device="cpu"))
        return record(self.architecture, inputs, list(sites), logits=logits)

    def _row_sites(
        self, site: str, layer_indices: Sequence[Layer] | None = None, head: int | None = None
    ) -> dict[str, Site]:
        """What each row reads."""
        if self.tuned is not None and site not in TUNED_SITES:
            raise SiteError(
                f"a tuned lens reads the stream between blocks ({', '.join(TUNED_SITES)}), "
                f"not {site!r}; use a plain LogitLens"
            )
        return row_sites(self.architecture, site, layer_indices, head)

    def _hidden(self, kept: Recording, site: Site, head: int | None) -> Tensor:
        """``[position, d_model]`` of one row: what is read, or what a head adds to the stream."""
        value = kept[site][0]
        if head is None:
            return value
        arch = self.architecture
        scale = arch.structure[site.layer].scale
        return scale * arch.project_head(value, site.layer, head % arch.heads(site.layer)[0])

    def read(
        self,
        text: Prompt,
        ids: Sequence[int],
        positions: Sequence[int],
        hidden: Mapping[str, Tensor],
        final: Callable[[slice], Tensor] | None = None,
        final_row: str | None = None,
        *,
        site: str = "resid_post",
        top_k: int = 10,
        apply_ln: bool = True,
        target: str | int | None = None,
        metrics: Sequence[str] = DEFAULT_METRICS,
        each: Callable[[int, slice, Tensor], None] | None = None,
    ) -> LensResult:
        """Stream the rows through the head, one chunk of positions and one row at a time.

        Args:
            text: What was read.
            ids: Its tokens.
            positions: Absolute position of each column.
            hidden: Row label to ``[position, d_model]``.
            final: The model's own logits of some columns; needed unless ``metrics`` is empty.
            final_row: The row whose logits are ``final``'s, if one is.
            site: What the rows are.
            top_k: As in `run`.
            apply_ln: As in `run`.
            target: As in `run`.
            metrics: As in `run`.
            each: Sees every block of logits ``(row, columns, logits)`` before it is thrown away.

        Raises:
            InputError: an argument cannot be used.
        """
        self.check_top_k(top_k)
        target_id = None if target is None else self.token_id(target)
        meter = RowMeter(len(hidden), len(positions), top_k, metrics, target_id)
        following = [ids[p + 1] if p + 1 < len(ids) else -1 for p in positions]
        through = {row: previous_row(row) if site == "resid_pre" else row for row in hidden}
        vocabulary, device = self.architecture.config.vocab_size, self.architecture.stream_device
        for chunk in position_chunks(len(positions), vocabulary, device):
            reference = None if final is None else final(chunk)
            as_float = None if reference is None else reference.float()
            meter.start_chunk(chunk, as_float, torch.tensor(following[chunk], device="cpu"))
            known = {} if reference is None or final_row is None else {final_row: reference}
            rows = {row: (stream[chunk], through[row]) for row, stream in hidden.items()}
            for index, (row, logits) in enumerate(self._by_row(rows, known, apply_ln)):
                meter.add(index, logits.float(), is_reference=row in known)
                if each is not None:
                    each(index, chunk, logits)
        return self._result(text, ids, positions, tuple(hidden), site, meter)

    def _result(
        self,
        text: Prompt,
        ids: Sequence[int],
        positions: Sequence[int],
        rows: tuple[str, ...],
        site: str,
        meter: RowMeter,
    ) -> LensResult:
        strings = token_strings(self.tokenizer, ids)
        return LensResult(
            text=text if isinstance(text, str) else "".join(strings),
            tokens=tuple(strings[p] for p in positions),
            token_ids=tuple(ids[p] for p in positions),
            positions=tuple(positions),
            row_labels=rows,
            site=site,
            top_tokens=self.strings(meter.top_ids),
            top_ids=meter.top_ids,
            top_probs=meter.top_probs,
            top_logits=meter.top_logits,
            metrics=meter.metrics,
        )

    def _by_row(
        self,
        rows: Mapping[str, tuple[Tensor, str | None]],
        known: Mapping[str, Tensor],
        apply_ln: bool,
    ) -> Iterator[tuple[str, Tensor]]:
        """Each row's logits in turn, of its stream ``[position, d_model]`` and translator."""
        return logits_by_row(
            {row: partial(self._translated, *each) for row, each in rows.items()},
            known,
            partial(self.apply_lens_to_hidden_state, apply_ln=apply_ln),
            self.architecture.config.vocab_size,
            self.architecture.stream_device,
        )

    def row_logits(self, stream: Tensor, row: str | None, apply_ln: bool = True) -> Tensor:
        """Logits of a stream, if the lens is tuned through the row's translator (None: without)."""
        return self.apply_lens_to_hidden_state(self._translated(stream, row), apply_ln)

    def _translated(self, stream: Tensor, row: str | None) -> Tensor:
        if self.tuned is None or row is None:
            return stream
        return self.tuned.translate(row, stream)

    def check_top_k(self, top_k: int) -> None:
        """Refuse with InputError to list no token, or more than there are."""
        vocabulary = self.architecture.config.vocab_size
        if not 1 <= top_k <= vocabulary:
            raise InputError(f"top_k must lie in 1..{vocabulary}; came {top_k}")

    def strings(self, ids: np.ndarray) -> np.ndarray:
        """The tokens of an array of ids, as an object array of the same shape."""
        unique, places = np.unique(ids, return_inverse=True)
        texts = np.array(token_strings(self.tokenizer, unique.tolist()), dtype=object)
        return texts[places].reshape(ids.shape)

    def token_id(self, token: str | int) -> int:
        """The id of a token given by text (which must be exactly one token) or by id.

        Raises:
            InputError: it is no token, or several.
        """
        return token_id(self.tokenizer, token, self.architecture.config)

    # --- The contract's tables -------------------------------------------------------------------

    def get_layer_predictions(
        self,
        text: Prompt,
        layer_indices: Sequence[Layer] | None = None,
        top_k: int = 5,
        apply_ln: bool = True,
        return_logits: bool = False,
        return_probs: bool = False,
    ) -> dict[str, Any]:
        """The likeliest next tokens after every block, at every position.

        Args:
            text: Text, a chat, or token ids.
            layer_indices: Blocks to read, in any spelling; None means all.
            top_k: Tokens per position.
            apply_ln: Apply the final norm.
            return_logits: Also the full ``logits`` ``[position, vocab]`` of each layer (large).
            return_probs: Also the full ``probs``.

        Returns:
            ``input_text, input_tokens, input_ids``; ``final_logits`` ``[position, vocab]``, the
            model's own; and ``layers``: for each block ``top_k_tokens[position][k]``,
            ``top_k_probs`` and ``top_k_indices`` ``[position, k]``, best first.

        Raises:
            InputError: the text cannot be used.
            LayerError: there is no such layer.
        """
        self.check_top_k(top_k)
        layers = resolve_layers(self.architecture, layer_indices)
        ids = self.encode(text)
        kept = self._record(ids, [Site("resid_post", layer) for layer in layers], logits=True)
        assert kept.logits is not None
        final = kept.logits[0]
        full: dict[int, list[Tensor]] = {layer: [] for layer in layers}

        def keep(row: int, _chunk: slice, logits: Tensor) -> None:
            if return_logits or return_probs:
                full[layers[row]].append(logits.cpu())

        result = self.read(
            text, ids, range(len(ids)),
            {str(layer): kept[Site("resid_post", layer)][0] for layer in layers},
            lambda chunk: final[chunk],
            str(self.architecture.n_layers - 1) if apply_ln else None,
            top_k=top_k, apply_ln=apply_ln, metrics=(), each=keep,
        )  # fmt: skip
        table: dict[int, dict[str, Any]] = {}
        for row, layer in enumerate(layers):
            table[layer] = {
                "top_k_tokens": result.top_tokens[row].tolist(),
                "top_k_probs": result.top_probs[row],
                "top_k_indices": result.top_ids[row],
            }
            if return_logits:
                table[layer]["logits"] = torch.cat(full[layer])
            if return_probs:
                table[layer]["probs"] = torch.cat(full[layer]).float().softmax(-1)
        return {
            "input_text": result.text,
            "input_tokens": list(result.tokens),
            "input_ids": list(result.token_ids),
            "final_logits": final,
            "layers": table,
        }

    def get_convergence_metrics(self, text: Prompt, apply_ln: bool = True) -> dict[str, Any]:
        """How each layer's distribution compares with the final one.

        Args:
            text: Text, a chat, or token ids.
            apply_ln: Apply the final norm.

        Returns:
            Arrays ``[1 + n_layers, position]``, row 0 the embedding: ``kl_divergence`` (KL(final ‖
            layer), nats), ``top1_match`` (1 where the layer's best token is the final one, else 0),
            ``top1_rank`` (rank of the final best token in the layer, 0 is best), ``top1_logit``
            (logit of the layer's best token), ``entropy`` (nats); and ``input_tokens``,
            ``row_labels``.

        Raises:
            InputError: the text cannot be used.
        """
        names = ("kl_divergence", "top1_match", "top1_rank", "top1_logit", "entropy")
        result = self.run(text, 1, apply_ln=apply_ln, metrics=names)
        table: dict[str, Any] = {name: result.metrics[name] for name in names}
        return {**table, "input_tokens": list(result.tokens), "row_labels": list(result.row_labels)}

    def compare_to_input(self, text: Prompt, apply_ln: bool = True) -> dict[str, Any]:
        """How much of the input token each layer still says.

        Args:
            text: Text, a chat, or token ids.
            apply_ln: Apply the final norm.

        Returns:
            Arrays ``[1 + n_layers, position]``, row 0 the embedding: ``input_token_rank`` (0 is
            best), ``input_token_prob``, ``kl_from_input`` (KL(embedding ‖ layer), nats, the
            embedding's own lens being the reference); and ``input_tokens``, ``row_labels``.

        Raises:
            InputError: the text cannot be used.
        """
        ids = self.encode(text)
        sites = self._row_sites("resid_post")
        kept = self._record(ids, sites.values())
        measured = ("next_token_rank", "next_token_prob", "kl_divergence")
        meter = RowMeter(len(sites), len(ids), 1, measured)
        vocabulary, device = self.architecture.config.vocab_size, self.architecture.stream_device
        for chunk in position_chunks(len(ids), vocabulary, device):
            rows = {row: (kept[where][0, chunk], row) for row, where in sites.items()}
            for index, (_, row_logits) in enumerate(self._by_row(rows, {}, apply_ln)):
                logits = row_logits.float()
                if index == 0:
                    meter.start_chunk(chunk, logits, torch.tensor(ids[chunk], device="cpu"))
                meter.add(index, logits, is_reference=index == 0)
        named = zip(
            ("input_token_rank", "input_token_prob", "kl_from_input"), measured, strict=True
        )
        return {
            **{name: meter.metrics[metric] for name, metric in named},
            "input_tokens": token_strings(self.tokenizer, ids),
            "row_labels": list(sites),
        }

    # --- Printing and drawing ---------------------------------------------------------------------

    def print_layer_predictions(
        self, text: Prompt, layer_step: int = 2, max_tokens: int = 10
    ) -> None:
        """Print each layer's best token at the first positions; the last layer is always shown.

        Args:
            text: Text, a chat, or token ids.
            layer_step: Show every so many layers.
            max_tokens: Show at most this many positions.
        """
        result = self.run(text, 1, metrics=("kl_divergence",))
        print(result.to_text(layer_step, max_tokens))  # noqa: T201

    def plot_convergence(
        self,
        text: Prompt,
        figsize: tuple[float, float] | None = None,
        save_path: str | Path | None = None,
    ) -> Any:
        """Draw the four convergence panels. See `visualization.plot_convergence_analysis`."""
        from figures import plot_convergence_panels

        return plot_convergence_panels(
            self.get_convergence_metrics(text), figsize=figsize, save_path=save_path
        )

    def plot_input_preservation(
        self,
        text: Prompt,
        figsize: tuple[float, float] | None = None,
        save_path: str | Path | None = None,
    ) -> Any:
        """Draw the two preservation panels. See `visualization.plot_token_preservation`."""
        from figures import plot_preservation_panels

        return plot_preservation_panels(
            self.compare_to_input(text), figsize=figsize, save_path=save_path
        )
