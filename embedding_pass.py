"""Passes of one prompt whose token embeddings are exchanged, and gradients with respect to them.

`embedding_pass` opens a model for them: what its embedding module gives is replaced, row by row,
while ``input_ids`` stay (so embeddings per layer, as in Gemma 3n, stay those of the prompt). What a
model adds behind that module (learned positions, a norm, a multiplier) is its own.

`EmbeddingPass.gradients` takes one forward pass for any number of targets, and one
vector-Jacobian product for each. The head is passed back once for all targets that read different
positions, since a target's logits are made of its own position alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from base_run import logits_at, read_only
from forward_pass import (
    ArchitectureError,
    Hook,
    ModuleTap,
    Recording,
    Site,
    Tap,
    attached,
    evaluate,
    recording,
)
from gradient_scale import GradientScale
from interrupts import UndoStack, enable_grad, no_grad
from memory_limits import free_bytes, in_words, is_out_of_memory
from model_architecture import Architecture
from model_lock import hold
from module_devices import exact

LIKED_TOKENS = {"cpu": 2**10}
"""Tokens (rows × positions) of a pass that a processor likes; `MANY_TOKENS` elsewhere."""
MANY_TOKENS = 2**15

TABLE_ROWS = 4096
"""Rows of the embedding looked up at a time, for its mean."""

UNDIFFERENTIABLE = (
    "does not require grad",
    "does not have a grad_fn",
    "inplace operation",
    "in-place operation",
    "inference tensor",
    "derivative",
    "not implemented",
    "backward",
    "not have been used in the graph",
)
"""What torch says, in small letters, where there is no gradient."""


@dataclass(frozen=True, eq=False)
class Measure:
    """The numbers that are attributed, as a function of logits."""

    values: Callable[[Tensor], Tensor]
    """Logits ``[row, read, vocab]``, of at least float32, → ``[row, target]``."""
    slots: tuple[int, ...] | None
    """Which entry of ``read`` each target is made of; None: there is one, made of all of them."""

    def __call__(self, logits: Tensor) -> Tensor:
        """``[row, target]``, in float32, or float64 for such logits."""
        return self.values(logits.to(torch.promote_types(logits.dtype, torch.float32)))

    @property
    def count(self) -> int:
        """Number of targets."""
        return 1 if self.slots is None else len(self.slots)

    def rounds(self) -> list[list[int]]:
        """Targets by number, in groups within which no two read the same position."""
        groups: list[list[int]] = []
        seen: dict[int, int] = {}
        for number, slot in enumerate(self.slots or [0]):
            place = seen[slot] = seen.get(slot, -1) + 1
            if place == len(groups):
                groups.append([])
            groups[place].append(number)
        return groups


# --- The opened model -----------------------------------------------------------------------------


class EmbeddingPass:
    """One prompt in an opened model (see `embedding_pass`); `logits` runs it with any embeddings.

    Attributes:
        read: Absolute positions of which logits are made, ascending.
        kept: Sites that were asked for, of the latest pass, in its graph.
        embedding: ``[position, d]``, what the embedding gives for the prompt.
        base: ``[1, read, vocab]``, logits of the prompt as it is.
    """

    def __init__(self, architecture: Architecture, ids: Sequence[int], read: Sequence[int]) -> None:
        self.architecture = architecture
        self.ids = torch.tensor([list(ids)], device="cpu")
        self.read = tuple(sorted(read))
        self.kept = Recording()
        self.embedding = torch.empty(0, device="cpu")
        self.base = torch.empty(0, device="cpu")
        self._given: Tensor | None = None
        self._lookups = 0
        self._entered: list[Tensor] = []

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return self.ids.shape[1]

    @property
    def name(self) -> str:
        """The model's class."""
        return type(self.architecture.model).__name__

    def logits(self, embeddings: Tensor | None) -> Tensor:
        """Logits ``[row, read, vocab]`` for embeddings ``[row, position, d]``; None: its own.

        Raises:
            ArchitectureError: the model does not look its tokens up once.
        """
        rows = 1 if embeddings is None else len(embeddings)
        self._given, self._lookups = embeddings, 0
        self._entered.clear()
        inputs = self.architecture.inputs(self.ids.expand(rows, -1))
        made = self.architecture.model(**inputs, use_cache=False).logits
        if self._lookups != 1:
            raise ArchitectureError(
                f"{self.name} looks its tokens up {self._lookups} times in a pass; attribution to "
                "tokens needs a model that does so once"
            )
        return logits_at(made, self.read)

    def exchange(self, value: Tensor) -> Tensor | None:
        """What stands in the place of what the embedding gives.

        Raises:
            ArchitectureError: that is not ``[row, position, d]``.
        """
        self._lookups += 1
        rows = 1 if self._given is None else len(self._given)
        if value.dim() != 3 or value.shape[:2] != (rows, self.length):
            raise ArchitectureError(
                f"{self.name} embeds {rows} x {self.length} tokens as {tuple(value.shape)}; "
                "attribution to tokens needs [row, position, d]"
            )
        if self._given is None:
            self.embedding = value.detach()[0].clone()
        return self._given

    def enter_head(self, value: Tensor) -> None:
        """Remember what enters the head."""
        self._entered.append(value)

    def _before_head(self) -> Tensor | None:
        """What entered the head, ``[row, read, d]``, if that is all that the logits are made of."""
        if len(self._entered) != 1:
            return None
        (hidden,) = self._entered
        fits = hidden.dim() == 3 and hidden.shape[1] == len(self.read)
        return hidden if fits and hidden.requires_grad else None

    def gradients(
        self, points: Tensor, measure: Measure, take: Callable[[int, Tensor], None]
    ) -> None:
        """Gradient of every target with respect to the embeddings, from one forward pass.

        Args:
            points: Embeddings ``[row, position, d]``.
            measure: The targets.
            take: Is given each target's number and its gradient ``[row, position, d]``, float32
                where the model computes in float16.

        Raises:
            ArchitectureError: the model has no gradient.
        """
        scale = GradientScale(self.architecture.model, by_position=measure.slots is not None)
        try:
            with enable_grad(), differentiable(self.name):
                leaf = points.detach().requires_grad_()
                values = measure(scale.widen(self.logits(leaf)))
                self._pull_back(values, measure, leaf, scale, take)
        finally:  # a batch that is tried again must not find the memory of this one taken
            self._given = None
            self._entered.clear()

    def _pull_back(
        self,
        values: Tensor,
        measure: Measure,
        leaf: Tensor,
        scale: GradientScale,
        take: Callable[[int, Tensor], None],
    ) -> None:
        hidden = self._before_head()
        groups = measure.rounds()
        for group in groups:
            behind = None
            if hidden is not None:
                total = values[:, group].sum()
                (behind,) = torch.autograd.grad(total, hidden, retain_graph=True)
            for number in group:
                output = values[:, number].sum() if hidden is None else hidden
                seed = None if behind is None else _own_part(behind, measure.slots, number)
                keep = number != groups[-1][-1]
                (found,) = torch.autograd.grad(output, leaf, seed, retain_graph=keep)
                take(number, scale.undo(found, measure.slots[number] if measure.slots else 0))


