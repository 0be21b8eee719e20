"""Measure what the demo model can do on what its training never showed, and write the tables.

Run as `python demo_model/evaluate.py`: prints the tables and writes them into `README.md` between
the markers; with `--check` it writes nothing and exits with 1 where `README.md` differs.

Heads are named `layer.head`, both from 0. Head scores are the means over 32 sequences of 50 random
tokens, twice in a row (Olsson et al. 2022; the definitions of TransformerLens' `head_detector`):
attention from each token of the second copy to the token after its first occurrence (induction) or
to its first occurrence (duplicate token), and from each token to the one before (previous token).
"""

import argparse
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

try:
    from demo_model import sentences as patterns
    from demo_model import vocabulary as words
    from demo_model import write_corpus as corpus
except ImportError:  # run as a script: the folder of this file is the import path
    import sentences as patterns
    import vocabulary as words
    import write_corpus as corpus

FOLDER: Final = Path(__file__).parent
MARKERS: Final = ("<!-- evaluation: start -->", "<!-- evaluation: end -->")


@dataclass(frozen=True)
class Result:
    """One row of the table; `accuracy` is a share of `n` held-out prompts."""

    behaviour: str
    n: int
    accuracy: float
    detail: str


@dataclass(frozen=True)
class Subject:
    """The model under evaluation, with eager attention, and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @torch.no_grad()
    def last_logits(self, prompts: list[str]) -> Tensor:
        """Logits after each prompt, `[prompt, vocab]`; no padding: equal lengths run together."""
        encoded = [self.tokenizer.encode(prompt) for prompt in prompts]
        rows: list[Tensor] = [torch.empty(0)] * len(prompts)
        for members in _by_length(encoded):
            ids = torch.tensor([encoded[i] for i in members])
            for i, row in zip(members, self.model(ids).logits[:, -1], strict=True):
                rows[i] = row
        return torch.stack(rows)

    @torch.no_grad()
    def greedy(self, prompts: list[str], n_tokens: int) -> list[str]:
        """The `n_tokens` most likely next tokens of each prompt, as text."""
        encoded = [self.tokenizer.encode(prompt) for prompt in prompts]
        texts = [""] * len(prompts)
        for members in _by_length(encoded):
            ids = torch.tensor([encoded[i] for i in members])
            made = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=n_tokens,
                pad_token_id=self.tokenizer.eos_token_id,
            )
            for i, row in zip(members, made[:, ids.shape[1] :].tolist(), strict=True):
                texts[i] = self.tokenizer.decode(row)
        return texts


def _by_length(encoded: list[list[int]]) -> Iterable[list[int]]:
    groups: dict[int, list[int]] = defaultdict(list)
    for i, ids in enumerate(encoded):
        groups[len(ids)].append(i)
    return groups.values()


def load(folder: Path = FOLDER) -> Subject:
    """Load the model of `folder`."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    return Subject(model.eval(), AutoTokenizer.from_pretrained(folder))


def _share_completed(subject: Subject, pairs: list[tuple[str, str]]) -> float:
    """Share of (prompt, answer) whose greedy continuation starts with the whole answer."""
    n_tokens = max(len(subject.tokenizer.encode(f" {answer}")) for _, answer in pairs)
    texts = subject.greedy([prompt for prompt, _ in pairs], n_tokens)
    hits = [text.strip().startswith(answer) for text, (_, answer) in zip(texts, pairs, strict=True)]
    return sum(hits) / len(hits)


def fact_prompts(kind: str) -> list[tuple[str, str]]:
    """Held-out (prompt, answer) of `capital`, `country` or `landmark`."""
    phrasings, slot = {
        "capital": (patterns.CAPITAL_PHRASINGS, "{city}"),
        "country": (patterns.COUNTRY_PHRASINGS, "{country}"),
        "landmark": (patterns.LANDMARK_PHRASINGS, "{city}"),
    }[kind]
    found = []
    for owner in words.LANDMARKS if kind == "landmark" else words.COUNTRIES:
        city = words.LANDMARKS[owner] if kind == "landmark" else words.COUNTRIES[owner][0]
        for index, phrasing in enumerate(phrasings):
            if corpus.is_held_out(kind, owner, str(index)):
                prompt = phrasing.split(slot)[0].rstrip()
                prompt = prompt.format(country=owner, city=city, landmark=owner)
                found.append((prompt, owner if kind == "country" else city))
    return found


