"""The command ``python -m model_loader check PATH_OR_ID``: is a model understood?

It prints what was found in the model, every proof with its largest difference, and what is not
available: what an issue about a model should hold. The exit code is 0 where every proof holds, 1
where one fails, 2 for a model that cannot be loaded or analysed and for wrong usage.
"""

from __future__ import annotations

import argparse
import platform
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import transformers

from architecture_check import ArchitectureReport, check_architecture
from forward_pass import ArchitectureError, InputError
from model_architecture import Architecture
from model_inspection import parameter_count
from model_loader import DEMO_MODEL, ModelLoadError, load_model


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: What follows ``python -m model_loader``; None takes the process's own.

    Returns:
        The exit code.
    """
    given = _parser().parse_args(arguments)
    loading: dict[str, Any] = {
        name: value
        for name in ("dtype", "attn_implementation", "device_map", "revision", "trust_remote_code")
        if (value := getattr(given, name))
    }
    try:
        model, _ = load_model(
            given.model, given.device, head=not given.no_head, load_tokenizer=False, **loading
        )
        architecture = Architecture(model)
        report = check_architecture(architecture)
    except (ModelLoadError, ArchitectureError, InputError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    except Exception as error:  # noqa: BLE001 - a model may fail in any way; the code must not say "1"
        traceback.print_exc()
        print(f"error: {type(error).__name__} while checking {given.model}", file=sys.stderr)  # noqa: T201
        return 2
    print(render(architecture, report))  # noqa: T201
    return 0 if report.passed else 1


def render(architecture: Architecture, report: ArchitectureReport) -> str:
    """The report with what else an issue needs: versions, dtype, device, attention, size."""
    model = architecture.model
    size = parameter_count(model)["total"]
    facts = {
        "versions": ", ".join(f"{name} {number}" for name, number in versions().items()),
        "model": f"{model.config.model_type}, {size:,} parameters, {model.dtype}",
        "runs on": f"{architecture.input_device}, attention {_attention(model)!r}",
    }
    lines = [f"{name:<9} {fact}" for name, fact in facts.items()]
    verdict = "every proof holds" if report.passed else "NOT UNDERSTOOD: a proof failed"
    return "\n".join([*lines, str(report), verdict])


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on; ``accelerate`` and ``torchao`` where they are."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    found["transformers"] = transformers.__version__
    for name in ("accelerate", "torchao", "bitsandbytes"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _attention(model: Any) -> str:
    return str(getattr(model.config, "_attn_implementation", None))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m model_loader")
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="prove by numbers that a model is understood")
    check.add_argument(
        "model", nargs="?", default=str(DEMO_MODEL), help="folder or hub id (the bundled model)"
    )
    check.add_argument("--device", help="cpu, cuda, mps; the fastest there is by default")
    check.add_argument("--dtype", help="float32, bfloat16, float16 or float64")
    check.add_argument("--attn-implementation", help="eager, sdpa, flex_attention, …")
    check.add_argument("--device-map", help="how accelerate places the model, for example auto")
    check.add_argument("--revision", help="branch, tag or commit of a hub id")
    check.add_argument("--no-head", action="store_true", help="load the base model without a head")
    check.add_argument(
        "--trust-remote-code", action="store_true", help="run code that the model brings along"
    )
    return parser
