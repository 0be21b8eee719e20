"""One story on one model: where does it decide what comes next?

    python analyzer_demo.py                                  # the bundled model
    python analyzer_demo.py PATH_OR_ID "A prompt"            # any other

Prints what a person wants to read and saves its pictures to ``out/``. Deterministic.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from activation_extraction import compare_activations
from model_analyzer import ModelAnalyzer
from model_loader import DEMO_MODEL
from visualization import plot_convergence_analysis, plot_embeddings_2d, plot_lens_heatmap

PROMPT = "The Eiffel Tower is in"
OTHER = "The Colosseum is in"
OUT = Path("out")


def introduce(analyzer: ModelAnalyzer) -> None:
    """Say what was loaded, and prove that it was understood."""
    analyzer.print_architecture_summary()
    print(f"\nDoes the toolkit understand this model?\n{analyzer.check()}")


def follow_one_prompt(analyzer: ModelAnalyzer, prompt: str) -> None:
    """Continue a prompt, and watch the layers come to their answer."""
    written: Any = analyzer.generate(prompt, max_new_tokens=8, return_activations=True)
    text, record = written
    print(f"\nThe model continues: {text!r}\n  kept while it wrote: {record}\n")
    analyzer.print_logit_lens(prompt, layer_step=2, top_k=3)
    result = analyzer.lens.run(prompt)
    depth = result.row_labels[result.decision_depth()[-1]]
    best = result.top_tokens[-1, -1, 0]
    print(f"  From layer {depth} on, {best!r} stays the best next token.")
    plot_lens_heatmap(analyzer.lens, prompt, save_path=OUT / "logit_lens.png")
    plot_convergence_analysis(analyzer.lens, prompt, save_path=OUT / "convergence.png")


def compare_two_prompts(analyzer: ModelAnalyzer, prompt: str, other: str) -> None:
    """See in which layers two prompts part."""
    first, second = analyzer.extract_batch_activations([prompt, other], show_progress=False)
    print(f"\nHow alike are {prompt!r} and {other!r} at their last token?")
    for layer in range(0, analyzer.get_num_layers(), 2):
        cosine = compare_activations(first, second, layer, position=-1)
        print(f"  layer {layer:>2}  {'█' * round(30 * max(cosine, 0)):<30} {cosine:.3f}")


def look_at_many_prompts(analyzer: ModelAnalyzer) -> None:
    """Keep one token of every layer for a thousand prompts, save it, and draw a part of it."""
    pairs = [(i, j) for i in range(1, 33) for j in range(1, 33)]
    prompts = [f"{i} + {j} = " for i, j in pairs]
    records = analyzer.extract_batch_activations(prompts, positions="last", show_progress=False)
    path = OUT / "sums.safetensors"
    analyzer.save_activations(records, path, format="safetensors")
    size = path.stat().st_size / 2**20
    print(f"\nKept every layer at the last token of {len(records)} sums: {path} ({size:.1f} MiB)")
    vectors = [record.layer_activations[-1][0, -1].numpy() for record in records]
    sums = [i + j for i, j in pairs]
    title = "The last layer at the end of 'i + j = ', coloured by i + j"
    plot_embeddings_2d(
        vectors, colors=sums, title=title, show_labels=False, save_path=OUT / "sums.png"
    )


def main() -> None:
    """Tell the story."""
    parser = argparse.ArgumentParser(description="Where does a model decide what comes next?")
    parser.add_argument("model", nargs="?", default=str(DEMO_MODEL), help="folder or hub id")
    parser.add_argument("prompt", nargs="?", default=PROMPT)
    parser.add_argument("--other", default=OTHER, help="a prompt to compare it with")
    arguments = parser.parse_args()
    analyzer = ModelAnalyzer(arguments.model)
    introduce(analyzer)
    follow_one_prompt(analyzer, arguments.prompt)
    compare_two_prompts(analyzer, arguments.prompt, arguments.other)
    look_at_many_prompts(analyzer)
    print(f"\nPictures: {', '.join(str(p) for p in sorted(OUT.glob('*.png')))}")


if __name__ == "__main__":
    main()
