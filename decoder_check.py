"""Is a model a decoder? Refusing those that are none, by what they do.

A decoder's token sees itself and earlier tokens. Most models need no test: their class is one of
transformers' causal language models and no attention of theirs says that it is not causal. The
others are run twice, on texts that differ in the last token alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from forward_pass import ArchitectureError, evaluate
from interrupts import UndoStack, no_grad
from module_devices import exact

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PURPOSE = "this toolkit analyses decoder-only language models"


def refuse_encoder_decoder(config: Any, name: str) -> None:
    """Raise ArchitectureError where a config says that the model is an encoder-decoder."""
    if getattr(config, "is_encoder_decoder", False):
        raise ArchitectureError(f"{name} is an encoder-decoder; {PURPOSE}")


def refuse_encoder(model: PreTrainedModel, body: nn.Module, inputs: Mapping[str, Tensor]) -> None:
    """Refuse a doubtful model whose tokens see later ones.

    Args:
        model: The model; nothing is run where its class leaves no doubt.
        body: The module that is called.
        inputs: One row of a few tokens, as ``body`` takes them.

    Raises:
        ArchitectureError: it is an encoder, or takes no token ids.
    """
    if not is_doubtful(model):
        return
    if not takes_token_ids(body):
        raise ArchitectureError(f"{type(model).__name__} takes no token ids; {PURPOSE}")
    if later_token_effect(model, body, inputs) > 0:
        raise ArchitectureError(
            f"{type(model).__name__} is an encoder: its tokens see later ones; {PURPOSE} (where "
            "the config has is_decoder, a model trained as a decoder needs is_decoder=True there)"
        )


def takes_token_ids(body: nn.Module) -> bool:
    """Whether a module's ``forward`` takes ``input_ids``, by that name or any."""
    parameters = inspect.signature(body.forward).parameters
    anything = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    return "input_ids" in parameters or (anything and "hidden_states" not in parameters)


def is_doubtful(model: PreTrainedModel) -> bool:
    """Whether a model's class or an attention module gives a reason to think it no decoder."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

    kind = type(model.config)
    known_as_other = kind in MODEL_MAPPING and kind not in MODEL_FOR_CAUSAL_LM_MAPPING
    return known_as_other or any(
        getattr(module, "is_causal", True) is False for module in model.modules()
    )


@no_grad()
def later_token_effect(model: nn.Module, body: nn.Module, inputs: Mapping[str, Tensor]) -> float:
    """How much the last token changes what ``body`` returns at earlier positions.

    Args:
        model: The model; dropout is off meanwhile.
        body: The module that is called.
        inputs: One row of at least two tokens.

    Returns:
        The largest absolute difference in units of the largest value; 0 where it is rounding.
    """
    ids = inputs["input_ids"]
    changed = ids.clone()
    changed[:, -1] = ids[:, 0]
    with UndoStack() as stack:
        evaluate(stack, model)
        one, other = (
            exact(body(**{**inputs, "input_ids": each})[0][:, :-1]) for each in (ids, changed)
        )
    difference = float((one - other).abs().max() / one.abs().max().clamp(min=1e-30))
    dtype = next(model.parameters()).dtype
    rounding = torch.finfo(dtype if dtype.is_floating_point else torch.float32).eps ** 0.5
    return difference if difference > rounding else 0.0
