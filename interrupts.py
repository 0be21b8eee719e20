"""Ctrl-C that comes while hooks are put on or taken off: kept until they all are.

    UndoStack           an `ExitStack` whose entering and leaving of contexts is not torn apart
    interrupts_held     a context in which Ctrl-C waits
    until_closed        registers a hook that a stack removes
    breathe             lets one through, within it
    no_grad             torch's own, which Ctrl-C finds before it is entered or after it is left
    enable_grad         the same

An exception can come between any two steps of Python code. Between "a hook is attached" and "its
removal is noted", or as an ``__exit__`` begins, it would leave hooks on a model. So while a stack
is open, a handler of our own stands before the one that was there. It lets a Ctrl-C wait where
`interrupts_held`, sends it again a moment later where a context is just being entered or left, and
everywhere else (in a pass of the model) hands it on at once.
"""

from __future__ import annotations

import _signal  # what `signal` itself calls; that seeks a name for each handler, slowly
import _thread
import signal
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from types import FrameType
from typing import Any, TypeVar
from weakref import ref

import torch

T = TypeVar("T")

AGAIN = 0.001
"""Seconds after which a Ctrl-C is sent again that came while a context was entered or left."""

NEAR = 4
"""How many of the innermost frames are looked at: what entering a context calls is short."""


class _Keeper:
    """Stands before the user's SIGINT handler; Python runs those in the main thread alone."""

    def __init__(self) -> None:
        self.theirs: Callable[[int, Any], Any] = signal.default_int_handler
        self.waiting: tuple[int, Any] | None = None
        self._holder: ref[object] | None = None  # weak: an error of another signal may lose it

    def stand(self) -> bool:
        """Come before the handler that there is; whether this call is what did it."""
        if threading.get_ident() != threading.main_thread().ident:
            return False
        handler = _signal.getsignal(signal.SIGINT)
        if handler == self.handle or not callable(handler):  # ignored, or the system's own
            return False
        self.theirs = handler
        try:
            _signal.signal(signal.SIGINT, self.handle)
        except ValueError:  # no thread of this interpreter gets signals
            return False
        return True

    def step_aside(self) -> None:
        """Put theirs back, unless somebody has put another one in our place."""
        if _signal.getsignal(signal.SIGINT) == self.handle:
            _signal.signal(signal.SIGINT, self.theirs)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """What Python calls for a SIGINT, between any two steps of the main thread."""
        if self._held():
            self.waiting = (number, frame)
        elif _is_delicate(frame):
            _thread.start_new_thread(_send_again, (number,))
        else:
            self.theirs(number, frame)

    def _held(self) -> bool:
        return self._holder is not None and self._holder() is not None

    def hold(self, holder: object) -> None:
        """Let Ctrl-C wait until ``holder`` lets go, unless somebody before it holds it."""
        if threading.get_ident() == threading.main_thread().ident and not self._held():
            self._holder = ref(holder)

    def let_go(self, holder: object) -> None:
        """If it is ``holder`` who held it: let Ctrl-C come again; one that waited comes now."""
        if self._holder is not None and self._holder() is holder:
            self._holder = None
            self.deliver()

    def deliver(self) -> None:
        """Call the user's handler for what waited."""
        if self.waiting is not None:
            (number, frame), self.waiting = self.waiting, None
            self.theirs(number, frame)

    def breathe(self) -> None:
        """Where something waits long: let a Ctrl-C through that came meanwhile."""
        if threading.get_ident() == threading.main_thread().ident:
            self.deliver()


def _is_delicate(frame: FrameType | None) -> bool:
    """Whether a context is being entered or left just here, or a step of this module is taken."""
    for _ in range(NEAR):
        if frame is None:
            return False
        code = frame.f_code
        if code.co_name in ("__enter__", "__exit__") or code.co_filename == __file__:
            return True
        frame = frame.f_back
    return False


def _send_again(number: int) -> None:
    time.sleep(AGAIN)
    _thread.interrupt_main(signal.Signals(number))


_keeper = _Keeper()
breathe = _keeper.breathe


class interrupts_held:
    """While open, Ctrl-C waits; where it waits already, or in other threads, nothing changes."""

    _stands = False

    def __enter__(self) -> None:
        self._stands = _keeper.stand()
        _keeper.hold(self)

    def __exit__(self, *_error: object) -> None:
        if self._stands:
            _keeper.step_aside()
        _keeper.let_go(self)


def until_closed(
    stack: ExitStack, register: Callable[..., Any], *args: Any, **options: Any
) -> None:
    """Register a hook, ``register(*args, **options)``; closing ``stack`` removes it.

    Args:
        stack: Closes it. An `UndoStack`, or within one, so that Ctrl-C is watched.
        register: Gives a handle with ``remove()``, as ``module.register_forward_hook`` does.
        *args: For it.
        **options: For it.
    """
    # a Ctrl-C meanwhile comes within a step of this module, so it is sent again
    stack.callback(register(*args, **options).remove)


class UndoStack(ExitStack):
    """An `ExitStack` that Ctrl-C finds before a context is entered or after, never between."""

    _stands = False

    def __enter__(self) -> UndoStack:
        self._stands = _keeper.stand()
        return self

    def enter_context(self, cm: AbstractContextManager[T, Any]) -> T:
        """Enter a context that is left when the stack is."""
        with interrupts_held():
            return super().enter_context(cm)

    def pop_all(self) -> UndoStack:
        """Hand everything, the watch for Ctrl-C too, to another stack."""
        other = super().pop_all()
        other._stands, self._stands = self._stands, False
        return other

    def __exit__(self, *error: Any) -> Any:
        _keeper.hold(self)
        try:
            return super().__exit__(*error)
        finally:
            if self._stands:
                self._stands = False
                _keeper.step_aside()
            _keeper.let_go(self)


class _Watched:
    """A context of torch's during which our handler stands, so that it is left whole."""

    _stands = False

    def __enter__(self) -> None:
        self._stands = _keeper.stand()
        super().__enter__()  # type: ignore[misc]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[misc]
        if self._stands:
            self._stands = False
            _keeper.step_aside()


class no_grad(_Watched, torch.no_grad):
    """`torch.no_grad`, also as a decorator; no Ctrl-C leaves it switched on."""


class enable_grad(_Watched, torch.enable_grad):
    """`torch.enable_grad`, also as a decorator; no Ctrl-C leaves it switched on."""
