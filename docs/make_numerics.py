"""Write docs/NUMERICS.md: how far the numbers are from Hugging Face's, measured.

    python docs/make_numerics.py

Tiny models with random weights, on the CPU (`tests/numeric_trials.py`, `tests/loading_trials.py`).
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
import transformers  # noqa: E402

import families  # noqa: E402
import numeric_trials  # noqa: E402
from loading_trials import WAYS, results  # noqa: E402
from model_loader import load_model  # noqa: E402
from numeric_trials import DTYPES, TECHNIQUES, Measured, apart, applies, measure  # noqa: E402

FAMILIES = ("gpt2", "llama", "gemma2", "granite", "cohere", "falcon_new", "mamba", "mixtral")
IMPLEMENTATIONS = ("sdpa", "flex_attention", "flash_attention_2")
WITH_ATTENTION = ("llama", "gpt2", "mistral")
WAY_FAMILIES = ("llama", "gpt2")

HEAD = """# Numerics

Made by `python docs/make_numerics.py`: how far this toolkit's numbers are from Hugging Face's own,
with {versions}, on the CPU, on tiny models with random weights
({families}). Differences are relative to the largest value of the tensor; each entry is the worst
of all families, layers and cells.

## The rule

A difference is rounding if the same weights in float64 leave none of it; one that stays is a
mistake. `tests/test_numerics.py` asks for both: less than {limit:.0e} is left in float64, and in
every other dtype the toolkit is about as near to the float64 result as Hugging Face's own pass (at
most three times as far). Two traps on the way: most models compute norms and softmaxes in float32
whatever their dtype, so a plain `model.double()` keeps float32's rounding (the measurement turns
every request for float32 into one for float64); and weights must be rounded to the low dtype
before they are widened, or two models are compared.

## Technique by dtype

*exact*: not one bit differs from the other way, because the very same calls are made. A number:
the two add up in another order. *left in float64* is the difference of the same weights in
float64, with no part in float32 (the column *float64* is the model as it is, parts in float32).

"""

TRUTH = """
## Distance to the float64 result

