"""One use of a model at a time: a re-entrant lock per model, held by every verb of the engine.

Hooks belong to a model, not to a thread, so two threads that use one model at the same time would
see each other's edits. Whatever of this toolkit runs a model, or holds hooks on it, holds its lock
meanwhile: another thread waits until the context is closed, the same thread goes on. Two models
have two locks. A plain ``model(...)`` of another thread takes no lock and does see the hooks.

While the lock is held, a model that ``torch.compile`` has compiled is run eagerly: compiled graphs
do not look for hooks that came later.

An edit function cannot run its own model again (the hooks would see a pass inside the pass that
they are part of); `ModelLock.acquire` refuses that. It may run another model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from interrupts import breathe, interrupts_held
from module_devices import modules_of
from sites import Hook, InputError

PATIENCE = 0.05
"""Seconds for which Ctrl-C waits while another thread has the model."""

_guard = threading.Lock()
_locks: WeakKeyDictionary[nn.Module, ModelLock] = WeakKeyDictionary()


class _Editing(threading.local):
    """The models whose edit functions are under way in this thread."""

    def __init__(self) -> None:
        self.locks: list[ModelLock] = []


_editing = _Editing()


class ModelLock:
    """A re-entrant lock of one model and all of its modules."""

    def __init__(self) -> None:
        self.wrapped = False
        """Whether a compiled wrapper around the model is in use somewhere."""
        self.root: ref[nn.Module] | None = None
        """The outermost module that is known."""
        self._lock = threading.RLock()
        self._depth = 0
        self._eager = False

    def acquire(self, seconds: float = -1) -> bool:
        """Wait for other threads, for ever or so long; compiled models run eagerly from here on.

        Returns:
            Whether it is ours now.

        Raises:
            InputError: an edit function of this model is under way in this thread.
        """
        self.refuse_reentry()
        if not self._lock.acquire(timeout=seconds):
            return False
        self._depth += 1
        if self._depth == 1 and self._compiled():
            self._eager = True
            _run_eagerly(1)
        return True

    def release(self) -> None:
        """Undo one `acquire`."""
        self._depth -= 1
        if self._depth == 0 and self._eager:
            self._eager = False
            _run_eagerly(-1)
        self._lock.release()

    def refuse_reentry(self) -> None:
        """Raise InputError if an edit function of this model is under way in this thread."""
        if self in _editing.locks:
            raise InputError(
                "an edit function ran the model that it is an edit of; run the model before the "
                "edit, and let the function use what it gave"
            )

    def _compiled(self) -> bool:
        root = None if self.root is None else self.root()
        return self.wrapped or (root is not None and any(map(is_compiled, modules_of(root))))

    def edits(self, hook: Hook) -> Hook:
        """``hook``, known to be under way while it runs."""

        def run(value: Tensor) -> Tensor | None:
            depth = len(_editing.locks)
            try:
                _editing.locks.append(self)
                return hook(value)
            finally:
                del _editing.locks[depth:]

        return run


def lock_of(module: nn.Module) -> ModelLock:
    """The lock of the model that a module is part of, as far as that model is known."""
    with _guard:
        found = _locks.get(module)
        if found is None:
            parts = modules_of(module)
            known = (_locks[part] for part in parts if part in _locks)
            found = next(known, None) or ModelLock()
            found.root = ref(module)
            for part in parts:
                _locks[part] = found
        return found


def hold(stack: ExitStack, module: nn.Module) -> ModelLock:
    """Hold the lock of a module's model until ``stack`` closes.

    Raises:
        InputError: an edit function of this model is under way in this thread.
    """
    lock = lock_of(module)
    while True:
        with interrupts_held():
            if lock.acquire(PATIENCE):
                stack.callback(lock.release)
                return lock
        breathe()


# --- Compiled models ------------------------------------------------------------------------------


def is_compiled(module: nn.Module) -> bool:
    """Whether a module was compiled in place, or wraps one that was."""
    own = module.__dict__
    return own.get("_compiled_call_impl") is not None or "_orig_mod" in own["_modules"]


def is_wrapper(module: Any) -> bool:
    """Whether it is what ``torch.compile(module)`` returns."""
    return isinstance(module, nn.Module) and "_orig_mod" in module._modules


def unwrap(model: Any) -> Any:
    """The model itself, where it is what ``torch.compile(model)`` returned, or PEFT.

    PEFT puts its adapters into the model, so they are part of what is returned.
    """
    while is_wrapper(model):
        model = model._modules["_orig_mod"]
        lock_of(model).wrapped = True
    return model.get_base_model() if hasattr(model, "get_base_model") else model


_eager_uses = 0
_put_back: list[Callable[..., Any]] = []


def _run_eagerly(change: int) -> None:
    """Count who wants everything compiled to run eagerly; the first switches, the last puts back.

    The switch is torch's own and holds for the whole process.
    """
    global _eager_uses
    with _guard:
        _eager_uses += change
        if _eager_uses == 1 and change == 1:
            _put_back.append(torch.compiler.set_stance("force_eager").__exit__)
        elif _eager_uses == 0:
            _put_back.pop()(None, None, None)
