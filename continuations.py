"""Many continuations of many prompts: sampled in batches, reproducibly, and measured for fluency.

`sample_continuations` draws every continuation from random numbers of its own (by inversion: the
token at which the cumulative probability passes a uniform number), so that it is the same text
alone and in any batch, and that runs under different interventions share their random numbers:
where an intervention changes nothing, the text is the same. `continuation_nats` is the negative
log-likelihood of continuations under a model, given their prompts (the exponential of its mean per
token is the perplexity).

Both run the model as it is: open an `intervention_handler.InterventionHandler` around them, or not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from forward_pass import InputError, evaluate, record
from generation import decode_text, generation_options
from interrupts import UndoStack
from memory_limits import in_batches
from model_architecture import Architecture
from sites import check_batch_size
from tokenization import Prompt, check_ids, encode, pad_left

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_ROWS = 64
"""Continuations that are generated at a time."""

LOGIT_BYTES = 2**27
"""Bytes of float32 logits that are in memory at a time when likelihoods are measured."""


@dataclass(frozen=True)
class Continuation:
    """What followed a prompt once."""

    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    """The tokens after the prompt, up to the end-of-text token, which is included."""
    text: str
    """What these tokens add to the prompt's text, special tokens left out."""


class UniformDraw:
    """A logits processor: one token per row is left, the one that a given uniform number draws.

    Args:
        uniforms: ``[row, step]``, in [0, 1).
        prompt_columns: Tokens in the batch before the first step.
        temperature: The scores are divided by it.
        top_p: Keep the likeliest tokens up to this probability mass.
        top_k: Keep this many of the likeliest tokens; 0 keeps all.
    """

    def __init__(
        self,
        uniforms: np.ndarray,
        prompt_columns: int,
        temperature: float,
        top_p: float,
        top_k: int,
    ) -> None:
        from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        self.uniforms, self.prompt_columns = torch.from_numpy(uniforms), prompt_columns
        self.warpers: list[Callable[[Any, Any], Any]] = []
        if temperature != 1:
            self.warpers.append(TemperatureLogitsWarper(float(temperature)))
        if top_k:
            self.warpers.append(TopKLogitsWarper(top_k))
        if top_p < 1:
            self.warpers.append(TopPLogitsWarper(top_p))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores ``[row, vocab]`` with −∞ at every token but one."""
        for warp in self.warpers:
            scores = warp(input_ids, scores)
        step = input_ids.shape[1] - self.prompt_columns
        passed = scores.float().softmax(-1).cumsum(-1)
        wanted = self.uniforms[:, step : step + 1].to(passed) * passed[:, -1:]
        last = torch.nextafter(passed[:, -1:], torch.zeros_like(wanted))
        drawn = torch.searchsorted(passed, torch.minimum(wanted, last), right=True)
        return torch.full_like(scores, -torch.inf).scatter(1, drawn, 0.0)


def sample_continuations(
    architecture: Architecture,
    tokenizer: PreTrainedTokenizerBase | None,
    prompts: Sequence[Prompt],
    n_samples: int = 1,
    *,
    max_new_tokens: int = 30,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    batch_size: int = DEFAULT_ROWS,
) -> list[Continuation]:
    """Continue every prompt several times.

    Args:
        architecture: The model, with a head.
        tokenizer: For prompts and texts.
        prompts: Texts, chats or lists of token ids.
        n_samples: Continuations per prompt.
        max_new_tokens: How many tokens to add at most.
        temperature: 0 takes the likeliest token each time.
        top_p: Keep the likeliest tokens up to this probability mass.
        top_k: Keep this many of the likeliest tokens; 0 keeps all.
        seed: Of the random numbers; the global random state is neither read nor changed.
        batch_size: Continuations per batch; the texts do not depend on it.

    Returns:
        ``n_samples`` for the first prompt, then for the second, and so on.

    Raises:
        InputError: there is no prompt, one cannot be used, or an argument is out of range.
        ArchitectureError: the model has no head.
    """
    if isinstance(prompts, str) or not len(prompts):
        raise InputError(f"prompts is a list of at least one prompt; came {prompts!r}")
    if n_samples < 1:
        raise InputError(f"n_samples must be at least 1; came {n_samples}")
    check_batch_size(batch_size)
    rows = [ids for prompt in prompts for ids in [encode(tokenizer, prompt)] * n_samples]
    for ids in rows[::n_samples]:
        check_ids(ids, architecture.config, extra=max_new_tokens)
    uniforms = np.random.default_rng(seed).random((len(rows), max(max_new_tokens, 1)))
    order = sorted(range(len(rows)), key=lambda row: -len(rows[row]))
    done: dict[int, list[int]] = {}
    sampling = (temperature, top_p, top_k)

    def run(chosen: Sequence[int]) -> list[list[int]]:
        batch, draws = [rows[row] for row in chosen], uniforms[list(chosen)]
        return _generate(architecture, tokenizer, batch, max_new_tokens, draws, sampling)

    for chosen, new in in_batches(_cut(order, batch_size), run, unit="continuations"):
        done.update(zip(chosen, new, strict=True))
    return [
        Continuation(tuple(ids), tuple(done[row]), _new_text(tokenizer, ids, done[row]))
        for row, ids in enumerate(rows)
    ]


def _cut(order: list[int], size: int) -> Iterator[list[int]]:
    return (order[start : start + size] for start in range(0, len(order), size))


def _generate(
    architecture: Architecture,
    tokenizer: PreTrainedTokenizerBase | None,
    batch: list[list[int]],
    max_new_tokens: int,
    uniforms: np.ndarray,
    sampling: tuple[float, float, int],
) -> list[list[int]]:
    """The new tokens of each row of a batch, longest prompt first."""
    # checks temperature, top_p and top_k; the processor draws, so that to `generate` it is greedy
    generation_options(architecture, tokenizer, batch[0], max_new_tokens, *sampling, {})
    drawn = [UniformDraw(uniforms, len(batch[0]), *sampling)] if sampling[0] > 0 else []
    given = {"logits_processor": drawn, "disable_compile": True}  # compiled code runs no hooks
    options = generation_options(
        architecture, tokenizer, batch[0], max_new_tokens, 0.0, 1.0, 50, given
    )
    model: Any = architecture.model
    own = model.generation_config
    if own.max_new_tokens is None:
        options["max_length"] = len(batch[0]) + max_new_tokens
    ids, mask = pad_left(batch, options.get("pad_token_id") or own.pad_token_id or 0)
    device = architecture.input_device
    with UndoStack() as stack:
        evaluate(stack, model)
        made = model.generate(ids.to(device), attention_mask=mask.to(device), **options)
    end = own.eos_token_id
    ends = {end} if isinstance(end, int) else set(end or ())
    new = made.sequences[:, ids.shape[1] :].tolist()
    return [_until(row, ends) for row in new]


def _until(ids: list[int], ends: set[int]) -> list[int]:
    """Up to the first end-of-text token, which is kept."""
    stop = next((place for place, token in enumerate(ids) if token in ends), len(ids))
    return ids[: stop + 1]


def _new_text(
    tokenizer: PreTrainedTokenizerBase | None, prompt: Sequence[int], new: Sequence[int]
) -> str:
    """What new tokens add to a text: decoded alone they may lose their leading space."""
    before, whole = (decode_text(tokenizer, ids) for ids in (list(prompt), [*prompt, *new]))
    return whole[len(before) :] if whole.startswith(before) else decode_text(tokenizer, list(new))


# --- Fluency --------------------------------------------------------------------------------------


def continuation_nats(
    architecture: Architecture, continuations: Sequence[Continuation]
) -> np.ndarray:
    """Negative log-likelihood of each continuation given its prompt, in nats.

    Args:
        architecture: The model that judges, as it is when this is called.
        continuations: What it judges; the prompts' own tokens are not counted.

    Returns:
        ``[continuation]``, float64, sums over the continuation's tokens; divide by their number
        (``len(continuation.ids)``) for the mean.

    Raises:
        ArchitectureError: the model has no head.
    """
    architecture.require_head("measuring fluency")
    nats = np.zeros(len(continuations))
    order = sorted(
        range(len(continuations)),
        key=lambda i: -len(continuations[i].prompt_ids) - len(continuations[i].ids),
    )
    longest = max((len(each.ids) for each in continuations), default=1)
    rows = max(LOGIT_BYTES // (4 * longest * architecture.config.vocab_size), 1)

    def run(chosen: Sequence[int]) -> np.ndarray:
        return _nats(architecture, [continuations[i] for i in chosen])

    for chosen, found in in_batches(_cut(order, rows), run, unit="continuations"):
        nats[list(chosen)] = found
    return nats


def _nats(architecture: Architecture, batch: Sequence[Continuation]) -> np.ndarray:
    ids, mask = pad_left([[*each.prompt_ids, *each.ids] for each in batch])
    columns = max(len(each.ids) for each in batch)
    predicting = torch.arange(ids.shape[1] - columns - 1, ids.shape[1] - 1, device="cpu")
    inputs = architecture.inputs(ids, mask)
    places = predicting.to(architecture.stream_device)
    logits = record(architecture, inputs, [], positions=places, logits=True).logits
    assert logits is not None
    targets = ids[:, -columns:].to(logits.device)
    chosen = logits.float().log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    counted = (
        torch.arange(columns, device="cpu")[None]
        >= columns - torch.tensor([len(each.ids) for each in batch], device="cpu")[:, None]
    )
    return 0.0 - (chosen.cpu().double() * counted).sum(1).numpy()