What a dtype costs, for the toolkit and for Hugging Face's own pass: the residual stream after
every block, and the cells of a sweep. The two agree: the toolkit adds no error of its own. (Half
precision makes Mixtral choose other experts than float64 does, which is most of bfloat16's number.)

"""

ATTENTION = """
## Attention implementations

Logits of a steered pass and a sweep, against eager. The user's choice is what runs wherever no
attention weights are asked for; for a pattern the model is switched to eager for that pass, and
back. (Where PyTorch does not compile flex attention, it computes as eager does.)

"""

LOADING = """
## Ways of loading

Records at every site, resume, lens, a padded batch, steering, a sweep and generation ({families},
float32), against the plain model.

"""

TAIL = """
Weights that are read from a file or offloaded may lie at other addresses, where a matrix product
rounds in another way; Hugging Face's own pass differs by as much. In training mode the toolkit's
passes run without dropout and each module's mode is put back; a pass that you call yourself
(`with handler: model(...)`) keeps the model's mode. A compiled model runs eagerly while the toolkit
holds hooks on it. Quantized models are exact against themselves; the table compares with plain
matrices of the dequantized weights.

## Other devices

Float64 statistics go through `module_devices.exact`, which computes on the CPU where a device has
no float64 (Apple's MPS). The analyses are run on a pretended accelerator that refuses float64 and
refuses to mix devices (`tests/accelerator_trials.py`), also while it is PyTorch's default device.

On CUDA (an NVIDIA H200, torch 2.11, `tests/test_cuda.py`) 59 analyses and 27 long calls of 26
families gave the CPU's numbers, within 2e-4 of the largest one in float32 or what float64 shows to
be rounding. In float32, bfloat16 and float16 the techniques above agreed with Hugging Face's own
pass there by the rule of this page (steering in the first two); of the sweeps, and of OPT's
neurons, that comparison has not run on CUDA since it was mended. Nothing was measured on MPS.

## What does not work

- float64, a padded batch and transformers' eager attention: its float32 softmax turns padding
  into NaN. That is refused with a message; with `attn_implementation="sdpa"`, or one prompt at a
  time, it works.
- Mixtures of experts in float64 need `model.set_experts_implementation("eager")`; transformers'
  default knows no float64.
- torchao's `Int4WeightOnlyConfig` has no CPU kernel in this version;
  `IntxWeightOnlyConfig(torch.int4)` has.
"""


def packages() -> str:
    """Names and versions of what the numbers depend on."""
    found = []
    for name in ("torch", "transformers", "accelerate", "torchao"):
        try:
            found.append(f"{name} {version(name).partition('+')[0]}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def models(name: str) -> Iterator[tuple[str, Any]]:
    """One family in every dtype, loaded from a folder as a user would."""
    with tempfile.TemporaryDirectory() as folder:
        families.build(name).save_pretrained(folder)
        for dtype, kind in DTYPES.items():
            model, _ = load_model(folder, "cpu", load_tokenizer=False, dtype=kind)
            if dtype == "float64":
                numeric_trials.runnable_in_float64(model)
            yield dtype, model


def techniques() -> dict[tuple[str, str], list[Measured]]:
    """What was measured, by technique and dtype, one entry per family."""
    found: dict[tuple[str, str], list[Measured]] = {}
    for family in FAMILIES:
        for dtype, model in models(family):
            for name in filter(lambda each: applies(each, model), TECHNIQUES):
                found.setdefault((name, dtype), []).append(measure(name, model))
            print(family, dtype, flush=True)  # noqa: T201
    return found


def number(value: float) -> str:
    """A difference as it stands in a table."""
    return "0" if value == 0 else f"{value:.0e}"


def technique_table(found: dict[tuple[str, str], list[Measured]]) -> Iterator[str]:
    """One row per technique."""
    yield f"| technique | compared with | {' | '.join(DTYPES)} | left in float64 |"
    yield f"|{'---|' * (len(DTYPES) + 3)}"
    for name, technique in TECHNIQUES.items():
        cells = []
        for dtype in DTYPES:
            each = found[name, dtype]
            same = all(one.same_bits for one in each)
            cells.append("exact" if same else number(max(one.between for one in each)))
        left = number(max(one.between_64 for dtype in DTYPES for one in found[name, dtype]))
        yield f"| {name} | {technique.what} | {' | '.join(cells)} | {left} |"


def truth_table(found: dict[tuple[str, str], list[Measured]]) -> Iterator[str]:
    """Distance to float64 of both ways."""
    shown = ("record resid_post", "batch, padded", "sweep resid_post", "recorded generation")
    yield f"| technique | {' | '.join(f'{dtype}: toolkit, Hugging Face' for dtype in DTYPES)} |"
    yield f"|{'---|' * (len(DTYPES) + 1)}"
    for name in shown:
        cells = []
        for dtype in DTYPES:
            each = found[name, dtype]
            ours, theirs = max(o.ours_off for o in each), max(o.theirs_off for o in each)
            cells.append(f"{number(ours)}, {number(theirs)}")
        yield f"| {name} | {' | '.join(cells)} |"


def attention_table() -> Iterator[str]:
    """One row per implementation."""
    yield f"| implementation | {' | '.join(WITH_ATTENTION)} |"
    yield f"|{'---|' * (len(WITH_ATTENTION) + 1)}"
    for implementation in IMPLEMENTATIONS:
        cells = [against_eager(name, implementation) for name in WITH_ATTENTION]
        yield f"| {implementation} | {' | '.join(cells)} |"


def against_eager(name: str, implementation: str) -> str:
    """Difference to eager in float32 and, where it is there, float64; or that it does not run."""
    cells = []
    for dtype in (torch.float32, torch.float64):
        try:
            model, eager = (
                families.build(name, attn_implementation=each).to(dtype)
                for each in (implementation, "eager")
            )
            with numeric_trials.in_float64() if dtype == torch.float64 else torch.no_grad():
                pairs = [
                    (way(model), way(eager))
                    for way in (numeric_trials.steered, numeric_trials.swept("resid_post"))
                ]
        except Exception:  # noqa: BLE001  whatever it is, it does not run here
            cells.append("does not run here")
            continue
        worst = max(apart(*pair) for pair in pairs)
        cells.append(f"{number(worst) if worst else 'exact'} in {str(dtype)[6:]}")
    return cells[0] if cells[0] == cells[1] else ", ".join(cells)


def loading_table() -> Iterator[str]:
    """One row per way."""
    yield "| way | largest difference |"
    yield "|---|---|"
    for name, way in WAYS.items():
        print(name, flush=True)  # noqa: T201
        worst = 0.0
        for family in WAY_FAMILIES:
            with tempfile.TemporaryDirectory() as folder:
                model, plain = way(family, Path(folder))
                own = any(module.training for module in model.modules())
                found = results(model, passes_of_the_users_own=not own)
                expected = results(plain, passes_of_the_users_own=not own)
                worst = max(worst, *(apart(found[key], expected[key]) for key in expected))
        yield f"| {name} | {'exact' if worst == 0 else number(worst)} |"


def main() -> None:
    """Measure everything and write the page."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    found = techniques()
    head = HEAD.format(
        versions=packages(), families=", ".join(FAMILIES), limit=numeric_trials.ROUNDING_64
    )
    parts = [
        head, *technique_table(found), TRUTH, *truth_table(found), ATTENTION, *attention_table(),
        LOADING.format(families=", ".join(WAY_FAMILIES)), *loading_table(), TAIL,
    ]  # fmt: skip
    text = "".join(part if part.endswith("\n") else f"{part}\n" for part in parts)
    (ROOT / "docs" / "NUMERICS.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
