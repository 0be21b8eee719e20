"""Where a model's blocks are, what calls them and what makes the logits: found by structure."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from torch import nn

from forward_pass import ArchitectureError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BLOCK_COUNTS = ("num_hidden_layers", "num_layers", "decoder_layers")
"""Names in configs that may say how many blocks there are, in order of trying."""


def text_config(config: Any) -> Any:
    """The part of a config that describes the decoder."""
    return config.get_text_config(decoder=True)


def attention_configs(model: PreTrainedModel) -> list[Any]:
    """Every config object that a model's modules read their attention implementation from."""
    owners = [model, *model.modules()]
    configs = {
        id(config): config
        for owner in owners
        if (config := getattr(owner, "config", None)) is not None
    }
    return [
        config for config in configs.values() if hasattr(config, "_attn_implementation_internal")
    ]


def find_blocks(model: PreTrainedModel, config: Any) -> tuple[str, nn.ModuleList]:
    """The blocks and their path: the outermost list with as many entries as the config says.

    Raises:
        ArchitectureError: there is none; the message lists those that are there.
    """
    lists = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
    ]
    counts = [getattr(config, name, None) for name in BLOCK_COUNTS]
    candidates = next(
        (
            found
            for wanted in counts
            if wanted and (found := [entry for entry in lists if len(entry[1]) == wanted])
        ),
        [],
    )
    if not candidates:
        there = ", ".join(f"{path} ({len(module)})" for path, module in lists)
        if counts[0] is None:
            raise ArchitectureError(
                f"the config of {type(model).__name__} does not say how many blocks it has "
                f"(num_hidden_layers); it has {there or 'no ModuleList at all'}"
            )
        raise ArchitectureError(
            f"{type(model).__name__} has no ModuleList of {counts[0]} blocks "
            f"(config.num_hidden_layers); it has {there or 'no ModuleList at all'}"
        )
    outermost = min(path.count(".") for path, _ in candidates)

    def size(entry: tuple[str, nn.ModuleList]) -> int:
        return sum(parameter.numel() for parameter in entry[1].parameters())

    return max((entry for entry in candidates if entry[0].count(".") == outermost), key=size)


def find_body(model: PreTrainedModel, blocks_path: str) -> nn.Module:
    """The innermost module around the blocks that takes token ids."""
    path = blocks_path
    while path:
        path, _, _ = path.rpartition(".")
        body = model.get_submodule(path)
        if "input_ids" in inspect.signature(body.forward).parameters:
            return body
    return model


def find_head(model: PreTrainedModel) -> nn.Module | None:
    """The module that makes the logits; None in a base model."""
    try:
        return model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def base_prefix(model: PreTrainedModel) -> str:
    """What a base model's module names lack, compared with the same model with a head."""
    prefix = getattr(model, "base_model_prefix", "")
    return f"{prefix}." if prefix and not hasattr(model, prefix) else ""
