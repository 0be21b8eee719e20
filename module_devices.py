"""Where a module computes, also while its weights lie elsewhere.

With ``device_map`` accelerate keeps offloaded weights on the meta device, which holds no values,
and fetches them for each call. Whoever reads ``weight.device`` then gets a device on which nothing
can be put. Accelerate's hook on the module says where the call takes place.

`exact` is the one way to float64: Apple's GPU has none.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

WITHOUT_FLOAT64 = frozenset({"mps"})
"""Kinds of device that know no float64 at all."""


def exact(tensor: Tensor) -> Tensor:
    """A tensor in float64: where it lies, or on the CPU where its device has no float64."""
    there = tensor.device.type not in WITHOUT_FLOAT64
    return tensor.double() if there else tensor.cpu().double()


def as_tensor(value: Any, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor where it lies; numbers, a list or an array on the CPU.

    `torch.as_tensor` puts both on the device that ``torch.set_default_device`` names.
    """
    if isinstance(value, Tensor):
        return value if dtype is None else value.to(dtype)
    return torch.as_tensor(value, dtype=dtype, device="cpu")


def modules_of(model: nn.Module) -> list[nn.Module]:
    """Every module of a model once, parents first: ``model.modules()``, ten times faster."""
    found = dict.fromkeys([model])
    left = [model]
    while left:
        module = left.pop()
        found[module] = None
        left.extend(
            child for child in reversed(module._modules.values())
            if child is not None and child not in found
        )  # fmt: skip
    return list(found)


def stored_matrix(module: nn.Module) -> Tensor | None:
    """A module's weight, if it is a matrix whose numbers can be read where it lies.

    None where it is packed (quantized), held in parts by several processes, or offloaded.
    """
    weight = getattr(module, "weight", None)
    plain = isinstance(weight, nn.Parameter) and type(weight.data) is Tensor
    if isinstance(weight, Tensor) and (plain or type(weight) is Tensor) and not weight.is_meta:
        return weight.detach() if weight.is_floating_point() and weight.dim() == 2 else None
    return None


def compute_device(module: nn.Module) -> torch.device:
    """The device on which a module computes: of its first part that holds weights.

    A module without values (built on the meta device) computes there; one without any tensor on
    the CPU.
    """
    found = torch.device("cpu")
    for part in modules_of(module):
        for device in _devices(part):
            if device.type != "meta":
                return device
            found = device
    return found


def compute_devices(module: nn.Module) -> set[torch.device]:
    """Every device on which some part of a module computes."""
    return {device for part in modules_of(module) for device in _devices(part)}


def _devices(part: nn.Module) -> Iterator[torch.device]:
    """Where one module's own weights are used."""
    tensors = [*part.parameters(recurse=False), *part.buffers(recurse=False)]
    hook = getattr(part, "_hf_hook", None)
    for each in getattr(hook, "hooks", (hook,)):
        if tensors and (named := getattr(each, "execution_device", None)) is not None:
            yield _as_device(named)
            return
    yield from (tensor.device for tensor in tensors)


def _as_device(named: Any) -> torch.device:
    """A device as accelerate writes it; a bare number is an accelerator's."""
    if not isinstance(named, int):
        return torch.device(named)
    accelerator = torch.accelerator.current_accelerator()
    return torch.device("cuda" if accelerator is None else accelerator.type, named)
