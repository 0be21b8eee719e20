"""Attribution patching of every head and MLP against two forward passes and one backward pass.

    python benchmarks/bench_attribution_patching.py [--small] [--rounds 15] [--threads 1]

The yardstick is plain PyTorch: one forward pass without a graph, one with it, and one backward pass
to the embeddings alone; weights require no gradient, so that it is the least that there is. What a
user's ``loss.backward()`` takes, which also computes every weight's gradient, is timed beside it,
and so is the exact sweep.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from side_by_side import medians, print_machine, print_table
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from attribution_patching import attribution_sweeps
from model_architecture import Architecture
from model_loader import DEMO_MODEL
from patching_sweep import patching_sweep

GOAL = "attribution_sweeps at most 1.5 x two forwards and a backward"


def yardstick(model: Any, clean: torch.Tensor, corrupted: torch.Tensor) -> Callable[[], Any]:
    """Two forward passes and a backward pass to the embeddings."""

    def run() -> None:
        with torch.no_grad():
            model(clean, use_cache=False)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        leaf = model.get_input_embeddings()(corrupted).detach().requires_grad_()
        logits = model(inputs_embeds=leaf, use_cache=False).logits[0, -1]
        torch.autograd.grad(logits[5] - logits[7], leaf)
        for parameter in model.parameters():
            parameter.requires_grad_(True)

    return run


def with_weights(model: Any, clean: torch.Tensor, corrupted: torch.Tensor) -> Callable[[], Any]:
    """The same with ``loss.backward()``."""

    def run() -> None:
        with torch.no_grad():
            model(clean, use_cache=False)
        logits = model(corrupted, use_cache=False).logits[0, -1]
        (logits[5] - logits[7]).backward()
        model.zero_grad(set_to_none=True)

    return run


def compare(name: str, model: Any, length: int, rounds: int, exact: bool) -> None:
    """Print one table."""
    generator = torch.Generator().manual_seed(1)
    clean, corrupted = torch.randint(0, 2000, (2, 1, length), generator=generator)
    architecture = Architecture(model)
    options: dict[str, Any] = {"answer": 5, "foil": 7, "show_progress": False}
    prompts = architecture, None, clean[0].tolist(), corrupted[0].tolist()
    sites = ("head_out", "mlp_out")
    ways: dict[str, Callable[[], Any]] = {
        "two forwards, one backward": yardstick(model, clean, corrupted),
        "the same with every weight's gradient": with_weights(model, clean, corrupted),
        "attribution_sweeps, heads and MLPs": lambda: attribution_sweeps(
            *prompts, sites, **options
        ),
    }
    if exact:
        ways["queries and keys, attention corrected"] = lambda: attribution_sweeps(
            *prompts, ("query", "key"), attention_correction=True, **options
        )
        ways["heads and MLPs, GradDrop"] = lambda: attribution_sweeps(
            *prompts, sites, grad_drop=True, **options
        )
        ways["patching_sweep, heads"] = lambda: patching_sweep(*prompts, "head_out", **options)
    seconds = medians(ways, rounds, warm_up=1)
    print_table(name, seconds, "two forwards, one backward", GOAL)


def main() -> None:
    """Compare on three models."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--small", action="store_true", help="leave GPT-2 small's shape out")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print_machine()
    demo = AutoModelForCausalLM.from_pretrained(DEMO_MODEL).eval()
    compare("bundled model, 16 tokens", demo, 16, arguments.rounds, exact=True)
    compare("bundled model, 96 tokens", demo, 96, arguments.rounds, exact=False)
    if not arguments.small:
        torch.manual_seed(0)
        large = GPT2LMHeadModel(GPT2Config(initializer_range=0.1)).eval()
        rounds = max(3, arguments.rounds // 3)
        compare("GPT-2 small's shape, 16 tokens", large, 16, rounds, exact=False)
        compare("GPT-2 small's shape, 64 tokens", large, 64, rounds, exact=False)


if __name__ == "__main__":
    main()
