"""What the engine costs on a GPU, beside plain calls, at the shape of Llama 3.2 1B.

    python benchmarks/bench_accelerator.py [--device cuda] [--small]

Everything is timed with the device waited for. The floors: recording cannot be cheaper than the
forward pass without its head; the lens needs that pass and one product of the head with every
layer's stream; a sweep needs the blocks that follow each cell; 10,000 prompts need their batched
forward passes. ``--small`` tries the script out.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from side_by_side import medians, print_machine, print_table
from transformers import AutoModelForCausalLM, LlamaConfig

from activation_extraction import extract_batch, make_request
from edited_runs import abilities
from forward_pass import Site, record
from generation import generate_with_activations
from logit_lens import LogitLens
from model_architecture import Architecture
from model_loader import load_model
from patching_sweep import patching_sweep
from tokenization import encode, pad_left

SUBLAYERS = ("resid_post", "resid_mid", "attn_out", "mlp_out")


def llama(device: str, small: bool, dtype: torch.dtype) -> Any:
    """Llama 3.2 1B's shape with random weights, or a tenth of it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256 if small else 2048, intermediate_size=512 if small else 8192,
        num_hidden_layers=4 if small else 16, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=4096 if small else 128256, max_position_embeddings=4096, bos_token_id=None,
        eos_token_id=None, initializer_range=0.05,
    )  # fmt: skip
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def waited(device: str, call: Callable[[], Any]) -> Callable[[], Any]:
    """``call``, and then nothing left to do on the device."""

    def run() -> Any:
        result = call()
        if device == "cuda":
            torch.cuda.synchronize()
        return result

    return run


def peak_mib(device: str, call: Callable[[], Any]) -> float:
    """MiB that PyTorch allocates at most beyond what is there."""
    if device != "cuda":
        return float("nan")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del result
    return peak / 2**20


def compare(
    title: str, device: str, ways: dict[str, Callable[[], Any]], baseline: str, rounds: int
) -> None:
    """A table of times, and of peaks."""
    print_table(
        title, medians({k: waited(device, w) for k, w in ways.items()}, rounds, 2), baseline
    )
    peaks = (f"{name} {peak_mib(device, way):.0f}" for name, way in ways.items())
    print(f"  peak MiB above the model: {', '.join(peaks)}", flush=True)


@torch.no_grad()
def bench_reading(model: Any, device: str, length: int, rounds: int) -> None:
    """Recording and the lens on one text."""
    architecture, lens = Architecture(model), LogitLens(model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (1, length), generator=generator).to(device)
    inputs, blocks = architecture.inputs(ids), range(architecture.n_layers)
    streams = [Site("resid_post", layer) for layer in blocks]
    everything = [Site(name, layer) for layer in blocks for name in SUBLAYERS]
    last = torch.tensor([length - 1], device=device)
    tokens = ids[0].tolist()

    def naive_lens() -> list[Any]:
        """All logits of all layers, the ten best of them, and their log-probabilities."""
        states = model(ids, output_hidden_states=True, use_cache=False).hidden_states
        rows = [model.lm_head(model.model.norm(state)) for state in states[:-1]]
        return [row.float().log_softmax(-1).topk(10) for row in rows]

    ways: dict[str, Callable[[], Any]] = {
        "plain forward": lambda: model(ids, use_cache=False),
        "floor: forward without head": lambda: model.model(ids, use_cache=False),
        "record resid_post, every token": lambda: record(architecture, inputs, streams),
        "record resid_post, last token": lambda: record(
            architecture, inputs, streams, positions=last
        ),
        "record 4 sites of every block": lambda: record(architecture, inputs, everything),
        "lens, every layer and token": lambda: lens.run(tokens, 10),
        "lens by hand": naive_lens,
    }
    compare(f"{length} tokens", device, ways, "plain forward", rounds)


