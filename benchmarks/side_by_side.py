"""Time several ways to do one thing, interleaved in one process, and compare their medians.

Run-to-run noise hits all ways alike, so the ratio is steadier than any single time.
"""

from __future__ import annotations

import gc
import platform
import statistics
import time
from collections.abc import Callable, Mapping

import torch
import transformers


def medians(
    ways: Mapping[str, Callable[[], object]], rounds: int = 30, warm_up: int = 3
) -> dict[str, float]:
    """Median seconds of each way; every round runs each of them once, in turn.

    Args:
        ways: Name to what is timed.
        rounds: How often each is timed.
        warm_up: How often each runs before that.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(warm_up + rounds):
        for name, way in ways.items():
            gc.disable()
            start = time.perf_counter()
            way()
            elapsed = time.perf_counter() - start
            gc.enable()
            if number >= warm_up:
                times[name].append(elapsed)
    return {name: statistics.median(values) for name, values in times.items()}


def print_table(title: str, seconds: Mapping[str, float], baseline: str, goal: str = "") -> None:
    """Print milliseconds and the ratio to one of the ways."""
    print(f"\n{title}" + (f"  (goal: {goal})" if goal else ""))
    width = max(map(len, seconds))
    for name, value in seconds.items():
        print(f"  {name:<{width}}  {1e3 * value:10.3f} ms   {value / seconds[baseline]:7.3f} x")


def print_machine() -> None:
    """Print what the figures were measured on."""
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, Python {platform.python_version()}"
    )
