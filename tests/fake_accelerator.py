"""An accelerator that is not there: tensors that say ``fake:0`` and keep its rules, on the CPU.

    accelerator()          while open, tensors can be made on, and moved to, the device ``fake:0``
    moved(model)           a copy of a model that lies there

Two rules that a GPU has and the CPU has not, each an error here as there: tensors of two devices
do not meet in one operation (only a single number, or an index in brackets, may come from the CPU),
and there is no float64. The values are the CPU's, so results can be compared to the last bit.
"""

import copy
from contextlib import contextmanager

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "fake"

if torch._C._get_privateuse1_backend_name() != NAME:
    _setup_privateuseone_for_python_backend(NAME)
DEVICE = torch.device(NAME, 0)
aten = torch.ops.aten

TAKES_A_CPU_INDEX = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
COPIES = {aten._to_copy.default, aten.copy_.default, aten.copy.default, aten.set_.source_Tensor}
SAME_ON_THE_CPU = {
    aten._scaled_dot_product_attention_math_for_mps.default: (
        aten._scaled_dot_product_attention_math.default
    ),
    aten.histc.default: lambda x, *rest: aten.histc.default(x.float(), *rest).to(x.dtype),
}
"""What the CPU lacks, or calls by another name."""


class There(torch.Tensor):
    """A tensor on the accelerator, whose values lie in ``held``."""

    held: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held):
        if held.dtype == torch.float64:
            raise TypeError("Cannot convert a fake Tensor to float64 dtype")
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )
        self.held = held
        return self

    def __repr__(self):
        return f"There({self.held!r})"

    def tolist(self):
        return self.held.tolist()

    def untyped_storage(self):
        return self.held.untyped_storage()

    def numpy(self, **_):
        raise TypeError("can't convert fake:0 device type tensor to numpy")

    def __array__(self, *_, **__):
        raise TypeError("can't convert fake:0 device type tensor to numpy")

    def __deepcopy__(self, memo):
        return self.clone()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def run(func, args, kwargs):
    """One operation under the accelerator's rules."""
    there = kwargs.get("device") is not None and torch.device(kwargs["device"]).type == NAME
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    on_it = any(isinstance(x, There) for x in tensors)
    if not on_it and not there:
        return func(*args, **kwargs)
    if on_it and func not in COPIES:
        checked = args[0] if func in TAKES_A_CPU_INDEX else (args, kwargs)
        for x in tree_flatten(checked)[0]:
            if isinstance(x, torch.Tensor) and not isinstance(x, There) and x.dim() > 0:
                raise RuntimeError(f"{func}: tensors on two devices, fake:0 and cpu")
    leaves = "device" in kwargs and kwargs["device"] is not None and not there
    if "device" in kwargs:
        kwargs = {**kwargs, "device": "cpu"}
    inner_args, inner_kwargs = tree_map_only(There, lambda x: x.held, (args, kwargs))
    made = SAME_ON_THE_CPU.get(func, func)(*inner_args, **inner_kwargs)
    if leaves or func is aten._local_scalar_dense.default:
        return made
    return _wrapped(func, args, kwargs, made)


def _wrapped(func, args, kwargs, made):
    if func in (aten.copy_.default,) and not isinstance(args[0], There):
        return args[0]
    known = {id(x.held): x for x in tree_flatten((args, kwargs))[0] if isinstance(x, There)}

    def wrap(x):
        return known[id(x)] if id(x) in known else There(x)

    return tree_map_only(torch.Tensor, wrap, made)


class _Accelerator(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


INDEXED = (torch.Tensor.__getitem__, torch.Tensor.__setitem__)


class _Literals(TorchFunctionMode):
    """``torch.tensor(…, device=…)`` and ``x[[0, 1]]`` make tensors unseen by a dispatch mode."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if func in (torch.tensor, torch.as_tensor) and device and torch.device(device) == DEVICE:
            return func(*args, **{**kwargs, "device": "cpu"}).to(DEVICE)
        if func in INDEXED and isinstance(args[0], There):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            tensors = tuple(torch.tensor(x) if isinstance(x, list) else x for x in index)
            args = (args[0], tensors, *args[2:])
        return func(*args, **kwargs)


@contextmanager
def accelerator():
    """While open, ``device="fake:0"`` works."""
    with _Accelerator(), _Literals():
        yield DEVICE


def moved(model):
    """Return a copy of a model on the accelerator; use it inside `accelerator`."""
    model = copy.deepcopy(model)
    shared = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                key = id(parameter)
                if key not in shared:
                    shared[key] = nn.Parameter(There(parameter.detach()), parameter.requires_grad)
                module._parameters[name] = shared[key]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = There(buffer)
    return model
