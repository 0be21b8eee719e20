"""What a lens says of one position: of a prompt's end, of a saved record, of a generated token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from activation_record import ActivationRecord
from forward_pass import InputError, Site, record
from generation import decode_text, generate_ids
from lens_result import resolve_layers, shown_rows
from logit_lens import LogitLens
from model_architecture import Layer
from tokenization import Prompt, token_strings


def predict_last(
    lens: LogitLens,
    text: Prompt,
    layer_indices: Sequence[Layer] | None = None,
    top_k: int = 10,
    apply_ln: bool = True,
) -> dict[int, list[tuple[str, float]]]:
    """The likeliest next tokens after the last position, by layer.

    Args:
        lens: A logit lens or tuned lens.
        text: Text, a chat, or token ids.
        layer_indices: Blocks to read; None means all.
        top_k: Tokens per layer.
        apply_ln: Apply the final norm.

    Returns:
        ``{layer: [(token, probability), …]}``, best first.

    Raises:
        InputError: the text or ``top_k`` cannot be used.
        LayerError: there is no such layer.
    """
    lens.check_top_k(top_k)
    layers = resolve_layers(lens.architecture, layer_indices)
    ids = lens.encode(text)
    end = torch.tensor([len(ids) - 1], device="cpu")
    sites = [Site("resid_post", layer) for layer in layers]
    kept = record(
        lens.architecture,
        lens.architecture.inputs(torch.tensor([ids], device="cpu")),
        sites,
        positions=end,
    )
    hidden = {str(site.layer): kept[site][0] for site in sites}
    result = lens.read(
        text, ids, [len(ids) - 1], hidden, top_k=top_k, apply_ln=apply_ln, metrics=()
    )
    cells = zip(result.top_tokens[:, 0].tolist(), result.top_probs[:, 0].tolist(), strict=True)
    return {
        layer: list(zip(tokens, probabilities, strict=True))
        for layer, (tokens, probabilities) in zip(layers, cells, strict=True)
    }


def format_predictions(
    predictions: Mapping[int, Sequence[tuple[str, float]]], title: str, layer_step: int = 1
) -> str:
    """Predictions by layer as text, one line each; the last layer is always shown.

    Args:
        predictions: From `predict_last`.
        title: The first line.
        layer_step: Show every so many layers.

    Raises:
        InputError: ``layer_step`` is below 1.
    """
    layers = list(predictions)
    lines = [title]
    for index in shown_rows([str(layer) for layer in layers], layer_step):
        cells = "  ".join(f"{token!r} {share:.3f}" for token, share in predictions[layers[index]])
        lines.append(f"  layer {layers[index]:>2}  {cells}")
    return "\n".join(lines)


def print_predictions(lens: LogitLens, text: Prompt, layer_step: int = 1, top_k: int = 5) -> None:
    """Print what each layer would say next; the last layer is always shown. See `predict_last`."""
    shown_rows(("0",), layer_step)  # refuse a wrong step before the model runs
    predictions = predict_last(lens, text, top_k=top_k)
    print(format_predictions(predictions, f"Logit lens after {text!r}", layer_step))  # noqa: T201


def read_record(
    lens: LogitLens,
    record: ActivationRecord,
    layer_indices: Sequence[Layer] | None = None,
    top_k: int = 10,
    apply_ln: bool = True,
    token_position: int | None = -1,
) -> dict[str, Any]:
    """The lens on activations recorded earlier (also while generating, or loaded from a file).

    Args:
        lens: A lens of the same model.
        record: Holds ``resid_post`` of some layers and positions.
        layer_indices: Layers of the record to read; None means all that it holds.
        top_k: Tokens per layer.
        apply_ln: Apply the final norm.
        token_position: Absolute token position (negative from the end of the record's tokens);
            None means all that the record holds, and adds a position axis to the results.

    Returns:
        ``{"layers": {layer: {"top_k_tokens", "top_k_probs", "logits"}}, "metadata": {…}}``.

    Raises:
        InputError: the record does not hold that position or any layer, has no values, or comes
            from a model of another width.
        LayerError: the record does not hold that layer.
    """
    lens.check_top_k(top_k)
    held = record.layer_activations
    if not held.layers:
        raise InputError("this record holds no layer's output (resid_post)")
    layers = held.layers
    if layer_indices is not None:
        layers = resolve_layers(lens.architecture, layer_indices)
    streams = {layer: held[layer] for layer in layers}
    columns = _columns(record, token_position)
    one = token_position is not None
    table: dict[int, dict[str, Any]] = {}
    for layer, stream in streams.items():
        logits = lens.row_logits(stream[0, columns], str(layer), apply_ln)
        ids = logits.topk(top_k).indices  # of the logits: small probabilities may all be 0
        shares = logits.float().softmax(-1).gather(-1, ids)
        tokens = lens.strings(ids.cpu().numpy()).tolist()
        table[layer] = {
            "top_k_tokens": tokens[0] if one else tokens,
            "top_k_probs": shares[0].tolist() if one else shares.tolist(),
            "logits": logits[0] if one else logits,
        }
    positions = [record.positions[column] for column in columns]
    metadata = {
        **record.metadata,
        "prompt": record.prompt,
        "token_position": positions[0] if one else positions,
        "token": record.tokens[positions[0]] if one else [record.tokens[p] for p in positions],
        "apply_ln": apply_ln,
        "top_k": top_k,
    }
    return {"layers": table, "metadata": metadata}


def _columns(record: ActivationRecord, token_position: int | None) -> list[int]:
    """Where a token's activations lie on the record's position axis."""
    if token_position is None:
        return list(range(len(record.positions)))
    absolute = token_position + len(record.tokens) if token_position < 0 else token_position
    if absolute not in record.positions:
        raise InputError(
            f"token_position={token_position} is not in this record of {len(record.tokens)} "
            f"tokens; it holds {record.positions}"
        )
    return [record.positions.index(absolute)]


def analyze_generation_token(
    lens: LogitLens,
    prompt: Prompt,
    target_token: str | int | None = None,
    token_position: int | None = None,
    max_new_tokens: int = 50,
    layer_step: int = 1,
    top_k: int = 5,
    **generation_kwargs: Any,
) -> dict[str, Any]:
    """Continue a prompt, then ask every layer about one of the tokens it made.

    The layers are read at the position *before* that token: there it was predicted.

    Args:
        lens: A lens on the model that generates.
        prompt: Text, a chat, or token ids.
        target_token: Which token, by text or id: its first occurrence in the continuation. Text
            that does not occur as it is may lack its leading space.
        token_position: Which token, by absolute position in prompt and continuation (negative from
            the end). With neither, the first generated token; with both, the token at that position
            must be the target.
        max_new_tokens: How many tokens to add at most.
        layer_step: Read every so many layers; the last one always.
        top_k: Tokens per layer.
        **generation_kwargs: As in `generation.generate_text`.

    Returns:
        ``generated_text``, ``target_token`` (text), ``token_position``, ``all_tokens``, and
        ``analysis``: per layer ``top_k_tokens``, ``top_k_probs``, ``target_rank`` (0 is best) and
        ``target_prob``.

    Raises:
        InputError: the token does not occur in the continuation, or the position is out of range.
    """
    lens.check_top_k(top_k)
    wanted = None if target_token is None else _target_ids(lens, target_token)
    names = [str(layer) for layer in range(lens.architecture.n_layers)]
    rows = [names[index] for index in shown_rows(names, layer_step)]
    prompt_ids = lens.encode(prompt)
    ids = generate_ids(
        lens.architecture, lens.tokenizer, prompt_ids, max_new_tokens, **generation_kwargs
    )
    tokens = token_strings(lens.tokenizer, ids)
    if token_position is None:
        position = _first_occurrence(ids, tokens, len(prompt_ids), wanted, target_token)
    else:
        position = _checked_position(ids, tokens, token_position, wanted, target_token)
    return {
        "generated_text": decode_text(lens.tokenizer, ids),
        "target_token": tokens[position],
        "token_position": position,
        "all_tokens": tokens,
        "analysis": _analysis(lens, ids[:position], ids[position], rows, top_k),
    }


def _analysis(
    lens: LogitLens, before: Sequence[int], target: int, rows: Sequence[str], top_k: int
) -> dict[int, dict[str, Any]]:
    """What each layer says after some tokens, and how it ranks the one that came."""
    sites = [Site("resid_post", int(row)) for row in rows]
    kept = record(
        lens.architecture,
        lens.architecture.inputs(torch.tensor([before], device="cpu")),
        sites,
        positions=torch.tensor([len(before) - 1], device="cpu"),
    )
    result = lens.read(
        before, before, [len(before) - 1],
        {row: kept[site][0] for row, site in zip(rows, sites, strict=True)},
        top_k=top_k, target=target, metrics=(),
    )  # fmt: skip
    return {
        int(row): {
            "top_k_tokens": result.top_tokens[index, 0].tolist(),
            "top_k_probs": result.top_probs[index, 0].tolist(),
            "target_rank": int(result.metrics["target_rank"][index, 0]),
            "target_prob": float(result.metrics["target_prob"][index, 0]),
        }
        for index, row in enumerate(rows)
    }


def _target_ids(lens: LogitLens, target: str | int) -> list[int]:
    """The ids that a target may have: as written, then with a space before it."""
    if isinstance(target, int) or target[:1].isspace():
        return [lens.token_id(target)]
    found = []
    for written in (target, f" {target}"):
        try:
            found.append(lens.token_id(written))
        except InputError:
            continue
    return found or [lens.token_id(target)]


def _first_occurrence(
    ids: Sequence[int],
    tokens: Sequence[str],
    start: int,
    wanted: Sequence[int] | None,
    target: str | int | None,
) -> int:
    """Where in the continuation the wanted token is; its start where none is named."""
    if wanted is None:
        return start
    continuation = list(ids[start:])
    for token in wanted:
        if token in continuation:
            return start + continuation.index(token)
    raise InputError(f"{target!r} does not occur in the continuation {list(tokens[start:])}")


def _checked_position(
    ids: Sequence[int],
    tokens: Sequence[str],
    position: int,
    wanted: Sequence[int] | None,
    target: str | int | None,
) -> int:
    """The absolute position that is meant; the token there must be the wanted one."""
    absolute = position + len(ids) if position < 0 else position
    if not 1 <= absolute < len(ids):
        raise InputError(
            f"token_position={position} is out of range: prompt and continuation have "
            f"{len(ids)} tokens, and the first is predicted by nothing"
        )
    if wanted is not None and ids[absolute] not in wanted:
        raise InputError(
            f"the token at position {absolute} is {tokens[absolute]!r}, not {target!r}"
        )
    return absolute