def facts(subject: Subject, kind: str) -> Result:
    """Whether the answer follows a phrasing never seen with this country or landmark.

    A country that opens the text is another token than after a space, and only one phrasing opens
    with it: held out there, that token was never seen with its capital. `new_token` measures these.
    """
    pairs = [pair for pair in fact_prompts(kind) if kind != "capital" or not _opens(pair[0])]
    title = {
        "capital": "capital of a country",
        "country": "country of a capital",
        "landmark": "city of a landmark",
    }[kind]
    detail = "whole answer, greedy; (name, phrasing) held out"
    return Result(title, len(pairs), _share_completed(subject, pairs), detail)


def _opens(prompt: str) -> bool:
    """Whether a prompt opens with the name of a country."""
    return any(prompt.startswith(country) for country in words.COUNTRIES)


def new_token(subject: Subject) -> Result:
    """Whether a capital follows a country's token that was never seen with it."""
    pairs = [pair for pair in fact_prompts("capital") if _opens(pair[0])]
    title, detail = "the same, country opens the text", "a token never seen with its capital"
    return Result(title, len(pairs), _share_completed(subject, pairs), detail)


def ioi_prompts(seed: int = 0) -> list[tuple[str, str, str]]:
    """(prompt, indirect object, subject) for every held-out pair of names, in both orders."""
    rng = random.Random(seed)
    found = []
    for i, first in enumerate(words.NAMES):
        for second in words.NAMES[i + 1 :]:
            if corpus.names_held_out(first, second):
                for pair in ((first, second), (second, first)):
                    slots = corpus.ioi_slots(rng, *pair)
                    text = rng.choice(patterns.IOI_TEMPLATES).format(**slots)
                    prompt = corpus.with_articles(text).rsplit(" ", 1)[0]
                    found.append((prompt, slots["recipient"], slots["subject"]))
    return found


def indirect_object(subject: Subject) -> Result:
    """Whether the name that was not repeated is predicted."""
    cases = ioi_prompts()
    logits = subject.last_logits([prompt for prompt, _, _ in cases])
    objects = torch.tensor([subject.tokenizer.encode(f" {name}")[0] for _, name, _ in cases])
    subjects = torch.tensor([subject.tokenizer.encode(f" {name}")[0] for _, _, name in cases])
    rows = torch.arange(len(cases))
    difference = logits[rows, objects] - logits[rows, subjects]
    top = (logits.argmax(1) == objects).double().mean().item()
    positive = (difference > 0).double().mean().item()
    detail = (
        f"top-1; object above subject {positive:.3f}, mean logit difference"
        f" {difference.mean():.1f}; pair of names held out"
    )
    return Result("indirect object", len(cases), top, detail)


def greater_than(subject: Subject) -> Result:
    """Whether the greedy end year is later than a start year never seen in training."""
    starts = [
        (century, start)
        for century in corpus.CENTURIES
        for start in range(2, 99)
        if corpus.is_held_out("year", str(century), str(start))
    ]
    digits = torch.tensor([subject.tokenizer.encode(str(digit))[0] for digit in range(10)])
    mass, hits, firsts = 0.0, 0, 0
    for number, (century, start) in enumerate(starts):
        event = words.EVENTS[number % len(words.EVENTS)]
        prompt = f"The {event} lasted from the year {century}{start:02d} to the year {century}"
        first = subject.last_logits([prompt]).softmax(1)[0, digits]
        then = subject.last_logits([f"{prompt}{d}" for d in range(10)]).softmax(1)[:, digits]
        joint = (first[:, None] * then).flatten()
        mass += joint[start + 1 :].sum().item()
        best = int(first.argmax()) * 10 + int(then[first.argmax()].argmax())
        hits += best > start
        firsts += int(first.argmax()) >= start // 10
    n = len(starts)
    detail = (
        f"greedy two digits later; first digit not earlier {firsts / n:.3f}, probability of all"
        f" later years {mass / n:.3f}; start year held out"
    )
    return Result("greater-than", n, hits / n, detail)