def _own_part(behind: Tensor, slots: tuple[int, ...] | None, number: int) -> Tensor:
    """One target's part of the gradient at the head's input: that at its own position."""
    if slots is None or behind.shape[1] == 1:
        return behind
    seed = torch.zeros_like(behind)
    seed[:, slots[number]] = behind[:, slots[number]]
    return seed


@contextmanager
def embedding_pass(
    architecture: Architecture,
    ids: Sequence[int],
    read: Sequence[int],
    sites: Sequence[Site] = (),
) -> Iterator[EmbeddingPass]:
    """Open a model for passes of a prompt with other embeddings; it is as before afterwards.

    While open, the model is in evaluation mode and none of its parameters requires a gradient.

    Args:
        architecture: The model, with a head.
        ids: The prompt.
        read: Positions whose logits are wanted.
        sites: What to keep of each pass, in its graph.

    Yields:
        The opened prompt; it has been run once.

    Raises:
        ArchitectureError: the model does not look its tokens up once, or has no head.
    """
    architecture.require_head("attribution to tokens")
    opened = EmbeddingPass(architecture, ids, read)
    taps: list[tuple[Tap, Hook]] = [(ModuleTap(_lookup(architecture)), opened.exchange)]
    looks: list[tuple[Tap, Any]] = []
    head = architecture.model.get_output_embeddings()
    if isinstance(head, nn.Module):
        looks.append((ModuleTap(head, at_input=True), opened.enter_head))
    with UndoStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        evaluate(stack, architecture.model)
        if sites:
            opened.kept = stack.enter_context(recording(architecture, sites, detach=False))
        freeze(stack, architecture.model)
        read_only(stack, architecture, opened.read)
        stack.enter_context(attached(taps))
        stack.enter_context(attached(looks, last=True))
        stack.callback(opened.kept.clear)
        with no_grad():
            opened.base = opened.logits(None).detach()
        yield opened


