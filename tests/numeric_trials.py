"""Each technique twice: by the toolkit, and by Hugging Face's own output or plain PyTorch hooks.

    TECHNIQUES             name -> the two ways, each a function of a model; exact where they must
                           agree to the bit
    measure(name, model)   how far the two are apart, in units of the largest value
    in_float64()           while open, no part of a model computes in float32
    as_float64(model)      the same weights, in float64

The rule for a difference: take the same weights in float64. What is rounding shrinks with the
rounding of the dtype, to less than `ROUNDING_64`; what stays is a mistake. Many models compute
norms and softmaxes in float32 whatever their dtype, which would hide the shrinking, so `in_float64`
turns every request for float32 into one for float64.
"""

import copy
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from activation_extraction import ActivationExtractor, make_request
from forward_pass import Site, record, resume
from generation import generate_ids, generate_with_activations
from intervention_handler import InterventionHandler
from logit_lens import LogitLens
from model_architecture import Architecture
from patch_oracle import hooked_logits, put, recorded
from patching_sweep import patching_sweep
from steering_vector import SteeringVector

CLEAN = (7, 11, 15, 6, 49, 10, 13)
CORRUPTED = (7, 11, 30, 6, 49, 21, 13)
ANSWER, FOIL = 40, 12
CHANGED = 2
"""The first position at which the two differ."""
SHORT = (7, 11, 30)
NEW_TOKENS = 5

ROUNDING_64 = 1e-10
"""Relative difference that float64 can leave of rounding, after a few layers."""

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


# --- float64 throughout ---------------------------------------------------------------------------


