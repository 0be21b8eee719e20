"""What happens when memory does not suffice: batches are halved, and the last error says why.

    in_batches           run batches, halved until they fit; the results are those of whole batches
    explain              an error of any allocator, out of memory, as one that says what can be done
    is_out_of_memory     whether an error is one of these
    free_bytes           what a device has left
    in_words             a number of bytes for a person

torch raises `torch.OutOfMemoryError` where CUDA has no memory left, a plain RuntimeError where the
CPU's allocator, MPS or cuBLAS has none, and NumPy a MemoryError.
"""

from __future__ import annotations

import gc
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakSet

import torch

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
"""Where Linux says what memory there is, and what a process may use of it."""

Item = TypeVar("Item")
Result = TypeVar("Result")

MESSAGES = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
)
"""What a RuntimeError says, in small letters, that is about memory."""


_shared: WeakSet[torch.nn.Module] = WeakSet()


def share_passes(model: torch.nn.Module) -> None:
    """Note that other processes take part in every pass of a model.

    While such a model lives no batch is halved: in the others it would stay whole, and they would
    wait for one another for ever.
    """
    _shared.add(model)


class SmallerBatchWarning(UserWarning):
    """A batch did not fit into memory; smaller ones give the same results."""


class NotEnoughMemoryError(torch.OutOfMemoryError, MemoryError):
    """What cannot be made any smaller does not fit into memory."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that an allocator has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(message in text for message in MESSAGES)


def in_batches(
    batches: Iterable[Sequence[Item]],
    run: Callable[[Sequence[Item]], Result],
    *,
    unit: str,
    cost: Callable[[Sequence[Item]], int] = len,
    needs: Callable[[Sequence[Item]], str] | None = None,
) -> Iterator[tuple[Sequence[Item], Result]]:
    """Run batch after batch; one that does not fit is halved, and later ones are made as small.

    Args:
        batches: What to run.
        run: Runs a batch. It may be called again with a part of what it failed on.
        unit: What a batch consists of, for messages (``"prompts"``).
        cost: What the memory of a batch grows with; only batches of lower cost are tried later.
        needs: What a batch needs, in words, for the error.

    Yields:
        Each batch that was run, in order, and its result.

    Raises:
        NotEnoughMemoryError: a batch of one does not fit, or any while `share_passes` forbids
            halves.
    """
    limit: float = float("inf")
    for whole in batches:
        pending = [whole]
        while pending:
            batch = pending.pop()
            half = len(batch) // 2
            if half and cost(batch) > limit:
                pending += [batch[half:], batch[:half]]
                continue
            done = _attempt(run, batch)
            if not isinstance(done, _Failed):
                yield batch, done
                continue
            _give_back()
            if len(_shared):
                raise NotEnoughMemoryError(_shared_advice(len(batch), unit)) from done.error
            if not half:
                failure = _alone(unit, None if needs is None else partial(needs, batch), done.error)
                raise failure
            limit = cost(batch[:half])
            warnings.warn(
                f"{len(batch)} {unit} at a time do not fit into memory: going on with {half}",
                SmallerBatchWarning,
                stacklevel=3,
            )
            pending += [batch[half:], batch[:half]]


class _Failed:
    """An error without the frames that hold what it was raised over."""

    def __init__(self, error: BaseException) -> None:
        self.error = error.with_traceback(None)


def _attempt(run: Callable[[Sequence[Item]], Result], batch: Sequence[Item]) -> Result | _Failed:
    try:
        return run(batch)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return _Failed(error)


def _give_back() -> None:
    """Let go of what a failed pass left behind."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _alone(
    unit: str, needs: Callable[[], str] | None, error: BaseException
) -> NotEnoughMemoryError:
    """The error of a batch that cannot be halved, with what it needs if that can be said."""
    told = "" if needs is None else _attempt(lambda _: needs(), [])
    words = told if isinstance(told, str) else ""
    if not words and isinstance(error, NotEnoughMemoryError):
        return error
    found = NotEnoughMemoryError(_advice(f"one of the {unit} alone", words))
    found.__cause__ = error
    return found


def _shared_advice(count: int, unit: str) -> str:
    return (
        f"{count} {unit} at a time do not fit into memory, and no batch of a model that is split "
        "over processes is halved by one of them: give them all a smaller batch_size (or "
        "max_tokens), or shorten the text"
    )


def _advice(what: str, needed: str) -> str:
    return (
        f"{what} does not fit into memory{needed and ': '}{needed}. Shorten the text, ask for "
        "fewer layers, sites or positions, load the model in a smaller dtype, or take a device "
        "with more memory"
    )


def explain(_kind: Any, error: BaseException | None, _trace: Any) -> None:
    """An exit function for ``ExitStack.push``: an allocator's error becomes one that says more.

    Raises:
        NotEnoughMemoryError: instead of any allocator's own error; others pass.
    """
    if error is None or isinstance(error, NotEnoughMemoryError) or not is_out_of_memory(error):
        return
    said = str(error).strip().split("\n")[0].rstrip(".")
    raise NotEnoughMemoryError(_advice("a pass of the model", said)) from error.with_traceback(None)


# --- How much there is ----------------------------------------------------------------------------


def free_bytes(device: torch.device) -> float:
    """What a device has left, with what torch holds of it unused; a container's limit counts."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(_available(), *_container_rooms())


def _available() -> float:
    """What the computer has left: on Linux with what caches of files would give back."""
    with suppress(OSError):
        text = (PROC / "meminfo").read_text()
        found = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
        if found:
            return float(found[1]) * 1024
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):
        return float(2**31)


def _container_rooms() -> Iterator[float]:
    """What the control groups of this process (a container's, a job's) still allow it."""
    yield float("inf")
    try:
        lines = (PROC / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, kinds, path = line.split(":", 2)
        if not kinds:
            base, names = CGROUPS, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in kinds.split(","):
            base = CGROUPS / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        own = base / path.strip("/")
        yield from (
            _room(each, *names) for each in (own, *own.parents) if base in (each, *each.parents)
        )


def _room(group: Path, limit: str, used: str, idle: str) -> float:
    """What a control group has left; what it caches of files can be given back."""
    try:
        most, held = (int((group / name).read_text()) for name in (limit, used))
        numbers = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return float(max(0, most - held + int(numbers.get(idle, 0))))
    except (OSError, ValueError):  # no such file, or "max"
        return float("inf")


def in_words(nbytes: float) -> str:
    """A number of bytes for a person, in steps of 1024: ``"1.5 GiB"``."""
    size = float(nbytes)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} TiB"
