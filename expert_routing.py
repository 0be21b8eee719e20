"""Which experts a mixture chooses, seen and changed as a model runs.

The router of a mixture of experts is found by what it returns, never by its name: one entry for
every token and expert (its logits), the experts it chose, and the weights with which their outputs
are added. Three sites come of it, ``[batch, position, expert]`` each: ``router_logits``,
``router_probs`` (softmax or sigmoid of the logits, whichever the weights are made of) and
``expert_weights`` (0 for experts that were not chosen).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from forward_pass import (
    READ_ONLY,
    Hook,
    SiteError,
    read_input,
    read_only_message,
    replaced,
)
from module_taps import Turn, hook_in_turn

ROUTING = ("router_logits", "router_probs", "expert_weights")
"""The sites that this module serves."""

SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: torch.softmax(logits.float(), dim=-1),
    "sigmoid": lambda logits: torch.sigmoid(logits.float()),
}
"""What routers make of their logits."""


@dataclass(frozen=True)
class Routing:
    """What a router returns: which entry of its tuple is what."""

    experts: int
    weights: int
    """Weights of the chosen experts ``[token, k]``; of all ``[token, expert]``, where `chosen` is
    None.
    """
    chosen: int | None = None
    """Numbers of the chosen experts ``[token, k]``."""
    logits: int | None = None
    """``[token, expert]``."""
    scores: str | None = None
    """A key of `SCORES`: what the weights are in proportion to; None if neither."""


def find_routing(output: Any) -> Routing | None:
    """What a module returned, if it is a router's answer; None if it is not.

    Args:
        output: The output of any module, on a few tokens.
    """
    if not isinstance(output, tuple | list) or len(output) < 2:
        return None
    tensors = {i: each for i, each in enumerate(output) if isinstance(each, Tensor)}
    whole = {i for i, each in tensors.items() if not each.is_floating_point()}
    if len(whole) == 1:
        (chosen,) = whole
        return _find_chosen(tensors, chosen)
    return None if whole else _find_dense(tensors)


def _find_chosen(tensors: dict[int, Tensor], chosen: int) -> Routing | None:
    indices = tensors[chosen]
    if indices.dim() < 2 or indices.dtype == torch.bool:
        return None
    floats = [i for i in tensors if i != chosen and tensors[i].shape[:-1] == indices.shape[:-1]]
    weights = [i for i in floats if tensors[i].shape == indices.shape]
    wide = [i for i in floats if i not in weights[-1:] and tensors[i].shape[-1] > indices.max()]
    if not weights or not wide:
        return None
    logits, experts = wide[0], tensors[wide[0]].shape[-1]
    return Routing(
        experts,
        weights[-1],
        chosen,
        logits,
        _proportion(tensors[logits], tensors[weights[-1]], indices),
    )


def _proportion(logits: Tensor, weights: Tensor, indices: Tensor) -> str | None:
    """Which score of the logits the weights are in proportion to, token by token."""
    for name, score in SCORES.items():
        ratio = weights.float() / score(logits).gather(-1, indices)
        if torch.allclose(ratio, ratio[..., :1].expand_as(ratio), rtol=1e-2):
            return name
    return None


def _find_dense(tensors: dict[int, Tensor]) -> Routing | None:
    """Weights of all experts, most of them 0, beside the logits."""
    if len(tensors) != 2 or len({tuple(each.shape) for each in tensors.values()}) != 1:
        return None
    sparse = [
        i
        for i, each in tensors.items()
        if each.dim() >= 2 and bool(((each == 0).any(-1) & (each != 0).any(-1)).all())
    ]
    if len(sparse) != 1:
        return None
    (weights,) = sparse
    (logits,) = set(tensors) - {weights}
    used = tensors[weights] != 0
    for name, score in SCORES.items():
        if torch.allclose(score(tensors[logits])[used], tensors[weights].float()[used], rtol=1e-2):
            return Routing(tensors[logits].shape[-1], weights, None, logits, name)
    return None


@dataclass(frozen=True, eq=False)
class RoutingTap:
    """One of `ROUTING` of one router."""

    module: nn.Module
    part: str
    routing: Routing
    block: nn.Module
    """Tells the batch, of which the router sees the tokens in one row."""

    def attach(self, stack: ExitStack, hook: Hook, last: bool = False) -> None:
        """Attach ``hook``; closing ``stack`` detaches it.

        An edit of ``expert_weights`` chooses anew: the experts with the largest weights.
        """
        shape: list[int] = []

        def remember(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            shape[:] = read_input(args, kwargs).shape[:2]

        stack.callback(shape.clear)
        hook_in_turn(stack, self.block, remember, Turn.REMEMBER, before=True)

        def after(_module: nn.Module, _args: Any, output: Any) -> Any:
            return self._shown(hook, output, shape)

        hook_in_turn(stack, self.module, after, Turn.of(last, False), before=False)

    def _shown(self, hook: Hook, output: Any, shape: list[int]) -> Any:
        """What shall stand in the place of the router's answer; None leaves it.

        Raises:
            SiteError: the hook changes what can only be recorded.
        """
        value = self._read(output)
        shown = value.reshape(*shape, -1)
        new = replaced(hook, shown)
        if new is shown or torch.equal(new, shown):
            return None
        if self.part in READ_ONLY:
            raise SiteError(read_only_message(self.part))
        return self._write(output, new.reshape(value.shape))

    def _read(self, output: Any) -> Tensor:
        routing = self.routing
        if self.part == "expert_weights":
            weights = output[routing.weights]
            if routing.chosen is None:
                return weights
            empty = weights.new_zeros(*weights.shape[:-1], routing.experts)
            return empty.scatter(-1, output[routing.chosen].long(), weights)
        assert routing.logits is not None
        logits = output[routing.logits]
        return logits if self.part == "router_logits" else SCORES[routing.scores or ""](logits)

    def _write(self, output: Any, dense: Tensor) -> Any:
        routing, new = self.routing, list(output)
        if routing.chosen is None:
            new[routing.weights] = dense
        else:
            k = output[routing.chosen].shape[-1]
            _, chosen = dense.abs().topk(k, dim=-1)
            new[routing.weights] = dense.gather(-1, chosen)
            new[routing.chosen] = chosen.to(output[routing.chosen].dtype)
        return type(output)(new) if isinstance(output, list) else tuple(new)