class _Widened(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def wide(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        if func is torch.Tensor.float:
            func = torch.Tensor.double
        kwargs = {key: wide(value) for key, value in (kwargs or {}).items()}
        return func(*map(wide, args), **kwargs)


@contextmanager
def in_float64() -> Any:
    """While open, what asks for float32 gets float64."""
    with _Widened():
        yield


def as_float64(model: Any) -> Any:
    """Return a copy with the same weights, rounded as they are, in float64."""
    wide = copy.deepcopy(model).to(torch.float64)
    runnable_in_float64(wide)
    return wide


def runnable_in_float64(model: Any) -> None:
    """Choose the implementations of experts and attention that know float64."""
    if getattr(model.config, "_experts_implementation", None) == "grouped_mm":
        model.set_experts_implementation("eager")


# --- The two ways ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Technique:
    """What the toolkit says, and what it must be."""

    ours: Callable[[Any], list[Tensor]]
    theirs: Callable[[Any], list[Tensor]]
    exact: bool = False
    """Whether the two are the same computation, so that no bit may differ."""
    what: str = ""
    """With what it is compared, in words."""


def inputs(ids: Any = CLEAN) -> dict[str, Tensor]:
    return {"input_ids": torch.tensor([list(ids)])}


@torch.no_grad()
def plain(model: Any, ids: Any = CLEAN, hooks: Any = ()) -> tuple[Tensor, dict[Any, Tensor]]:
    """Logits of a plain pass, and what each ``(module, kind)`` in ``hooks`` took or gave."""
    seen: dict[Any, Tensor] = {}
    handles = []
    for key, module, kind in hooks:

        def take(_m: Any, args: Any, kwargs: Any, key: Any = key) -> None:
            seen[key] = (args[0] if args else kwargs["hidden_states"]).clone()

        def give(_m: Any, _args: Any, output: Any, key: Any = key) -> None:
            seen[key] = (output[0] if isinstance(output, tuple) else output).clone()

        handles.append(
            module.register_forward_pre_hook(take, with_kwargs=True)
            if kind == "in"
            else module.register_forward_hook(give)
        )
    try:
        logits = model(**inputs(ids), use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    return logits, seen


def _sites(model: Any, name: str) -> list[Site]:
    arch = Architecture(model)
    return [Site(name, i) for i in range(arch.n_layers) if arch.missing(Site(name, i)) is None]


def recorded_at(name: str) -> Callable[[Any], list[Tensor]]:
    def ours(model: Any) -> list[Tensor]:
        sites = _sites(model, name)
        kept = record(Architecture(model), inputs(), sites, logits=True)
        return [kept.logits, *(kept[site] for site in sites)]

    return ours


def hooked_at(name: str) -> Callable[[Any], list[Tensor]]:
    """The same from plain hooks: on blocks, or on the matrix that a site enters."""

    def theirs(model: Any) -> list[Tensor]:
        arch = Architecture(model)
        hooks = []
        for site in _sites(model, name):
            part = {"head_out": "out_proj", "mlp_neurons": "down_proj"}.get(name)
            path = arch.layer_names[site.layer] if part is None else arch.part_name(site[1], part)
            kind = "out" if name == "resid_post" else "in"
            hooks.append((site, model.get_submodule(path), kind))
        logits, seen = plain(model, CLEAN, hooks)
        heads = {site: arch.heads(site.layer)[0] for site in seen}
        if name == "head_out":
            seen = {site: value.unflatten(-1, (heads[site], -1)) for site, value in seen.items()}
        own = 2 if name == "head_out" else 1  # axes of one token; some families flatten the others
        rows = (value.reshape(1, len(CLEAN), *value.shape[-own:]) for value in seen.values())
        return [logits, *rows]

    return theirs


def patterns(model: Any) -> list[Tensor]:
    sites = _sites(model, "attn_pattern")
    kept = record(Architecture(model), inputs(), sites)
    return [kept[site] for site in sites]


@torch.no_grad()
def own_patterns(model: Any) -> list[Tensor]:
    """What Hugging Face returns of an eager model."""
    config = copy.deepcopy(model.config)
    with torch.random.fork_rng(devices=[]):
        eager = type(model)._from_config(config, attn_implementation="eager", dtype=model.dtype)
    eager.load_state_dict(model.state_dict())
    for name, buffer in model.named_buffers():  # some are in no state dict
        owner, _, last = name.rpartition(".")
        setattr(eager.get_submodule(owner), last, buffer)
    eager.eval()
    return list(eager(**inputs(), use_cache=False, output_attentions=True).attentions)


def resumed(model: Any) -> list[Tensor]:
    arch = Architecture(model)
    sites = [*_sites(model, "resid_pre"), Site("resid_post", arch.n_layers - 1)]
    kept = record(arch, inputs(), sites)
    with torch.no_grad():
        return [resume(arch, inputs(), layer, kept[site]) for layer, site in enumerate(sites)]


def repeated_logits(model: Any) -> list[Tensor]:
    return [plain(model)[0]] * (Architecture(model).n_layers + 1)


def lens_of_last(model: Any) -> list[Tensor]:
    arch = Architecture(model)
    site = Site("resid_post", arch.n_layers - 1)
    stream = record(arch, inputs(), [site])[site]
    return [LogitLens(model).apply_lens_to_hidden_state(stream)]


def read_rows(model: Any) -> list[Tensor]:
    """The lens of every block."""
    arch = Architecture(model)
    sites = _sites(model, "resid_post")
    kept = record(arch, inputs(), sites)
    return [LogitLens(model).apply_lens_to_hidden_state(kept[site]) for site in sites]


def stopped_early(model: Any) -> list[Tensor]:
    """The same by a copy of the model without its later blocks."""
    found = []
    for layers in range(1, Architecture(model).n_layers + 1):
        short = copy.deepcopy(model)
        arch = Architecture(short)
        path = arch.blocks_path
        owner, _, name = path.rpartition(".")
        setattr(short.get_submodule(owner), name, arch.blocks[:layers])
        config = short.config.get_text_config(decoder=True)
        config.num_hidden_layers = layers
        for part in short.modules():  # some keep a number of their own
            if "num_hidden_layers" in part.__dict__:
                part.num_hidden_layers = layers
        found.append(plain(short)[0])
    return found


def batched(model: Any) -> list[Tensor]:
    arch = Architecture(model)
    records = ActivationExtractor(model, None).extract_batch_activations(
        [list(CLEAN), list(SHORT)], show_progress=False, return_logits=True
    )
    return [
        each for record in records
        for each in (record.logits, *(record.layer_activations[i] for i in range(arch.n_layers)))
    ]  # fmt: skip


def one_by_one(model: Any) -> list[Tensor]:
    arch = Architecture(model)
    hooks = [(i, block, "out") for i, block in enumerate(arch.blocks)]
    found = []
    for ids in (CLEAN, SHORT):
        logits, seen = plain(model, ids, hooks)
        found += [logits, *(seen[i] for i in range(arch.n_layers))]
    return found


def _vector(model: Any) -> tuple[Tensor, int]:
    arch = Architecture(model)
    generator = torch.Generator("cpu").manual_seed(1)
    vector = torch.randn(arch.d_model, generator=generator, device="cpu")
    return vector.to(arch.stream_device), arch.n_layers // 2


def steered(model: Any) -> list[Tensor]:
    vector, layer = _vector(model)
    with InterventionHandler(model).register_steering_vector(SteeringVector(vector, layer, 2.0)):
        return [plain(model)[0]]


def steered_by_hand(model: Any) -> list[Tensor]:
    vector, layer = _vector(model)

    def add(hidden: Tensor) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        return (hidden.to(wide) + 2.0 * vector).to(hidden.dtype)

    return [hooked_logits(model, CLEAN, [(Site("resid_post", layer), add)])]


def swept(name: str) -> Callable[[Any], list[Tensor]]:
    def ours(model: Any) -> list[Tensor]:
        result = patching_sweep(
            model, None, CLEAN, CORRUPTED, name, answer=ANSWER, foil=FOIL, direction="denoising",
            show_progress=False,
        )  # fmt: skip
        values = torch.from_numpy(result.values.copy())
        return [values[:, CHANGED:] if name == "resid_post" else values]

    return ours


def one_pass_per_cell(name: str) -> Callable[[Any], list[Tensor]]:
    def theirs(model: Any) -> list[Tensor]:
        table = []
        for site in _sites(model, name):
            value = recorded(model, CLEAN, site)[0]
            cells = (
                [put(value[i], i) for i in range(CHANGED, len(CLEAN))]
                if name == "resid_post"
                else [put(value, head=head) for head in range(value.shape[1])]
            )
            rows = [hooked_logits(model, CORRUPTED, [(site, cell)])[0, -1] for cell in cells]
            table.append([float(row[ANSWER].double() - row[FOIL].double()) for row in rows])
        return [torch.tensor(table, dtype=torch.float64)]

    return theirs


def generated(model: Any) -> list[Tensor]:
    return [torch.tensor(generate_ids(Architecture(model), None, CLEAN, NEW_TOKENS))]


@torch.no_grad()
def generated_by_hugging_face(model: Any) -> list[Tensor]:
    ids = inputs()["input_ids"]
    options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "pad_token_id": 0}
    return [model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0]]


TEXT = (*CLEAN, 21, 8, 33, 60, 5)
"""What is generated where the tokens are forced, so that it is one text in every dtype."""


def recorded_generation(model: Any) -> list[Tensor]:
    arch = Architecture(model)
    _, kept = generate_with_activations(
        arch, None, CLEAN, make_request(arch), len(TEXT) - len(CLEAN),
        prefix_allowed_tokens_fn=lambda _row, ids: [TEXT[len(ids)]],
    )  # fmt: skip
    assert tuple(kept.token_ids) == TEXT
    return [kept.layer_activations[i] for i in range(arch.n_layers)]


def read_at_once(model: Any) -> list[Tensor]:
    arch = Architecture(model)
    hooks = [(i, block, "out") for i, block in enumerate(arch.blocks)]
    _, seen = plain(model, TEXT, hooks)
    return [seen[i] for i in range(arch.n_layers)]


TECHNIQUES: dict[str, Technique] = {
    **{
        f"record {name}": Technique(recorded_at(name), hooked_at(name), True, "a hook there")
        for name in ("resid_pre", "resid_post", "head_out", "mlp_neurons")
    },
    "record attn_pattern": Technique(patterns, own_patterns, True, "`output_attentions`, eager"),
    "resume at every layer": Technique(resumed, repeated_logits, True, "the model's logits"),
    "lens of the last layer": Technique(
        lens_of_last, lambda model: [plain(model)[0]], True, "the model's logits"
    ),
    "lens of every layer": Technique(read_rows, stopped_early, what="the model cut off there"),
    "batch, padded": Technique(batched, one_by_one, what="hooks, one prompt at a time"),
    "steering": Technique(steered, steered_by_hand, True, "a hook that adds"),
    "sweep resid_post": Technique(
        swept("resid_post"), one_pass_per_cell("resid_post"), what="one hooked pass per cell"
    ),
    "sweep head_out": Technique(
        swept("head_out"), one_pass_per_cell("head_out"), what="one hooked pass per cell"
    ),
    "generate": Technique(
        generated, generated_by_hugging_face, True, "`model.generate`, token by token"
    ),
    "recorded generation": Technique(
        recorded_generation, read_at_once, what="hooks, one pass over the text"
    ),
}
"""Exact are those that make the very same calls; the others add up in another order."""


# --- Measuring ------------------------------------------------------------------------------------


def apart(ones: list[Tensor], others: list[Tensor]) -> float:
    """Largest difference in units of the largest value; of the worst pair."""
    assert len(ones) == len(others) > 0
    worst = 0.0
    for one, other in ((a.cpu(), b.cpu()) for a, b in zip(ones, others, strict=True)):
        assert one.shape == other.shape, f"{tuple(one.shape)} against {tuple(other.shape)}"
        assert bool(torch.isfinite(one).all() and torch.isfinite(other).all())
        difference = (one.double() - other.double()).abs().max()
        worst = max(worst, float(difference / other.double().abs().max().clamp(min=1e-300)))
    return worst


@dataclass(frozen=True)
class Measured:
    """What one technique showed in one dtype; all relative to the largest value."""

    between: float
    """Between the toolkit and what it is compared with, in this dtype."""
    between_64: float
    """The same with the same weights in float64: what is left is no rounding."""
    ours_off: float
    """From the toolkit to the truth, which is the other way in float64."""
    theirs_off: float
    """From the other way in this dtype to the truth."""
    same_bits: bool


def measure(name: str, model: Any) -> Measured:
    """Try one technique both ways, in a model's dtype and in float64."""
    technique = TECHNIQUES[name]
    ours, theirs = technique.ours(model), technique.theirs(model)
    wide = as_float64(model)
    with in_float64():
        wide_ours, truth = technique.ours(wide), technique.theirs(wide)
    numbers = theirs[0].is_floating_point()  # token ids are right or wrong
    return Measured(
        between=apart(ours, theirs),
        between_64=apart(wide_ours, truth),
        ours_off=apart(ours, truth) if numbers else float("nan"),
        theirs_off=apart(theirs, truth) if numbers else float("nan"),
        same_bits=all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(ours, theirs, strict=True)),
    )


def applies(name: str, model: Any) -> bool:
    """Whether a model has what a technique needs."""
    if "padded" in name and model.config._attn_implementation == "eager":
        return False  # in float64 transformers makes NaN of padding there
    needed = name.rpartition(" ")[2] if name.startswith(("record ", "sweep ")) else "resid_post"
    return needed not in ("head_out", "mlp_neurons", "attn_pattern") or bool(_sites(model, needed))
