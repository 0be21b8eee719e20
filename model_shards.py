"""Models that several processes run together: what each holds a part of is seen whole.

With ``tp_plan="auto"`` under ``torchrun``, transformers splits heads and neurons over processes
(Megatron's tensor parallelism: Shoeybi et al. 2019, section 3). The residual stream, what attention
and MLP add to it, and the logits are whole in every process; z, query, key, value, pattern and the
MLP's neurons are not. A `ShardedTap` gathers these for its hook and keeps the process's own part of
what the hook gives back, so that sites have the same values in every process as in a single one,
gradients included.

Every process must make the same calls in the same order, as for the model itself.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from module_taps import Tap, replaced
from sites import ArchitectureError, Hook

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

TENSOR_PARALLEL = "tp"
"""The axis of a mesh with several over which transformers splits modules."""


def is_sharded(tensor: Tensor) -> bool:
    """Whether a process holds but a part of a tensor (or is one of several to hold it)."""
    return hasattr(tensor, "device_mesh")


def find_mesh(module: nn.Module) -> DeviceMesh | None:
    """The processes over which a module's weights are split; None where they are plain tensors."""
    sharded: Any = next((p for p in module.parameters() if is_sharded(p)), None)
    if sharded is None:
        return None
    mesh: DeviceMesh = sharded.device_mesh
    if mesh.ndim == 1:
        return mesh
    names = mesh.mesh_dim_names or ()
    return mesh[TENSOR_PARALLEL] if TENSOR_PARALLEL in names else None


def require_whole(model: nn.Module, purpose: str) -> None:
    """Refuse a model whose weights are split over processes.

    Raises:
        ArchitectureError: they are.
    """
    mesh = find_mesh(model)
    if mesh is not None:
        raise ArchitectureError(
            f"{purpose} needs whole weights, and those of {type(model).__name__} are split over "
            f"{mesh.size()} processes: load the model without tp_plan (or DistributedConfig)"
        )


def whole_weight(weight: Tensor) -> Tensor:
    """A weight as a plain tensor; gathered, in every process, where each holds a part of it."""
    sharded: Any = weight
    return sharded.full_tensor() if is_sharded(weight) else weight


def smallest(module: nn.Module, number: int) -> int:
    """The least of the numbers that the processes of a model pass; the number itself in one."""
    mesh = find_mesh(module)
    if mesh is None:
        return number
    import torch.distributed as dist

    found = torch.tensor(number, device=mesh.device_type)
    dist.all_reduce(found, op=dist.ReduceOp.MIN, group=mesh.get_group())
    return int(found)


# --- Activations ----------------------------------------------------------------------------------


def count_parts(module: nn.Module, value: Tensor) -> int:
    """Over how many processes an activation of a module is split: 1 where each holds all of it.

    The processes' values are compared: what each has computed whole is the same in all of them.

    Args:
        module: What the activation belongs to; its weights tell which processes work on it.
        value: The activation in this process.
    """
    mesh = find_mesh(module)
    if mesh is None or mesh.size() == 1:
        return 1
    import torch.distributed as dist

    own = value.detach().contiguous()
    found = [torch.empty_like(own) for _ in range(mesh.size())]
    dist.all_gather(found, own, group=mesh.get_group())
    alike = all(torch.allclose(found[0], other, rtol=1e-3, atol=1e-6) for other in found[1:])
    return 1 if alike else mesh.size()


def gather(value: Tensor, mesh: DeviceMesh, axis: int, size: int) -> Tensor:
    """The whole of an activation that is split along an axis; differentiable.

    Args:
        value: This process's part.
        mesh: The processes.
        axis: Along which it is split.
        size: Entries of the whole along that axis.
    """
    from torch.distributed.tensor import DTensor, Shard

    shape = torch.Size(size if i == axis % value.dim() else n for i, n in enumerate(value.shape))
    stride = torch.empty(shape, device="meta").stride()
    whole: Any = {"shape": shape, "stride": stride, "run_check": False}
    return DTensor.from_local(value.contiguous(), mesh, [Shard(axis)], **whole).full_tensor()


def own_part(whole: Tensor, mesh: DeviceMesh, axis: int) -> Tensor:
    """This process's part of an activation along an axis; the gradient is that of the whole."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    everywhere = DTensor.from_local(whole, mesh, [Replicate()], run_check=False)
    return everywhere.redistribute(placements=[Shard(axis)]).to_local()


@dataclass(frozen=True, eq=False)
class ShardedTap:
    """A tap on a site of which each process holds a part; hooks see and give the whole."""

    tap: Tap
    mesh: DeviceMesh
    axis: int
    size: int
    """Entries of the whole along `axis`."""

    @property
    def module(self) -> nn.Module:
        """The part of the model that it looks at."""
        return self.tap.module

    def attach(self, stack: ExitStack, hook: Hook, last: bool = False) -> None:
        """Attach ``hook``; closing ``stack`` detaches it."""

        def on_whole(value: Tensor) -> Tensor | None:
            whole = gather(value, self.mesh, self.axis, self.size)
            new = replaced(hook, whole)
            return None if new is whole else own_part(new, self.mesh, self.axis)

        self.tap.attach(stack, on_whole, last)
