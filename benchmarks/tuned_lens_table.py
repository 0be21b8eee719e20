"""Train a tuned lens on the bundled demo model; print held-out KL beside the logit lens, by layer.

The translators learn from documents of the model's own corpus. KL(final ‖ layer), in nats, is then
averaged over documents drawn with another seed, without those that training has seen word for
word.

    PYTHONPATH=. python benchmarks/tuned_lens_table.py [--steps 200] [--save FILE]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from demo_model.write_corpus import documents
from logit_lens import LogitLens
from model_loader import load_model
from tuned_lens import TunedLens

TRAIN_DOCUMENTS = 6000
HELD_OUT_DOCUMENTS = 200
CONTEXT = 64


def held_out_kl(lens: LogitLens, rows: list[list[int]]) -> torch.Tensor:
    """Mean KL(final ‖ row) over rows of tokens, ``[1 + n_layers]``."""
    tables = [lens.run(row, 1, metrics=("kl_divergence",)).metrics["kl_divergence"] for row in rows]
    return torch.cat([torch.from_numpy(table) for table in tables], 1).mean(1)


def main() -> None:
    """Train, measure, print."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--save", type=Path, help="also write the tuned lens into this file")
    arguments = parser.parse_args()
    model, tokenizer = load_model(device="cpu")
    assert tokenizer is not None
    plain = LogitLens(model, tokenizer=tokenizer)
    train = [document.text for document in documents(TRAIN_DOCUMENTS, seed=0)]
    seen = set(train)
    fresh = [document.text for document in documents(HELD_OUT_DOCUMENTS, seed=1)]
    end = [tokenizer.eos_token_id]

    def as_ids(texts: list[str]) -> list[int]:
        return [token for text in texts for token in [*tokenizer(text)["input_ids"], *end]]

    ids = as_ids([text for text in fresh if text not in seen])
    rows = [ids[i : i + CONTEXT] for i in range(0, len(ids) - CONTEXT + 1, CONTEXT)]
    start = time.perf_counter()
    tuned = TunedLens(steps=arguments.steps, context=CONTEXT)
    tuned.fit(plain.architecture, tokenizer, [as_ids(train)])
    seconds = time.perf_counter() - start
    before, after = (held_out_kl(lens, rows) for lens in (plain, LogitLens(model, tuned=tuned)))
    print(
        f"Mean KL(final ‖ layer) in nats over {len(rows)} × {CONTEXT} held-out tokens; "
        f"{arguments.steps} steps, {seconds:.0f} s of training"
    )
    print(f"{'after layer':<12} {'logit lens':>10} {'tuned lens':>10} {'of it':>7}")
    labels = ("embed", *map(str, range(plain.architecture.n_layers)))
    for label, logit, translated in zip(labels, before.tolist(), after.tolist(), strict=True):
        share = f"{translated / logit:>7.0%}" if logit else ""
        print(f"{label:<12} {logit:>10.3f} {translated:>10.3f} {share}".rstrip())
    if arguments.save is not None:
        tuned.save(arguments.save)


if __name__ == "__main__":
    main()
