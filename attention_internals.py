"""What happens inside attention: query, key, value and pattern, seen and changed as a model runs.

Two routes, chosen by looking at what a model does (`model_architecture` probes it), never by its
name:

1. *registry*: transformers routes the attention of most families through ``AttentionInterface``.
   While a tap is attached, the function that the registry hands out is wrapped; it calls the real
   one, whichever implementation the user chose, with the tensors that a hook may have changed.
2. *products*: older families multiply query by key and pattern by value themselves. A
   ``TorchFunctionMode`` watches the two products of the attention module (or its single
   ``scaled_dot_product_attention`` call).

A pattern exists only in an eager implementation: while a tap on it is attached, the model's configs
say ``eager``; the user's choice is put back on leaving. All values have the shapes of
`forward_pass.SITES`: ``[batch, position, head, d_head]``, and ``[batch, head, query, key]`` for the
pattern. In a cached decode step, key and value hold every position of the cache.
"""

from __future__ import annotations

import bisect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from forward_pass import ArchitectureError, Hook, replaced

PARTS = ("query", "key", "value", "attn_pattern")
"""The sites that this module serves."""


class Entry(NamedTuple):
    """A hook on one part of a module's attention; those that only look come ``last``."""

    part: str
    hook: Hook
    last: bool = False


def _insert(hooks: list[Entry], entry: Entry) -> None:
    """Add an entry in order of coming, but edits before recorders."""
    bisect.insort(hooks, entry, key=lambda each: each.last)


@dataclass(frozen=True, eq=False)
class AttentionTap:
    """One of `PARTS` of one attention module."""

    module: nn.Module
    part: str
    route: str
    """``registry`` or ``products``."""
    kv_heads: int
    configs: Sequence[Any]
    """The model's configs, switched to eager while a pattern is watched."""

    def attach(self, stack: ExitStack, hook: Hook, last: bool = False) -> None:
        """Attach ``hook``; closing ``stack`` detaches it."""
        if self.part == "attn_pattern":
            _switch_to_eager(stack, self.configs)
        watch = _watch_registry if self.route == "registry" else _watch_products
        watch(stack, self.module, Entry(self.part, hook, last), self.kv_heads)


def _switch_to_eager(stack: ExitStack, configs: Sequence[Any]) -> None:
    for config in configs:
        before = config._attn_implementation_internal
        if before != "eager":
            stack.callback(setattr, config, "_attn_implementation_internal", before)
            config._attn_implementation_internal = "eager"


# --- Route 1: the registry ------------------------------------------------------------------------

_lock = threading.RLock()
_watched: dict[nn.Module, list[Entry]] = {}
_finders: list[AttentionFinder] = []
_original: list[Any] = []
"""The registry's own ``get_interface``, while it is wrapped."""


def _wrap_registry() -> None:
    """Wrap or unwrap the registry, whichever watchers and finders want now (hold `_lock`)."""
    registry: Any = _registry()
    if hasattr(
        registry, "get_interface"
    ):  # not in transformers 5.0: everything goes by the products
        if (_watched or _finders) and not _original:
            _original.append(registry.get_interface)
            registry.get_interface = _wrapping_get_interface
        elif _original and not _watched and not _finders:
            registry.get_interface = _original.pop()


def _registry() -> Any:
    from transformers.modeling_utils import AttentionInterface

    return AttentionInterface


def _wrapping_get_interface(registry: Any, implementation: str, default: Callable[..., Any]) -> Any:
    return partial(_attend, _original[0](registry, implementation, default))


def _watch_registry(stack: ExitStack, module: nn.Module, entry: Entry, _kv_heads: int) -> None:
    with _lock:
        _insert(_watched.setdefault(module, []), entry)
        _wrap_registry()
    stack.callback(_unwatch_registry, module, entry)


def _unwatch_registry(module: nn.Module, entry: Entry) -> None:
    with _lock:
        _watched[module].remove(entry)
        if not _watched[module]:
            del _watched[module]
        _wrap_registry()


