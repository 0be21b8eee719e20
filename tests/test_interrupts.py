"""Ctrl-C, or any error, at any point of every long call: the model is as it was."""

import contextlib
import functools
import os
import random
import signal
import sys
import threading
import time

import pytest
import torch

import families
import interrupts
from forward_pass import edit, record
from interrupts import UndoStack, breathe, interrupts_held, until_closed
from long_calls import CALLS, same
from model_architecture import Architecture
from model_lock import lock_of
from patch_oracle import assert_untouched, state_of
from sites import Site

FAMILIES = ("gpt2", "llama", "bloom", "gptj")
"""By the ways to attention: the registry, the registry with grouped keys, and products by hand."""


@pytest.fixture(autouse=True)
def _ctrl_c_raises():
    """Also in a process that began with SIGINT ignored, as a shell's background jobs do."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@functools.cache
def built(name):
    return families.build(name)


def process_state():
    """What is not the model's, and an interrupted call could leave changed."""
    from transformers.modeling_utils import AttentionInterface

    return (
        AttentionInterface.__dict__.get("get_interface"),
        torch._C._len_torch_function_stack(),
        torch.is_grad_enabled(),
        torch.random.get_rng_state().tolist(),
    )


class Interrupts:
    """Counts the calls of a model's blocks, and raises in one of them."""

    def __init__(self, monkeypatch, model):
        self.count, self.at, self.error = 0, None, None
        kinds = {type(block) for block in Architecture(model).blocks}
        for kind in kinds:
            monkeypatch.setattr(kind, "forward", self.counting(kind.forward))

    def counting(self, forward):
        @functools.wraps(forward)
        def counted(*args, **kwargs):
            self.count += 1
            if self.count == self.at:
                raise self.error
            return forward(*args, **kwargs)

        return counted

    def arm(self, at, error):
        self.count, self.at, self.error = 0, at, error


