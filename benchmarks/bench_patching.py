"""Patching sweeps against one hooked forward pass per cell, and against the least possible work.

    python benchmarks/bench_patching.py [--small] [--long] [--repeats 3] [--threads 1]

The naive way is what a plain script does: for each cell, a forward hook on the block that writes
one position, and a whole forward pass. Both ways give the same numbers (checked on every row). The
floor is the blocks × positions that cannot be avoided, at the arithmetic rate of the best batch.
TransformerLens' own sweep (`get_act_patch_resid_pre`) is timed beside them where it is installed.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from side_by_side import medians, print_machine, print_table
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from edited_runs import abilities
from model_architecture import Architecture
from patching_sweep import patching_sweep


def make_model(width: int, heads: int, vocabulary: int) -> GPT2LMHeadModel:
    """A GPT-2 of 12 layers with random weights."""
    torch.manual_seed(0)
    config = GPT2Config(n_embd=width, n_head=heads, vocab_size=vocabulary, initializer_range=0.1)
    return GPT2LMHeadModel(config).eval()


@torch.no_grad()
def naive_sweep(model: Any, clean: Tensor, corrupted: Tensor, tokens: tuple[int, int]) -> Tensor:
    """One hooked forward pass per cell of ``resid_pre``, ``[layer, position]``."""
    blocks = model.transformer.h
    streams: list[Tensor] = []
    handles = [
        block.register_forward_pre_hook(lambda _m, args: streams.append(args[0].clone()))
        for block in blocks
    ]
    model(clean)
    for handle in handles:
        handle.remove()
    found = torch.zeros(len(blocks), clean.shape[1])
    for layer, block in enumerate(blocks):
        for position in range(clean.shape[1]):

            def patch(_m: Any, args: Any, layer: int = layer, position: int = position) -> Any:
                hidden = args[0].clone()
                hidden[:, position] = streams[layer][:, position]
                return (hidden, *args[1:])

            handle = block.register_forward_pre_hook(patch)
            logits = model(corrupted).logits[0, -1]
            handle.remove()
            found[layer, position] = logits[tokens[0]] - logits[tokens[1]]
    return found


@torch.no_grad()
def naive_heads(model: Any, clean: Tensor, corrupted: Tensor, tokens: tuple[int, int]) -> Tensor:
    """One hooked forward pass per head, ``[layer, head]``."""
    blocks, n_heads = model.transformer.h, model.config.n_head
    size = model.config.n_embd // n_heads
    kept: list[Tensor] = []
    handles = [
        block.attn.c_proj.register_forward_pre_hook(lambda _m, args: kept.append(args[0].clone()))
        for block in blocks
    ]
    model(clean)
    for handle in handles:
        handle.remove()
    found = torch.zeros(len(blocks), n_heads)
    for layer, block in enumerate(blocks):
        for head in range(n_heads):
            part = slice(head * size, (head + 1) * size)

            def patch(_m: Any, args: Any, layer: int = layer, part: slice = part) -> Any:
                z = args[0].clone()
                z[..., part] = kept[layer][..., part]
                return (z,)

            handle = block.attn.c_proj.register_forward_pre_hook(patch)
            logits = model(corrupted).logits[0, -1]
            handle.remove()
            found[layer, head] = logits[tokens[0]] - logits[tokens[1]]
    return found


@torch.no_grad()
def floor_seconds(model: Any, length: int, cells: str) -> float:
    """The unavoidable blocks × positions, at the rate of the best batch of one block."""
    block = model.transformer.h[0]
    n_layers, width, n_heads = 12, model.config.n_embd, model.config.n_head
    rates = []
    for rows in (8, 32, 128, 256):
        hidden = torch.randn(rows, length, width)
        block(hidden)
        took = min(_timed(lambda hidden=hidden: block(hidden)) for _ in range(3))
        rates.append(rows * length / took)
    left = np.arange(n_layers, 0, -1)  # blocks left from each layer on
    positions = np.arange(length, 0, -1)
    work = left.sum() * (positions.sum() if cells == "positions" else n_heads * length)
    return float(work / max(rates)) + 2 * _timed(lambda: model(torch.zeros(1, length).long()))


def _timed(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def transformer_lens_sweep(
    make: Callable[[], Any], clean: Tensor, corrupted: Tensor, tokens: tuple[int, int]
) -> Callable[[], Any] | None:
    """TransformerLens' own sweep on the same weights; None where it is not installed.

    Its bridge wraps a model in place, so it gets a copy of its own. Timed are the clean run that
    fills its cache and `get_act_patch_resid_pre`, as its documentation has them.
    """
    if find_spec("transformer_lens") is None:
        print("TransformerLens is not installed here, so it is not timed")
        return None
    from transformer_lens.model_bridge.sources import build_bridge_from_module
    from transformer_lens.patching import get_act_patch_resid_pre

    model = make()
    bridge = build_bridge_from_module(model, type(model).__name__, hf_config=model.config)

    @torch.no_grad()
    def sweep() -> Tensor:
        _, cache = bridge.run_with_cache(clean)
        return get_act_patch_resid_pre(
            bridge, corrupted, cache, lambda z: z[0, -1, tokens[0]] - z[0, -1, tokens[1]]
        )

    return sweep


def compare(
    name: str, make: Callable[[], Any], length: int, repeats: int, heads: bool = False
) -> None:
    """Print one row."""
    model = make()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, model.config.vocab_size, (2, length), generator=generator)
    clean, corrupted, tokens = ids[:1], ids[1:], (5, 7)
    architecture = Architecture(model)
    abilities(architecture)  # once per model, not part of a sweep

    def ours() -> np.ndarray:
        site = "head_out" if heads else "resid_pre"
        result = patching_sweep(
            architecture, None, clean, corrupted, site,
            answer=tokens[0], foil=tokens[1], show_progress=False,
        )  # fmt: skip
        return result.values

    naive = naive_heads if heads else naive_sweep
    ways: dict[str, Callable[[], Any]] = {
        "patching_sweep": ours,
        "one hooked forward per cell": lambda: naive(model, clean, corrupted, tokens),
    }
    truth = naive(model, clean, corrupted, tokens).numpy()
    off = {"patching_sweep": np.abs(ours() - truth).max()}
    theirs = None if heads else transformer_lens_sweep(make, clean, corrupted, tokens)
    if theirs is not None:
        ways["TransformerLens"] = theirs
        off["TransformerLens"] = np.abs(theirs().numpy() - truth).max()
    seconds = medians(ways, repeats, warm_up=1)
    seconds["floor"] = floor_seconds(model, length, "heads" if heads else "positions")
    print_table(name, seconds, "patching_sweep")
    print(
        "  largest difference from one hooked forward per cell: "
        + ", ".join(f"{way} {value:.1e}" for way, value in off.items())
        + f" (values up to {np.abs(truth).max():.1f})",
        flush=True,
    )


def report_long() -> None:
    """Peak memory of cells of a 2,048-token prompt at GPT-2 small's shape, above the model."""
    model = GPT2LMHeadModel(GPT2Config(n_positions=2048, initializer_range=0.1)).eval()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    clean, corrupted = torch.randint(0, 50257, (2, 2048)).tolist()
    result = patching_sweep(
        model, None, clean, corrupted, answer=5, foil=7, show_progress=False,
        layers=[6, 11], positions=[0, 1000, 1500, 2047],
    )  # fmt: skip
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"2,048 tokens: {result}, {result.passes} passes, peak {peak:.0f} MiB above the model")


def main() -> None:
    """Compare on three shapes."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--small", action="store_true", help="leave GPT-2 small's shape out")
    parser.add_argument("--long", action="store_true", help="only the memory of 2,048 tokens")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print_machine()
    if arguments.long:
        report_long()
        return

    def small() -> Any:
        return make_model(96, 6, 2048)

    def large() -> Any:
        return make_model(768, 12, 50257)

    compare("resid_pre, 12 x 96, 16 tokens", small, 16, arguments.repeats)
    compare("resid_pre, 12 x 96, 32 tokens", small, 32, arguments.repeats)
    if not arguments.small:
        compare("resid_pre, GPT-2 small's shape, 16 tokens", large, 16, arguments.repeats)
        compare("heads, GPT-2 small's shape, 16 tokens", large, 16, arguments.repeats, heads=True)


if __name__ == "__main__":
    main()
