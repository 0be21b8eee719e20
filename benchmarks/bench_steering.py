"""Steered generation against `model.generate`, interleaved in one process.

Floor: the plain call on the same tokens. Steering adds, per pass, one addition to the residual
stream of each steered layer, a hook there, and a clock that keeps absolute positions.
`steer_generation` is the whole call: it also tokenizes, checks and decodes.

    PYTHONPATH=. python benchmarks/bench_steering.py [--quick]
"""

from __future__ import annotations

import sys

import torch
from side_by_side import medians, print_machine, print_table
from transformers import GPT2Config, GPT2LMHeadModel

from continuations import sample_continuations
from model_architecture import Architecture
from model_loader import load_model
from steering import steer, steer_generation
from steering_direction import Direction

NEW = 40
GOAL = "≤ 1.15 x"
PLAIN = "model.generate"


def gpt2_small() -> GPT2LMHeadModel:
    """GPT-2 small's shape with random weights, in evaluation mode."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config()).eval()
    assert (model.config.n_layer, model.config.n_embd) == (12, 768)
    return model


def bench(title: str, model: GPT2LMHeadModel, rounds: int) -> None:
    """One prompt: one steered layer, all of them, every way of naming tokens."""
    architecture = Architecture(model)
    ids = list(range(5, 13))
    batch = torch.tensor([ids])
    middle = architecture.n_layers // 2
    vector = torch.randn(architecture.d_model, generator=torch.Generator().manual_seed(0))
    every = {layer: Direction(vector, layer) for layer in range(architecture.n_layers)}
    options = {"min_new_tokens": NEW, "pad_token_id": 0, "do_sample": False}

    def plain() -> object:
        mask = torch.ones_like(batch)
        return model.generate(batch, attention_mask=mask, max_new_tokens=NEW, **options)

    def steered(positions: str | None = None, **how: bool) -> object:
        return steer_generation(
            model,
            None,
            ids,
            vector,
            middle,
            0.1,
            positions=positions,
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            pad_token_id=0,
            **how,
        )

    def in_context() -> object:
        with steer(model, vector, middle, 0.1):
            return plain()

    def everywhere() -> object:
        with steer(model, every, coefficient=0.1):
            return plain()

    ways = {
        PLAIN: plain,
        "steer_generation": steered,
        "steer_generation, constant norm": lambda: steered(keep_norm=True),
        "steer_generation, prompt only": lambda: steered("prompt"),
        "model.generate inside steer(…)": in_context,
        "model.generate inside steer(…), 12 layers": everywhere,
    }
    print_table(f"{title}, {NEW} tokens", medians(ways, rounds, 2), PLAIN, GOAL)


def bench_batch(rounds: int) -> None:
    """Many sampled continuations, as a sweep makes them."""
    model, tokenizer = load_model(device="cpu")
    architecture = Architecture(model)
    prompts = ["Today I feel"] * 64
    batch = torch.tensor([tokenizer("Today I feel")["input_ids"]] * 64)
    vector = torch.randn(architecture.d_model, generator=torch.Generator().manual_seed(0))

    def plain() -> object:
        mask = torch.ones_like(batch)
        options = {"do_sample": True, "top_k": 0, "pad_token_id": 0}
        return model.generate(batch, attention_mask=mask, max_new_tokens=25, **options)

    def ours() -> object:
        return sample_continuations(architecture, tokenizer, prompts, max_new_tokens=25)

    def steered() -> object:
        with steer(model, vector, architecture.n_layers // 2, 0.1):
            return ours()

    ways = {PLAIN: plain, "sample_continuations": ours, "the same, steered": steered}
    seconds = medians(ways, rounds, 1)
    print_table("64 sampled continuations of 25 tokens, demo model", seconds, PLAIN, GOAL)


def main() -> None:
    """Print every table."""
    torch.set_num_threads(1)
    rounds = 5 if "--quick" in sys.argv else 15
    print_machine()
    model, _ = load_model(device="cpu")
    bench("demo model, 12 × 96", model, rounds)
    bench("GPT-2 small's shape, 12 × 768", gpt2_small(), max(rounds // 3, 3))
    bench_batch(max(rounds // 3, 3))


if __name__ == "__main__":
    main()
