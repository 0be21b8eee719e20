"""Direct logit attribution against the forward pass that it cannot do without.

Floor: one recorded forward pass, which keeps what is split: the stream, what attention and MLPs
add, every z, and the logits. The attribution adds a small pass from the stream to the logits and
reads each part along the direction of the token that is asked about. Where the token differs from
position to position (the default: the model's best), each position has a direction of its own, and
reading a head takes the output projection once more, backwards.

Times are CPU seconds of one thread, so that a busy machine blurs the ratios less.

    python benchmarks/bench_attribution.py [--quick]
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping

import torch
from side_by_side import print_machine, print_table
from transformers import GPT2Config, GPT2LMHeadModel

from direct_attribution import logit_attribution
from forward_pass import Site, record
from model_architecture import Architecture
from model_loader import load_model

FLOOR = "floor: one recorded forward pass"
KEPT = ("resid_post", "attn_out", "mlp_out", "head_out")


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
    """GPT-2 small's shape with random weights, in evaluation mode."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config()).eval()
    shape = model.config.n_layer, model.config.n_embd, model.config.vocab_size
    assert shape == (12, 768, 50257)
    return model


def bench(title: str, arch: Architecture, length: int, rounds: int) -> None:
    """Attribution of the last position and of all, beside the pass."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(arch.config.vocab_size, (length,), generator=generator).tolist()
    sites = [Site("resid_pre", 0)]
    sites += [Site(name, layer) for layer in range(arch.n_layers) for name in KEPT]
    inputs = arch.inputs(torch.tensor([ids]))

    def split(positions: int | None, **options: object) -> Callable[[], object]:
        return lambda: logit_attribution(arch, None, ids, positions=positions, **options)

    ways = {
        FLOOR: lambda: record(arch, inputs, sites, logits=True),
        "last position, the best token": split(-1),
        "last position, neurons too": split(-1, neurons=True),
        "all positions, one token": split(None, tokens=5),
        "all positions, the best token of each": split(None),
        "all positions, one token, neurons too": split(None, tokens=5, neurons=True),
    }
    print_table(title, cpu_medians(ways, rounds), FLOOR)


def main() -> None:
    """Print every table."""
    torch.set_num_threads(1)
    print_machine()
    rounds = 3 if "--quick" in sys.argv else 7
    bundled = Architecture(load_model(device="cpu")[0])
    for length in (16, 100):
        bench(f"bundled model, {length} tokens", bundled, length, rounds)
    small = Architecture(gpt2_small())
    for length in (16, 128):
        bench(f"GPT-2 small's shape, {length} tokens", small, length, rounds)


if __name__ == "__main__":
    main()
