"""Every analysis on a pretended accelerator (`fake_accelerator`), compared with the CPU.

    python accelerator_trials.py FAMILY quick|more|calls      (with . and .. on PYTHONPATH)

prints a JSON object: for each analysis the largest difference in units of the largest value, or the
error. It is a program of its own, since PyTorch keeps a pretended device for as long as a process
lives. With ``calls`` it is every long call, while PyTorch's default device is the accelerator.
"""

import json
import sys
import warnings
from typing import Any

import torch
import transformers

import families
import module_devices
from analysis_trials import MORE, QUICK, difference
from fake_accelerator import DEVICE, NAME, accelerator, moved
from forward_pass import SiteError
from long_calls import CALLS
from model_analyzer import ModelAnalyzer


def try_one(analysis: Any, here: Any, there: Any) -> float | str | None:
    """The difference, the error, or None where the model has not what is asked for."""
    try:
        expected = analysis(here)
    except SiteError:
        return None
    except ValueError as err:
        return None if "no attention heads" in str(err) else f"on the CPU: {err}"
    try:
        with accelerator():
            return difference(expected, analysis(there))
    except Exception as err:  # noqa: BLE001  whatever it is, it is reported
        return f"{type(err).__name__}: {' '.join(str(err).split())[:200]}"


def try_call(name: str, here: Any, there: Any) -> float | str | None:
    """The same for a long call, where tensors of no named device are made on the accelerator."""
    expected = CALLS[name](here)
    try:
        with accelerator(), torch.device(DEVICE):
            found = CALLS[name](there)
        return difference(expected, found)
    except Exception as err:  # noqa: BLE001  whatever it is, it is reported
        return f"{type(err).__name__}: {' '.join(str(err).split())[:200]}"


def main(family: str, chosen: str) -> None:
    """Try the analyses of `QUICK` or of `MORE`, or the long calls."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    module_devices.WITHOUT_FLOAT64 |= {NAME}
    model, tokenizer = families.build(family), families.tiny_tokenizer()
    here = ModelAnalyzer(model, tokenizer=tokenizer)
    with accelerator():
        there = ModelAnalyzer(moved(model), tokenizer=tokenizer)
    if chosen == "calls":
        found = {name: try_call(name, here.model, there.model) for name in CALLS}
    else:
        analyses = {"quick": QUICK, "more": MORE}[chosen]
        found = {name: try_one(analysis, here, there) for name, analysis in analyses.items()}
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
