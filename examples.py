"""The modular calls, one function per feature; run all of them, or name some.

    python examples.py
    python examples.py model_inspection logit_lens_analysis

`ModelAnalyzer` (see `analyzer_demo.py`) does the same with one object; here every module is used
alone.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from activation_extraction import (
    ActivationExtractor,
    compare_activations,
    get_activation_statistics,
)
from attention_analysis import attention_patterns, find_heads, head_summary
from attribution_patching import attribution_patching
from direct_attribution import logit_attribution
from embedding_geometry import token_neighbors
from gradient_attribution import attribute_tokens
from head_circuits import composition_scores, copying_scores
from head_writing import head_writes
from intervention import (
    ActivationPatch,
    CausalTracer,
    ablate,
    activation_patch_experiment,
    compute_feature_attribution,
    create_steering_vector,
    generate_with_patching,
    patch_paths,
    patching_sweep,
    path_patching,
    steer_generation,
)
from layer_attribution import layer_attribution
from linear_probes import train_probes
from logit_lens import LogitLens
from model_architecture import Architecture
from model_loader import DEMO_MODEL, ModelInspector, compare_architectures
from similarity import layer_similarity
from visualization import (
    compare_reduction_methods,
    plot_convergence_analysis,
    plot_embeddings_2d,
    plot_layer_embeddings,
    plot_token_preservation,
    reduce_dimensions,
)

OUT = Path("out")


def model_inspection() -> None:
    """Look at a model; its weights are loaded only when a question needs them."""
    inspector = ModelInspector(DEMO_MODEL)
    inspector.print_architecture_summary()
    print("blocks:", ", ".join(inspector.get_layer_names()[:3]), "…")
    print("attention:", ", ".join(inspector.get_attention_layer_names()[:3]), "…")
    print("weights of one:", list(inspector.get_weights_by_layer("h.0.attn")))
    print("side by side:", compare_architectures([DEMO_MODEL]))


def activation_extraction() -> None:
    """Extract, summarise and compare activations."""
    extractor = ActivationExtractor(*ModelInspector(DEMO_MODEL).load_model())
    record = extractor.extract_activations(
        "The quick brown fox", include_attention=True, return_logits=True
    )
    print(record)
    print(record.layer_activations["transformer.h.5"].shape, record.at("attn_pattern", 5).shape)
    stats = get_activation_statistics(record, "transformer.h.5")
    print(f"layer 5: mean {stats['mean']:.4f}, std {stats['std']:.4f}, norm {stats['norm']:.2f}")
    cat = extractor.extract_activations("The cat", sites=("resid_post", "mlp_out"))
    dog = extractor.extract_activations("The dog", sites=("resid_post", "mlp_out"))
    for site in ("resid_post", "mlp_out"):
        print(f"cat and dog, {site} 5:", compare_activations(cat, dog, 5, "cosine", site=site))


def saving_and_loading() -> None:
    """Write records in every format, and read them back."""
    extractor = ActivationExtractor(*ModelInspector(DEMO_MODEL).load_model())
    records = extractor.extract_batch_activations(
        ["Paris is the capital of", "London is the capital of"], show_progress=False
    )
    with tempfile.TemporaryDirectory() as folder:
        for format in ("pickle", "pt", "npz", "safetensors", "json"):
            path = Path(folder) / f"records.{format}"
            extractor.save_activations(records, path, format=format)
            loaded: Any = extractor.load_activations(path)
            print(f"{format:<12}{path.stat().st_size:>9} bytes  {loaded[0]}")


def logit_lens_analysis() -> None:
    """Read the layers, and draw how they converge."""
    lens = LogitLens(DEMO_MODEL)
    lens.print_layer_predictions("The quick brown fox jumps", layer_step=2)
    plot_convergence_analysis(lens, "Machine learning is", save_path=OUT / "convergence.png")
    plot_token_preservation(lens, "Machine learning is", save_path=OUT / "preservation.png")


def embedding_visualization() -> None:
    """Draw word embeddings, and a text's way through the layers."""
    loaded: Any = ModelInspector(DEMO_MODEL).load_model()
    model, tokenizer = loaded
    words = ["king", "queen", "man", "woman"]
    ids = [tokenizer.encode(word, add_special_tokens=False)[0] for word in words]
    embeddings = model.get_input_embeddings().weight[ids].detach().numpy()
    plot_embeddings_2d(embeddings, labels=words, save_path=OUT / "words.png")
    compare_reduction_methods(
        embeddings, labels=words, methods=["pca", "tsne"], save_path=OUT / "reductions.png"
    )
    plot_layer_embeddings(model, tokenizer, "The cat sat on the mat", save_path=OUT / "layers.png")
    points = np.random.default_rng(0).normal(size=(100, 768))
    print("100 points in 768 dimensions →", reduce_dimensions(points, method="pca").shape)


def activation_patching() -> None:
    """One layer, every layer, every layer and token, every head; and one patch while generating."""
    loaded: Any = ModelInspector(DEMO_MODEL).load_model()
    model, tokenizer = loaded
    clean, corrupted = "The capital of France is", "The capital of Italy is"
    result = activation_patch_experiment(model, tokenizer, clean, corrupted, layer_name="6")
    print(f"layer 6, last token: effect {result['effect']:.3f}")
    effects = path_patching(model, tokenizer, clean, corrupted)
    print("every layer:", {layer: round(effect, 2) for layer, effect in effects.items()})
    sweep = patching_sweep(model, tokenizer, clean, corrupted, normalize=True)
    sweep.plot(save_path=OUT / "patching.png")
    heads = patching_sweep(model, tokenizer, clean, corrupted, "head_out", normalize=True)
    print(sweep, heads, heads.top(3), sep="\n")
    record = ActivationExtractor(model, tokenizer).extract_activations(corrupted)
    patch = ActivationPatch(layer_name="transformer.h.5", position=-1, value=record)
    print(generate_with_patching(model, tokenizer, clean, patch, max_new_tokens=2))


