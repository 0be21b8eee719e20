"""What a model or its config says of itself: sizes, parameters, modules by name; nothing is run.

`architecture_summary` reads a config; `parameter_count`, `find_module`, `part_names` and
`weights_of` read a model that is there. `model_loader.ModelInspector` asks them about a folder or a
hub id.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from block_finding import text_config
from forward_pass import LayerError
from model_architecture import Architecture, Layer
from model_shards import whole_weight

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SUMMARY_FIELDS = {
    "model_type": ("model_type",),
    "num_layers": ("num_hidden_layers",),
    "hidden_size": ("hidden_size",),
    "num_attention_heads": ("num_attention_heads",),
    "head_dim": ("head_dim",),
    "intermediate_size": ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"),
    "vocab_size": ("vocab_size",),
    "max_position_embeddings": ("max_position_embeddings", "max_seq_len"),
    "activation_function": ("activation_function", "hidden_act", "hidden_activation", "activation"),
}
"""Keys of the architecture summary, and the config attributes that may hold each."""


def architecture_summary(config: Any) -> dict[str, Any]:
    """What a config says of the decoder; a key is None where the config does not say.

    Args:
        config: A Hugging Face config.

    Returns:
        The keys of `SUMMARY_FIELDS`.
    """
    config = text_config(config)
    summary = {
        key: next(
            (value for name in names if (value := getattr(config, name, None)) is not None), None
        )
        for key, names in SUMMARY_FIELDS.items()
    }
    hidden, heads = summary["hidden_size"], summary["num_attention_heads"]
    if summary["head_dim"] is None and isinstance(hidden, int) and isinstance(heads, int):
        summary["head_dim"] = hidden // heads
    left_open = any(
        getattr(config, name, 0) is None for name in SUMMARY_FIELDS["intermediate_size"]
    )
    if summary["intermediate_size"] is None and left_open and isinstance(hidden, int):
        summary["intermediate_size"] = 4 * hidden  # n_inner=None means four times the width
    return summary


def format_summary(summary: dict[str, Any], title: str) -> str:
    """A summary as aligned text."""
    width = max(len(key) for key in summary)
    rows = (
        f"  {key:<{width}}  {'-' if value is None else value}" for key, value in summary.items()
    )
    return "\n".join([title, *rows])


def parameter_count(model: nn.Module) -> dict[str, int]:
    """Number of parameters, tied ones counted once: ``total, trainable, non_trainable``."""
    total = sum(parameter.numel() for parameter in model.parameters())
    trainable = sum(
        parameter.numel() for parameter in model.parameters() if parameter.requires_grad
    )
    return {"total": total, "trainable": trainable, "non_trainable": total - trainable}


def find_module(model: PreTrainedModel, name: Layer) -> nn.Module:
    """A module by its dotted name, with or without leading parts; a block by any spelling.

    Args:
        model: Where to look.
        name: ``"transformer.h.5.attn"``, ``"h.5.attn"``; for a block also ``5``, ``"5"`` or ``-1``.

    Raises:
        LayerError: there is none, or more than one; the message names the nearest.
    """
    names = [path for path, _ in model.named_modules(remove_duplicate=False) if path]
    base = f"{model.base_model_prefix}."
    for exact in (str(name), str(name).removeprefix(base), f"{base}{name}"):
        if exact in names:
            return model.get_submodule(exact)
    architecture = Architecture(model)
    try:
        return architecture.blocks[architecture.resolve(name)]
    except LayerError as err:
        fitting = [path for path in names if path.endswith(f".{name}")]
        if len(fitting) == 1:
            return model.get_submodule(fitting[0])
        if fitting:
            raise LayerError(
                f"{name!r} fits {len(fitting)} modules, from {fitting[0]!r} to {fitting[-1]!r}: "
                "write more of the name"
            ) from None
        near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.0)
        raise LayerError(f"{err}; of all modules the nearest is {near[0]!r}") from None


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """A module's parameters by name, detached: the live storage, not a copy.

    Parameters that accelerate has offloaded are fetched, those that are split over processes
    gathered; both are copies.
    """
    weights = {name: whole_weight(each.detach()) for name, each in module.named_parameters()}
    for path, part in module.named_modules():
        own = [f"{path}.{name}".lstrip(".") for name, _ in part.named_parameters(recurse=False)]
        if hasattr(part, "_hf_hook") and any(weights[n].is_meta for n in own if n in weights):
            weights |= {name: weight for name, weight in _fetched(part, path) if name in weights}
    return weights


def weight_of(module: Any, name: str = "weight") -> Tensor | None:
    """One tensor of a module with its values, detached: see `weights_of`; None without one.

    What torchao has quantized is dequantized.
    """
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor):
        return None
    if weight.is_meta:
        weight = weights_of(module).get(name, weight)
    weight = whole_weight(weight.detach())
    quantized = type(weight).dequantize is not Tensor.dequantize
    return weight.dequantize() if quantized else weight


def _fetched(part: nn.Module, path: str) -> list[tuple[str, Tensor]]:
    """Copies of one module's own parameters that lie elsewhere."""
    from accelerate.utils import align_module_device

    with align_module_device(part):
        return [
            (f"{path}.{name}".lstrip("."), parameter.detach().clone())
            for name, parameter in part.named_parameters(recurse=False)
        ]


def part_names(architecture: Architecture, part: str) -> list[str]:
    """Full names of the blocks' attention or MLP modules, in order, where a block has one.

    Args:
        architecture: The model.
        part: ``attention`` or ``mlp``.
    """
    names = [architecture.part_name(layer, part) for layer in range(architecture.n_layers)]
    return [name for name in names if name is not None]
