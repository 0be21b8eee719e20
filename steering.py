"""Steering: text generated, or any pass run, while directions act on the residual stream.

    vector = create_steering_vector(model, tokenizer, ["I am happy"], ["I am sad"], "h.6")
    text = steer_generation(model, tokenizer, "Today I feel", vector, "h.6", coefficient=2.0)

    with steer(model, directions, coefficient=1.5):          # one or many layers
        model(**inputs)                                       # or model.generate(...)

- `create_steering_vector` finds a direction as a tensor (`direction_finding` has the methods, and
  directions that know their place).
- `steer` makes the context in which directions act; `steer_generation` generates text in it.
- `generate_with_steering` does both: contrastive examples in, steered text out.

What can be done along a direction (add, subtract, ablate, clamp, rotate) is in `steering_vector`,
which tokens are meant in `pass_positions`.

References: Turner et al. (2023), Activation Addition; Rimsky et al. (2024), Steering Llama 2 via
Contrastive Activation Addition; Zou et al. (2023), Representation Engineering; Arditi et al.
(2024), Refusal in language models is mediated by a single direction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from direction_finding import Method, find_direction, find_directions
from forward_pass import InputError
from generation import generate_text
from intervention_handler import InterventionHandler, refuse_chunks
from model_architecture import Architecture, Layer
from module_devices import as_tensor, compute_device
from pass_positions import PassPositions
from steering_direction import Direction, by_layer
from steering_vector import SteeringVector
from tokenization import Positions, Prompt, check_ids, encode

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Steerable = Direction | Mapping[int, Direction] | Tensor | np.ndarray
"""A direction, several by layer, or a bare vector ``[d_model]`` (which needs to be told where)."""


def create_steering_vector(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    positive_prompts: Sequence[Prompt],
    negative_prompts: Sequence[Prompt],
    layer_name: Layer,
    normalize: bool = False,
    *,
    method: str | Method = "mean",
    read: Positions = "last",
    site: str = "resid_post",
) -> Tensor:
    """The mean activation of positive prompts minus that of negative ones, at the last token.

    Args:
        model: The model; it needs no head.
        tokenizer: For text and chats.
        positive_prompts: Texts, chats or lists of token ids, at least one.
        negative_prompts: The same; the numbers may differ.
        layer_name: The block after which it is read, in any spelling.
        normalize: Scale to length 1.
        method: How the examples become a direction; see `direction_finding.METHODS`.
        read: Which token, or ``"mean"``; see `direction_finding.read_examples`.
        site: A site that holds one vector per token.

    Returns:
        ``[d_model]``, float32, where that block computes.

    Raises:
        InputError: a list is empty or no list, a prompt or position cannot be used, or the prompts
            do not differ where they are read.
        LayerError: there is no such layer.
        SiteError: the model has no such site.
    """
    found = find_direction(
        model,
        tokenizer,
        positive_prompts,
        negative_prompts,
        layer_name,
        method=method,
        read=read,
        site=site,
        normalize=normalize,
    )
    return found.vector.to(_device(Architecture(model), found.layer))


def _device(architecture: Architecture, layer: int) -> torch.device:
    """Where a block computes."""
    return compute_device(architecture.blocks[layer])


def steer(
    model: PreTrainedModel,
    directions: Steerable,
    layers: Layer | Sequence[Layer] | None = None,
    coefficient: float = 1.0,
    *,
    positions: PassPositions = None,
    operation: str = "add",
    keep_norm: bool = False,
    site: str | None = None,
) -> InterventionHandler:
    """A context in which directions act on every pass of the model, also inside ``generate``.

    Args:
        model: The model that will be called.
        directions: A `Direction`, ``{layer: Direction}``, or a vector ``[d_model]``.
        layers: Where it acts, one or many. None means each direction's own layer; a bare vector
            needs it; of several directions it chooses some.
        coefficient: How strongly; what it means depends on the operation.
        positions: Which tokens: None (all), ``"prompt"``, ``"generated"``, indices; see
            `pass_positions`.
        operation: ``add``, ``subtract``, ``ablate``, ``clamp`` or ``rotate``; see
            `steering_vector`.
        keep_norm: Scale each token's activation back to the norm that it had.
        site: Where in the block; None means the direction's own site, or ``resid_post``.

    Returns:
        The handler, closed: use it in a ``with``. More can be registered on it.

    Raises:
        InputError: the directions are of no known kind, a bare vector comes without a layer, a
            vector does not fit the model, or an option is of no known kind.
        LayerError: there is no such layer, or no direction of that layer.
        SiteError: the model has no such site.
    """
    handler = InterventionHandler(model)
    architecture = handler.architecture
    for layer, found, own_site in _places(architecture, directions, layers):
        vector = as_tensor(found).to(_device(architecture, layer))
        steering = SteeringVector(
            vector, layer, coefficient, positions, operation, keep_norm, site or own_site
        )
        handler.register_steering_vector(steering)
    return handler


def _places(
    architecture: Architecture, directions: Any, layers: Layer | Sequence[Layer] | None
) -> list[tuple[int, Any, str]]:
    """Layer, vector and site of each intervention."""
    asked = _resolved(architecture, layers)
    if isinstance(directions, Tensor | np.ndarray):
        if asked is None:
            raise InputError("a bare vector belongs to no layer: give layers=, or a Direction")
        return [(layer, directions, "resid_post") for layer in asked]
    found = by_layer(directions)
    if isinstance(directions, Direction):
        one = directions
        asked = [architecture.resolve(one.layer)] if asked is None else asked
        return [(layer, one.vector, one.site) for layer in asked]
    chosen = list(found) if asked is None else asked
    missing = [layer for layer in chosen if layer not in found]
    if missing:
        raise InputError(
            f"there is no direction of layer {missing[0]}; there are some of "
            f"{', '.join(map(str, found))}"
        )
    return [(architecture.resolve(n), found[n].vector, found[n].site) for n in chosen]


def _resolved(
    architecture: Architecture, layers: Layer | Sequence[Layer] | None
) -> list[int] | None:
    if layers is None:
        return None
    several = isinstance(layers, Sequence | np.ndarray) and not isinstance(layers, str)
    asked: Any = layers if several else [layers]
    found = [architecture.resolve(layer) for layer in asked]
    if not found or len(set(found)) != len(found):
        raise InputError(f"layers must name at least one layer, each once; came {layers!r}")
    return found


def steer_generation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: Prompt,
    steering_vector: Steerable,
    layer_name: Layer | Sequence[Layer] | None,
    coefficient: float = 1.0,
    max_length: int = 50,
    positions: PassPositions = None,
    *,
    max_new_tokens: int | None = None,
    operation: str = "add",
    keep_norm: bool = False,
    **generation_kwargs: Any,
) -> str:
    """Continue a prompt while a vector acts on the residual stream.

    Args:
        model: The model, with a head.
        tokenizer: For the prompt and the result.
        prompt: Text, a chat, or token ids.
        steering_vector: ``[d_model]``, a `Direction`, or ``{layer: Direction}``.
        layer_name: The block after which it acts, or several; None where the directions say it.
        coefficient: How strongly; negative turns the effect round.
        max_length: Tokens of the whole text, the prompt's included, as in Hugging Face. Not
            looked at where ``max_new_tokens`` is given.
        positions: Which tokens are steered: None (all, prompt and generated), ``"prompt"``,
            ``"generated"``, ``"last"`` (of the prompt), or indices.
        max_new_tokens: How many tokens to add at most.
        operation: See `steer`.
        keep_norm: See `steer`.
        **generation_kwargs: ``temperature``, ``top_p``, ``top_k``, ``seed`` as in
            `generation.generate_text` (greedy by default), the rest for ``model.generate``.

    Returns:
        The prompt and its continuation, special tokens left out.

    Raises:
        InputError: the vector, the prompt or an argument cannot be used; the prompt alone is as
            long as ``max_length``; or no token was steered.
        LayerError: there is no such layer.
        ArchitectureError: the model has no head.
    """
    ids = encode(tokenizer, prompt)
    if max_new_tokens is None:
        max_new_tokens = max_length - len(ids)
        if max_new_tokens < 1:
            raise InputError(
                f"max_length={max_length} counts the prompt's {len(ids)} tokens and leaves none to "
                "generate: give max_new_tokens="
            )
    check_ids(ids, Architecture(model).config, extra=max_new_tokens)
    refuse_chunks(generation_kwargs)
    _refuse_second_prompt(positions, generation_kwargs)
    handler = steer(
        model,
        steering_vector,
        layer_name,
        coefficient,
        positions=positions,
        operation=operation,
        keep_norm=keep_norm,
    )
    compiled = {"disable_compile": True}  # compiled code would not run the hooks
    with handler:
        return generate_text(
            handler.architecture, tokenizer, ids, max_new_tokens, **(compiled | generation_kwargs)
        )


def _refuse_second_prompt(positions: PassPositions, generation_kwargs: Mapping[str, Any]) -> None:
    """Classifier-free guidance runs a second prompt in turn with the first."""
    scale = generation_kwargs.get("guidance_scale")
    if scale not in (None, 1) and positions is not None:
        raise InputError(
            f"guidance_scale={scale} runs two prompts in turn, so that positions={positions!r} is "
            "not clear: steer all tokens (positions=None)"
        )


def generate_with_steering(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: Prompt,
    positive_examples: Sequence[Prompt],
    negative_examples: Sequence[Prompt],
    layer_name: Layer | Sequence[Layer] | None = None,
    coefficient: float = 2.0,
    max_new_tokens: int = 50,
    *,
    method: str | Method = "mean",
    read: Positions = "last",
    normalize: bool = False,
    positions: PassPositions = None,
    operation: str = "add",
    keep_norm: bool = False,
    **generation_kwargs: Any,
) -> str:
    """Continue a prompt, steered from what the negative examples are to what the positive ones are.

    Args:
        model: The model, with a head.
        tokenizer: For the prompt and the result.
        prompt: Text, a chat, or token ids.
        positive_examples: Prompts (texts, chats or token ids) that have what is wanted.
        negative_examples: The same without it, or with its opposite.
        layer_name: The block where the examples are read and the prompt is steered, or several;
            None means the middle one, ``n_layers // 2``.
        coefficient: Multiples of the difference; negative steers towards the negative examples.
        max_new_tokens: How many tokens to add at most.
        method: How the examples become a direction; see `direction_finding.METHODS`.
        read: Where the examples are read; see `direction_finding.read_examples`.
        normalize: Scale the direction to length 1.
        positions: Which tokens are steered; see `steer_generation`.
        operation: See `steer`.
        keep_norm: See `steer`; it makes strong steering a little weaker and more fluent.
        **generation_kwargs: See `steer_generation`.

    Returns:
        The prompt and its continuation, special tokens left out.

    Raises:
        InputError: examples, prompt or an argument cannot be used; see `find_directions` and
            `steer_generation`.
        LayerError: there is no such layer.
        ArchitectureError: the model has no head.
    """
    architecture = Architecture(model)
    check_ids(encode(tokenizer, prompt), architecture.config, extra=max_new_tokens)
    layers = architecture.n_layers // 2 if layer_name is None else layer_name
    directions = find_directions(
        model,
        tokenizer,
        positive_examples,
        negative_examples,
        layers,
        method=method,
        read=read,
        normalize=normalize,
    )
    return steer_generation(
        model,
        tokenizer,
        prompt,
        directions,
        None,
        coefficient,
        positions=positions,
        max_new_tokens=max_new_tokens,
        operation=operation,
        keep_norm=keep_norm,
        **generation_kwargs,
    )
