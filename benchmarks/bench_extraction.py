"""Extraction against the plain Hugging Face call, in one process.

Floor: recording runs the same forward pass, so the least it can cost is that pass without the head
(which extraction does not need) plus a copy of every recorded tensor. Batched extraction cannot be
faster than one batched forward over all tokens, without the head.
"""

from __future__ import annotations

import resource
import sys

import torch
from side_by_side import medians, print_machine, print_table
from transformers import GPT2Config, GPT2LMHeadModel

from activation_extraction import ActivationExtractor, extract_batch, make_request
from forward_pass import Site, record
from generation import generate_with_activations
from model_architecture import Architecture
from model_loader import load_model
from tokenization import encode, pad_left

SUBLAYERS = ("resid_post", "resid_mid", "attn_out", "mlp_out")


def gpt2(layers: int, width: int, heads: int, vocabulary: int, positions: int) -> GPT2LMHeadModel:
    """A random GPT-2 of a given size, in evaluation mode, with SDPA attention."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=layers, n_embd=width, n_head=heads, vocab_size=vocabulary, n_positions=positions
    )
    model = GPT2LMHeadModel(config).eval()
    assert model.config.num_hidden_layers == layers
    assert model.config._attn_implementation == "sdpa"
    return model


def bench_forward(title: str, model: GPT2LMHeadModel, length: int, rounds: int, goal: str) -> None:
    """One pass that records, beside one that does not."""
    architecture = Architecture(model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (1, length), generator=generator)
    inputs = architecture.inputs(ids)
    blocks = range(architecture.n_layers)
    streams = [Site("resid_post", layer) for layer in blocks]
    sublayers = [Site(name, layer) for layer in blocks for name in SUBLAYERS]
    extractor = ActivationExtractor(model)
    token_ids = ids[0].tolist()

    def plain() -> object:
        with torch.no_grad():
            return model(ids)

    def body_only() -> object:
        with torch.no_grad():
            return model.transformer(ids, use_cache=False)

    ways = {
        "plain forward": plain,
        "floor: forward without head": body_only,
        "record resid_post of every layer": lambda: record(architecture, inputs, streams),
        "record every sublayer": lambda: record(architecture, inputs, sublayers),
        "the same with logits": lambda: record(architecture, inputs, sublayers, logits=True),
        "extract_activations (whole call)": lambda: extractor.extract_activations(token_ids),
    }
    print_table(title, medians(ways, rounds), "plain forward", goal)


def bench_generation(model: GPT2LMHeadModel, rounds: int) -> None:
    """Recording while generating, beside generating."""
    architecture = Architecture(model)
    ids = list(range(5, 13))
    request = make_request(architecture)
    batch = torch.tensor([ids])

    def plain() -> object:
        return model.generate(
            batch,
            attention_mask=torch.ones_like(batch),
            max_new_tokens=40,
            do_sample=False,
            pad_token_id=0,
        )

    ways = {
        "model.generate, 40 tokens": plain,
        "generate with activations": lambda: generate_with_activations(
            architecture, None, ids, request, max_new_tokens=40, pad_token_id=0
        ),
    }
    seconds = medians(ways, rounds)
    print_table("generation, 12 × 96", seconds, "model.generate, 40 tokens", "≤ 1.2 x")


def bench_prompts(count: int) -> None:
    """The last token's stream at every layer, for many short prompts."""
    model, tokenizer = load_model(device="cpu")
    architecture = Architecture(model)
    prompts = [f"{i % 100} + {i // 100} = " for i in range(count)]
    request = make_request(architecture)
    sample = prompts[:: max(1, count // 500)]

    def one_by_one() -> list[torch.Tensor]:
        kept = []
        for prompt in sample:
            inputs = tokenizer(prompt, return_tensors="pt")
            with torch.no_grad():
                states = model(**inputs, output_hidden_states=True).hidden_states
            kept.append(torch.stack([state[0, -1] for state in states[1:]]))
        return kept

    def batched() -> list[object]:
        return extract_batch(architecture, tokenizer, prompts, request, "last", show_progress=False)

    rows = sorted((encode(tokenizer, prompt) for prompt in prompts), key=len)
    batches = [pad_left(rows[i : i + 64])[0] for i in range(0, len(rows), 64)]

    def floor() -> None:
        with torch.no_grad():
            for ids in batches:
                model.transformer(ids, use_cache=False)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    records = batched()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    held = sum(record.nbytes for record in records)
    del records
    ways = {"one by one": one_by_one, "batched": batched, "floor: batched forwards": floor}
    seconds = medians(ways, 3, 1)
    seconds["one by one"] *= count / len(sample)
    print_table(
        f"{count:,} prompts, last token, every layer (one by one: scaled up from {len(sample)})",
        seconds,
        "one by one",
        "≥ 8 times faster: ≤ 0.125 x",
    )
    print(f"  peak memory grew by {grown / 1024:.0f} MiB; the tensors hold {held / 2**20:.0f} MiB")


def main() -> None:
    """Print every table."""
    quick = "--quick" in sys.argv
    print_machine()
    small = gpt2(12, 96, 6, 1024, 128)
    goal = "resid_post ≤ 1.15 x, sublayers ≤ 1.25 x"
    bench_forward("12 × 96, 16 tokens", small, 16, 20 if quick else 200, goal)
    big = gpt2(12, 768, 12, 50257, 1024)
    bench_forward("GPT-2 small's shape, 256 tokens", big, 256, 3 if quick else 15, "≤ 1.05 x")
    bench_generation(small, 3 if quick else 15)
    bench_prompts(1000 if quick else 10_000)


if __name__ == "__main__":
    main()
