"""Train the demo model: tokenizer first, then a 12-layer GPT-2, both from the written corpus.

Run as `python demo_model/train.py`. The corpus is written to `build/` if it is not there. On one
machine and device, the same arguments give the same weights.

1. `train_tokenizer`: byte-level BPE, one token per digit, no token added in front.
2. `text_row`: documents packed into rows. Every row starts with the start of a document, mostly
   without `<|endoftext|>`, because that is how prompts start.
3. `Batches`: text rows and rows of random tokens, of 64 tokens first and of 128 at the end.
4. `train`: AdamW, warm-up and cosine decay.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
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
SHORT_ROWS: Final = (64, 0.88)
"""Tokens of a row, until this share of the steps is done; then rows are as long as the context."""
RANDOM_SHARES: Final = ((0.6, 0.28), (1.0, 0.2))
"""(until this share of the steps, share of the rows that are random tokens)"""
PHASES: Final = (0.0, 0.3, 0.7, 1.0)
POOL_GROWTH: Final = (0, 0, 1, 1)
"""Logarithmic size, at `PHASES`, of the pool of random tokens: 0 is 128, 1 the vocabulary."""
LONGEST_PHASES: Final = (0.0, 0.2, 0.6, 1.0)
LONGEST: Final = (8, 12, 28, 28)
"""Most tokens, at `LONGEST_PHASES`, in a random row's alphabet or block."""
REPEATED_SHARE: Final = 0.3
"""Of the random rows, those that repeat one block; the others are random bigrams."""
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
    """Return a GPT-2 of 12 layers, 6 heads of 16 and width 96, with fresh weights."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY_SIZE,
        n_positions=CONTEXT,
        n_embd=96,
        n_layer=12,
        n_head=6,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=end_id,
        eos_token_id=end_id,
    )
    return GPT2LMHeadModel(config)


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
    """Token ids and labels of each step, each `[row, token]`; `IGNORED` labels do not count.

    Random rows start with few tokens of a small pool, so that copying is found early, and grow.
    """

    def __init__(self, corpus: Path, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        """Start at the first document of `corpus`."""
        self.encoded = encoded_documents(corpus, tokenizer)
        self.end_id = tokenizer.eos_token_id
        self.rng = np.random.default_rng(seed)
        self.tokens = 1 + self.rng.permutation(VOCABULARY_SIZE - 1)

    def at(self, done: float) -> tuple[Tensor, Tensor]:
        """Return the next batch when a share `done` of the steps is done."""
        length = SHORT_ROWS[0] if done < SHORT_ROWS[1] else CONTEXT
        n_rows = BATCH_TOKENS // length
        share = next(share for end, share in RANDOM_SHARES if done < end)
        n_random = math.ceil(n_rows * share)
        growth = float(np.interp(done, PHASES, POOL_GROWTH))
        longest = int(np.interp(done, LONGEST_PHASES, LONGEST))
        n_tokens = len(self.tokens)
        pool = self.tokens[: int(128 * (n_tokens / 128) ** growth)]
        pairs = [self.random_row(pool, length, longest) for _ in range(n_random)]
        for _ in range(n_rows - n_random):
            row = text_row(self.encoded, length, self.end_id, self.rng.random() < 0.25)
            pairs.append((row, row))
        ids, labels = (torch.from_numpy(np.stack(rows)) for rows in zip(*pairs, strict=True))
        return ids, labels

    def random_row(
        self, pool: np.ndarray, length: int, longest: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return a row of tokens from `pool`, and its labels."""
        repeats = self.rng.random() < REPEATED_SHARE
        make = write_corpus.repeated_row if repeats else write_corpus.bigram_row
        row, predictable = make(self.rng, pool, length, min(longest, length // 2))
        return row, np.where(predictable, row, IGNORED)


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
    text, random_tokens = (
        losses[rows].sum() / used[rows].sum() for rows in (~is_random, is_random)
    )
    return f"text {text:.3f} random {random_tokens:.3f} nats"


def learning_rate(step: int, n_steps: int, peak: float) -> float:
    """Linear warm-up, then a cosine from the peak to a twentieth of it."""
    progress = max(0, step - WARM_UP) / (n_steps - WARM_UP)
    decay = 0.5 * (1 + math.cos(math.pi * progress)) * 0.95 + 0.05
    return peak * min(1, (step + 1) / WARM_UP) * decay


def make_optimizer(model: GPT2LMHeadModel, peak: float) -> torch.optim.AdamW:
    """AdamW that lets only matrices decay."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": 0.05},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95), fused=True)


def train(arguments: argparse.Namespace) -> None:
    """Train for `arguments.steps` steps, printing losses and saving the model as it goes."""
    corpus = arguments.build / "corpus.jsonl"
    if not corpus.exists():
        write_corpus.write_corpus(corpus, N_DOCUMENTS, arguments.seed)
    tokenizer = train_tokenizer(corpus)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build_model(arguments.seed, tokenizer.eos_token_id).to(device)
    use_fused_gelu(model)
    optimizer = make_optimizer(model, arguments.lr)
    batches = Batches(corpus, tokenizer, arguments.seed)
    began = time.monotonic()
    for step in range(arguments.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, arguments.steps, arguments.lr)
        ids, labels = (part.to(device) for part in batches.at(step / arguments.steps))
        losses, used = losses_of(model, ids, labels)
        (losses.sum() / used.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        done = step + 1
        if done % 25 == 0:
            seconds = time.monotonic() - began
            print(f"step {done} {describe(losses, used, labels)} {seconds:.0f} s", flush=True)
        if done % arguments.save_every == 0 or done == arguments.steps:
            save(model, tokenizer, arguments.output)


def main() -> None:
    """Read the arguments and train."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--steps", type=int, default=2600)
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
