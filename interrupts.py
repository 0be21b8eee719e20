"""Ctrl-C that comes while hooks are put on or taken off: kept until they all are.

    interrupts_held     a context in which Ctrl-C waits
    until_closed        registers a hook that a stack removes
    breathe             lets one through, within it
    UndoStack           an `ExitStack` whose entering and leaving of contexts is not torn apart

An exception can come between any two steps of Python code. Between "a hook is attached" and "its
removal is noted", or in the middle of an `ExitStack` that unwinds, it would leave hooks on a model.
Passes of the model themselves are interrupted at once.
"""

from __future__ import annotations

import _signal  # what `signal` itself calls; that seeks a name for each handler, slowly
import signal
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any, TypeVar

T = TypeVar("T")


class _Held:
    """Whether Ctrl-C waits now; Python runs signal handlers in the main thread alone."""

    def __init__(self) -> None:
        self.holding = False
        self.waiting: tuple[int, Any] | None = None
        self.handler: Callable[[int, Any], Any] | None = None

    def hold(self) -> bool:
        """Let Ctrl-C wait; whether it did so before."""
        if self.holding or threading.get_ident() != threading.main_thread().ident:
            return True
        handler = _signal.getsignal(signal.SIGINT)
        if handler == self._note:  # an error of another signal came while it was put there
            handler = self.handler
        if not callable(handler):  # ignored, or the system's own
            return True
        self.handler, self.waiting = handler, None
        try:
            _signal.signal(signal.SIGINT, self._note)
        except ValueError:  # no thread of this interpreter gets signals
            return True
        self.holding = True
        return False

    def let_go(self) -> None:
        """Let Ctrl-C come again; one that waited comes now."""
        handler = self.handler
        if not self.holding or handler is None:
            return
        self.holding = False
        _signal.signal(signal.SIGINT, handler)
        if self.waiting is not None:
            (number, frame), self.waiting = self.waiting, None
            handler(number, frame)

    def breathe(self) -> None:
        """Where something waits long: let a Ctrl-C through that came meanwhile."""
        if self.holding and threading.get_ident() == threading.main_thread().ident:
            self.let_go()
            self.hold()

    def _note(self, number: int, frame: Any) -> None:
        self.waiting = (number, frame)


_held = _Held()
breathe = _held.breathe


class interrupts_held:
    """While open, Ctrl-C waits; where it waits already, or in other threads, nothing changes."""

    def __init__(self) -> None:
        self._before = True

    def __enter__(self) -> None:
        self._before = _held.hold()

    def __exit__(self, *_error: object) -> None:
        if not self._before:
            _held.let_go()


def until_closed(
    stack: ExitStack, register: Callable[..., Any], *args: Any, **options: Any
) -> None:
    """Register a hook, ``register(*args, **options)``; closing ``stack`` removes it.

    Args:
        stack: Closes it.
        register: Gives a handle with ``remove()``, as ``module.register_forward_hook`` does.
        *args: For it.
        **options: For it.
    """
    with interrupts_held():
        stack.callback(register(*args, **options).remove)


class UndoStack(ExitStack):
    """An `ExitStack` that Ctrl-C finds before a context is entered or after, never between."""

    def enter_context(self, cm: AbstractContextManager[T, Any]) -> T:
        """Enter a context that is left when the stack is."""
        with interrupts_held():
            return super().enter_context(cm)

    def __exit__(self, *error: Any) -> Any:
        before = True
        try:
            before = _held.hold()
        finally:  # also if Ctrl-C comes just then
            try:
                swallowed = super().__exit__(*error)
            finally:
                if not before:
                    _held.let_go()
        return swallowed
