"""Steer the bundled demo model from sad to happy: share of positive words, and perplexity.

Neutral prompts, none of them an example, are continued by sampling at temperature 1; every cell
draws from the same random numbers. A continuation's words of two lists are counted (those that the
corpus was written from); the share of positive ones is taken over all words counted, its standard
error over continuations. Perplexity is that of the continuations under the unsteered model, given
their prompts.

    PYTHONPATH=. python benchmarks/steering_table.py [--samples 128] [--seed 0] [--save FOLDER]
"""

from __future__ import annotations

import argparse
import time
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from demo_model.write_corpus import NEGATIVE_WORDS, POSITIVE_WORDS
from model_analyzer import ModelAnalyzer
from steering_sweep import SteeringSweep


class Case(NamedTuple):
    """What is steered, and by which examples."""

    name: str
    prompts: list[str]
    positive: list[str]
    negative: list[str]


CASES = (
    Case(
        "feelings, the README's examples",
        ["Today I feel"],
        ["I am happy", "This is great"],
        ["I am sad", "This is terrible"],
    ),
    Case(
        "film reviews, the README's examples",
        ["The movie was"],
        ["The movie was amazing"],
        ["The movie was terrible"],
    ),
    Case(
        "eight prompts, eight pairs of examples",
        [
            *("Today I feel", "The movie was", "My day was", "I feel"),
            *("The film was", "Life is", "The show was really", "It makes me"),
        ],
        [
            *("I am happy", "I am very glad now", "I am so joyful", "This is great"),
            *("Today is wonderful", "I think the movie was amazing", "This is lovely"),
            "I am hopeful",
        ],
        [
            *("I am sad", "I am very angry now", "I am so gloomy", "This is terrible"),
            *("Today is awful", "I think the movie was horrible", "This is ugly"),
            "I am hopeless",
        ],
    ),
)


def print_row(sweep: SteeringSweep, layer: int) -> None:
    """Share and perplexity of one layer, and whether they rise as they should."""
    row = sweep.layers.index(layer)
    effects, errors = sweep.effect[row], sweep.standard_error[row]
    print(f"{'coefficient':<28}" + "".join(f"{c:>+14g}" for c in sweep.coefficients))
    cells = (f"{e:.3f} ± {s:.3f}" for e, s in zip(effects, errors, strict=True))
    print(f"{'share of positive words':<28}" + "".join(f"{cell:>14}" for cell in cells))
    print(f"{'perplexity':<28}" + "".join(f"{cost:>14.2f}" for cost in sweep.perplexity[row]))
    rises = all(a < b for a, b in pairwise(effects))
    ends = effects[0] < 0.25 and effects[-1] > 0.75
    print(f"rises at every step: {rises}; from under 25 % to over 75 %: {ends}")


def report(analyzer: ModelAnalyzer, case: Case, arguments: argparse.Namespace) -> None:
    """Print the table of one case, the layers, and what the model then says."""
    start = time.perf_counter()
    sweep = analyzer.steering_sweep(
        case.prompts,
        case.positive,
        case.negative,
        positive_words=POSITIVE_WORDS,
        negative_words=NEGATIVE_WORDS,
        n_samples=-(-arguments.samples // len(case.prompts)),
        seed=arguments.seed,
        batch_size=arguments.samples,
        show_progress=False,
    )
    middle = analyzer.get_num_layers() // 2
    count, seconds = len(sweep.prompts), time.perf_counter() - start
    print(f"\n## {case.name}: {count} continuations a cell, {seconds:.0f} s for all layers")
    print(f"\nlayer {middle}, the facade's default")
    print_row(sweep, middle)
    print(f"\n{sweep.to_text()}")
    best, layer = sweep.best(), sweep.best_layer()
    print(f"moves the farthest while fluent: layer {layer}; the most positive fluent cell: {best}")
    for coefficient in (-2.0, 0.0, 2.0):
        text = analyzer.generate_with_steering(
            case.prompts[0],
            case.positive,
            case.negative,
            coefficient=coefficient,
            max_new_tokens=25,
        )
        print(f"{coefficient:+g}  {text!r}")
    if arguments.save is not None:
        name = case.name.replace(",", "").replace("'", "").replace(" ", "-")
        sweep.save(arguments.save / f"{name}.safetensors")
        sweep.plot(save_path=arguments.save / f"{name}.png", title=case.name)


def main() -> None:
    """Measure every case."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--samples", type=int, default=128, help="continuations per cell")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path, help="also write sweeps and pictures into this folder")
    arguments = parser.parse_args()
    analyzer = ModelAnalyzer(device="cpu")
    for case in CASES:
        report(analyzer, case, arguments)


if __name__ == "__main__":
    main()
