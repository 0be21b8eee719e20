"""The logit lens with all its metrics against the products it cannot do without, in one process.

Floor: one forward pass and one head product per layer. The lens reads one row more than there are
layers, the embedding, so both make 13 products on 12 layers. What the lens adds are passes over
each row of logits, a few of them at a time so that they stay in the cache: best tokens,
exponentials, two dot products and two ranks, about 0.25 ms per row of 50,257 where the product
takes 1.5 ms. Measured: 1.16 to 1.23 times the floor, goal 1.35; a quarter of that distance is the
exponential.

Times are CPU seconds of one thread, so that a busy machine blurs the ratios less.

    python benchmarks/bench_lens.py [--quick]     every table; --quick with fewer rounds
    python benchmarks/bench_lens.py --memory N    peak memory on a text of N tokens, nothing else
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path

import torch
from side_by_side import print_machine, print_table
from torch import Tensor
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel

from lens_metrics import METRICS
from logit_lens import LogitLens

LENGTH = 128
LONG = 2048
FLOOR = "floor: forward, one head product per layer"
CELLS = 12
"""Cells of the double loop that are timed; its time is scaled up to all of them."""


def cpu_medians(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median CPU seconds of each way; every round runs each of them once, in turn."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.process_time()
            way()
            times[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def gpt2_small(positions: int) -> GPT2LMHeadModel:
    """GPT-2 small's shape with random weights, in evaluation mode."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_positions=positions)).eval()
    shape = model.config.n_layer, model.config.n_embd, model.config.vocab_size
    assert shape == (12, 768, 50257)
    return model


@torch.no_grad()
def one_product_per_layer(model: GPT2LMHeadModel, ids: Tensor) -> None:
    """The least that a lens over every layer has to compute."""
    states = model.transformer(ids, output_hidden_states=True, use_cache=False).hidden_states
    for state in states[:-1]:
        model.lm_head(model.transformer.ln_f(state[0]))
    model.lm_head(states[-1][0])


@torch.no_grad()
def double_loop(model: GPT2LMHeadModel, states: Tensor) -> None:
    """Norm, head, softmax and sort for each layer and position on its own."""
    for state in states:
        shares = functional.softmax(model.lm_head(model.transformer.ln_f(state)), dim=-1)
        shares.sort(descending=True)


def transformer_lens_ways(ids: Tensor) -> dict[str, Callable[[], object]]:
    """The lens by TransformerLens, on the same weights; none where it is not installed.

    Its bridge wraps a model in place, so it gets a copy of its own. Two calls are timed: the recipe
    of its documentation (cache the residual stream before each block and after the last,
    `accumulated_resid` with the final norm, `unembed` each) as far as the ten best tokens and their
    log-probabilities; and its own `logit_lens` with ``top_k=10``, which adds each cell's entropy
    and a check of the last row against the model.
    """
    if find_spec("transformer_lens") is None:
        print("\nTransformerLens is not installed here, so it is not timed")
        return {}
    from transformer_lens.model_bridge.sources import build_bridge_from_module
    from transformer_lens.tools.analysis.logit_lens import logit_lens

    model = gpt2_small(1024)
    with torch.no_grad():
        expected = model(ids).logits
    bridge = build_bridge_from_module(model, type(model).__name__, hf_config=model.config)
    names = [f"blocks.{layer}.hook_resid_pre" for layer in range(12)]
    names.append("blocks.11.hook_resid_post")

    @torch.no_grad()
    def rows() -> Iterator[Tensor]:
        """The logits of each row, ``[1, position, vocab]``, the embedding first."""
        _, cache = bridge.run_with_cache(ids, names_filter=names)
        for stream in cache.accumulated_resid(apply_ln=True):
            yield bridge.unembed(stream)

    def recipe() -> None:
        for logits in rows():
            logits.log_softmax(-1).topk(10)

    *_, last = rows()
    torch.testing.assert_close(last, expected, rtol=0, atol=1e-3)
    return {
        "TransformerLens: cache, unembed, top tokens": recipe,
        "TransformerLens: its logit_lens": lambda: logit_lens(
            bridge, ids, positions=None, return_type="log_probs", top_k=10
        ),
    }


def bench_speed(rounds: int) -> None:
    """All layers and metrics of a text of `LENGTH` tokens."""
    model = gpt2_small(1024)
    lens = LogitLens(model)
    ids = torch.randint(0, 50257, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    states = torch.randn(CELLS, 768)
    lens.run(ids[:, :4])  # the structure is found once per model
    loop = f"double loop ({CELLS} cells, scaled up)"
    ways = {
        FLOOR: lambda: one_product_per_layer(model, ids),
        "logit lens, default metrics": lambda: lens.run(ids),
        "logit lens, top tokens only": lambda: lens.run(ids, metrics=()),
        "logit lens, every metric": lambda: lens.run(ids, metrics=METRICS),
        "input preservation": lambda: lens.compare_to_input(ids),
        loop: lambda: double_loop(model, states),
        **transformer_lens_ways(ids),
    }
    seconds = cpu_medians(ways, rounds)
    seconds[loop] *= 13 * LENGTH / CELLS
    goal = "default metrics ≤ 1.35 x, aim 1.2 x"
    print_table(f"GPT-2 small's shape, {LENGTH} tokens, every layer", seconds, FLOOR, goal)


def report_memory(length: int) -> None:
    """Print the peak of resident memory above the loaded model; Linux only."""
    model = gpt2_small(max(length, 1024))
    lens = LogitLens(model)
    lens.run([1, 2, 3])
    ids = torch.randint(0, 50257, (length,), generator=torch.Generator().manual_seed(0)).tolist()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = _kilobytes("VmRSS")
    lens.run(ids)
    grown = (_kilobytes("VmHWM") - before) / 1024
    print(f"  {length} tokens: peak {grown:.0f} MiB above the model (goal: < 1024 MiB)")


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
    bench_speed(2 if "--quick" in sys.argv else 5)
    if Path("/proc/self/clear_refs").exists():
        print("\nmemory, GPT-2 small's shape, 12 layers, in a process of its own", flush=True)
        subprocess.run([sys.executable, __file__, "--memory", str(LONG)], check=True)


if __name__ == "__main__":
    main()
