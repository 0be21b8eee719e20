"""Scores of every head over 100 texts against the forward passes that they cannot do without.

Floor: one eager forward of the body (no head) over the same batches, since only eager attention
forms a pattern. The summary adds to it what reads each pattern: entropy, which is a logarithm per
cell, sums along rows, and the few cells that lie on diagonals or behind copies.

Times are CPU seconds of one thread, so that a busy machine blurs the ratios less.

    python benchmarks/bench_heads.py [--quick]      every table; --quick with fewer rounds
    python benchmarks/bench_heads.py --memory N     peak memory over N texts, nothing else
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from side_by_side import print_machine, print_table
from transformers import GPT2Config, GPT2LMHeadModel

from attention_analysis import BATCH_CELLS, batch_attention_patterns, head_summary
from model_loader import load_model

FLOOR = "floor: eager forward of the body"


def cpu_medians(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median CPU seconds of each way; every round runs each of them once, in turn."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            start = time.process_time()
            way()
            if number:  # the first round warms up
                times[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def gpt2_small() -> GPT2LMHeadModel:
    """GPT-2 small's shape with random weights and eager attention, in evaluation mode."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(attn_implementation="eager")).eval()
    shape = model.config.n_layer, model.config.n_embd, model.config.vocab_size
    assert shape == (12, 768, 50257)
    return model


def texts(count: int, length: int, vocabulary: int, seed: int = 0) -> list[list[int]]:
    """Random texts; a token is drawn as often as Zipf's law says, so that many occur again."""
    generator = torch.Generator().manual_seed(seed)
    weights = 1 / torch.arange(1, vocabulary + 1)
    drawn = torch.multinomial(weights, count * length, replacement=True, generator=generator)
    return drawn.view(count, length).tolist()


def bench(title: str, model: GPT2LMHeadModel, rows: list[list[int]], rounds: int) -> None:
    """The summary beside the passes, and beside keeping every pattern."""
    size = max(1, BATCH_CELLS // len(rows[0]) ** 2)
    batches = torch.tensor(rows).split(size)

    @torch.no_grad()
    def passes() -> None:
        for ids in batches:
            model.transformer(ids, use_cache=False)

    @torch.no_grad()
    def with_attentions() -> None:
        for ids in batches:
            model(ids, use_cache=False, output_attentions=True)

    def kept() -> object:
        return batch_attention_patterns(model, None, rows, batch_size=size, show_progress=False)

    ways = {
        FLOOR: passes,
        "model(…, output_attentions=True), no scores": with_attentions,
        "head_summary": lambda: head_summary(model, None, rows),
        "batch_attention_patterns (keeps them all)": kept,
    }
    if len(rows) * len(rows[0]) ** 2 * 144 > 2**28:  # a gigabyte of patterns
        del ways["batch_attention_patterns (keeps them all)"]
    print_table(title, cpu_medians(ways, rounds), FLOOR, "head_summary ≤ 1.3 x")


def report_memory(count: int) -> None:
    """Print the peak of resident memory above the loaded model; Linux only."""
    model, _ = load_model(device="cpu")
    rows = texts(count, 100, model.config.vocab_size)
    head_summary(model, None, rows[:32])
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = _kilobytes("VmRSS")
    head_summary(model, None, rows)
    grown = (_kilobytes("VmHWM") - before) / 1024
    print(f"  {count} texts: peak {grown:.0f} MiB above the loaded model and its texts")


def _kilobytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def main() -> None:
    """Print every table, or the memory alone."""
    torch.set_num_threads(1)
    if "--memory" in sys.argv:
        report_memory(int(sys.argv[sys.argv.index("--memory") + 1]))
        return
    print_machine()
    quick = "--quick" in sys.argv
    model, _ = load_model(device="cpu", attn_implementation="eager")
    vocabulary = model.config.vocab_size
    for length in (16, 100):
        rows = texts(100, length, vocabulary)
        bench(f"bundled model, 100 texts of {length} tokens", model, rows, 3 if quick else 9)
    small = gpt2_small()
    count = 8 if quick else 100
    rows = texts(count, 128, 50257)
    bench(f"GPT-2 small's shape, {count} texts of 128 tokens", small, rows, 1 if quick else 2)
    rows = texts(2 if quick else 4, 512, 50257)
    bench(f"GPT-2 small's shape, {len(rows)} texts of 512 tokens", small, rows, 1 if quick else 3)
    if Path("/proc/self/clear_refs").exists():
        print("\nmemory, bundled model, texts of 100 tokens, each in a process of its own")
        sys.stdout.flush()
        for count in (100, 1600):
            subprocess.run([sys.executable, __file__, "--memory", str(count)], check=True)


if __name__ == "__main__":
    main()
