"""What works on a model, each capability tried against an oracle of its own.

    COLUMNS                what is tried, in order
    Outcome                "yes", "no" or "n.a.", and why
    try_all(model, folder) every column of one live model

An oracle here is Hugging Face's own output or a pass with PyTorch's own hooks on the blocks; the
architecture's own proofs stand for the columns that they name.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from architecture_check import ArchitectureReport, check_architecture
from forward_pass import Site, record
from intervention_handler import InterventionHandler
from logit_lens import LogitLens
from model_architecture import Architecture
from model_loader import load_model
from patching_sweep import patching_sweep
from steering_vector import SteeringVector

CLEAN = (7, 11, 15, 6, 49, 10, 13)
CORRUPTED = (7, 11, 30, 6, 49, 21, 13)
ANSWER, FOIL = 40, 12
CHANGED = 2
"""The first position at which the two differ."""
NEW_TOKENS = 6


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Whether something works, and why not."""

    value: str
    """``yes``, ``no`` or ``n.a.``"""
    reason: str = ""


class NotApplicable(Exception):
    """The model has nothing that this could be tried on; the message says why."""


@dataclasses.dataclass
class Subject:
    """A model under trial."""

    model: Any
    folder: Path
    architecture: Architecture
    report: ArchitectureReport

    @property
    def tolerance(self) -> float:
        return 2e-5 * float(self.logits(CLEAN).abs().max())

    def logits(self, ids: Any, hooks: tuple[tuple[int, Any], ...] = ()) -> Tensor:
        """Logits of one plain pass; ``hooks`` change the output of blocks."""
        handles = [self.architecture.blocks[i].register_forward_hook(hook) for i, hook in hooks]
        try:
            with torch.no_grad():
                return self.model(torch.tensor([list(ids)]), use_cache=False).logits[0]
        finally:
            for handle in handles:
                handle.remove()

    def proof(self, name: str) -> None:
        proof = next(p for p in self.report.proofs if p.name == name)
        if proof.passed is None:
            raise NotApplicable(self.why(PROVEN_ON[name]))
        assert proof.passed, f"{proof.difference:.1e} (allowed {proof.allowed:.1e})"

    def why(self, site: str) -> str:
        sentence = self.architecture.missing(Site(site, 0)) or f"no site {site!r}"
        return sentence.partition(": ")[2] or sentence

    def layers_with(self, site: str) -> list[int]:
        layers = range(self.architecture.n_layers)
        return [i for i in layers if self.architecture.missing(Site(site, i)) is None]


PROVEN_ON = {"parts": "attn_out", "heads": "head_out", "pattern": "attn_pattern"}
"""Without this site a proof has nothing to try."""


def _load(subject: Subject) -> None:
    subject.model.save_pretrained(subject.folder)
    ids = torch.tensor([CLEAN])
    try:
        theirs = AutoModelForCausalLM.from_pretrained(subject.folder)
        with torch.no_grad():
            expected = theirs(ids, use_cache=False).logits[0]
    except Exception as err:  # noqa: BLE001  whatever it is, it goes into the table
        raise NotApplicable(f"transformers cannot load what it saved: {_line(err)}") from None
    if not torch.equal(expected, subject.logits(CLEAN)):
        raise NotApplicable("transformers loads other weights than it saved")
    again, _ = load_model(subject.folder, "cpu", load_tokenizer=False)
    with torch.no_grad():
        logits = again(ids, use_cache=False).logits[0]
    assert torch.equal(logits, subject.logits(CLEAN)), "the loaded model gives other logits"


def _record(subject: Subject) -> None:
    arch, seen = subject.architecture, {}

    def keep(layer: int) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple | list) else output
            seen[layer] = arch.stream.show(hidden).clone()

        return hook

    logits = subject.logits(CLEAN, tuple((i, keep(i)) for i in range(arch.n_layers)))
    sites = [Site("resid_post", i) for i in range(arch.n_layers)]
    kept = record(arch, {"input_ids": torch.tensor([CLEAN])}, sites, logits=True)
    assert kept.logits is not None
    assert torch.equal(kept.logits[0], logits), "recording changes the logits"
    for site in sites:
        assert torch.equal(kept[site], seen[site.layer]), f"layer {site.layer} differs"