def spread(count, few):
    """The first calls, the last, and some in between."""
    return sorted({1, 2, count - 1, count, *range(1, count, max(count // few, 1))} - {0})


def check_call(monkeypatch, name, call, few):
    model = built(name)
    call(model)  # what is found out once per model is known now
    interrupts = Interrupts(monkeypatch, model)
    interrupts.arm(None, None)
    expected = call(model)
    count = interrupts.count
    assert count >= 3, "the call runs blocks"
    before, process = state_of(model), process_state()
    for error in (KeyboardInterrupt, RuntimeError("some other error")):
        for at in spread(count, few):
            interrupts.arm(at, error)
            with pytest.raises(type(error) if isinstance(error, Exception) else error):
                call(model)
            assert interrupts.count == at
            assert_untouched(model, before)
            assert process_state() == process
    interrupts.arm(None, None)
    same(call(model), expected)


@pytest.mark.parametrize("call", CALLS)
def test_a_call_that_is_interrupted_leaves_nothing(monkeypatch, call):
    check_call(monkeypatch, "gpt2", CALLS[call], 6)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("call", CALLS)
def test_interrupted_anywhere_in_every_family(monkeypatch, call, name):
    check_call(monkeypatch, name, CALLS[call], 25)


@pytest.mark.parametrize("call", ["sweep", "pattern sweep", "paths", "features", "extraction"])
def test_the_first_call_on_a_model_can_be_interrupted(monkeypatch, call):
    """While it is still being found out what the model allows: nothing half known stays."""
    expected = CALLS[call](families.build("gpt2"))
    for at in (1, 2, 5, 9, 14, 20):
        model = families.build("gpt2")
        before, process = state_of(model), process_state()
        with monkeypatch.context() as patch:
            interrupts = Interrupts(patch, model)
            interrupts.arm(at, KeyboardInterrupt)
            try:
                CALLS[call](model)
            except KeyboardInterrupt:
                assert interrupts.count == at
        assert_untouched(model, before)
        assert process_state() == process
        same(CALLS[call](model), expected)


# --- Ctrl-C itself, at any moment -----------------------------------------------------------------


@contextlib.contextmanager
def ctrl_c_after(seconds):
    """Send this process a SIGINT then, as a terminal does, if it is still inside."""
    before = signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
        signal.setitimer(signal.ITIMER_REAL, 0)
        time.sleep(5 * interrupts.AGAIN)  # one that came at the very end is sent again
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def check_ctrl_c(name, call, times):
    model, rng = families.build(name), random.Random(call)
    expected = CALLS[call](model)
    began = time.perf_counter()
    CALLS[call](model)
    took, stopped = time.perf_counter() - began, 0
    before, process, handler = state_of(model), process_state()[:3], signal.getsignal(signal.SIGINT)
    for _ in range(times):
        try:
            with ctrl_c_after(rng.uniform(0, took)):
                CALLS[call](model)
        except KeyboardInterrupt:
            stopped += 1
        assert_untouched(model, before)
        assert process_state()[:3] == process
        assert lock_of(model)._depth == 0
        assert signal.getsignal(signal.SIGINT) is handler
    assert stopped > times / 4
    same(CALLS[call](model), expected)


ctrl_c = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs setitimer")
ignored = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
"""Python itself drops an exception that comes inside ``__del__``."""


@ctrl_c
@ignored
@pytest.mark.parametrize(
    ("name", "call"),
    [("gpt2", "sweep"), ("bloom", "pattern sweep"), ("llama", "extraction"), ("llama", "steering")],
)
@pytest.mark.slow  # real signals at random moments
def test_ctrl_c_at_any_moment_leaves_nothing(name, call):
    check_ctrl_c(name, call, 25)


@ctrl_c
@ignored
@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("call", CALLS)
def test_ctrl_c_at_any_moment_of_every_call(name, call):
    check_ctrl_c(name, call, 25)


def test_an_interrupt_waits_until_it_may_come():
    done = []
    with pytest.raises(KeyboardInterrupt):
        with interrupts_held():
            signal.raise_signal(signal.SIGINT)
            done.append("waited")
            with interrupts_held():
                done.append("inside")
            done.append("still")
        done.append("never")
    assert done == ["waited", "inside", "still"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_comes_where_something_waits_long():
    with pytest.raises(KeyboardInterrupt), interrupts_held():
        signal.raise_signal(signal.SIGINT)
        breathe()
        raise AssertionError("it did not come")


def test_the_handler_of_the_user_is_called_and_stays():
    seen = []
    before = signal.signal(signal.SIGINT, lambda number, _frame: seen.append(number))
    try:
        with interrupts_held():
            signal.raise_signal(signal.SIGINT)
            assert seen == []
        assert seen == [signal.SIGINT]
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with interrupts_held():
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_stack_is_unwound_whole_before_the_interrupt_comes():
    undone = []

    def undo(number):
        undone.append(number)
        if number == 2:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt), UndoStack() as stack:
        for number in range(4):
            stack.callback(undo, number)
    assert undone == [3, 2, 1, 0]


def test_a_hook_is_registered_and_noted_in_one():
    module = torch.nn.Linear(1, 1)

    def register(hook):
        handle = module.register_forward_hook(hook)
        signal.raise_signal(signal.SIGINT)
        return handle

    with pytest.raises(KeyboardInterrupt), UndoStack() as stack:
        until_closed(stack, register, print)
        time.sleep(1)
    assert not module._forward_hooks


def test_who_waits_for_another_thread_can_be_interrupted():
    model, held, free = families.build("gpt2"), threading.Event(), threading.Event()

    def hold():
        with edit(Architecture(model), {}):
            held.set()
            free.wait(60)

    thread = threading.Thread(target=hold, daemon=True)
    thread.start()
    assert held.wait(60)
    try:
        with pytest.raises(KeyboardInterrupt), ctrl_c_after(0.3):
            CALLS["lens"](model)
    finally:
        free.set()
        thread.join(60)
    assert lock_of(model)._depth == 0
    CALLS["lens"](model)


def test_other_threads_hold_nothing_back():
    before, found = signal.getsignal(signal.SIGINT), []

    def work():
        with interrupts_held():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before]


@pytest.mark.parametrize("step", ["stand", "hold"])
@pytest.mark.parametrize("context", [interrupts_held, UndoStack])
def test_another_signals_error_does_not_swallow_ctrl_c(monkeypatch, step, context):
    """Its handler may raise between any two steps, so also once Ctrl-C is made to wait."""
    keeper, torn = interrupts._keeper, []
    real = getattr(keeper, step)

    def tearing(*args):
        real(*args)
        if not torn:
            torn.append(step)
            raise TimeoutError

    monkeypatch.setattr(keeper, step, tearing)
    with pytest.raises(TimeoutError), context():
        pass
    assert torn == [step]
    monkeypatch.undo()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), UndoStack() as stack:
        with interrupts_held():
            signal.raise_signal(signal.SIGINT)
            stack.callback(torn.append, "undone")
    assert torn == [step, "undone"]
    signal.signal(signal.SIGINT, signal.default_int_handler)


class Traced:
    """Sends a SIGINT as a call of a function of that name begins, the ``nth`` time."""

    def __init__(self, name, nth):
        self.name, self.left = name, nth

    def __call__(self, frame, event, _arg):
        if event == "call" and self.left and frame.f_code.co_qualname == self.name:
            self.left -= 1
            if not self.left:
                signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("nth", [1, 2, 3])
@pytest.mark.parametrize(
    "name", ["UndoStack.__enter__", "UndoStack.__exit__", "_GeneratorContextManager.__exit__"]
)
def test_one_that_comes_as_a_context_is_entered_or_left_waits(name, nth):
    """Just there it would lose the stack, with all that it was to undo."""
    model = families.build("gpt2")
    architecture = Architecture(model)
    edits, inputs = (
        {Site("attn_pattern", 0): torch.zeros_like},
        {"input_ids": torch.arange(3)[None]},
    )

    def call():
        with edit(architecture, edits):
            record(architecture, inputs, [Site("resid_post", 1)])
        time.sleep(1)  # a second is enough for one that is sent again

    before, process = state_of(model), process_state()
    traced = Traced(name, nth)
    with pytest.raises(KeyboardInterrupt) as kept:  # with its traceback, as a notebook keeps it
        sys.setprofile(traced)
        try:
            call()
        finally:
            sys.setprofile(None)
    assert not traced.left
    assert_untouched(model, before)
    assert process_state() == process
    assert kept.tb is not None
