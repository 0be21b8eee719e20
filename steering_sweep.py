"""Which layer and coefficient steer: effect against fluency, over sampled continuations.

1. A direction is found at every layer (`direction_finding`), or given.
2. Neutral prompts are continued at every layer and coefficient; every cell draws from the same
   random numbers, so that two cells differ by the steering alone. Coefficient 0 is the unsteered
   model and is run once.
3. *Effect*: a score of each continuation, or the share of positive words among the words of two
   lists. *Fluency*: the perplexity of the continuations under the unsteered model, given their
   prompts; unsteered text has the model's own.

The result, `steering_effects.SteeringSweep`, finds the best cell.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from continuations import DEFAULT_ROWS, Continuation, continuation_nats, sample_continuations
from direction_finding import Method, check_examples, find_directions
from forward_pass import InputError
from generation import decode_text
from model_architecture import Architecture, Layer
from pass_positions import PassPositions
from steering import steer
from steering_direction import Direction, by_layer
from steering_effects import SteeringCell, SteeringSweep, WordBalance
from tokenization import Positions, Prompt, check_ids, encode

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["SteeringCell", "SteeringSweep", "WordBalance", "steering_sweep", "sweep_directions"]

COEFFICIENTS = (-2.0, -1.0, 0.0, 1.0, 2.0)
"""Those that are tried where none are given."""

Score = Callable[[str], float]
"""A continuation's text → how much of the effect it shows; NaN where it does not say."""


def steering_sweep(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prompts: Sequence[Prompt],
    positive_prompts: Sequence[Prompt],
    negative_prompts: Sequence[Prompt],
    layers: Layer | Sequence[Layer] | None = None,
    coefficients: Sequence[float] = COEFFICIENTS,
    *,
    method: str | Method = "mean",
    read: Positions = "last",
    normalize: bool = False,
    **options: Any,
) -> SteeringSweep:
    """Find a direction at each layer, steer by it, and measure effect and fluency.

    Args:
        model: The model, with a head.
        tokenizer: For prompts and texts.
        prompts: What is continued: neutral ones, and none of the examples.
        positive_prompts: Examples of what is wanted; see `direction_finding.find_directions`.
        negative_prompts: Examples of the opposite.
        layers: Blocks in any spelling; None means all.
        coefficients: See `sweep_directions`.
        method: See `direction_finding.find_directions`.
        read: See `direction_finding.find_directions`.
        normalize: See `direction_finding.find_directions`.
        **options: See `sweep_directions`; ``score``, or ``positive_words`` and ``negative_words``,
            must be among them.

    Returns:
        The sweep.

    Raises:
        InputError: the examples or an option cannot be used.
        LayerError: there is no such layer.
        ArchitectureError: the model has no head.
    """
    _measure(options.get("score"), *(options.get(name, ()) for name in _WORD_LISTS))
    _rows(Architecture(model), tokenizer, prompts, options.get("max_new_tokens", NEW_TOKENS))
    directions = find_directions(
        model,
        tokenizer,
        positive_prompts,
        negative_prompts,
        layers,
        method=method,
        read=read,
        normalize=normalize,
    )
    return sweep_directions(model, tokenizer, prompts, directions, coefficients, **options)


def _rows(
    architecture: Architecture, tokenizer: Any, prompts: Sequence[Prompt], max_new_tokens: int
) -> list[list[int]]:
    """Token ids of each prompt, checked before anything runs."""
    check_examples(prompts, "prompts")
    rows = [encode(tokenizer, prompt) for prompt in prompts]
    for ids in rows:
        check_ids(ids, architecture.config, extra=max_new_tokens)
    return rows


NEW_TOKENS = 25
"""Tokens of a continuation, where nothing else is said."""

_WORD_LISTS = ("positive_words", "negative_words")