def mood_balance(text: str) -> int:
    """Number of positive minus negative words in `text`."""
    found = re.findall(r"[a-z]+", text.lower())
    return sum((w in corpus.POSITIVE_WORDS) - (w in corpus.NEGATIVE_WORDS) for w in found)


def sentiment_prompts() -> list[tuple[str, int]]:
    """Held-out (first sentence, +1 or -1)."""
    found = []
    for sign, mood in ((1, corpus.MOODS["positive"]), (-1, corpus.MOODS["negative"])):
        openings = patterns.FEELING_OPENINGS + patterns.QUALITY_OPENINGS + patterns.REVIEW_OPENINGS
        for opening in openings:
            for word in mood.feelings if "{feeling}" in opening else mood.qualities:
                if corpus.is_held_out("opening", opening, word):
                    text = opening.format(feeling=word, quality=word)
                    found.append((corpus.with_articles(text) + ".", sign))
    return found


def sentiment(subject: Subject) -> Result:
    """Whether 25 continued tokens hold more words of the first sentence's sentiment."""
    cases = sentiment_prompts()
    texts = subject.greedy([prompt for prompt, _ in cases], 25)
    hits = [mood_balance(text) * sign > 0 for text, (_, sign) in zip(texts, cases, strict=True)]
    detail = "25 greedy tokens, words counted by list; (opening, word) held out"
    return Result("sentiment of continuations", len(cases), sum(hits) / len(hits), detail)


def pronouns(subject: Subject) -> Result:
    """Whether the pronoun of the person's gender is above the other's."""
    prompts, signs, choices = [], [], []
    for person, male in corpus.persons().items():
        for index, pattern in enumerate(patterns.PRONOUN_TEMPLATES):
            if corpus.is_held_out("pronoun", person, str(index)):
                slot = "{he}" if "{he}" in pattern else "{his}"
                prompts.append(pattern.split(slot)[0].rstrip().format(person=person))
                signs.append(1 if male else -1)
                choices.append((" he", " she") if slot == "{he}" else (" his", " her"))
    logits = subject.last_logits(prompts)
    ids = torch.tensor([[subject.tokenizer.encode(word)[0] for word in pair] for pair in choices])
    chosen = logits.gather(1, ids)
    hits = (chosen[:, 0] - chosen[:, 1]) * torch.tensor(signs) > 0
    detail = "he above she, his above her, or the reverse; (person, phrasing) held out"
    return Result("gendered pronouns", len(prompts), hits.double().mean().item(), detail)


def sums(subject: Subject, two_digit: bool) -> Result:
    """Whether the whole sum is right; both orders of the held-out summands."""
    pairs = []
    for left in range(100):
        for right in range(100):
            if corpus.sum_held_out(left, right) and (max(left, right) > 9) == two_digit:
                pairs.append((f"{left} + {right} =", str(left + right)))
    texts = subject.greedy([prompt for prompt, _ in pairs], 5)
    found = [re.match(r" (\d+)", text) for text in texts]
    hits = [m is not None and m[1] == answer for m, (_, answer) in zip(found, pairs, strict=True)]
    title = "sums, a summand of two digits" if two_digit else "sums of two one-digit numbers"
    detail = "whole number, greedy; pair of summands held out"
    return Result(title, len(pairs), sum(hits) / len(hits), detail)


@torch.no_grad()
def induction(subject: Subject, n_sequences: int = 32, length: int = 50) -> tuple[Result, Tensor]:
    """Accuracy on the second copy of random tokens, and head scores `[kind, layer, head]`.

    Kinds in order: induction, previous token, duplicate token.
    """
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(1, len(subject.tokenizer), (n_sequences, length), generator=generator)
    ids = torch.cat((first, first), dim=1)
    output = subject.model(ids, output_attentions=True)
    hits = (output.logits[:, length:-1].argmax(2) == ids[:, length + 1 :]).double().mean()
    pattern = torch.stack(output.attentions).mean(1)  # [layer, head, query, key]
    scores = torch.stack(
        [
            pattern[:, :, length:].diagonal(1, 2, 3).mean(-1),
            pattern.diagonal(-1, 2, 3).mean(-1),
            pattern[:, :, length:].diagonal(0, 2, 3).mean(-1),
        ]
    )
    n = n_sequences * (length - 1)
    detail = f"top-1 on the second copy of {length} random tokens"
    return Result("induction", n, hits.item(), detail), scores