def _lookup(architecture: Architecture) -> nn.Module:
    """The module that turns token ids into embeddings.

    Raises:
        ArchitectureError: the model has none.
    """
    try:
        module: Any = architecture.model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        module = None
    if not isinstance(module, nn.Module):
        raise ArchitectureError(
            f"{type(architecture.model).__name__} names no embedding of its tokens "
            "(get_input_embeddings)"
        )
    return module


def freeze(stack: ExitStack, model: nn.Module) -> None:
    """Until ``stack`` closes, keep parameters out of the graph; it holds less memory then."""
    trained = [name for name, each in model.named_parameters() if each.requires_grad]

    def put_back() -> None:
        parameters = dict(model.named_parameters())  # offloading makes new ones under old names
        for name in trained:
            parameters[name].requires_grad_(True)

    stack.callback(put_back)
    for parameter in model.parameters():
        parameter.requires_grad_(False)


@contextmanager
def differentiable(name: str) -> Iterator[None]:
    """Say of an error of autograd that a model has no gradient, and what does without.

    Raises:
        ArchitectureError: instead of autograd's own error.
        RuntimeError: as it came, where it is about something else.
        AssertionError: never; a model's own becomes an ArchitectureError too.
    """
    try:
        yield
    except (RuntimeError, AssertionError) as error:
        text = str(error).lower()
        known = any(message in text for message in UNDIFFERENTIABLE)
        known = known or isinstance(error, AssertionError)  # a model that refuses by itself
        if isinstance(error, ArchitectureError) or is_out_of_memory(error) or not known:
            raise
        raise ArchitectureError(
            f"{name} has no gradient with respect to its embeddings (quantized weights, a kernel "
            "without a backward pass, or an operation in place): "
            f"{str(error).partition(chr(10))[0].rstrip('.')}. method='occlusion' needs none"
        ) from error


# --- Embeddings to compare with -------------------------------------------------------------------


@no_grad()
def token_embeddings(architecture: Architecture, ids: Sequence[int]) -> Tensor:
    """What the embedding gives for some tokens by themselves, ``[token, d]``."""
    given = torch.tensor([list(ids)], device=architecture.input_device)
    with UndoStack() as stack:
        hold(stack, architecture.model)  # another thread's pass exchanges what is looked up
        return _lookup(architecture)(given)[0].detach().clone()


def mean_embedding(architecture: Architecture) -> Tensor:
    """The mean over the whole vocabulary of what the embedding gives, ``[d]``, in float32."""
    size = int(architecture.config.vocab_size)
    total = torch.zeros((), device="cpu")
    for start in range(0, size, TABLE_ROWS):
        rows = token_embeddings(architecture, range(start, min(start + TABLE_ROWS, size)))
        rows = exact(rows)
        total = total.to(rows.device) + rows.sum(0)
    return (total / size).float()


# --- How many rows go into a pass -----------------------------------------------------------------


def rows_per_pass(opened: EmbeddingPass, *, graph: bool) -> int:
    """Rows that fit into half of the free memory, and that a processor likes."""
    device = opened.architecture.input_device
    liked = LIKED_TOKENS.get(device.type, MANY_TOKENS)
    fitting = free_bytes(device) / 2 / _bytes_per_token(opened, graph)
    return max(1, int(min(fitting, liked) // opened.length))


def _bytes_per_token(opened: EmbeddingPass, graph: bool) -> float:
    arch = opened.architecture
    config, width = arch.config, opened.embedding.shape[-1]
    inner = getattr(config, "intermediate_size", None) or 4 * width
    inner = max(inner) if isinstance(inner, list | tuple) else inner
    heads = getattr(config, "num_attention_heads", None) or 1
    per_block = 16 * width + 4 * int(inner) + 2 * heads * opened.length
    logits = 4 * config.vocab_size * len(opened.read) / opened.length
    return (per_block * (arch.n_layers if graph else 1) + logits) * 4


def memory_needed(opened: EmbeddingPass, rows: int, *, graph: bool) -> str:
    """What a pass of some rows needs beside the weights, and what is free."""
    needed = in_words(rows * opened.length * _bytes_per_token(opened, graph))
    free = in_words(free_bytes(opened.architecture.input_device))
    return f"{rows} x {opened.length} tokens in one pass need about {needed}, and {free} are free"