def _attend(
    real: Callable[..., Any],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """The real attention function, on hooked query, key and value; then the hooked pattern."""
    hooks = _watched.get(module)
    args = tuple(_bounded(each) for each in args)
    kwargs = {name: _bounded(each) for name, each in kwargs.items()}
    if not hooks:
        calls = [finder.note_registry_call(module, query, key) for finder in _finders]
        made = real(module, query, key, value, *args, **kwargs)
        for call in calls:
            call.output = made[0].clone()
        return made
    query, key, value = (
        _hooked_heads(hooks, part, tensor)
        for part, tensor in (("query", query), ("key", key), ("value", value))
    )
    output, pattern = real(module, query, key, value, *args, **kwargs)
    patterns = [entry.hook for entry in hooks if entry.part == "attn_pattern"]
    if not patterns:
        return output, pattern
    if pattern is None:
        raise ArchitectureError(
            f"{type(module).__name__} computed no attention pattern; "
            "a pattern needs attn_implementation='eager'"
        )
    if kwargs.get("s_aux") is not None:
        pattern = _less_sink(pattern, value, output)
    edited = pattern
    for hook in patterns:
        edited = replaced(hook, edited)
    if edited is not pattern:
        values = value.repeat_interleave(edited.shape[1] // value.shape[1], dim=1)
        output = torch.matmul(edited, values).transpose(1, 2).contiguous()
    return output, edited


def _less_sink(pattern: Tensor, value: Tensor, output: Tensor) -> Tensor:
    """The pattern that makes the output, where a sink's share is taken off the output alone."""
    values = value.repeat_interleave(pattern.shape[1] // value.shape[1], dim=1)
    plain, made = torch.matmul(pattern, values).float(), output.transpose(1, 2).float()
    rounding = 64 * torch.finfo(pattern.dtype).eps * plain.abs().amax()
    if bool(((made - plain).abs() <= rounding).all()):
        return pattern
    size = (plain * plain).sum(-1, keepdim=True)
    share = (made * plain).sum(-1, keepdim=True) / torch.where(size > 0, size, 1)
    return pattern * share.to(pattern.dtype)


def _bounded(given: Any) -> Any:
    """A float64 mask, with float32's lowest number for its own.

    Eager implementations compute the softmax in float32, where the lowest number of float64 is
    minus infinity, and rows of padding, which see nothing, would be NaN.
    """
    if isinstance(given, Tensor) and given.dtype is torch.float64:
        return given.clamp(min=torch.finfo(torch.float32).min)
    return given


def _hooked_heads(hooks: list[Entry], part: str, tensor: Tensor) -> Tensor:
    """``[batch, head, position, d_head]`` shown to hooks as ``[batch, position, head, d_head]``."""
    for hook in (entry.hook for entry in hooks if entry.part == part):
        shown = tensor.transpose(1, 2)
        new = replaced(hook, shown)
        if new is not shown:
            tensor = new.transpose(1, 2)
    return tensor


# --- Route 2: the two products --------------------------------------------------------------------

PRODUCTS = {torch.matmul, torch.bmm, torch.baddbmm, torch.Tensor.matmul, torch.Tensor.__matmul__}
PRODUCTS |= {torch.Tensor.bmm, torch.Tensor.baddbmm}
FUSED: Any = torch.nn.functional.scaled_dot_product_attention


def _operands(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """The two factors of a call to one of `PRODUCTS`, however they were passed."""
    tensors = [
        *args,
        *(kwargs[name] for name in ("batch1", "batch2", "mat2", "other") if name in kwargs),
    ]
    return tensors[-2], tensors[-1]


def _with_operands(
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    old: tuple[Tensor, Tensor],
    new: tuple[Tensor, Tensor],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def swap(value: Any) -> Any:
        return new[0] if value is old[0] else new[1] if value is old[1] else value

    return tuple(swap(value) for value in args), {
        name: swap(value) for name, value in kwargs.items()
    }


def take_off(mode: TorchFunctionMode) -> None:
    """Leave a mode wherever it is in torch's stack, or is no longer: an interrupt may lose it."""
    modes = [torch._C._pop_torch_function_stack() for _ in range(_mode_count())]
    for each in reversed(modes):
        if each is not mode:
            torch._C._push_on_torch_function_stack(each)


_mode_count = torch._C._len_torch_function_stack


@dataclass(eq=False)
class _WatchedModule:
    """An attention module whose products are watched, with its hooks in order of attaching."""

    kv_heads: int
    hooks: list[Entry]
    handles: list[Any]
    products: int = 0
    """How many products this call has made so far."""
    batch: int = 1


class _ProductWatch(TorchFunctionMode):
    """Shows the factors of watched modules' products to hooks while those modules run.

    One per thread serves all taps, so that hooks on one module run in the order in which they came.
    """

    def __init__(self) -> None:
        super().__init__()
        self.watched: dict[nn.Module, _WatchedModule] = {}
        self.running: _WatchedModule | None = None

    def add(self, module: nn.Module, entry: Entry, kv_heads: int) -> None:
        """Start to show ``module``'s products to a hook."""
        if not self.watched:
            self.__enter__()
        if module not in self.watched:
            handles = [
                module.register_forward_pre_hook(self._enter_module, with_kwargs=True),
                module.register_forward_hook(self._leave_module, always_call=True),
            ]
            self.watched[module] = _WatchedModule(kv_heads, [], handles)
        _insert(self.watched[module].hooks, entry)

    def remove(self, module: nn.Module, entry: Entry) -> None:
        """Stop again; the last one out switches the watch off."""
        found = self.watched[module]
        found.hooks.remove(entry)
        if not found.hooks:
            del self.watched[module]
            for handle in found.handles:
                handle.remove()
        if not self.watched:
            self.running = None
            take_off(self)

    def _enter_module(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        self.running = self.watched[module]
        self.running.products, self.running.batch = 0, tensors[0].shape[0]

    def _leave_module(self, *_: Any) -> None:
        self.running = None

    def __torch_function__(
        self,
        func: Any,
        _types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        found = self.running
        if found is None:
            return func(*args, **kwargs)
        if func is FUSED:
            names = ("query", "key", "value")
            tensors = [args[i] if i < len(args) else kwargs[name] for i, name in enumerate(names)]
            hooked = [
                _shown(found, name, tensor) for name, tensor in zip(names, tensors, strict=True)
            ]
            rest = {name: value for name, value in kwargs.items() if name not in names}
            return func(*hooked, *args[3:], **rest)
        if func in PRODUCTS:
            left, right = _operands(args, kwargs)
            if left.dim() >= 3 and right.dim() >= 3:
                args, kwargs = self._product(found, left, right, args, kwargs)
        return func(*args, **kwargs)

    def _product(
        self,
        found: _WatchedModule,
        left: Tensor,
        right: Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        found.products += 1
        if found.products == 1:
            new = _shown(found, "query", left), _shown(found, "key", right.mT).mT
        elif found.products == 2:
            new = _shown(found, "attn_pattern", left), _shown(found, "value", right)
        else:
            return args, kwargs
        return _with_operands(args, kwargs, (left, right), new)


def _shown(found: _WatchedModule, part: str, tensor: Tensor) -> Tensor:
    """Show ``[batch·head, …]`` or ``[batch, head, …]`` to the hooks of a part, in the site's shape.

    Keys and values that the model has already repeated for its query heads are shown, and put back,
    once per key/value head.
    """
    hooks = [entry.hook for entry in found.hooks if entry.part == part]
    if not hooks:
        return tensor
    by_head = tensor if tensor.dim() == 4 else tensor.unflatten(0, (found.batch, -1))
    repeats = by_head.shape[1] // found.kv_heads if part in ("key", "value") else 1
    shown = by_head[:, ::repeats]
    if part != "attn_pattern":
        shown = shown.transpose(1, 2)
    edited = shown
    for hook in hooks:
        edited = replaced(hook, edited)
    if edited is shown:
        return tensor
    if part != "attn_pattern":
        edited = edited.transpose(1, 2)
    if repeats > 1:
        edited = edited.repeat_interleave(repeats, dim=1)
    return edited if tensor.dim() == 4 else edited.flatten(0, 1)


class _PerThread(threading.local):
    """A torch function mode belongs to the thread that entered it."""

    def __init__(self) -> None:
        self.product_watch = _ProductWatch()


_per_thread = _PerThread()


def _watch_products(stack: ExitStack, module: nn.Module, entry: Entry, kv_heads: int) -> None:
    watch = _per_thread.product_watch
    watch.add(module, entry, kv_heads)
    stack.callback(watch.remove, module, entry)


# --- Finding attention ----------------------------------------------------------------------------


@dataclass(eq=False)
class AttentionCall:
    """One attention computation that was seen while a model ran."""

    module: nn.Module
    route: str
    query_heads: int
    kv_heads: int
    query: Tensor
    """As it was multiplied, and `key` too; in a process that holds a part, this part."""
    key: Tensor
    order: int = 0
    """When it was computed, on the clock of whoever looks."""
    output: Tensor | None = None
    """What attention made, before any gate or output projection; None where it is not seen."""


class AttentionFinder(TorchFunctionMode):
    """While open, notes which modules attend, by which route, with how many heads.

    ``running`` must name the innermost module under way (the prober keeps it so); ``clock`` tells
    the order of what is seen.
    """

    def __init__(
        self, length: int, running: Callable[[], nn.Module | None], clock: Iterator[int]
    ) -> None:
        super().__init__()
        self.calls: list[AttentionCall] = []
        self._length, self._running, self._clock = length, running, clock
        self._factors: tuple[Tensor, Tensor] | None = None
        self._mixing = False
        """Whether the next product is that of a pattern and values."""

    def __enter__(self) -> AttentionFinder:
        with _lock:
            _finders.append(self)
            _wrap_registry()
        super().__enter__()
        return self

    def __exit__(self, *_error: Any) -> None:
        take_off(self)
        with _lock:
            _finders.remove(self)
            _wrap_registry()

    def note_registry_call(self, module: nn.Module, query: Tensor, key: Tensor) -> AttentionCall:
        """Take note of an attention function that the registry handed out, before it runs."""
        heads = query.shape[1], key.shape[1]
        self.calls.append(AttentionCall(module, "registry", *heads, query, key, next(self._clock)))
        return self.calls[-1]

    def __torch_function__(
        self,
        func: Any,
        _types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        module = self._running()
        if module is not None and not any(call.module is module for call in self.calls):
            self._note(module, func, args, kwargs)
        made = func(*args, **kwargs)
        if self._mixing and self._mixes(func, args, kwargs):
            self._mixing = False
            by_head = made if made.dim() == 4 else made.unflatten(0, (1, -1))
            self.calls[-1].output = by_head.transpose(1, 2).clone()
        return made

    def _mixes(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call multiplies a pattern by values (the fused one does that itself)."""
        if func is FUSED:
            return True
        if func not in PRODUCTS:
            return False
        left, _ = _operands(args, kwargs)
        return left.shape[-2:] == (self._length, self._length)

    def _note(
        self, module: nn.Module, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if func is FUSED:
            tensors = [
                args[i] if i < len(args) else kwargs[name]
                for i, name in enumerate(("query", "key"))
            ]
            self._add(module, *tensors)
        elif func in PRODUCTS:
            left, right = _operands(args, kwargs)
            if (
                left.dim() >= 3
                and right.dim() >= 3
                and right.shape[-1] == left.shape[-2] == self._length
            ):
                self._factors = (left, right)
        elif getattr(func, "__name__", "") == "softmax" and self._factors is not None:
            left, right = self._factors
            self._factors = None
            if args[0].shape[-2:] == (self._length, self._length):
                self._add(module, left, right)

    def _add(self, module: nn.Module, query: Tensor, key: Tensor) -> None:
        axis = 1 if query.dim() == 4 else 0  # the probe is one row: [batch·head, …] counts heads
        heads = query.shape[axis], key.shape[axis]
        self.calls.append(AttentionCall(module, "products", *heads, query, key, next(self._clock)))
        self._mixing = True
