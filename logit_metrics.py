"""One number per run, from its logits: what patching, tracing and ablation measure.

A metric is a name out of `NAMED`, a `Metric`, or a function of one run's logits
``[1, position, vocab]`` that returns a number. The named ones read the last position:

==============  ==================================================================  ======
``logit_diff``  logit of the answer less logit of the foil                          logits
``logit``       logit of the answer                                                 logits
``log_prob``    log probability of the answer                                       nats
``prob``        probability of the answer                                           1
``rank``        tokens with a larger logit than the answer; 0 is best               1
``kl``          KL(reference ‖ run), the reference being the clean run              nats
``distance``    ‖base − run‖ / ‖base − other‖ of the logits, base being the run      1
                that is edited and other the one it takes activations from
==============  ==================================================================  ======

The *answer* is a token, by text or id; by default the clean run's best token. The *foil* is the
token it competes with; by default the corrupted run's best token. All is computed in float32.

References: Wang et al. (2022), Interpretability in the Wild (logit difference); Zhang and Nanda
(2024), Towards Best Practices of Activation Patching (which metric to choose).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from forward_pass import InputError
from lens_metrics import rank_of
from module_devices import as_tensor, exact
from tokenization import resolve_positions, token_id, token_strings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Token = str | int
"""A token, by text (exactly one token) or by id."""

MetricLike = "str | Metric | Callable[[Tensor], Any]"
"""What may be given as a metric."""

UNITS = {
    "logit_diff": "logits",
    "logit": "logits",
    "log_prob": "nats",
    "prob": "",
    "rank": "",
    "kl": "nats",
    "distance": "",
}
NAMED = tuple(UNITS)
"""Every metric that can be asked for by name."""

NEED_ANSWER = frozenset({"logit_diff", "logit", "log_prob", "prob", "rank"})


@dataclass(frozen=True, eq=False)
class Metric:
    """A number per run, from the logits at the positions that it reads."""

    name: str
    unit: str
    measure: Callable[[Tensor], Tensor]
    """``[run, read, vocab]`` → ``[run]``. What it writes there, `make_metric` keeps from others."""
    read: tuple[int, ...] | None = (-1,)
    """Positions whose logits it needs, negative from the end; None means all.

    Whatever their order here, the logits come in ascending order of position.
    """
    answer: int | None = None
    foil: int | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """The number of each run, float32 (float64 for such logits), ``[run]``."""
        wide = torch.promote_types(logits.dtype, torch.float32)
        return self.measure(logits.to(wide))

    def positions(self, length: int) -> tuple[int, ...]:
        """Absolute positions that are read of a prompt with so many tokens, as `read` has them.

        Raises:
            InputError: the prompt has no such position.
        """
        if self.read is None:
            return tuple(range(length))
        return tuple(resolve_positions([p], length)[0] for p in self.read)


def reads_of(metric: Any) -> tuple[int, ...] | None:
    """Which positions a metric needs, before it is made: the last one, or all (None).

    Raises:
        InputError: it is no metric.
    """
    if isinstance(metric, Metric):
        return metric.read
    if isinstance(metric, str):
        if metric not in NAMED:
            raise InputError(f"no metric {metric!r}; metrics are {', '.join(NAMED)}, or a function")
        return (-1,)
    if callable(metric):
        return None
    raise InputError(
        f"a metric is a name ({', '.join(NAMED)}) or a function of logits [1, position, vocab]; "
        f"came {type(metric).__name__}"
    )


def refuse_unused(metric: Any, answer: Any = None, foil: Any = None) -> None:
    """Refuse tokens that a metric would not look at.

    Args:
        metric: As in `make_metric`.
        answer: A token, or one for each pair; None where it was not given.
        foil: The same.

    Raises:
        InputError: such a token was given, or it is no metric.
    """
    reads_of(metric)
    name = metric if isinstance(metric, str) else getattr(metric, "__name__", None)
    what = repr(name or getattr(metric, "name", type(metric).__name__))
    if answer is not None and not (isinstance(metric, str) and metric in NEED_ANSWER):
        raise InputError(
            f"answer={answer!r} was given, and the metric {what} measures no single token: leave "
            f"it out, or take one of {', '.join(sorted(NEED_ANSWER))}"
        )
    if foil is not None and not (isinstance(metric, str) and metric == "logit_diff"):
        raise InputError(
            f"foil={foil!r} was given, and the metric {what} compares no two tokens: leave it out, "
            "or take 'logit_diff'"
        )


def make_metric(
    metric: Any,
    clean: Tensor,
    corrupted: Tensor,
    *,
    base: Tensor | None = None,
    answer: Token | None = None,
    foil: Token | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    config: Any = None,
) -> Metric:
    """A metric for one pair of prompts.

    Args:
        metric: A name, a `Metric`, or a function. What they write into the logits that they are
            given changes no run.
        clean: The clean run's logits ``[1, read, vocab]`` at the positions that `reads_of` names.
        corrupted: The same of the corrupted run.
        base: Logits of the run that will be edited, one of the two; None is the clean run.
        answer: The token that is measured; None is the clean run's best.
        foil: The token it is compared with; None is the corrupted run's best.
        tokenizer: For tokens given as text.
        config: The model's text config, to check ids given as numbers.

    Raises:
        InputError: it is no metric, a token is not one token, answer and foil are the same, or one
            is given that the metric would not look at.
    """
    refuse_unused(metric, answer, foil)
    if isinstance(metric, Metric):
        given = metric.measure
        return replace(metric, measure=lambda logits: given(logits.clone()))
    if not isinstance(metric, str):
        name = getattr(metric, "__name__", type(metric).__name__)
        return Metric(name, "", lambda logits: _each(metric, logits), None)
    ids: dict[str, int] = {}
    if metric in NEED_ANSWER:
        ids["answer"] = _token(answer, clean, tokenizer, config)
    if metric == "logit_diff":
        ids["foil"] = _token(foil, corrupted, tokenizer, config)
        if ids["answer"] == ids["foil"]:
            (text,) = token_strings(tokenizer, [ids["answer"]])
            raise InputError(
                f"answer and foil are both {text!r}: both prompts predict it. Say which tokens "
                "are compared: answer=' Paris', foil=' Rome'"
            )
    measure = _measure(metric, clean, corrupted, clean if base is None else base, **ids)
    return Metric(metric, UNITS[metric], measure, answer=ids.get("answer"), foil=ids.get("foil"))


def _token(token: Token | None, logits: Tensor, tokenizer: Any, config: Any) -> int:
    if token is None:
        return int(logits[0, -1].argmax())
    return token_id(tokenizer, token, config)


def _each(function: Callable[[Tensor], Any], logits: Tensor) -> Tensor:
    """A function of one run's logits, run by run; in the graph where the function is."""
    values = [function(run[None].clone()) for run in logits]
    try:
        return torch.stack([as_tensor(value, dtype=logits.dtype).reshape(()) for value in values])
    except (TypeError, ValueError, RuntimeError):
        raise InputError(
            "a metric is given logits [1, position, vocab] and must return one number; "
            f"it returned {values[0]!r}"
        ) from None


