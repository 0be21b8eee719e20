"""Ways to load, place or wrap a model, and results that must not depend on them.

results(model)     what the toolkit says of a model: one number of every kind, by name
WAYS               name -> a function of a family and an empty folder; it returns the model and
one of the same weights as plain as can be
"""

import copy
import importlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import torch
from torch import Tensor, nn

import families
import numeric_trials
from forward_pass import Site, record
from model_architecture import Architecture
from model_loader import load_model
from numeric_trials import apart, inputs

CPU = torch.device("cpu")


def results(model: Any, passes_of_the_users_own: bool = True) -> dict[str, list[Tensor]]:
    """Records at every site, resume, lens, a batch, steering, a sweep and generation."""
    arch = Architecture(model)
    everywhere = [
        Site(name, layer) for layer in range(arch.n_layers) for name in arch.available_sites(layer)
    ]
    kept = record(arch, inputs(), everywhere, logits=True)
    found = {str(site): [value] for site, value in kept.items()} | {"logits": [kept.logits]}
    if passes_of_the_users_own:  # with the model's own dropout
        found["steering"] = numeric_trials.steered(model)
    techniques = {
        "resume": numeric_trials.resumed,
        "lens": numeric_trials.lens_of_last,
        "batch": numeric_trials.batched,
        "sweep": numeric_trials.swept("resid_post"),
        "generate": numeric_trials.generated,
        "recorded generation": numeric_trials.recorded_generation,
    }
    return found | {name: technique(model) for name, technique in techniques.items()}


def assert_same(
    found: dict[str, list[Tensor]], expected: dict[str, list[Tensor]], allowed: float = 0.0
) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert apart(found[name], values) <= allowed, name


# --- Where the weights lie ------------------------------------------------------------------------


def cpu_offloaded(model: Any, _folder: Path) -> Any:
    return accelerate.cpu_offload(model, execution_device=CPU)


def disk_offloaded(model: Any, folder: Path) -> Any:
    return accelerate.disk_offload(model, str(folder), execution_device=CPU)


def partly_offloaded(model: Any, folder: Path) -> Any:
    """The second block on disk, the rest in place."""
    blocks = Architecture(model).layer_names
    leaves = [name for name, child in model.named_modules() if not list(child.children())]
    inside = tuple(f"{block}." for block in blocks)
    places = {name: "cpu" for name in leaves if not name.startswith(inside)}
    places |= dict.fromkeys(blocks, "cpu") | {blocks[1]: "disk"}
    return accelerate.dispatch_model(
        model, places, main_device="cpu", offload_dir=str(folder), force_hooks=True
    )


def mapped(folder: Path) -> Any:
    """A Llama loaded with a ``device_map`` that puts two blocks on disk."""
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    places |= {"model.layers.2": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    places["lm_head"] = "cpu"
    return load_model(
        folder, device_map=places, offload_folder=folder / "off", load_tokenizer=False
    )[0]


# --- Modes and wrappers ---------------------------------------------------------------------------

DROPOUT = {
    "gpt2": {"resid_pdrop": 0.5, "attn_pdrop": 0.5, "embd_pdrop": 0.5},
    "llama": {"attention_dropout": 0.5},
    "opt": {"dropout": 0.5, "attention_dropout": 0.5},
}


def checkpoint(model: Any) -> None:
    """Switch gradient checkpointing on, under the name that this version of transformers has."""
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)()


# --- Quantized ------------------------------------------------------------------------------------


def quietly_import(name: str) -> Any:
    """Import a package that warns while it is imported; ImportError where it is not there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


def torchao_config(bits: int) -> Any:
    """Weight-only, 8 or 4 bits, of the kinds that run on a CPU."""
    quantization = quietly_import("torchao.quantization")
    if bits == 8:
        return quantization.Int8WeightOnlyConfig()
    return quantization.IntxWeightOnlyConfig(
        weight_dtype=torch.int4, granularity=quantization.PerGroup(16)
    )


def quantized(model: Any, bits: int) -> Any:
    config = torchao_config(bits)
    quietly_import("torchao.quantization").quantize_(model, config)
    return model


def dequantized(model: Any) -> Any:
    """The same function with plain matrices: what torchao multiplies by."""
    plain = copy.deepcopy(model)
    count = 0
    for module in plain.modules():
        if isinstance(module, nn.Linear) and "torchao" in type(module.weight.data).__module__:
            module.weight = nn.Parameter(module.weight.dequantize(), requires_grad=False)
            count += 1
    assert count > 0
    return plain


# --- By name --------------------------------------------------------------------------------------


def _placed(place: Callable[[Any, Path], Any]) -> Callable[[str, Path], tuple[Any, Any]]:
    def way(name: str, folder: Path) -> tuple[Any, Any]:
        return place(families.build(name), folder), families.build(name)

    return way


def _from_folder(name: str, folder: Path) -> tuple[Any, Any]:
    families.build(name).save_pretrained(folder)
    return load_model(folder, "cpu", load_tokenizer=False)[0], families.build(name)


def _compiled(model: Any, _folder: Path) -> Any:
    compiled: Any = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(**inputs())
    return compiled


def _compiled_in_place(model: Any, _folder: Path) -> Any:
    model.compile(backend="eager")
    return model


def _training(name: str, _folder: Path) -> tuple[Any, Any]:
    model = families.build(name, **DROPOUT[name]).train()
    checkpoint(model)
    return model, families.build(name)


def _quantized(bits: int) -> Callable[[str, Path], tuple[Any, Any]]:
    def way(name: str, _folder: Path) -> tuple[Any, Any]:
        model = quantized(families.build(name), bits)
        return model, dequantized(model)

    return way


WAYS: dict[str, Callable[[str, Path], tuple[Any, Any]]] = {
    "a local folder": _from_folder,
    "`cpu_offload`": _placed(cpu_offloaded),
    "`disk_offload`": _placed(disk_offloaded),
    "`device_map`, one block on disk": _placed(partly_offloaded),
    "`torch.compile(model)`": _placed(_compiled),
    "`model.compile()`": _placed(_compiled_in_place),
    "training mode, dropout 0.5, gradient checkpointing": _training,
    "torchao int8, against the dequantized weights": _quantized(8),
    "torchao int4 in groups of 16, against the dequantized weights": _quantized(4),
}