def _lens(subject: Subject) -> None:
    arch = subject.architecture
    last = Site("resid_post", arch.n_layers - 1)
    lens = LogitLens(subject.model)
    stream = record(arch, {"input_ids": torch.tensor([CLEAN])}, [last])[last]
    read = lens.apply_lens_to_hidden_state(stream)[0]
    off = float((read - subject.logits(CLEAN)).abs().max())
    assert off <= subject.tolerance / 10, f"the lens of the last layer is off by {off:.1e}"


def _difference(logits: Tensor) -> float:
    return float(logits[-1, ANSWER].double() - logits[-1, FOIL].double())


def _put(subject: Subject, position: int, value: Tensor) -> Any:
    """A hook that puts ``value [d_model]`` at a position of what a block returns."""
    stream = subject.architecture.stream

    def hook(_module: Any, _args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple | list) else output
        shown = stream.show(hidden).clone()
        shown[:, position] = value
        stored = stream.store(shown)
        return (stored, *output[1:]) if isinstance(output, tuple | list) else stored

    return hook


def _sweep(subject: Subject) -> None:
    arch = subject.architecture
    result = patching_sweep(
        subject.model, None, CLEAN, CORRUPTED, "resid_post", **_ENDS, direction="denoising"
    )
    inputs = {"input_ids": torch.tensor([CLEAN])}
    sites = [Site("resid_post", i) for i in range(arch.n_layers)]
    clean = record(arch, inputs, sites)
    for layer in range(arch.n_layers):
        for position in range(CHANGED, len(CLEAN)):
            value = clean[sites[layer]][0, position]
            hook = _put(subject, position, value)
            expected = _difference(subject.logits(CORRUPTED, ((layer, hook),)))
            found = float(result.values[layer, position])
            assert abs(found - expected) <= subject.tolerance, f"layer {layer} at {position}"


_ENDS: dict[str, Any] = {"answer": ANSWER, "foil": FOIL, "show_progress": False}


def _head_patching(subject: Subject) -> None:
    """Against a hook on the output projection of the last layer that has one."""
    layers = subject.layers_with("head_out")
    if not layers:
        raise NotApplicable(subject.why("head_out"))
    arch, layer = subject.architecture, layers[-1]
    site, heads = Site("head_out", layer), arch.heads(layer)[0]
    result = patching_sweep(subject.model, None, CLEAN, CORRUPTED, "head_out", **_ENDS)
    rows = [record(arch, {"input_ids": torch.tensor([ids])}, [site]) for ids in (CLEAN, CORRUPTED)]
    clean, corrupted = (kept[site][0] for kept in rows)
    name = arch.part_name(layer, "out_proj")
    projection = subject.model.get_submodule(name)
    names = [arch.part_name(i, "out_proj") for i in layers]
    turn = sum(subject.model.get_submodule(other) is projection for other in names) - 1
    """Blocks may share the module: the last block's call is the last."""
    row = result.labels[0].index(layer)
    for head in range(heads):
        mixed = corrupted.clone()
        mixed[:, head] = clean[:, head]

        calls: list[int] = []

        def swap(_module: Any, args: Any, mixed: Tensor = mixed, calls: Any = calls) -> Any:
            calls.append(1)
            mine = len(calls) == turn + 1
            return (mixed.flatten(-2).view_as(args[0]), *args[1:]) if mine else None

        handle = projection.register_forward_pre_hook(swap)
        try:
            expected = _difference(subject.logits(CORRUPTED))
        finally:
            handle.remove()
        off = abs(float(result.values[row, head]) - expected)
        assert off <= subject.tolerance, f"head {head} of layer {layer} is off by {off:.1e}"