def _measure(
    name: str,
    clean: Tensor,
    corrupted: Tensor,
    base: Tensor,
    answer: int = 0,
    foil: int = 0,
) -> Callable[[Tensor], Tensor]:
    if name == "distance":
        other = corrupted if base is clean or torch.equal(base, clean) else clean
        apart = (exact(base[0, -1]) - exact(other[0, -1])).norm()
        return lambda logits: _distance(logits[:, -1], base[0, -1], apart)
    log_p = exact(clean[0, -1]).log_softmax(-1)
    measures: dict[str, Callable[[Tensor], Tensor]] = {
        "logit_diff": lambda z: z[:, answer] - z[:, foil],
        "logit": lambda z: z[:, answer],
        "log_prob": lambda z: z.log_softmax(-1)[:, answer],
        "prob": lambda z: z.softmax(-1)[:, answer],
        "rank": lambda z: _rank(z.detach(), answer),
        "kl": lambda z: kl_divergence(log_p.to(z), z.log_softmax(-1)),
    }
    return lambda logits: measures[name](logits[:, -1])


def _rank(logits: Tensor, answer: int) -> Tensor:
    found = rank_of(logits, torch.full_like(logits[:, 0], answer, dtype=torch.long))
    return found.to(logits).masked_fill(logits.isnan().any(-1), torch.nan)


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q) in nats, not below 0: ``[vocab]``, ``[run, vocab]`` → ``[run]``."""
    p = log_p.exp()
    return torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(-1).clamp(min=0)


def _distance(logits: Tensor, base: Tensor, apart: Tensor) -> Tensor:
    """Share of the way to the other run; 0 where the two runs do not differ at all."""
    moved = (exact(logits) - exact(base.to(logits.device))).norm(dim=-1)
    return (moved / apart if float(apart) else torch.zeros_like(moved)).to(logits.dtype)
