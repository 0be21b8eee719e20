"""Interventions that stay in force while a context is open: patches and steering, also in generate.

1. An `ActivationPatch` says where (layer, site, head or neurons, positions) and what (a tensor, a
   number, a function, a record of another run) shall stand there; a `SteeringVector` is a direction
   to add to the residual stream, or to take out of it.
2. An `InterventionHandler` resolves both against a model when they are registered, so that a wrong
   layer, site, head or width fails at once, and the positions against each sequence that runs
   (`pass_positions`), before its blocks do.
3. On leaving the context the hooks are gone. An intervention that never changed a token is an
   error: it would otherwise look like an effect of zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from forward_pass import InputError, attached, run_every_position
from interrupts import UndoStack, interrupts_held
from model_architecture import Architecture
from pass_positions import SequenceClock
from patch_binding import ActivationPatch, Bound, bind, by_token, token_shape, token_shapes
from steering_vector import SteeringVector

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "ActivationPatch",
    "Bound",
    "InterventionHandler",
    "SteeringVector",
    "bind",
    "by_token",
    "refuse_chunks",
    "token_shape",
]


def refuse_chunks(generation_kwargs: Mapping[str, Any]) -> None:
    """A prompt that is fed in chunks cannot be told from one that is generated token by token.

    Raises:
        InputError: ``prefill_chunk_size`` is given.
    """
    size = generation_kwargs.get("prefill_chunk_size")
    if size is not None:
        raise InputError(
            f"prefill_chunk_size={size} splits the prompt, so that positions would count from its "
            "first chunk: leave it out while interventions act"
        )


class InterventionHandler:
    """Holds patches and steering vectors in force while it is open.

        with handler:
            outputs = model(**inputs)        # or model.generate(...)

    Registering and clearing inside the ``with`` takes effect at once. Several interventions on one
    place act in the order registered; an outer handler acts before an inner one.

    Args:
        model: The model that will be called.
        tokenizer: Not needed; accepted because other tools take it.

    Raises:
        ArchitectureError: it is not a decoder-only language model.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.architecture = Architecture(model)
        token_shapes(self.architecture)  # understand the model before hooks change it
        self.interventions: list[Bound] = []
        """In the order registered."""
        self._stack: ExitStack | None = None
        self._attached = UndoStack()
        self._clock = SequenceClock()

    def __repr__(self) -> str:
        state = "open" if self._stack is not None else "closed"
        return f"InterventionHandler({[bound.source for bound in self.interventions]}, {state})"

    def register_activation_patch(self, patch: ActivationPatch) -> InterventionHandler:
        """Add a patch; returns the handler, so that calls can be chained.

        Raises:
            LayerError: there is no such layer.
            SiteError: the layer has no such site, head or neuron.
            InputError: the value does not fit.
        """
        return self._register(patch)

    def register_steering_vector(self, vector: SteeringVector) -> InterventionHandler:
        """Add a steering vector; returns the handler, so that calls can be chained.

        Raises:
            LayerError: there is no such layer.
            InputError: the vector has another width than the stream.
        """
        return self._register(vector)

    def _register(self, item: ActivationPatch | SteeringVector) -> InterventionHandler:
        bound = bind(self.architecture, item)
        self.interventions.append(bound)
        if self._stack is not None:
            self._attach(bound)
        return self

    def clear_interventions(self) -> None:
        """Forget all of them, also while the handler is open."""
        self._attached.close()
        self.interventions.clear()

    def _attach(self, bound: Bound) -> None:
        tap = self.architecture.tap(bound.site)
        self._attached.enter_context(attached([(tap, bound.hook(self._clock))]))

    def _check_pass(self) -> None:
        """Before the blocks of a pass run: does every value fit the tokens that are meant?"""
        for bound in self.interventions:
            bound.check(self._clock)

    def __enter__(self) -> InterventionHandler:
        """Attach everything registered.

        Raises:
            InputError: the handler is open already.
        """
        if self._stack is not None:
            raise InputError("this handler is open already; make a second one to nest them")
        try:
            with interrupts_held(), UndoStack() as stack:
                self._clock = SequenceClock()
                self._clock.attach(stack, self.architecture.body)
                self._clock.announce_to(self._check_pass)
                run_every_position(stack, self.architecture)
                stack.enter_context(self._attached)
                for bound in self.interventions:
                    bound.places.clear()
                    self._attach(bound)
                self._stack = stack.pop_all()
        except BaseException:
            self._detach()
            raise
        return self

    def _detach(self) -> None:
        with interrupts_held():
            stack, self._stack = self._stack, None
            if stack is not None:
                stack.close()

    def __exit__(self, kind: Any, _error: Any, _trace: Any) -> None:
        """Remove the hooks.

        Raises:
            InputError: an intervention never changed one of the tokens that it names, and nothing
                else went wrong.
        """
        self._detach()
        if kind is None:
            for bound in self.interventions:
                bound.check_done(self._clock)