def _steered(subject: Subject) -> tuple[SteeringVector, int, Any]:
    arch = subject.architecture
    layer = arch.n_layers // 2
    generator = torch.Generator().manual_seed(1)
    vector = torch.randn(arch.d_model, generator=generator)

    def add(_module: Any, _args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple | list) else output
        stored = arch.stream.store(arch.stream.show(hidden) + 2.0 * vector)
        return (stored, *output[1:]) if isinstance(output, tuple | list) else stored

    return SteeringVector(vector, layer, 2.0), layer, add


def _steering(subject: Subject) -> None:
    vector, layer, add = _steered(subject)
    handler = InterventionHandler(subject.model).register_steering_vector(vector)
    with handler:
        found = subject.logits(CLEAN)
    expected = subject.logits(CLEAN, ((layer, add),))
    assert float((found - expected).abs().max()) <= subject.tolerance, "other logits than by hand"
    assert not torch.allclose(found, subject.logits(CLEAN)), "nothing changed"


def _generation(subject: Subject) -> None:
    """Cached and steered, against plain passes over the whole text, hooked by hand."""
    vector, layer, add = _steered(subject)
    try:
        plain, whole = (_generate(subject, use_cache=cached) for cached in (True, False))
    except Exception as err:  # noqa: BLE001  whatever it is, it goes into the table
        raise NotApplicable(f"transformers' own cached generation fails: {_line(err)}") from None
    if float((plain - whole).abs().max()) > 5 * subject.tolerance:
        raise NotApplicable("transformers' own cached generation differs from its uncached one")
    handle = subject.architecture.blocks[layer].register_forward_hook(add)
    try:
        expected = _generate(subject, use_cache=False)
    finally:
        handle.remove()
    assert not torch.allclose(expected, whole), "nothing changed"
    with InterventionHandler(subject.model).register_steering_vector(vector):
        found = _generate(subject, use_cache=True)
    off = float((found - expected).abs().max())
    assert off <= 5 * subject.tolerance, f"logits are off by {off:.1e}"


def _generate(subject: Subject, use_cache: bool) -> Tensor:
    """The logits ``[step, vocab]`` from which each new token was chosen."""
    ids = torch.tensor([CLEAN])
    made = subject.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        disable_compile=True,
        pad_token_id=0,
        use_cache=use_cache,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return torch.cat(made.logits)


def _pattern(subject: Subject) -> None:
    subject.proof("pattern")
    values = next(p for p in subject.report.proofs if p.name == "pattern and value")
    assert values.passed is not False, f"pattern @ value is off by {values.difference:.1e}"


COLUMNS: dict[str, Callable[[Subject], None]] = {
    "load": _load,
    "record": _record,
    "resume": lambda subject: subject.proof("resume"),
    "lens exact": _lens,
    "parts sum to whole": lambda subject: subject.proof("parts"),
    "heads split": lambda subject: subject.proof("heads"),
    "attention pattern": _pattern,
    "head patching": _head_patching,
    "sweep": _sweep,
    "steering": _steering,
    "generation with cache": _generation,
}
"""What is tried: a function raises an error where it fails, NotApplicable where it cannot be."""


def _line(err: BaseException) -> str:
    return f"{type(err).__name__}: {' '.join(str(err).split())[:160]}"


def try_all(model: Any, folder: Path) -> dict[str, Outcome]:
    """Try every column on a live model.

    Args:
        model: The model; it is left as it was.
        folder: An empty folder, to save and load it.
    """
    try:
        architecture = Architecture(model)
        report = check_architecture(architecture)
    except Exception as err:  # noqa: BLE001  whatever it is, it goes into the table
        return dict.fromkeys(COLUMNS, Outcome("no", _line(err)))
    subject = Subject(model, folder, architecture, report)
    return {name: _outcome(trial, subject) for name, trial in COLUMNS.items()}


def _outcome(trial: Callable[[Subject], None], subject: Subject) -> Outcome:
    try:
        trial(subject)
    except NotApplicable as err:
        return Outcome("n.a.", str(err))
    except Exception as err:  # noqa: BLE001  whatever it is, it goes into the table
        return Outcome("no", _line(err))
    return Outcome("yes")