def sweep_directions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prompts: Sequence[Prompt],
    directions: Direction | Mapping[int, Direction],
    coefficients: Sequence[float] = COEFFICIENTS,
    *,
    score: Score | None = None,
    positive_words: Collection[str] = (),
    negative_words: Collection[str] = (),
    effect_name: str | None = None,
    n_samples: int = 8,
    max_new_tokens: int = NEW_TOKENS,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    positions: PassPositions = None,
    operation: str = "add",
    keep_norm: bool = False,
    seed: int = 0,
    batch_size: int = DEFAULT_ROWS,
    show_progress: bool = True,
) -> SteeringSweep:
    """Steer by each direction alone, with each coefficient, and measure effect and fluency.

    Args:
        model: The model, with a head.
        tokenizer: For prompts and texts.
        prompts: What is continued.
        directions: One, or several by layer.
        coefficients: Strengths; 0 is added to them.
        score: A function of a continuation's text, mean over continuations; or
        positive_words: with ``negative_words``: the share of these among the words counted.
        negative_words: See ``positive_words``.
        effect_name: What the effect is called; None means the score's name, or what is counted.
        n_samples: Continuations per prompt.
        max_new_tokens: See `continuations.sample_continuations`.
        temperature: See `continuations.sample_continuations`.
        top_p: See `continuations.sample_continuations`.
        top_k: See `continuations.sample_continuations`.
        positions: Which tokens are steered; see `steering.steer`.
        operation: See `steering.steer`. Only what does nothing at coefficient 0 can be swept, so
            not ``clamp``.
        keep_norm: See `steering.steer`.
        seed: Of the random numbers, which every cell shares.
        batch_size: See `continuations.sample_continuations`.
        show_progress: A progress bar, where there is a terminal to show it.

    Returns:
        The sweep; its cells hold ``len(prompts) × n_samples`` continuations each.

    Raises:
        InputError: there is nothing to measure, a prompt or an option cannot be used.
        LayerError: the model has no layer of a direction.
        ArchitectureError: the model has no head.
    """
    measure, name = _measure(score, positive_words, negative_words)
    if operation == "clamp":
        raise InputError("clamp acts at coefficient 0 too, so that there is no unsteered column")
    found, strengths = by_layer(directions), _strengths(coefficients)
    steering: dict[str, Any] = {
        "positions": positions,
        "operation": operation,
        "keep_norm": keep_norm,
    }
    handlers = {
        (layer, strength): steer(model, direction, coefficient=strength, **steering)
        for layer, direction in found.items()
        for strength in strengths
        if strength
    }
    architecture = Architecture(model)
    sampling: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
    }
    sampling |= {"top_k": top_k, "seed": seed, "batch_size": batch_size}
    rows = _rows(architecture, tokenizer, prompts, max_new_tokens)

    def run() -> list[Continuation]:
        return sample_continuations(architecture, tokenizer, rows, n_samples, **sampling)

    base = run()
    cells: dict[tuple[int, float], list[Continuation]] = {}
    hidden = not show_progress or not sys.stderr.isatty()
    for place, handler in tqdm(handlers.items(), desc="steer", unit="cell", disable=hidden):
        with handler:
            cells[place] = run()
    table = [[cells.get((layer, c), base) for c in strengths] for layer in found]
    about = f"{operation}, positions={positions!r}, keep_norm={keep_norm}"
    known = [decode_text(tokenizer, ids) for ids in rows for _ in range(n_samples)]
    tables = _tables(architecture, table, measure)
    return SteeringSweep(
        tuple(found),
        strengths,
        tuple(known),
        **tables,
        effect_name=effect_name or name,
        about=about,
    )


def _measure(
    score: Score | None, positive_words: Collection[str], negative_words: Collection[str]
) -> tuple[Callable[[str], tuple[float, float]], str]:
    """A text's score and weight, and what they are called."""
    if (score is None) == (not positive_words and not negative_words):
        raise InputError(
            "say what the effect is: score= (a function of a text), or positive_words= and "
            "negative_words= (two lists)"
        )
    if score is None:
        return WordBalance.of(positive_words, negative_words).measure, "share of positive words"
    function = score

    def _measured(text: str) -> tuple[float, float]:
        value = float(function(text))
        if np.isinf(value):
            raise InputError(f"the score of {text!r} is {value}; it must be a number, or NaN")
        return value, float(not np.isnan(value))

    return _measured, getattr(score, "__name__", "score").replace("_", " ").strip("<>")


def _strengths(coefficients: Sequence[float]) -> tuple[float, ...]:
    """Ascending, each once, 0 among them."""
    try:
        strengths = sorted({0.0, *map(float, coefficients)})
    except TypeError:
        raise InputError(f"coefficients is a list of numbers; came {coefficients!r}") from None
    if not np.isfinite(strengths).all() or len(strengths) < 2:
        raise InputError(f"coefficients must be finite, one of them not 0; came {coefficients!r}")
    return tuple(strengths)


def _tables(
    architecture: Architecture,
    cells: list[list[list[Continuation]]],
    measure: Callable[[str], tuple[float, float]],
) -> dict[str, np.ndarray]:
    """The arrays of a `SteeringSweep`; a text that stands in many cells is measured once."""
    unique = list(dict.fromkeys(each for row in cells for cell in row for each in cell))
    nats = dict(zip(unique, continuation_nats(architecture, unique).tolist(), strict=True))
    measured = {each: measure(each.text) for each in unique}
    shape = (len(cells), len(cells[0]), len(cells[0][0]))
    flat = [each for row in cells for cell in row for each in cell]
    texts = np.empty(len(flat), dtype=object)
    texts[:] = [each.text for each in flat]
    return {
        "scores": np.array([measured[each][0] for each in flat], dtype=float).reshape(shape),
        "weights": np.array([measured[each][1] for each in flat], dtype=float).reshape(shape),
        "nats": np.array([nats[each] for each in flat], dtype=float).reshape(shape),
        "n_tokens": np.array([len(each.ids) for each in flat]).reshape(shape),
        "texts": texts.reshape(shape),
    }
