"""What each attention head looks at: patterns, scores over many texts, and heads by what they do.

    attention_patterns      every head's pattern of one text
    batch_attention_patterns   the same of many texts
    head_summary            previous-token, duplicate, induction, sink, … scores of every head
    find_heads              heads in order of one score
    repeated_random_tokens  the texts that induction is measured on

A summary runs each text once and adds up each pattern as the pass makes it: what is kept are sums
per layer and head, however many texts there are. Blocks behind the last one asked for are not run,
nor is the head of the model.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from activation_extraction import DEFAULT_BATCH, extract_batch
from attention_result import KINDS, AttentionPatterns, HeadRanking, HeadSummary, kind_of
from extraction_request import make_request
from forward_pass import Hook, InputError, Site, Tap, attached, evaluate, skip_blocks
from interrupts import UndoStack
from memory_limits import free_bytes, in_batches, in_words
from model_architecture import Architecture, Layer
from module_devices import exact
from sites import check_batch_size
from tokenization import Prompt, check_ids, context_length, encode, pad_left

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH_CELLS = 2**18
"""Query × key cells of a batch, per head: so many texts of one length go into one pass."""

NEED_COPIES = ("duplicate_token", "induction")
"""Kinds that only tokens with an earlier copy count for."""


# --- Patterns -------------------------------------------------------------------------------------


def attention_patterns(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: Prompt,
    layers: Layer | Sequence[Layer] | None = None,
) -> AttentionPatterns:
    """Every head's attention pattern of one text.

    Args:
        model: A causal language model, with or without its head.
        tokenizer: For text, and for readable tokens.
        prompt: Text, a chat, or token ids.
        layers: Which layers, in any spelling; None means all that attend.

    Returns:
        Patterns ``[head, query, key]`` per layer. They come from the eager implementation, which
        differs from others by rounding.

    Raises:
        InputError: the prompt cannot be used.
        LayerError: there is no such layer.
        SiteError: a layer that was named, or every layer, has no attention pattern.
    """
    (found,) = batch_attention_patterns(model, tokenizer, [prompt], layers, show_progress=False)
    return found


def batch_attention_patterns(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prompts: Iterable[Prompt],
    layers: Layer | Sequence[Layer] | None = None,
    *,
    batch_size: int = DEFAULT_BATCH,
    show_progress: bool = True,
) -> list[AttentionPatterns]:
    """Every head's attention pattern of many texts, padding gone, equal to one by one.

    Args:
        model: A causal language model, with or without its head.
        tokenizer: For text, and for readable tokens.
        prompts: Texts, chats or lists of token ids.
        layers: Which layers, in any spelling; None means all that attend.
        batch_size: Texts per forward pass.
        show_progress: A progress bar, where there is a terminal to show it.

    Returns:
        One result per text, in the order given. All are held at once: for what can be added up over
        texts, `head_summary` needs no room.

    Raises:
        InputError: a prompt cannot be used.
        LayerError: there is no such layer.
        SiteError: a layer that was named, or every layer, has no attention pattern.
    """
    architecture = Architecture(model)
    request = _request(architecture, layers)
    records = extract_batch(
        architecture,
        tokenizer,
        prompts,
        request,
        batch_size=batch_size,
        show_progress=show_progress,
    )
    found = tuple(site.layer for site in request.sites)
    results = []
    for record in records:
        weights = record.attention_weights
        assert weights is not None
        patterns = tuple(weights[layer][0].float().cpu().numpy() for layer in found)
        results.append(
            AttentionPatterns(patterns, found, tuple(record.tokens), tuple(record.token_ids))
        )
    return results


def _request(architecture: Architecture, layers: Layer | Sequence[Layer] | None) -> Any:
    chosen: Any = layers
    return make_request(architecture, chosen, sites=("attn_pattern",))


# --- The texts that induction is measured on ------------------------------------------------------


def repeated_random_tokens(
    tokenizer: PreTrainedTokenizerBase | None,
    config: Any,
    *,
    count: int = 16,
    length: int = 50,
    seed: int = 0,
) -> list[list[int]]:
    """Random tokens, then the same again: nothing but copying can predict the second half.

    Olsson et al. 2022, "In-context Learning and Induction Heads".

    Args:
        tokenizer: Its special tokens are left out; where it puts a BOS token before texts, one
            stands before each of these too.
        config: The model's text config.
        count: Number of texts.
        length: Random tokens of a text, all different; fewer where the vocabulary or half of the
            model's context is less.
        seed: Of the draw.

    Returns:
        Token ids, twice ``length`` (and a BOS token) for each text.

    Raises:
        InputError: ``count`` is below 1 or ``length`` below 2, or there is no room for these.
    """
    special = set() if tokenizer is None else set(tokenizer.all_special_ids)
    size = config.vocab_size if tokenizer is None else min(config.vocab_size, len(tokenizer))
    pool = np.array([token for token in range(size) if token not in special])
    first = _first_tokens(tokenizer)
    context = context_length(config)
    room = length if context is None else (context - len(first)) // 2
    length = min(length, len(pool), room)
    if count < 1 or length < 2:
        raise InputError(
            f"repeated random tokens need at least one text of two tokens, twice; there would be "
            f"{count} of {length} (vocabulary {len(pool)}, context {context})"
        )
    rng = np.random.default_rng(seed)
    drawn = [rng.choice(pool, size=length, replace=False).tolist() for _ in range(count)]
    return [[*first, *half, *half] for half in drawn]


def _first_tokens(tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    """The BOS token, if the tokenizer puts one before a text."""
    if tokenizer is None or tokenizer.bos_token_id is None:
        return []
    ids = list(tokenizer("a")["input_ids"])
    return ids[:1] if ids[0] == tokenizer.bos_token_id else []


# --- The summary ----------------------------------------------------------------------------------


def head_summary(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prompts: Iterable[Prompt] | None = None,
    *,
    layers: Layer | Sequence[Layer] | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    show_progress: bool = True,
) -> HeadSummary:
    """What every head attends to, on the average over the tokens of all texts.

    With ``A[i, j]`` the attention of token ``i`` to token ``j``, the mean over tokens ``i`` of

    - ``previous_token``: ``A[i, i-1]``;
    - ``current_token``: ``A[i, i]``;
    - ``first_token``: ``A[i, 0]``, an attention sink (Xiao et al. 2023, "Efficient Streaming
      Language Models with Attention Sinks");
    - ``duplicate_token``: the sum of ``A[i, j]`` over ``j < i`` that hold the same token (Wang et
      al. 2022, "Interpretability in the Wild", section 3), over ``i`` with an earlier copy;
    - ``induction``: the sum of ``A[i, j+1]`` over the same ``j``, ``j + 1 < i`` (the prefix
      matching score of Olsson et al. 2022), over ``i`` for which there is one;
    - ``no_token``: 1 less the row's sum: what goes to a learned sink instead of a token; 0 where it
      is no more than the rounding of a row in the model's dtype;
    - ``entropy``: ``-Σ A ln A`` in nats, a learned sink counted as one more token;
    - ``distance``: ``Σ A·(i-j) / Σ A``, the mean over attention rather than tokens.

    A text's first token can only see itself, and counts in no score; nor does padding. Where ``i``
    is 1, the first token is the previous one.

    Args:
        model: A causal language model, with or without its head.
        tokenizer: For text.
        prompts: Texts, chats or lists of token ids; None takes `repeated_random_tokens`.
        layers: Which layers, in any spelling; None means all that attend.
        batch_size: Texts per forward pass; None takes as many as `BATCH_CELLS` allows.
        seed: Of the random tokens.
        show_progress: A progress bar, where there is a terminal to show it.

    Returns:
        Scores ``[kind, layer, head]``.

    Raises:
        InputError: a prompt cannot be used, or no text has two tokens.
        LayerError: there is no such layer.
        SiteError: a layer that was named, or every layer, has no attention pattern.
        NotEnoughMemoryError: one text alone does not fit (a batch that does not is halved).
    """
    if batch_size is not None:
        check_batch_size(batch_size)
    architecture = Architecture(model)
    sites = _request(architecture, layers).sites
    if prompts is None:
        rows = repeated_random_tokens(tokenizer, architecture.config, seed=seed)
    else:
        rows = _encode_all(architecture, tokenizer, prompts)
    source = "repeated random tokens" if prompts is None else "prompts"
    return _summarize(architecture, rows, sites, source, batch_size, show_progress)


def find_heads(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    kind: str = "induction",
    prompts: Iterable[Prompt] | None = None,
    *,
    lowest: bool = False,
    **options: Any,
) -> HeadRanking:
    """The heads in order of one score of `head_summary`, which defines them.

    Args:
        model: A causal language model, with or without its head.
        tokenizer: For text.
        kind: A key of `attention_result.KINDS`; ``"previous-token"``, ``"sink"`` and the like too.
        prompts: Texts, chats or lists of token ids; None takes `repeated_random_tokens`.
        lowest: The lowest score first.
        **options: For `head_summary`: ``layers``, ``batch_size``, ``seed``, ``show_progress``.

    Returns:
        The ranking; ``ranking[0]`` is ``(layer, head, score)`` of the first.

    Raises:
        InputError: there is no such kind, a prompt cannot be used, or no token in the prompts
            counts for this kind.
        LayerError: there is no such layer.
        SiteError: a layer that was named, or every layer, has no attention pattern.
    """
    kind = kind_of(kind)
    if prompts is not None:
        architecture = Architecture(model)
        prompts = _encode_all(architecture, tokenizer, prompts)
        if kind in NEED_COPIES and not any(len(set(row)) < len(row) for row in prompts):
            raise InputError(
                f"{kind} is measured where a token occurs again, and in none of these texts does "
                "one; give longer texts, or prompts=None for repeated random tokens"
            )
    return head_summary(model, tokenizer, prompts, **options).rank(kind, lowest=lowest)


def _encode_all(
    architecture: Architecture,
    tokenizer: PreTrainedTokenizerBase | None,
    prompts: Iterable[Prompt],
) -> list[list[int]]:
    """Token ids of every text, checked; at least one text of two tokens."""
    if isinstance(prompts, str):
        raise InputError(f"prompts is a list of texts; put a single one into a list: [{prompts!r}]")
    if not isinstance(prompts, Iterable):
        raise InputError(f"prompts is a list of texts; came {prompts!r}")
    rows = []
    for number, prompt in enumerate(prompts):
        try:
            rows.append(encode(tokenizer, prompt))
            check_ids(rows[-1], architecture.config)
        except InputError as err:
            raise InputError(f"prompt {number}: {err}") from err
    if not any(len(row) > 1 for row in rows):
        raise InputError(
            f"none of the {len(rows)} prompts has two tokens, and a single one can only see itself"
        )
    return rows


def _summarize(
    architecture: Architecture,
    rows: Sequence[Sequence[int]],
    sites: Sequence[Site],
    source: str,
    batch_size: int | None,
    show_progress: bool,
) -> HeadSummary:
    sums: list[Tensor] = []
    counts = torch.zeros(len(KINDS), dtype=torch.int64, device="cpu")
    hidden = not show_progress or not sys.stderr.isatty()
    taps = {site: architecture.tap(site) for site in sites}

    def run(group: Sequence[Sequence[int]]) -> tuple[list[Tensor], Tensor]:
        batch = _Batch.of(group)
        found = _pass(architecture, batch, taps)
        return [found[site].cpu().double() for site in sites], batch.counts

    def needs(group: Sequence[Sequence[int]]) -> str:
        return _pattern_need(architecture, sites, len(group[0]))

    with tqdm(total=len(rows), desc="heads", unit="text", disable=hidden) as bar:
        batches = _batches(rows, batch_size)
        for group, (found, counted) in in_batches(
            batches, run, unit="texts", cost=_cells, needs=needs
        ):
            sums = [a + b for a, b in zip(sums, found, strict=True)] if sums else found
            counts += counted
            bar.update(len(group))
    return HeadSummary(
        values=_means(sums, counts),
        kinds=tuple(KINDS),
        layers=tuple(site.layer for site in sites),
        queries=tuple(counts.tolist()),
        texts=len(rows),
        tokens=sum(map(len, rows)),
        source=source,
    )


def _batches(rows: Sequence[Sequence[int]], size: int | None) -> Iterator[list[Sequence[int]]]:
    """Rows of like length together, longest first: memory fails early."""
    ordered = sorted(rows, key=len, reverse=True)
    start = 0
    while start < len(ordered):
        step = size or max(1, BATCH_CELLS // len(ordered[start]) ** 2)
        yield ordered[start : start + step]
        start += step


def _pattern_need(architecture: Architecture, sites: Sequence[Site], length: int) -> str:
    """What one layer's pattern of a text takes, in words: no more than one is held at a time."""
    heads = max(architecture.heads(site.layer)[0] for site in sites)
    nbytes = heads * length**2 * next(architecture.model.parameters()).element_size()
    free = in_words(free_bytes(architecture.input_device))
    return (
        f"a layer's pattern of {length} tokens takes {in_words(nbytes)}, about twice that while it "
        f"is computed, and {free} are free"
    )


def _cells(group: Sequence[Sequence[int]]) -> int:
    return len(group) * len(group[0]) ** 2


def _means(sums: Sequence[Tensor], counts: Tensor) -> np.ndarray:
    """``[kind, layer, head]`` out of ``[kind, head]`` per layer; NaN where there is no head."""
    heads = max(each.shape[1] for each in sums)
    table = np.full((len(KINDS), len(sums), heads), np.nan)
    with np.errstate(invalid="ignore", divide="ignore"):
        for row, each in enumerate(sums):
            over = exact(counts)[:, None].expand_as(each).clone()
            kinds = list(KINDS)
            attended = counts[kinds.index("no_token")] - each[kinds.index("no_token")]
            over[kinds.index("distance")] = attended
            table[:, row, : each.shape[1]] = each.numpy() / over.numpy()
    return table


# --- One pass -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Batch:
    """Texts of one pass, padded on the left, and which of their attention counts for what."""

    ids: Tensor
    """``[text, position]``."""
    mask: Tensor
    """The same, 0 at padding."""
    counted: Tensor
    """The same, boolean: tokens whose row counts, all but the first of each text."""
    copies: tuple[Tensor, Tensor, Tensor]
    """Text, query and key of every earlier copy of a token."""
    followers: tuple[Tensor, Tensor, Tensor]
    """The same of the tokens after these copies, where the query is not among them."""
    counts: Tensor
    """``[kind]``: how many rows count for each."""

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]]) -> _Batch:
        """Pad texts and look for tokens that occur again."""
        ids, mask = pad_left(rows)
        real = mask.bool()
        counted = real.clone()
        counted[torch.arange(len(rows), device="cpu"), mask.argmax(dim=1)] = False
        same = (ids[:, :, None] == ids[:, None, :]).tril_(-1)
        same &= real[:, None, :]  # no padding among keys; a query has copies before it or none
        text, query, key = same.nonzero(as_tuple=True)
        earlier = key + 1 < query
        followers = (text[earlier], query[earlier], key[earlier] + 1)
        places = text * ids.shape[1] + query
        per_kind = dict.fromkeys(KINDS, int(counted.sum()))
        per_kind["duplicate_token"] = len(places.unique())
        per_kind["induction"] = len(places[earlier].unique())
        counts = torch.tensor(list(per_kind.values()), device="cpu")
        return cls(ids, mask, counted, (text, query, key), followers, counts)


