"""The tuned lens: the logit lens with a learned affine translator per layer (Belrose et al. 2023).

"Eliciting Latent Predictions from Transformers with the Tuned Lens", equation 8: the translator of
layer l maps its stream h to ``h + A_l h + b_l``, which then goes through the model's own final norm
and head.

1. Each batch of text runs through the model once; every block's output and the final logits are
   kept.
2. For every row but the last, KL(final ‖ translated row) in nats is minimised by Adam, row after
   row, so that one row's logits are in memory at a time.
3. Translators start at zero: an untrained tuned lens is the logit lens.

Rows are named as in `logit_lens`: ``"embed"``, then block indices. The last block needs no
translator.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from array_files import open_arrays, write_arrays
from forward_pass import ArchitectureError, InputError, RecordFileError, Site, record, resume
from interrupts import enable_grad
from model_architecture import Architecture
from tokenization import Prompt, check_ids, encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KIND = "tuned lens"
"""What a file of `TunedLens.save` says that it holds."""

VERSION = 1
"""Of that file's schema."""


class TunedLens:
    """Translators for one model's layers; hand it to ``LogitLens(…, tuned=…)``.

    Args:
        learning_rate: Of Adam; it falls linearly to zero over the steps.
        steps: Batches to train on; 0 leaves the translators at zero.
        batch_size: Rows of text per step.
        context: Tokens per row of text.
        seed: Of the order of the batches.

    Attributes:
        rows_: Labels of the rows that have a translator, after `fit`.
        weight_: ``[row, d_model, d_model]``, A of each row.
        bias_: ``[row, d_model]``, b of each row.
        history_: ``[step, row]``, KL in nats before each step.
    """

    def __init__(
        self,
        learning_rate: float = 1e-3,
        steps: int = 500,
        batch_size: int = 8,
        context: int = 64,
        seed: int = 0,
    ) -> None:
        self.learning_rate, self.steps, self.batch_size = learning_rate, steps, batch_size
        self.context, self.seed = context, seed
        self.rows_: tuple[str, ...] = ()
        self.weight_: Tensor
        self.bias_: Tensor
        self.history_: Tensor
        self.model_: str = ""

    def __repr__(self) -> str:
        state = f"{len(self.rows_)} rows" if self.rows_ else "not fitted"
        return f"TunedLens({state}, steps={self.steps}, seed={self.seed})"

    # --- Training --------------------------------------------------------------------------------

    def fit(
        self,
        architecture: Architecture,
        tokenizer: PreTrainedTokenizerBase | None,
        texts: Sequence[Prompt],
        show_progress: bool = True,
    ) -> TunedLens:
        """Learn the translators from text; the model itself is not changed.

        Args:
            architecture: The model, with a head.
            tokenizer: For texts.
            texts: Joined by their tokens and cut into rows of ``context`` tokens.
            show_progress: A progress bar, where there is a terminal to show it.

        Returns:
            This object, fitted.

        Raises:
            InputError: the texts hold less than one row of tokens, or an argument of this object is
                out of range.
            ArchitectureError: the model has no head.
        """
        architecture.require_head("the tuned lens")
        self._check_arguments()
        rows = self._token_rows(architecture, tokenizer, texts)
        labels = ("embed", *map(str, range(architecture.n_layers - 1)))
        width, device = architecture.d_model, architecture.stream_device
        self.weight_ = torch.zeros(len(labels), width, width, device=device)
        self.bias_ = torch.zeros(len(labels), width, device=device)
        parameters = [self.weight_.requires_grad_(), self.bias_.requires_grad_()]
        optimizer = torch.optim.Adam(parameters, lr=self.learning_rate)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1e-3, max(self.steps, 1))
        self.history_ = torch.zeros(self.steps, len(labels), device="cpu")
        hidden = not show_progress or not sys.stderr.isatty()
        batches = self._batches(rows)
        for step in tqdm(range(self.steps), desc="tuned lens", unit="step", disable=hidden):
            optimizer.zero_grad()
            self.history_[step] = self._accumulate_gradients(architecture, next(batches))
            optimizer.step()
            schedule.step()
        self.weight_, self.bias_ = self.weight_.detach(), self.bias_.detach()
        self.rows_, self.model_ = labels, type(architecture.model).__name__
        return self

    def _check_arguments(self) -> None:
        least = {"steps": 0, "batch_size": 1, "context": 1, "learning_rate": 0.0}
        for name, bound in least.items():
            if not getattr(self, name) >= bound:
                raise InputError(f"{name} must be at least {bound}; came {getattr(self, name)}")

    def _token_rows(
        self,
        architecture: Architecture,
        tokenizer: PreTrainedTokenizerBase | None,
        texts: Sequence[Prompt],
    ) -> Tensor:
        ids = [token for text in texts for token in encode(tokenizer, text)]
        count = len(ids) // self.context
        if count == 0:
            raise InputError(
                f"the texts have {len(ids)} tokens; one row takes context={self.context}"
            )
        rows = torch.tensor(ids[: count * self.context], device="cpu").view(count, self.context)
        for row in rows.tolist():
            check_ids(row, architecture.config)
        return rows

    def _batches(self, rows: Tensor) -> Iterator[Tensor]:
        """Rows in a new random order each time round, for ever."""
        generator = torch.Generator().manual_seed(self.seed)
        waiting = torch.empty(0, dtype=torch.long, device="cpu")
        size = min(self.batch_size, len(rows))
        while True:
            if len(waiting) < size:
                waiting = torch.cat(
                    [waiting, torch.randperm(len(rows), generator=generator, device="cpu")]
                )
            yield rows[waiting[:size]]
            waiting = waiting[size:]

    def _accumulate_gradients(self, architecture: Architecture, batch: Tensor) -> Tensor:
        """Add every row's gradient; returns their KL in nats, ``[row]``."""
        inputs = architecture.inputs(batch)
        n_layers = architecture.n_layers
        sites = [
            Site("resid_pre", 0),
            *(Site("resid_post", layer) for layer in range(n_layers - 1)),
        ]
        kept = record(architecture, inputs, sites, logits=True)
        assert kept.logits is not None
        target = kept.logits.float().log_softmax(-1)
        losses = []
        with enable_grad(), _frozen(architecture.model):
            for row, site in enumerate(sites):
                stream = _translated(kept[site], self.weight_[row], self.bias_[row])
                logits = resume(architecture, inputs, n_layers, stream)
                loss = nn.functional.kl_div(
                    logits.float().log_softmax(-1), target, log_target=True, reduction="none"
                )
                mean = loss.sum(-1).mean()
                mean.backward()
                losses.append(mean.detach())
        return torch.stack(losses)

    # --- Use -------------------------------------------------------------------------------------

    def require_fit(self, architecture: Architecture) -> None:
        """Check that there are translators, and that they fit a model.

        Raises:
            ArchitectureError: not fitted, or fitted on a model of other sizes.
        """
        if not self.rows_:
            raise ArchitectureError(
                "this tuned lens is not fitted: call fit(architecture, tokenizer, texts), or load"
            )
        found = (len(self.rows_), self.bias_.shape[1])
        if found != (architecture.n_layers, architecture.d_model):
            raise ArchitectureError(
                f"this tuned lens was fitted on {found[0]} layers of width {found[1]}; "
                f"the model has {architecture.n_layers} of width {architecture.d_model}"
            )

    def translate(self, row: str, stream: Tensor) -> Tensor:
        """A row's stream through its translator.

        Args:
            row: ``"embed"`` or a block index as text; the last block's stream is handed on.
            stream: ``[…, d_model]``.
        """
        if row not in self.rows_:
            return stream
        index = self.rows_.index(row)
        weight, bias = self.weight_[index].to(stream.device), self.bias_[index].to(stream.device)
        return _translated(stream, weight, bias)

    def save(self, path: str | Path) -> None:
        """Write the translators into one safetensors file with a JSON header, atomically.

        Raises:
            ArchitectureError: there is nothing to save yet.
            RecordFileError: the file cannot be written.
        """
        if not self.rows_:
            raise ArchitectureError("this tuned lens is not fitted; there is nothing to save")
        arguments = {
            n: getattr(self, n) for n in ("learning_rate", "steps", "batch_size", "context", "seed")
        }
        content = {"arguments": arguments, "rows": list(self.rows_), "model": self.model_}
        arrays = {"weight": self.weight_.cpu(), "bias": self.bias_.cpu(), "history": self.history_}
        write_arrays(Path(path), "safetensors", KIND, VERSION, content, arrays)

    @classmethod
    def load(cls, path: str | Path) -> TunedLens:
        """Read what `save` wrote.

        Raises:
            RecordFileError: the file is not what `save` writes.
        """
        with open_arrays(Path(path), KIND, VERSION) as stored:
            content: dict[str, Any] = stored.content
            lens = cls(**content["arguments"])
            lens.rows_, lens.model_ = tuple(content["rows"]), content["model"]
            lens.weight_, lens.bias_ = stored.read("weight"), stored.read("bias")
            lens.history_ = stored.read("history")
            width = lens.bias_.shape[-1]
            shapes = {tuple(lens.bias_.shape), tuple(lens.weight_.shape[:2])}
            if shapes != {(len(lens.rows_), width)} or lens.weight_.shape[2:] != (width,):
                raise RecordFileError(
                    f"{len(lens.rows_)} rows, but A is {tuple(lens.weight_.shape)} and b "
                    f"{tuple(lens.bias_.shape)}"
                )
        return lens


def _translated(stream: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``h + A h + b`` in float32, handed on in the stream's dtype."""
    h = stream.float()
    return (h + h @ weight.T + bias).to(stream.dtype)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """While open, the model's own parameters ask for no gradient; then those that did ask again."""
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)