@torch.no_grad()
def bench_sweep(model: Any, device: str, length: int, rounds: int) -> None:
    """Every layer and position of ``resid_pre``, beside a hooked pass per cell."""
    architecture = Architecture(model)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, model.config.vocab_size, (2, length), generator=generator).to(device)
    clean, corrupted = ids[:1], ids[1:]
    abilities(architecture)

    def ours() -> np.ndarray:
        return patching_sweep(
            architecture, None, clean.tolist()[0], corrupted.tolist()[0], "resid_pre",
            answer=5, foil=7, show_progress=False,
        ).values  # fmt: skip

    def naive() -> np.ndarray:
        states = model(clean, output_hidden_states=True, use_cache=False).hidden_states
        found = torch.zeros(architecture.n_layers, length)
        for layer, block in enumerate(model.model.layers):
            for position in range(length):

                def patch(_m: Any, args: Any, layer: int = layer, at: int = position) -> Any:
                    hidden = args[0].clone()
                    hidden[:, at] = states[layer][:, at]
                    return (hidden, *args[1:])

                handle = block.register_forward_pre_hook(patch)
                logits = model(corrupted, use_cache=False, logits_to_keep=1).logits[0, -1]
                handle.remove()
                found[layer, position] = logits[5] - logits[7]
        return found.numpy()

    title = f"sweep of resid_pre, {architecture.n_layers} layers × {length} tokens"
    compare(title, device, {"patching_sweep": ours, "a hooked pass per cell": naive},
            "patching_sweep", rounds)  # fmt: skip
    truth = naive()
    print(f"  largest difference {np.abs(ours() - truth).max():.1e} of {np.abs(truth).max():.1f}")


@torch.no_grad()
def bench_prompts(model: Any, device: str, count: int, batch_size: int) -> None:
    """The last token's stream at every layer, for many short prompts."""
    architecture, (_, tokenizer) = Architecture(model), load_model(device="cpu")
    prompts = [f"{i % 100} + {i // 100} = " for i in range(count)]
    request = make_request(architecture)
    rows = sorted((encode(tokenizer, prompt) for prompt in prompts), key=len)
    batches = [
        pad_left(rows[i : i + batch_size])[0].to(device) for i in range(0, count, batch_size)
    ]

    def by_hand() -> list[Any]:
        kept = []
        for prompt in prompts[:200]:
            ids = tokenizer(prompt, return_tensors="pt").to(device)
            states = model(**ids, output_hidden_states=True).hidden_states
            kept.append(torch.stack([state[0, -1] for state in states[1:]]))
        return kept * (count // 200)

    ways: dict[str, Callable[[], Any]] = {
        "batched": lambda: extract_batch(
            architecture,
            tokenizer,
            prompts,
            request,
            "last",
            batch_size=batch_size,
            show_progress=False,
        ),
        "floor: batched forwards": lambda: [model.model(b, use_cache=False) for b in batches] and 0,
    }
    seconds = medians({k: waited(device, w) for k, w in ways.items()}, 2, 1)
    slow = medians({"one by one": waited(device, by_hand)}, 1, 0)["one by one"]
    seconds["one by one (scaled up from 200)"] = slow * count / 200
    print_table(f"{count:,} prompts, batches of {batch_size}", seconds, "floor: batched forwards")
    print(f"  peak {peak_mib(device, ways['batched']):.0f} MiB above the model", flush=True)


@torch.no_grad()
def bench_generation(model: Any, device: str, rounds: int) -> None:
    """Recording while generating, beside generating."""
    architecture, ids = Architecture(model), list(range(5, 69))
    request, batch = make_request(architecture), torch.tensor([ids], device=device)
    options = {"max_new_tokens": 32, "pad_token_id": 0}
    mask = torch.ones_like(batch)
    ways: dict[str, Callable[[], Any]] = {
        "model.generate, 32 tokens": lambda: model.generate(
            batch, attention_mask=mask, do_sample=False, **options
        ),
        "generate with activations": lambda: generate_with_activations(
            architecture, None, ids, request, **options
        ),
    }
    compare("generation", device, ways, "model.generate, 32 tokens", rounds)


def main() -> None:
    """Print every table."""
    parser = argparse.ArgumentParser(description=__doc__)
    there = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=there)
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    device, small = options.device, options.small or options.device == "cpu"
    print_machine()
    print(torch.cuda.get_device_name() if device == "cuda" else device)
    rounds = 3 if small else 15
    model = llama(device, small, torch.float32)
    print("\n== float32")
    bench_sweep(model, device, 5 if small else 16, 1 if small else 2)
    model = model.bfloat16()
    print("\n== bfloat16")
    for length in (64,) if small else (1024, 64):
        bench_reading(model, device, length, rounds)
    bench_sweep(model, device, 5 if small else 16, 1 if small else 2)
    bench_generation(model, device, min(rounds, 5))
    bench_prompts(model, device, 400 if small else 10_000, 64)
    if not small:
        bench_prompts(model, device, 10_000, 512)


if __name__ == "__main__":
    main()