def _pass(
    architecture: Architecture, batch: _Batch, taps: Mapping[Site, Tap]
) -> dict[Site, Tensor]:
    """Run the body once; the sums of each site, ``[kind, head]``, on the device of its block."""
    found: dict[Site, Tensor] = {}

    def reducing(site: Site) -> Hook:
        def reduce(pattern: Tensor) -> None:
            found[site] = _sums(pattern, batch)

        return reduce

    inputs = architecture.inputs(batch.ids, batch.mask)
    last = max(site.layer for site in taps)
    with UndoStack() as stack:
        stack.enter_context(torch.no_grad())
        evaluate(stack, architecture.model)
        pairs = [(tap, reducing(site)) for site, tap in taps.items()]
        stack.enter_context(attached(pairs, last=True))
        skip_blocks(stack, architecture, range(last + 1, architecture.n_layers))
        architecture.body(**inputs, use_cache=False)
    return found


def _sums(pattern: Tensor, batch: _Batch) -> Tensor:
    """What one pattern ``[text, head, query, key]`` adds to each score, ``[kind, head]``."""
    rounding = torch.finfo(pattern.dtype).eps / 2
    pattern = pattern.detach().float()
    length = pattern.shape[-1]
    device = pattern.device
    counted = batch.counted.to(device)[:, None]
    place = torch.arange(length, device=device, dtype=pattern.dtype)
    first = batch.mask.argmax(dim=1).to(device)
    total = pattern.sum(dim=-1)
    rest = 1 - total
    rest = torch.where(rest <= rounding, 0, rest)
    looked_back = total * place - pattern @ place
    over = partial(_over, counted=counted)
    text, query, key = (each.to(device) for each in batch.copies)
    after = [each.to(device) for each in batch.followers]
    found = {
        "previous_token": _over(pattern.diagonal(-1, dim1=2, dim2=3), counted=counted[..., 1:]),
        "duplicate_token": pattern[text, :, query, key].sum(dim=0),
        "induction": pattern[after[0], :, after[1], after[2]].sum(dim=0),
        "first_token": over(pattern[torch.arange(len(first), device=device), :, :, first]),
        "current_token": over(pattern.diagonal(dim1=2, dim2=3)),
        "no_token": over(rest),
        "entropy": over(torch.special.entr(pattern).sum(dim=-1) + torch.special.entr(rest)),
        "distance": over(looked_back),
    }
    return torch.stack([found[kind] for kind in KINDS])


def _over(values: Tensor, counted: Tensor) -> Tensor:
    """The sum of ``[text, head, query]`` over the rows that count, by head."""
    return torch.where(counted, values, 0).sum(dim=(0, 2))
