"""Train the demo model: tokenizer first, then a 12-layer GPT-2, both from the written corpus.

Run as `python demo_model/train.py`. The corpus is written to `build/` if it is not there. On one
machine and device, the same arguments give the same weights.

1. `train_tokenizer`: byte-level BPE, one token per digit, no token added in front.
2. `text_row`: documents packed into rows. Every row starts with the start of a document, mostly
   without `<|endoftext|>`, because that is how prompts start.
3. `Batches`: text rows and rows of random tokens, of 64 tokens first and of 128 at the end.
4. *Seed*: two of the twelve blocks alone learn to copy random tokens, which takes them minutes and
   the whole model many hours. Two things let the induction circuit form early: the position
   embeddings start as sinusoids, so that "the token before" is a rotation, and the random tokens
   come from a pool of `SEED_POOL` first, which grows to the whole vocabulary.
5. *All*: the ten other blocks join, writing nothing at first, and everything is trained on text
   and random rows together.

Both phases: AdamW with a warm-up; the second decays by a cosine.
"""

import argparse
import functools
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

try:
    from demo_model import vocabulary as words
    from demo_model import write_corpus
except ImportError:  # run as a script: the folder of this file is the import path
    import vocabulary as words
    import write_corpus

FOLDER: Final = Path(__file__).parent
END: Final = "<|endoftext|>"
VOCABULARY_SIZE: Final = 2048
CONTEXT: Final = 128
BATCH_TOKENS: Final = 2048
N_DOCUMENTS: Final = 320_000
IGNORED: Final = -100
N_LAYERS: Final = 12
WIDTH: Final = 96
N_HEADS: Final = 6
SHORT_ROWS: Final = (64, 0.85)
"""Tokens of a row, until this share of the steps is done; then rows are as long as the context."""
RANDOM_SHARE: Final = 0.16
"""Of the rows, those that are random tokens, when all blocks are trained."""
REPEATED_SHARE: Final = 0.3
"""Of the random rows, those that repeat one block; the others are random bigrams."""
LONGEST: Final = 28
"""Most tokens in a random row's alphabet or block."""

SEED_BLOCKS: Final = (1, 4)
"""The blocks in which the induction circuit is seeded."""
SEED_STEPS: Final = 1400
SEED_POOL: Final = 64
"""Random tokens that the seed starts with."""
SEED_LONGEST: Final = 12
SEED_GROWTH: Final = (600, 1200)
"""Steps of the seed between which its pool grows to the vocabulary, and rows to `LONGEST`."""

MATRIX_STD: Final = 0.08
EMBEDDING_STD: Final = 0.1
LONGEST_WAVE: Final = 100
"""Of the sinusoids that position embeddings start as, in tokens per radian; the shortest is 1."""
WARM_UP: Final = 100


def train_tokenizer(corpus: Path) -> PreTrainedTokenizerFast:
    """Train the byte-level BPE on the start of the corpus and on the words to keep whole."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with corpus.open(encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line, _ in zip(file, range(20_000), strict=False)]
    # Each kept word counts 20,000 times, so that it is merged before anything else.
    kept = ["".join(f" {word}" for word in words.SINGLE_TOKENS) * 100, *words.BARE_TOKENS * 100]
    tokenizer.train_from_iterator(texts + kept * 200, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        unk_token=END,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def build_model(seed: int, end_id: int) -> GPT2LMHeadModel:
    """Return a GPT-2 of 12 layers, 6 heads of 16 and width 96, with fresh weights.

    Blocks outside `SEED_BLOCKS` write nothing yet: the last matrices of attention and MLP are 0.
    """
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY_SIZE,
        n_positions=CONTEXT,
        n_embd=WIDTH,
        n_layer=N_LAYERS,
        n_head=N_HEADS,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=end_id,
        eos_token_id=end_id,
        initializer_range=MATRIX_STD,
    )
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        model.transformer.wte.weight.normal_(0, EMBEDDING_STD)
        model.transformer.wpe.weight.copy_(EMBEDDING_STD * waves())
        writing_std = MATRIX_STD / math.sqrt(2 * len(SEED_BLOCKS))
        for index, block in enumerate(model.transformer.h):
            for layer in (block.attn.c_proj, block.mlp.c_proj):
                layer.weight.normal_(0, writing_std if index in SEED_BLOCKS else 0)
    return model


def waves() -> Tensor:
    """Sines and cosines of the positions, `[position, width]`, of geometrically growing length."""
    frequencies = torch.exp(-torch.linspace(0, math.log(LONGEST_WAVE), WIDTH // 2))
    angles = torch.arange(CONTEXT)[:, None] * frequencies
    return torch.cat((angles.sin(), angles.cos()), dim=1)


def use_fused_gelu(model: GPT2LMHeadModel) -> None:
    """Exchange the blocks' `gelu_new` for the same function in one kernel."""
    for block in model.transformer.h:
        block.mlp.act = torch.nn.GELU(approximate="tanh")


