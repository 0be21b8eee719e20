"""Patching sweeps against one hooked forward pass per cell, and against the least possible work.

    python benchmarks/bench_patching.py [--small] [--repeats 3]

The naive way is what a plain script does: for each cell, a forward hook on the block that writes
one position, and a whole forward pass. Both ways give the same numbers (checked on every row). The
floor is the blocks × positions that cannot be avoided, at the arithmetic rate of the best batch.
TransformerLens' own sweep (`get_act_patch_resid_pre`) is timed beside them where it is installed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from side_by_side import medians, print_machine
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


def transformer_lens_sweep(model: Any) -> Callable[..., Any] | None:
    """TransformerLens' own sweep on the same weights; None where it is not installed."""
    try:
        from peers import boot_transformer_lens, transformer_lens_resid_pre
    except ImportError as err:
        print(f"TransformerLens is left out: {err}")
        return None
    bridge = boot_transformer_lens(model)
    return lambda *args: transformer_lens_resid_pre(bridge, *args)


def compare(name: str, model: Any, length: int, repeats: int, heads: bool, peer: bool) -> None:
    """Print one row."""
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
        "ours": ours,
        "naive": lambda: naive(model, clean, corrupted, tokens),
    }
    theirs = transformer_lens_sweep(model) if peer and not heads else None
    if theirs is not None:
        ways["TransformerLens"] = lambda: theirs(clean, corrupted, tokens)
    truth = ways["naive"]().numpy()
    off = np.abs(ours() - truth).max() / np.abs(truth).max()
    took = medians(ways, repeats, warm_up=1)
    floor = floor_seconds(model, length, "heads" if heads else "positions")
    print(
        f"{name:<42} ours {took['ours']:7.3f} s   naive {took['naive']:7.3f} s "
        f"({took['naive'] / took['ours']:5.1f} x)   floor {floor:6.3f} s "
        f"({took['ours'] / floor:4.2f} x the floor)   largest difference {off:.1e}"
        + (
            f"   TransformerLens {took['TransformerLens']:.3f} s "
            f"({took['TransformerLens'] / took['ours']:.1f} x)"
            if theirs is not None
            else ""
        )
    )


def main() -> None:
    """Compare on three shapes."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--small", action="store_true", help="leave GPT-2 small's shape out")
    parser.add_argument("--peer", action="store_true", help="TransformerLens too, if it imports")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    rest = (arguments.repeats, False, arguments.peer)
    print_machine()
    small = make_model(96, 6, 2048)
    compare("resid_pre, 12 x 96, 16 tokens", small, 16, *rest)
    compare("resid_pre, 12 x 96, 32 tokens", small, 32, *rest)
    if not arguments.small:
        large = make_model(768, 12, 50257)
        compare("resid_pre, GPT-2 small's shape, 16 tokens", large, 16, *rest)
        compare("heads, GPT-2 small's shape, 16 tokens", large, 16, arguments.repeats, True, False)


if __name__ == "__main__":
    main()
