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
from logit_lens import LogitLens
from model_loader import DEMO_MODEL, ModelInspector, compare_architectures
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


EXAMPLES: dict[str, Callable[[], None]] = {
    each.__name__: each
    for each in (
        model_inspection,
        activation_extraction,
        saving_and_loading,
        logit_lens_analysis,
        embedding_visualization,
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