def encoded_documents(corpus: Path, tokenizer: PreTrainedTokenizerFast) -> Iterator[list[int]]:
    """Yield the token ids of each document, over and over."""
    while True:
        with corpus.open(encoding="utf-8") as file:
            for line in file:
                yield tokenizer.encode(json.loads(line)["text"], add_special_tokens=False)


def text_row(
    encoded: Iterator[list[int]], length: int, end_id: int, starts_with_end: bool
) -> np.ndarray:
    """Pack the next documents into a row `[length]`; what does not fit is dropped."""
    row = [end_id] if starts_with_end else []
    while len(row) < length:
        row += [*next(encoded), end_id]
    return np.array(row[:length])


class Batches:
    """Token ids and labels of each step, each `[row, token]`; `IGNORED` labels do not count."""

    def __init__(self, corpus: Path, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        """Start at the first document of `corpus`."""
        self.encoded = encoded_documents(corpus, tokenizer)
        self.end_id = tokenizer.eos_token_id
        self.rng = np.random.default_rng(seed)
        self.tokens = 1 + self.rng.permutation(VOCABULARY_SIZE - 1)

    def seed_batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Return random rows alone: few tokens of a small pool first."""
        growth = float(np.interp(step, SEED_GROWTH, (0, 1)))
        n_tokens = int(SEED_POOL * (len(self.tokens) / SEED_POOL) ** growth)
        longest = int(np.interp(growth, (0, 1), (SEED_LONGEST, LONGEST)))
        length = SHORT_ROWS[0]
        pool = self.tokens[:n_tokens]
        rows = BATCH_TOKENS // length
        return _stacked([self.random_row(pool, length, longest) for _ in range(rows)])

    def batch(self, done: float) -> tuple[Tensor, Tensor]:
        """Return text and random rows when a share `done` of the steps is done."""
        length = SHORT_ROWS[0] if done < SHORT_ROWS[1] else CONTEXT
        n_rows = BATCH_TOKENS // length
        n_random = math.ceil(n_rows * RANDOM_SHARE)
        pairs = [self.random_row(self.tokens, length, LONGEST) for _ in range(n_random)]
        for _ in range(n_rows - n_random):
            row = text_row(self.encoded, length, self.end_id, self.rng.random() < 0.25)
            pairs.append((row, row))
        return _stacked(pairs)

    def random_row(
        self, pool: np.ndarray, length: int, longest: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return a row of tokens from `pool`, and its labels."""
        repeats = self.rng.random() < REPEATED_SHARE
        make = write_corpus.repeated_row if repeats else write_corpus.bigram_row
        row, predictable = make(self.rng, pool, length, min(longest, length // 2))
        return row, np.where(predictable, row, IGNORED)


def _stacked(pairs: list[tuple[np.ndarray, np.ndarray]]) -> tuple[Tensor, Tensor]:
    ids, labels = (torch.from_numpy(np.stack(rows)) for rows in zip(*pairs, strict=True))
    return ids, labels


def save(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write model and tokenizer beside `folder` first, then move the files into it."""
    temporary = folder.parent / f".{folder.name}.part"
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    folder.mkdir(exist_ok=True)
    for file in temporary.iterdir():
        file.replace(folder / file.name)
    temporary.rmdir()


def losses_of(model: GPT2LMHeadModel, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of every next token in nats, and whether it counts; both `[row, token - 1]`."""
    logits = model(ids, use_cache=False).logits[:, :-1]
    targets = labels[:, 1:]
    losses = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view_as(targets), targets != IGNORED


def describe(losses: Tensor, used: Tensor, labels: Tensor) -> str:
    """Mean losses of text rows and of random rows."""
    is_random = (labels == IGNORED).any(1)
    kinds = (("text", ~is_random), ("random", is_random))
    means = {name: losses[rows].sum() / used[rows].sum() for name, rows in kinds if rows.any()}
    return ", ".join(f"{name} {mean:.3f}" for name, mean in means.items()) + " nats"


def learning_rate(step: int, n_steps: int, peak: float) -> float:
    """Linear warm-up, then a cosine from the peak to a twentieth of it."""
    progress = max(0, step - WARM_UP) / (n_steps - WARM_UP)
    decay = 0.5 * (1 + math.cos(math.pi * progress)) * 0.95 + 0.05
    return warmed_up(step, peak) * decay


def warmed_up(step: int, peak: float) -> float:
    """Linear warm-up to the peak."""
    return peak * min(1, (step + 1) / WARM_UP)


def make_optimizer(model: GPT2LMHeadModel) -> torch.optim.AdamW:
    """AdamW that lets only matrices decay."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": 0.05},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def train_phase(
    name: str,
    model: GPT2LMHeadModel,
    batch_at: Callable[[int], tuple[Tensor, Tensor]],
    n_steps: int,
    rate_at: Callable[[int], float],
    after_step: Callable[[int], None] | None = None,
) -> None:
    """Train for `n_steps` on what `batch_at(step)` returns, printing losses."""
    optimizer = make_optimizer(model)
    began = time.monotonic()
    for step in range(n_steps):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step)
        ids, labels = (part.to(model.device) for part in batch_at(step))
        losses, used = losses_of(model, ids, labels)
        (losses.sum() / used.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        done = step + 1
        if done % 25 == 0:
            seconds = time.monotonic() - began
            said = describe(losses, used, labels)
            print(f"{name} step {done} {said} {seconds:.0f} s", flush=True)
        if after_step is not None:
            after_step(done)


def train(arguments: argparse.Namespace) -> None:
    """Seed the copying circuit, then train everything, saving the model as it goes."""
    corpus = arguments.build / "corpus.jsonl"
    if not corpus.exists():
        write_corpus.write_corpus(corpus, N_DOCUMENTS, arguments.seed)
    tokenizer = train_tokenizer(corpus)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build_model(arguments.seed, tokenizer.eos_token_id).to(device)
    use_fused_gelu(model)
    batches = Batches(corpus, tokenizer, arguments.seed)

    blocks = model.transformer.h
    model.transformer.h = torch.nn.ModuleList(blocks[i] for i in SEED_BLOCKS)
    seed_rate = functools.partial(warmed_up, peak=arguments.lr)
    train_phase("seed", model, batches.seed_batch, SEED_STEPS, seed_rate)
    model.transformer.h = blocks

    def save_sometimes(done: int) -> None:
        if done % arguments.save_every == 0 or done == arguments.steps:
            save(model, tokenizer, arguments.output)

    def batch_at(step: int) -> tuple[Tensor, Tensor]:
        return batches.batch(step / arguments.steps)

    rate = functools.partial(learning_rate, n_steps=arguments.steps, peak=arguments.lr)
    train_phase("all", model, batch_at, arguments.steps, rate, save_sometimes)


def main() -> None:
    """Read the arguments and train."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--steps", type=int, default=6500, help="after the seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save-every", type=int, default=250)
    parser.add_argument("--build", type=Path, default=FOLDER / "build")
    parser.add_argument("--output", type=Path, default=FOLDER)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    train(arguments)


if __name__ == "__main__":
    main()
