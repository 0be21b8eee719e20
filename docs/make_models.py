"""Write docs/MODELS.md: what works on every decoder that the installed transformers knows.

    python docs/make_models.py [MODEL_TYPE ...]

Each family is built tiny from its config (`tests/model_zoo.py`) and each column is tried against an
oracle (`tests/model_trials.py`). With names, the rows are printed and nothing is written.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
import transformers  # noqa: E402

from model_trials import COLUMNS, Outcome, try_all  # noqa: E402
from model_zoo import MODEL_TYPES, NOT_DECODERS, build, describe  # noqa: E402

MARKS = {"yes": "yes", "no": "**no**", "n.a.": "–"}

HEAD = """# Model families

What works on each decoder of `MODEL_FOR_CAUSAL_LM_MAPPING`, tried on a tiny model with random
weights, built from the family's config. Made by `python docs/make_models.py` with
transformers {transformers}, PyTorch {torch}, float32, on the CPU; `tests/test_model_zoo.py` tries
the same. *yes* was compared with an oracle (Hugging Face's own output, or a pass with PyTorch's own
hooks); – is not applicable, and *no* does not work: the reasons are below the table.

**{complete} of {decoders} decoders are complete**: nothing fails that the family has.
{partial} fail somewhere, {refused} are refused as a whole, {unbuilt} cannot be built or run by this
transformers version on their own.

- *load*: a saved folder gives the same logits. *record*: the residual stream after every block
  equals what a hook on the block sees. *resume*: running on from every block's input gives the
  logits, bit for bit. *lens exact*: the lens of the last block is the model's output.
- *parts sum to whole*: what attention and MLP add is all that a block adds. *heads split*: each
  head's part of the output projection sums to the whole.
- *attention pattern*: rows are probabilities and mix the values into what a head puts out.
- *head patching*, *sweep*: every cell equals a pass with a plain hook. *steering*: logits equal
  those of a plain hook. *generation with cache*: steered and cached, the text of uncached, plainly
  hooked passes.

Mixtures of experts have three more sites (`router_logits`, `router_probs`, `expert_weights`).
"""


def try_family(model_type: str) -> dict[str, Outcome] | str:
    """Outcomes of every column, or why the family could not be built or run at all."""
    try:
        model = build(model_type)
        with torch.no_grad():
            model(torch.tensor([[7, 11, 15]]), use_cache=False)
    except Exception as err:  # noqa: BLE001  whatever it is, it goes into the table
        return f"{type(err).__name__}: {' '.join(str(err).split())[:200]}"
    with tempfile.TemporaryDirectory() as folder:
        return try_all(model, Path(folder))


def main(chosen: list[str]) -> None:
    """Try the families and write the page, or print the rows of those named."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    found: dict[str, dict[str, Outcome]] = {}
    unbuilt = dict(NOT_DECODERS)
    for model_type in chosen or MODEL_TYPES:
        if model_type in NOT_DECODERS:
            continue
        result = try_family(model_type)
        if isinstance(result, str):
            unbuilt[model_type] = result
        else:
            found[model_type] = result
        print(row(model_type, result), flush=True)  # noqa: T201
    if not chosen:
        (ROOT / "docs" / "MODELS.md").write_text(page(found, unbuilt), encoding="utf-8")


def row(model_type: str, result: dict[str, Outcome] | str) -> str:
    """One line of the table."""
    if isinstance(result, str):
        return f"| {model_type} | {result} |"
    kinds = [model_type, describe(model_type), *(MARKS[each.value] for each in result.values())]
    return f"| {' | '.join(kinds)} |"


def page(found: dict[str, dict[str, Outcome]], unbuilt: dict[str, str]) -> str:
    """The whole page."""
    fails = {
        name: [key for key, each in outcomes.items() if each.value == "no"]
        for name, outcomes in found.items()
    }
    refused = [name for name, columns in fails.items() if len(columns) == len(COLUMNS)]
    partial = [name for name, columns in fails.items() if columns and name not in refused]
    header = ["family", "what it has", *COLUMNS]
    lines = [
        HEAD.format(
            transformers=version("transformers"),
            torch=version("torch").partition("+")[0],
            complete=len(found) - len(refused) - len(partial),
            decoders=len(found),
            partial=len(partial),
            refused=len(refused),
            unbuilt=len(unbuilt),
        ),
        f"| {' | '.join(header)} |",
        f"|{'---|' * len(header)}",
        *(row(name, found[name]) for name in found if name not in refused),
        "\n## What does not work, and why\n",
        *reasons(found, refused, "no"),
        *(f"- **{name}**: {found[name]['load'].reason}" for name in refused),
        "\n## Not applicable, and why\n",
        *reasons(found, refused, "n.a."),
        "\n## Not tried\n",
        *(f"- **{name}**: {why}" for name, why in sorted(unbuilt.items())),
        "",
    ]
    return "\n".join(lines)


def reasons(found: dict[str, dict[str, Outcome]], refused: list[str], value: str) -> list[str]:
    """One line for every reason, with the columns and the families it holds for."""
    by_reason: dict[tuple[str, str], list[str]] = {}
    for name, outcomes in found.items():
        for column, each in outcomes.items():
            if each.value == value and name not in refused:
                by_reason.setdefault((column, each.reason), []).append(name)
    return [
        f"- *{column}*: {reason} ({', '.join(names)})"
        for (column, reason), names in sorted(by_reason.items())
    ]


if __name__ == "__main__":
    main(sys.argv[1:])
