"""Integrated gradients of many targets: against the passes they cannot do without, and captum.

Floor: for each of n steps one forward pass of one row and one vector-Jacobian product per target,
by autograd alone. `attribute_tokens` adds the run of the prompt and of the baseline, and weighs the
gradients; it puts many steps into a pass. captum has one target per call, hence a forward pass
per step and target; it is given batches of the same size.

Times are CPU seconds of one thread, so that a busy machine blurs the ratios less.

    python benchmarks/bench_gradients.py [--quick]
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping

import numpy as np
import torch
from captum.attr import LayerIntegratedGradients
from side_by_side import print_machine, print_table
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from gradient_attribution import attribute_tokens
from model_loader import load_model

BASELINE = 11
STEPS = 20


def cpu_medians(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median CPU seconds of each way; every round runs each of them once, in turn."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            start = time.process_time()
            way()
            if number or rounds == 1:  # the first round warms up
                times[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def by_hand(model: PreTrainedModel, ids: Tensor, places: list[int], tokens: list[int]) -> Tensor:
    """``[target, position]``: n steps of a forward pass and one product per target."""
    embed = model.get_input_embeddings()
    with torch.no_grad():
        end, start = embed(ids), embed(torch.full_like(ids, BASELINE))
    nodes, weights = np.polynomial.legendre.leggauss(STEPS)
    total = torch.zeros(len(places), ids.shape[1])
    for node, weight in zip((1 + nodes) / 2, weights / 2, strict=True):
        leaf = (start + float(node) * (end - start)).requires_grad_()
        logits = model(inputs_embeds=leaf, use_cache=False).logits
        for row, (place, token) in enumerate(zip(places, tokens, strict=True)):
            keep = row < len(places) - 1
            (slope,) = torch.autograd.grad(logits[0, place, token], leaf, retain_graph=keep)
            total[row] += float(weight) * (slope * (end - start))[0].sum(-1)
    return total


def captums(
    model: PreTrainedModel, ids: Tensor, places: list[int], tokens: list[int], rows: int
) -> Tensor:
    """``[target, position]``, a call per target."""
    found = []
    for place, token in zip(places, tokens, strict=True):
        peer = LayerIntegratedGradients(
            lambda z, p=place: model(z, use_cache=False).logits[:, p], model.get_input_embeddings()
        )
        made = peer.attribute(
            ids,
            torch.full_like(ids, BASELINE),
            target=token,
            n_steps=STEPS,
            method="gausslegendre",
            internal_batch_size=rows,
        )
        found.append(made[0].sum(-1))
    return torch.stack(found).detach()


def bench(title: str, model: PreTrainedModel, length: int, targets: int, rounds: int) -> None:
    """The three ways, and how far their numbers are apart."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(12, model.config.vocab_size, (1, length), generator=generator)
    places = np.linspace(0, length - 1, targets + 1).astype(int)[1:].tolist()
    tokens = [20 + row for row in range(targets)]
    rows = max(1, 1024 // length)

    def ours() -> np.ndarray:
        found = attribute_tokens(
            model, None, ids[0], targets=tokens, target_positions=places, baseline=BASELINE,
            n_steps=STEPS, show_progress=False,
        )  # fmt: skip
        return found.scores

    floor = "floor: n × (forward + T products)"
    ways: dict[str, Callable[[], object]] = {
        floor: lambda: by_hand(model, ids, places, tokens),
        "attribute_tokens": ours,
        "captum, a call per target": lambda: captums(model, ids, places, tokens, rows),
    }
    seconds = cpu_medians(ways, rounds)
    heading = f"{title}, {length} tokens, {targets} targets, {STEPS} steps"
    print_table(heading, seconds, floor, "attribute_tokens ≤ 1.3 x")
    mine, hand = ours(), by_hand(model, ids, places, tokens).numpy()
    peer = captums(model, ids, places, tokens, rows).numpy()
    scale = np.abs(hand).max()
    apart = [float(np.abs(mine - other).max() / scale) for other in (hand, peer)]
    print(f"  largest difference: {apart[0]:.1e} from the floor's, {apart[1]:.1e} from captum's")


def main() -> None:
    """Print every table."""
    torch.set_num_threads(1)
    print_machine()
    quick = "--quick" in sys.argv
    model, _ = load_model(device="cpu")
    for targets in (1, 8, 31):
        bench("bundled model", model, 32, targets, 2 if quick else 5)
    torch.manual_seed(0)
    small = GPT2LMHeadModel(GPT2Config()).eval()
    assert (small.config.n_layer, small.config.n_embd) == (12, 768)
    for length, targets in ((32, 1), (32, 8), (128, 1)):
        bench("GPT-2 small's shape", small, length, targets, 1 if quick else 2)


if __name__ == "__main__":
    main()
