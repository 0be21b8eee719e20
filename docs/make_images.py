"""Make the pictures of the guides again, from the bundled model.

Run from the repository's root: ``PYTHONPATH=. .venv/bin/python docs/make_images.py [folder]``.
"""

from __future__ import annotations

import io
import itertools
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from activation_extraction import ActivationExtractor
from attention_analysis import attention_patterns, head_summary
from attribution_patching import attribution_patching
from causal_tracing import CausalTracer
from demo_model.write_corpus import NEGATIVE_WORDS, POSITIVE_WORDS
from direct_attribution import logit_attribution
from feature_attribution import attribute_features
from figures import plot_head_grid
from gradient_attribution import attribute_tokens
from linear_probes import train_probes
from logit_lens import LogitLens
from patching_sweep import patching_sweep
from steering_sweep import steering_sweep
from visualization import (
    compare_reduction_methods,
    plot_convergence_analysis,
    plot_embeddings_2d,
    plot_embeddings_3d,
    plot_layer_embeddings,
    plot_layer_similarity,
    plot_lens_heatmap,
    plot_logit_lens_basic,
    plot_prediction_refinement,
    plot_token_preservation,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
FACT = "The capital of France is Paris. The capital of Italy is"
WORDS = {
    "country": [" France", " Italy", " Japan", " Egypt", " Spain", " Greece"],
    "city": [" Paris", " Rome", " Tokyo", " Cairo", " Madrid", " Athens"],
    "name": [" Mary", " John", " Tom", " Anna", " James", " Alice"],
}
MOST = 150_000
"""Bytes of a picture."""


def of_a_text(lens: LogitLens) -> Iterator[tuple[str, Figure]]:
    """What is drawn through a lens."""
    yield "lens_basic", plot_logit_lens_basic(lens, FACT)
    yield "lens_heatmap", plot_lens_heatmap(lens, FACT)
    yield "lens_kl", plot_lens_heatmap(lens, FACT, "kl")
    yield "convergence", plot_convergence_analysis(lens, FACT)
    yield "preservation", plot_token_preservation(lens, FACT)
    yield "refinement", plot_prediction_refinement(lens, FACT)


def of_points(lens: LogitLens) -> Iterator[tuple[str, Figure]]:
    """What is drawn of embeddings and activations."""
    model, tokenizer = lens.model, lens.tokenizer
    words = [word for group in WORDS.values() for word in group]
    groups = [name for name, group in WORDS.items() for _ in group]
    ids = [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in words]
    table = model.get_input_embeddings().weight[ids]
    yield "embeddings_2d", plot_embeddings_2d(table, words, groups)
    yield "embeddings_3d", plot_embeddings_3d(table, words, groups)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # on the perplexity of so few points
        yield "methods", compare_reduction_methods(table, words, groups)
    yield "layer_paths", plot_layer_embeddings(model, tokenizer, FACT)
    record = ActivationExtractor(model, tokenizer).extract_activations(FACT)
    yield "layer_similarity", plot_layer_similarity(record)
    made_up = np.random.default_rng(0).normal(size=(12, 6)) ** 3
    yield "head_grid", plot_head_grid(made_up, name="effect (made-up numbers)")


CLEAN = "When Mary and John went to the store, John gave a drink to"
CORRUPTED = "When Mary and John went to the store, Mary gave a drink to"
HAPPY = ["I am happy", "This is great", "I am so glad"]
SAD = ["I am sad", "This is terrible", "I am so unhappy"]


def of_interventions(lens: LogitLens) -> Iterator[tuple[str, Figure]]:
    """What patching, tracing, attribution and steering find."""
    model, tokenizer = lens.model, lens.tokenizer
    sweep = patching_sweep(model, tokenizer, CLEAN, CORRUPTED, normalize=True)
    yield "patching_sweep", sweep.plot()
    heads = patching_sweep(model, tokenizer, CLEAN, CORRUPTED, "head_out", normalize=True)
    yield "patching_heads", heads.plot()
    fact = "The capital of France is"
    yield "causal_trace", CausalTracer(model, tokenizer).trace_subject(fact, "France").plot()
    neurons = attribute_features(model, tokenizer, fact, 9, site="mlp_neurons")
    yield "feature_attribution", neurons.plot()
    prompts = ["Today I feel", "The movie was", "The day", "My friends"]
    table = steering_sweep(
        model, tokenizer, prompts, HAPPY, SAD, [2, 4, 6, 8], n_samples=16,
        positive_words=POSITIVE_WORDS, negative_words=NEGATIVE_WORDS, show_progress=False,
    )  # fmt: skip
    yield "steering_sweep", table.plot()


def of_looking_inside(lens: LogitLens) -> Iterator[tuple[str, Figure]]:
    """What attention, direct and gradient attribution find."""
    model, tokenizer, architecture = lens.model, lens.tokenizer, lens.architecture
    yield "attention_heads", attention_patterns(model, tokenizer, CLEAN, 4).plot()
    yield "head_scores", head_summary(model, tokenizer).plot()
    parts = logit_attribution(architecture, tokenizer, CLEAN, " Mary", " John")
    yield "logit_parts", parts.plot("waterfall")
    fact = "The capital of France is"
    yield "token_attribution", attribute_tokens(model, tokenizer, fact).plot()
    estimate = attribution_patching(model, tokenizer, CLEAN, CORRUPTED, "head_out", exact=True)
    yield "attribution_patching", estimate.plot()


LANDMARKS = {
    "Paris": ("The Eiffel Tower", "The Louvre", "The Arc de Triomphe"),
    "Rome": ("The Colosseum", "The Trevi Fountain", "The Pantheon", "The Spanish Steps"),
    "London": ("Big Ben", "The London Eye", "Buckingham Palace", "Westminster Abbey"),
    "Moscow": ("The Kremlin", "Red Square", "The Bolshoi Theatre"),
    "Berlin": ("The Brandenburg Gate", "The Reichstag", "Checkpoint Charlie"),
}
ENDINGS = ("is in", "is located in", "can be seen in", "stands in the city of")


def of_probes(lens: LogitLens) -> Iterator[tuple[str, Figure]]:
    """Where a city can be read, against where patching says that it is."""
    model, tokenizer = lens.model, lens.tokenizer
    known = [(city, place) for city, places in LANDMARKS.items() for place in places]
    texts = [f"{place} {ending}" for _, place in known for ending in ENDINGS]
    cities, places = ([each[i] for each in known for _ in ENDINGS] for i in (0, 1))
    probes = train_probes(model, tokenizer, texts, cities, groups=places)
    three = [(city, place) for city, place in known if len(lens.encode(place)) == 3]
    pairs = [
        (f"{here} is in", f"{there} is in")
        for (a, here), (b, there) in itertools.permutations(three, 2)
        if a != b
    ]
    clean, corrupted = map(list, zip(*pairs, strict=True))
    used = {
        name: patching_sweep(
            model, tokenizer, clean, corrupted, "resid_post",
            axes=("layer",), positions=positions, normalize=True,
        ).layer_effects()
        for name, positions in (("patched: landmark", [0, 1, 2]), ("patched: last token", [4]))
    }  # fmt: skip
    yield "which_city", probes.plot(against=used, against_name="patching effect")


DRAWERS = (of_a_text, of_points, of_interventions, of_looking_inside, of_probes)


def main(folder: Path) -> None:
    """Save every picture.

    Raises:
        ValueError: one is too large for the repository.
    """
    lens = LogitLens(ROOT / "demo_model")
    for name, figure in itertools.chain.from_iterable(draw(lens) for draw in DRAWERS):
        with io.BytesIO() as sheet:
            figure.savefig(sheet, dpi=120)
            picture = Image.open(sheet).convert("RGB").quantize(256, kmeans=3)
        picture.save(folder / f"{name}.png", optimize=True)
    large = [path.name for path in folder.glob("*.png") if path.stat().st_size > MOST]
    if large:
        raise ValueError(f"larger than {MOST:,} bytes: {', '.join(large)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "images")