def attention_heads() -> None:
    """Where heads look, what their weights do, what they write."""
    loaded: Any = ModelInspector(DEMO_MODEL).load_model()
    model, tokenizer = loaded
    text = "When Mary and John went to the store, John gave a drink to"
    print(find_heads(model, tokenizer, "induction"))
    summary = head_summary(model, tokenizer)
    summary.plot(save_path=OUT / "head_scores.png")
    attention_patterns(model, tokenizer, text, [4]).view().save(OUT / "attention.html")
    architecture = Architecture(model)
    print(copying_scores(architecture).top(3))
    print(composition_scores(architecture, "k").top(3))
    print(head_writes(architecture, tokenizer, text, [" Mary", " John"]).top(3))


def direct_logit_attribution() -> None:
    """One logit difference as the sum of what every part wrote."""
    loaded: Any = ModelInspector(DEMO_MODEL).load_model()
    model, tokenizer = loaded
    text = "When Mary and John went to the store, John gave a drink to"
    parts = logit_attribution(Architecture(model), tokenizer, text, " Mary", " John")
    parts.plot("waterfall", save_path=OUT / "logit_parts.png")
    print(parts, parts.top(5), sep="\n")


def gradient_attribution() -> None:
    """Which tokens an answer stands on, by three methods; which heads are worth patching."""
    loaded: Any = ModelInspector(DEMO_MODEL).load_model()
    model, tokenizer = loaded
    text = "The capital of France is"
    for method in ("gradient_x_input", "integrated_gradients", "occlusion"):
        found = attribute_tokens(model, tokenizer, text, method)
        print(found, found.top(2), sep="\n")
    print(layer_attribution(model, tokenizer, text, "resid_post", "conductance"))
    estimate = attribution_patching(
        model, tokenizer, text, "The capital of Italy is", "head_out", exact=True
    )
    estimate.plot(save_path=OUT / "attribution_patching.png")
    print(estimate, f"correlation with the sweep: {estimate.pearson:.3f}", sep="\n")


def probes_and_similarity() -> None:
    """What a linear probe reads from each layer, and how alike layers are."""
    loaded: Any = ModelInspector(DEMO_MODEL).load_model()
    model, tokenizer = loaded
    cities = ("Paris", "Rome", "Tokyo", "Cairo", "Madrid", "Athens")
    frames = ("I live in {}", "The train to {}", "We love {}", "He went to {}", "The city of {}")
    texts = [frame.format(city) for city in cities for frame in frames]
    labels = [city for city in cities for _ in frames]
    groups = [frame for _ in cities for frame in frames]
    probes = train_probes(model, tokenizer, texts, labels, groups=groups)
    probes.plot(save_path=OUT / "probes.png")
    print(probes)
    print(layer_similarity(model, tokenizer, texts))
    print(token_neighbors(model, tokenizer, " Paris", 5).to_frame())


def causal_tracing() -> None:
    """Heads, MLPs, the subject; paths between components; what is lost without them."""
    loaded: Any = ModelInspector(DEMO_MODEL).load_model()
    model, tokenizer = loaded
    clean, corrupted = "The capital of France is", "The capital of Italy is"
    tracer = CausalTracer(model, tokenizer)
    print("largest head:", float(tracer.trace_attention_heads(clean, corrupted).max()))
    mlps = tracer.trace_mlp_layers(clean, corrupted)
    print("MLPs:", {layer: round(effect, 2) for layer, effect in mlps.items()})
    trace = tracer.trace_subject(clean, "France", samples=5)
    trace.plot(save_path=OUT / "trace.png")
    print(trace, trace.top(3), sep="\n")
    print(patch_paths(model, tokenizer, clean, corrupted, "heads", "logits").top(3))
    print(ablate(model, tokenizer, [clean, corrupted], "heads", "mean").top(3))
    print("neurons:", compute_feature_attribution(model, tokenizer, clean, 9, site="mlp_neurons"))


def steering() -> None:
    """A direction from contrastive prompts, and the same prompt steered both ways."""
    loaded: Any = ModelInspector(DEMO_MODEL).load_model()
    model, tokenizer = loaded
    positive, negative = ["I am happy", "This is great"], ["I am sad", "This is terrible"]
    layer = "transformer.h.6"
    vector = create_steering_vector(model, tokenizer, positive, negative, layer_name=layer)
    for coefficient in (-2.0, 0.0, 2.0):
        text = steer_generation(
            model, tokenizer, "Today I feel", vector, layer, coefficient, max_new_tokens=12
        )
        print(f"{coefficient:+.0f}  {text!r}")


EXAMPLES: dict[str, Callable[[], None]] = {
    each.__name__: each
    for each in (
        model_inspection,
        activation_extraction,
        saving_and_loading,
        logit_lens_analysis,
        embedding_visualization,
        activation_patching,
        attention_heads,
        direct_logit_attribution,
        gradient_attribution,
        probes_and_similarity,
        causal_tracing,
        steering,
    )
}


def main(names: list[str]) -> None:
    """Run the named examples, or all of them.

    Raises:
        SystemExit: there is no example of that name.
    """
    unknown = [name for name in names if name not in EXAMPLES]
    if unknown:
        raise SystemExit(f"no example {unknown[0]!r}; there are {', '.join(EXAMPLES)}")
    for name in names or EXAMPLES:
        print(f"\n=== {name}")
        EXAMPLES[name]()


if __name__ == "__main__":
    main(sys.argv[1:])