@torch.no_grad()
def name_movers(subject: Subject, n_prompts: int = 100) -> tuple[Tensor, Tensor]:
    """What the heads do at the end of indirect-object prompts of the first template.

    Returns:
        Attention from the last token to the object's name less that to the subject's first mention
        `[layer, head]`, and the loss of logit difference when the head's output is replaced by its
        mean over the prompts `[layer, head]`.
    """
    start = patterns.IOI_TEMPLATES[0].split("{")[0]
    cases = [case for case in ioi_prompts() if case[0].startswith(start)][:n_prompts]
    ids = torch.tensor([subject.tokenizer.encode(prompt) for prompt, _, _ in cases])
    names = [
        torch.tensor([subject.tokenizer.encode(f" {case[k]}")[0] for case in cases]) for k in (1, 2)
    ]
    rows = torch.arange(len(cases))
    output = subject.model(ids, output_attentions=True)
    spots = [(ids == name[:, None]).double().argmax(1) for name in names]
    last = torch.stack(output.attentions)[:, :, :, -1]  # [layer, prompt, head, key]
    moved = last[:, rows, :, spots[0]] - last[:, rows, :, spots[1]]  # [prompt, layer, head]

    def difference(logits: Tensor) -> float:
        return (logits[rows, -1, names[0]] - logits[rows, -1, names[1]]).mean().item()

    clean, width = difference(output.logits), subject.model.config.n_embd
    n_heads = subject.model.config.n_head
    drops = torch.zeros(subject.model.config.n_layer, n_heads)
    for layer, block in enumerate(subject.model.transformer.h):
        for head in range(n_heads):
            part = slice(head * width // n_heads, (head + 1) * width // n_heads)
            with block.attn.c_proj.register_forward_pre_hook(_mean_ablation(part)):
                drops[layer, head] = clean - difference(subject.model(ids).logits)
    return moved.mean(0), drops


def _mean_ablation(part: slice) -> Callable[..., tuple[Tensor]]:
    def replace(_: torch.nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        mixed = inputs[0].clone()
        mixed[..., part] = mixed[..., part].mean(0)
        return (mixed,)

    return replace


def _top_heads(scores: Tensor, n: int = 3) -> str:
    order = scores.flatten().argsort(descending=True)[:n].tolist()
    n_heads = scores.shape[1]
    return ", ".join(f"{i // n_heads}.{i % n_heads} ({scores.flatten()[i]:.2f})" for i in order)


def tables(subject: Subject) -> str:
    """All results as two Markdown tables."""
    copied, scores = induction(subject)
    moved, drops = name_movers(subject)
    results = [facts(subject, "capital"), new_token(subject)]
    results += [facts(subject, kind) for kind in ("country", "landmark")]
    results += [indirect_object(subject), greater_than(subject), sentiment(subject)]
    results += [pronouns(subject), copied, sums(subject, False), sums(subject, True)]
    lines = ["| behaviour | n | accuracy | measured as |", "| --- | ---: | ---: | --- |"]
    lines += [f"| {r.behaviour} | {r.n} | {r.accuracy:.3f} | {r.detail} |" for r in results]
    lines += ["", "| head score | top three heads |", "| --- | --- |"]
    named = zip(("induction", "previous token", "duplicate token"), scores, strict=True)
    lines += [f"| {name} | {_top_heads(score)} |" for name, score in named]
    lines.append(f"| name mover: attention to object less subject | {_top_heads(moved)} |")
    lines.append(f"| logit difference lost, head mean-ablated | {_top_heads(drops)} |")
    return "\n".join(lines)


def main() -> int:
    """Print the tables; write them, or compare them with `--check`."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--model", type=Path, default=FOLDER)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the same sums on every machine, and no waiting for busy cores
    table = tables(load(arguments.model))
    print(table)
    readme = FOLDER / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, rest = text.split(MARKERS[0])
    written = f"{before}{MARKERS[0]}\n{table}\n{MARKERS[1]}{rest.split(MARKERS[1])[1]}"
    if arguments.check:
        return int(written != text)
    readme.write_text(written, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
