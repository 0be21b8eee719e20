"""Generating text, and recording activations while it is generated.

Sampling is off unless a temperature above 0 is given. A recorded generation keeps each token's
activations from the very step that computed them; the last token, which no step has read, is read
by one more decode step on the same cache, so that the record equals one forward pass over the text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from torch import Tensor

from activation_extraction import Request, assemble_record, make_manifest, make_request
from activation_record import ActivationRecord
from forward_pass import InputError, Site, edit, evaluate
from interrupts import UndoStack
from model_architecture import Architecture
from module_devices import compute_devices
from tokenization import Prompt, as_ids, check_ids, encode

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase


def generate(
    architecture: Architecture,
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: Prompt,
    return_activations: bool = False,
    **options: Any,
) -> str | tuple[str, ActivationRecord]:
    """Continue a prompt; with ``return_activations`` every block's output comes beside the text.

    Args:
        architecture: The model, with a head.
        tokenizer: For the prompt and the result.
        prompt: Text, a chat, or token ids.
        return_activations: Return the pair `generate_with_activations` returns.
        **options: As in `generate_text`.

    Raises:
        InputError: the prompt or an option cannot be used.
        ArchitectureError: the model has no head.
    """
    if not return_activations:
        return generate_text(architecture, tokenizer, prompt, **options)
    return generate_with_activations(
        architecture, tokenizer, prompt, make_request(architecture), **options
    )


def generate_text(
    architecture: Architecture,
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: Prompt,
    max_new_tokens: int = 50,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 50,
    seed: int | None = None,
    **generation_kwargs: Any,
) -> str:
    """Continue a prompt.

    Args:
        architecture: The model, with a head.
        tokenizer: For the prompt and the result.
        prompt: Text, a chat, or token ids.
        max_new_tokens: How many tokens to add at most.
        temperature: 0 takes the likeliest token each time; above 0 samples.
        top_p: When sampling, keep the likeliest tokens up to this probability mass.
        top_k: When sampling, keep this many of the likeliest tokens.
        seed: Makes sampling reproducible; the global random state is left as it was.
        **generation_kwargs: For ``model.generate``.

    Returns:
        The prompt and its continuation, special tokens left out.

    Raises:
        InputError: the prompt is empty or too long, or an argument is out of range.
        ArchitectureError: the model has no head.
    """
    arguments = (max_new_tokens, temperature, top_p, top_k, seed)
    ids = generate_ids(architecture, tokenizer, prompt, *arguments, **generation_kwargs)
    return decode_text(tokenizer, torch.tensor(ids, device="cpu"))


def generate_ids(
    architecture: Architecture,
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: Prompt,
    max_new_tokens: int = 50,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 50,
    seed: int | None = None,
    **generation_kwargs: Any,
) -> list[int]:
    """Token ids of a prompt and its continuation; arguments and errors as in `generate_text`."""
    ids = encode(tokenizer, prompt)
    options = generation_options(
        architecture, tokenizer, ids, max_new_tokens, temperature, top_p, top_k, generation_kwargs
    )
    with seeded(architecture, seed):
        output = run_generate(architecture, ids, options)
    return output.sequences[0].tolist()


def generate_with_activations(
    architecture: Architecture,
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: Prompt,
    request: Request,
    max_new_tokens: int = 50,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 50,
    seed: int | None = None,
    **generation_kwargs: Any,
) -> tuple[str, ActivationRecord]:
    """Continue a prompt and keep the activations of prompt and continuation, as they were computed.

    Args:
        architecture: The model, with a head.
        tokenizer: For the prompt and the result.
        prompt: Text, a chat, or token ids.
        request: What to keep (`activation_extraction.make_request`); no patterns and no logits.
        max_new_tokens: How many tokens to add at most.
        temperature: See `generate_text`.
        top_p: See `generate_text`.
        top_k: See `generate_text`.
        seed: See `generate_text`.
        **generation_kwargs: For ``model.generate``; ``use_cache=False`` works too.

    Returns:
        The text, and one record over all its tokens (the prompt's first); its metadata hold
        ``prompt_length``.

    Raises:
        InputError: several sequences are asked for (beams), or the prompt cannot be used.
        ArchitectureError: the model has no head.
    """
    if any(site.name == "attn_pattern" for site in request.sites) or request.logits:
        raise InputError(
            "attention patterns and logits are not recorded while generating; "
            "extract them from the text"
        )
    ids = encode(tokenizer, prompt)
    options = generation_options(
        architecture, tokenizer, ids, max_new_tokens, temperature, top_p, top_k, generation_kwargs
    )
    _require_one_sequence(architecture, options)
    options["disable_compile"] = True  # compiled code would not run the hooks
    kept: dict[Site, list[Tensor]] = {site: [] for site in request.sites}
    with UndoStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(_recording_steps(architecture, kept))
        evaluate(stack, architecture.model)
        with seeded(architecture, seed):
            output = run_generate(architecture, ids, options)
        _read_last_token(architecture, output, output.sequences)
    sequence = output.sequences[0].tolist()
    text = decode_text(tokenizer, output.sequences[0])
    tensors = {site: torch.cat(parts, dim=1) for site, parts in kept.items()}
    manifest = {**make_manifest(architecture), "prompt_length": len(ids)}
    positions = range(len(sequence))
    record = assemble_record(
        architecture, tokenizer, text, sequence, positions, tensors, None, manifest
    )
    return text, record


_ONE_SEQUENCE: dict[str, Any] = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "guidance_scale": 1,
    "penalty_alpha": 0,
    "use_mtp": False,
    "assistant_model": None,
    "assistant_early_exit": None,
    "prompt_lookup_num_tokens": None,
    "dola_layers": None,
    "custom_generate": None,
    "constraints": None,
    "force_words_ids": None,
}
"""Options of ``model.generate``, and what they are where every pass appends to one sequence."""


def _require_one_sequence(architecture: Architecture, options: Mapping[str, Any]) -> None:
    """Refuse beams, drafts and the like: their passes do not simply append to one sequence."""
    own = architecture.model.generation_config
    for name, plain in _ONE_SEQUENCE.items():
        value = options.get(name, getattr(own, name, None))
        if value is not None and value != plain:
            raise InputError(
                f"return_activations=True records one sequence as it grows, which {name}={value!r} "
                "does not leave alone"
            )


@contextmanager
def _recording_steps(architecture: Architecture, kept: dict[Site, list[Tensor]]) -> Iterator[None]:
    """While open, append to ``kept`` what each pass computes for tokens not seen before."""
    clocks: list[Any] = []

    def keep(site: Site) -> Any:
        def hook(value: Tensor) -> None:
            clock, parts = clocks[0], kept[site]
            end = clock.offset + clock.length
            new = end - sum(part.shape[1] for part in parts)
            # key and value of a cached step hold what the cache holds: all positions up to `end`,
            # only the latest (a sliding window), or places for later ones too (a static cache)
            stop = min(end, value.shape[1])
            if new > 0:
                parts.append(value[:, stop - new : stop].detach().clone())

        return hook

    with edit(architecture, [(site, keep(site)) for site in kept]) as clock:
        clocks.append(clock)
        yield


def _read_last_token(architecture: Architecture, output: Any, sequences: Tensor) -> None:
    """One more decode step, for the token that generation ended with: no step has read it."""
    cache = getattr(output, "past_key_values", None)
    full = isinstance(cache, transformers.StaticCache)
    if cache is None or full:
        architecture.body(input_ids=sequences, use_cache=False)
        return
    parameters = architecture.forward_parameters
    inputs: dict[str, Any] = {"input_ids": sequences[:, -1:]}
    if "cache_params" in parameters:  # state-space models, whose mask is only for padding
        inputs["cache_params"] = cache
    else:
        inputs.update(past_key_values=cache, attention_mask=torch.ones_like(sequences))
    if "position_ids" in parameters:
        inputs["position_ids"] = torch.full_like(sequences[:, -1:], sequences.shape[1] - 1)
    architecture.body(**inputs, use_cache=True)


def generation_options(
    architecture: Architecture,
    tokenizer: PreTrainedTokenizerBase | None,
    ids: Sequence[int],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    generation_kwargs: Mapping[str, Any],
) -> dict[str, Any]:
    """Arguments for ``model.generate``, checked; the model's own generation config is not changed.

    Raises:
        InputError: an argument is out of range, or the text would outgrow the context.
        ArchitectureError: the model has no head.
    """
    architecture.require_head("generating text")
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be at least 1; came {max_new_tokens}")
    sample = _checked_sampling(temperature, top_p, top_k, generation_kwargs)
    check_ids(ids, architecture.config, extra=max_new_tokens)
    given = dict(generation_kwargs)
    config = given.pop("generation_config", None)
    if config is not None:
        of_config = {k: v for k, v in config.to_diff_dict().items() if k not in _DECIDED_HERE}
        given = {**of_config, **given}
    own: GenerationConfig = architecture.model.generation_config
    # Hugging Face takes what is not given from the model's own config, and warns of two lengths
    if own.max_new_tokens is None:
        given["max_length"] = len(ids) + max_new_tokens
    else:
        given["max_new_tokens"] = max_new_tokens
    if sample:
        given.update(temperature=temperature, top_p=top_p, top_k=top_k)
    if given.get("pad_token_id", own.pad_token_id) is None:
        given["pad_token_id"] = _pad_id(own, tokenizer)
    if given.get("stop_strings", own.stop_strings) is not None:
        given.setdefault("tokenizer", tokenizer)
    return {**given, "do_sample": sample, "return_dict_in_generate": True}


_DECIDED_HERE = {"max_length", "max_new_tokens", "do_sample", "temperature", "top_p", "top_k"}
_DECIDED_HERE |= {"transformers_version"}
"""Of a generation config handed over, what the arguments of `generate_text` say instead."""


def _checked_sampling(
    temperature: float, top_p: float, top_k: int, generation_kwargs: Mapping[str, Any]
) -> bool:
    """Whether to sample: where the temperature is above 0."""
    if not 0 <= temperature < float("inf"):
        raise InputError(f"temperature must be 0 (greedy) or above; came {temperature}")
    if not 0 < top_p <= 1:
        raise InputError(f"top_p must lie in (0, 1]; came {top_p}")
    if top_k < 0:
        raise InputError(f"top_k must be 0 (all tokens) or above; came {top_k}")
    sample = temperature > 0
    if generation_kwargs.get("do_sample") not in (None, sample):
        raise InputError(
            f"do_sample={not sample} contradicts temperature={temperature}: the temperature "
            "decides, 0 is greedy, above 0 samples"
        )
    if generation_kwargs.get("max_length") is not None:
        raise InputError("give max_new_tokens, which does not count the prompt, not max_length")
    return sample


def _pad_id(config: GenerationConfig, tokenizer: PreTrainedTokenizerBase | None) -> int:
    """Any token will do for a single row; the usual choice is the end-of-text token."""
    end = config.eos_token_id
    end = end[0] if isinstance(end, list) and end else end
    own = None if tokenizer is None else tokenizer.pad_token_id
    return next((int(token) for token in (own, end) if isinstance(token, int)), 0)


def run_generate(architecture: Architecture, ids: Sequence[int], options: Mapping[str, Any]) -> Any:
    """Call ``model.generate`` for one prompt; its output has ``sequences [row, position]``."""
    model: Any = architecture.model
    input_ids = torch.tensor([list(ids)], device=architecture.input_device)
    with UndoStack() as stack:
        evaluate(stack, model)
        return model.generate(input_ids, attention_mask=torch.ones_like(input_ids), **options)


@contextmanager
def seeded(architecture: Architecture, seed: int | None) -> Iterator[None]:
    """Draw from ``seed`` inside, with the random state put back after; None draws as always."""
    if seed is None:
        yield
        return
    places = compute_devices(architecture.model)
    cuda = [place.index for place in places if place.type == "cuda"]
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(seed)
        for index in cuda:
            with torch.cuda.device(index):
                torch.cuda.manual_seed(seed)
        if not any(place.type == "mps" for place in places):
            yield
            return
        before = torch.mps.get_rng_state()  # fork_rng does not know it
        torch.mps.manual_seed(seed)
        try:
            yield
        finally:
            torch.mps.set_rng_state(before)


def decode_text(
    tokenizer: PreTrainedTokenizerBase | None, ids: Sequence[int] | Tensor | np.ndarray
) -> str:
    """Token ids as text without special tokens; without a tokenizer, the ids themselves.

    Raises:
        InputError: they are no ids of one text.
    """
    numbers = as_ids(ids)
    if tokenizer is None:
        return " ".join(map(str, numbers))
    wrong = [token for token in numbers if not 0 <= token < 2**32]
    if wrong:
        raise InputError(f"token ids are 0 or above; came {wrong[0]}")
    return str(tokenizer.decode(numbers, skip_special_tokens=True))
