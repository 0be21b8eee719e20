"""One story on one model: where does it decide what comes next?

    python analyzer_demo.py                                  # the bundled model
    python analyzer_demo.py PATH_OR_ID "A prompt"            # any other

Prints what a person wants to read and saves its pictures to ``out/``. Deterministic.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from model_analyzer import ModelAnalyzer
from model_loader import DEMO_MODEL
from sites import SiteError
from visualization import plot_convergence_analysis, plot_embeddings_2d, plot_lens_heatmap

PROMPT = "The capital of France is"
OTHER = "The capital of Italy is"
HAPPY = ["I am happy", "This is great", "I am so glad"]
SAD = ["I am sad", "This is terrible", "I am so unhappy"]
OUT = Path("out")


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


def find_where_it_decides(analyzer: ModelAnalyzer, prompt: str, other: str) -> None:
    """Put one prompt's activations into the other's run, and see what brings its answer back."""
    sweep = analyzer.patching_sweep(prompt, other, metric="log_prob", normalize=True, align="end")
    sweep.plot(save_path=OUT / "patching.png")
    print(f"\nWhat of {prompt!r} brings {sweep.answer!r} back in {other!r}?")
    for position, token in enumerate(sweep.tokens):
        found = sweep.to_frame().query(f"position == {position} and value > 0.5")["layer"]
        where = f"entering layers {found.min()} to {found.max()}" if len(found) else "-"
        print(f"  the stream at {token!r:<12} {where}")
    heads = analyzer.patching_sweep(
        prompt, other, "head_out", metric="log_prob", normalize=True, positions="last", align="end"
    )
    named = ", ".join(f"{r.layer}.{r.head} ({r.value:.2f})" for r in heads.top(3).itertuples())
    print(f"  the heads that do it at the last token: {named}")


def look_inside(analyzer: ModelAnalyzer, prompt: str) -> None:
    """Name the heads by what they do, and split the answer's logit over parts and over tokens."""
    print("\nWhich heads do something known, on repeated random tokens?")
    for kind in ("previous_token", "induction"):
        try:
            print(f"  {analyzer.find_heads(kind)}")
        except SiteError as error:
            print(f"  {error}")
            break
    else:
        analyzer.attention_patterns(prompt).view().save(OUT / "attention.html")
    parts = analyzer.logit_attribution(prompt)
    parts.plot("waterfall", save_path=OUT / "logit_parts.png")
    named = ", ".join(f"{r.part} {r.value:+.1f}" for r in parts.top(4).itertuples())
    print(f"Which parts make the logit of its answer?\n  {parts}\n  {named}")
    tokens = analyzer.attribute_tokens(prompt)
    tokens.plot(save_path=OUT / "tokens.png")
    told = ", ".join(f"{r.token!r} {r.score:+.1f}" for r in tokens.to_frame().itertuples())
    print(f"Which tokens speak for it, by integrated gradients?\n  {told}")


def steer(analyzer: ModelAnalyzer) -> None:
    """Push one sentence towards joy and towards grief."""
    print("\nThe same prompt, steered from sad to happy:")
    for coefficient in (-2.0, 0.0, 2.0):
        text = analyzer.generate_with_steering(
            "Today I feel", HAPPY, SAD, coefficient=coefficient, max_new_tokens=14
        )
        print(f"  {coefficient:+.0f}  {text!r}")


def look_at_many_prompts(analyzer: ModelAnalyzer) -> None:
    """Keep one token of every layer for a thousand prompts, save it, and draw a part of it."""
    pairs = [(i, j) for i in range(1, 33) for j in range(1, 33)]
    prompts = [f"{i} + {j} = " for i, j in pairs]
    records = analyzer.extract_batch_activations(prompts, positions="last", show_progress=False)
    path = analyzer.save_activations(records, OUT / "sums.safetensors")
    print(f"\nKept every layer at the last token of {len(records)} sums: {path}")
    vectors = [record.layer_activations[-1][0, -1].numpy() for record in records]
    colors, title = [i + j for i, j in pairs], "The last layer at the end of 'i + j = '"
    plot_embeddings_2d(
        vectors, colors=colors, title=title, show_labels=False, save_path=OUT / "sums.png"
    )


def main() -> None:
    """Tell the story."""
    parser = argparse.ArgumentParser(description="Where does a model decide what comes next?")
    parser.add_argument("model", nargs="?", default=str(DEMO_MODEL), help="folder or hub id")
    parser.add_argument("prompt", nargs="?", default=PROMPT)
    parser.add_argument("--other", default=OTHER, help="a prompt with another answer")
    arguments = parser.parse_args()
    analyzer = ModelAnalyzer(arguments.model)
    analyzer.print_architecture_summary()
    print(f"\nDoes the toolkit understand this model?\n{analyzer.check()}")
    follow_one_prompt(analyzer, arguments.prompt)
    find_where_it_decides(analyzer, arguments.prompt, arguments.other)
    look_inside(analyzer, arguments.prompt)
    steer(analyzer)
    look_at_many_prompts(analyzer)
    print(f"\nPictures: {', '.join(str(p) for p in sorted(OUT.glob('*.png')))}")


if __name__ == "__main__":
    main()
