"""One of the processes of test_tensor_parallel.py: the split model against the same model whole.

    torchrun --nproc-per-node 2 tests/tensor_parallel_worker.py FOLDER [CALL ...]

In the folder lies a model. Each process writes ``RANK.json`` into it: for every comparison, and
every call named out of `long_calls.CALLS`, the largest difference and the largest number, or what
was raised.
"""

import json
import os
import sys
import warnings
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
sys.path.append(str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from architecture_check import check_architecture
from forward_pass import READ_ONLY, Site, edit, record, recording, resume
from head_circuits import embedding, unembedding
from long_calls import CALLS, CLEAN, ROWS
from memory_limits import NotEnoughMemoryError, SmallerBatchWarning
from model_analyzer import ModelAnalyzer
from model_architecture import Architecture
from model_comparison import compare_weights
from model_inspection import parameter_count, weights_of

torch.set_num_threads(1)


def flat(found):
    """What a call gave, as float64 arrays; text by its characters."""
    if isinstance(found, str):
        return [np.array([ord(each) for each in found], dtype=float)]
    if isinstance(found, list | tuple):
        return [array for each in found for array in flat(each)]
    if isinstance(found, dict):
        return [array for key in sorted(found) for array in flat(found[key])]
    return [torch.as_tensor(found).detach().double().cpu().numpy()]


def compare(work, split, whole):
    """Largest difference and number of a function of each model; or the error of the split one."""
    expected = flat(work(whole))
    try:
        found = flat(work(split))
    except Exception as error:  # noqa: BLE001 - it is reported
        return {"error": type(error).__name__, "message": str(error)}
    shapes, wanted = ([each.shape for each in both] for both in (found, expected))
    if shapes != wanted:
        return {"error": "shape", "message": f"{shapes}, not {wanted}"}
    holes = any((np.isnan(a) != np.isnan(b)).any() for a, b in zip(found, expected, strict=True))
    pairs = [(np.nan_to_num(a), np.nan_to_num(b)) for a, b in zip(found, expected, strict=True)]
    worst = max((float(np.abs(a - b).max(initial=0.0)) for a, b in pairs), default=0.0)
    largest = max((float(np.abs(b).max(initial=0.0)) for _, b in pairs), default=0.0)
    return {"difference": float("inf") if holes else worst, "largest": largest}


IDS = torch.tensor([CLEAN])


def all_sites(arch):
    return [Site(name, n) for n in range(arch.n_layers) for name in arch.available_sites(n)]


def recorded(name):
    def work(model):
        arch = Architecture(model)
        mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
        sites = [site for site in all_sites(arch) if site.name == name]
        some = torch.tensor([1, 4])
        kept = record(arch, arch.inputs(IDS.expand(2, -1), mask), sites, positions=some)
        return [kept[site] for site in sites]

    return work


def edited(name):
    """Logits under an edit in the middle block that differs from entry to entry."""

    def work(model):
        arch = Architecture(model)

        def change(value):
            steps = torch.linspace(0.5, 1.5, value.numel() // len(value))
            return value * steps.view(value.shape[1:])

        with torch.no_grad(), edit(arch, {Site(name, 1): change}):
            return model(**arch.inputs(IDS)).logits

    return work


def gradient(name):
    """Of a logit with respect to a site."""

    def work(model):
        arch, site = Architecture(model), Site(name, 1)
        with torch.enable_grad(), recording(arch, [site], detach=False) as kept:
            logits = model(**arch.inputs(IDS)).logits
            (found,) = torch.autograd.grad(logits[0, -1, 20], kept[site])
        return found

    return work


def resumed(model):
    arch = Architecture(model)
    sites = [Site("resid_pre", n) for n in range(arch.n_layers)]
    streams = record(arch, arch.inputs(IDS), sites)
    return [resume(arch, arch.inputs(IDS), site.layer, streams[site]) for site in sites]


def projected(model):
    arch, site = Architecture(model), Site("head_out", 1)
    z = record(arch, arch.inputs(IDS), [site])[site]
    with torch.no_grad():
        return [arch.project_head(z, 1, head) for head in range(arch.heads(1)[0])]


def described(model):
    arch = Architecture(model)
    found = [line for line in check_architecture(arch).found if "processes" not in line]
    return [str(found), [list(arch.heads(n)) for n in range(arch.n_layers)]]


def checked(model):
    report = check_architecture(Architecture(model))
    report.raise_if_failed()
    return str([(proof.name, proof.passed) for proof in report.proofs])


def comparisons(whole, calls):
    """What is compared, by name."""
    arch = Architecture(whole)
    names = arch.available_sites(1)
    changeable = [name for name in names if name not in READ_ONLY]
    with_gradient = [name for name in changeable if name != "expert_weights"]
    return {
        **{f"record {name}": recorded(name) for name in names},
        **{f"edit {name}": edited(name) for name in changeable},
        **{f"gradient {name}": gradient(name) for name in with_gradient},
        "resume": resumed,
        "project_head": projected,
        "structure": described,
        "check": checked,
        "embedding": lambda m: embedding(Architecture(m)),
        "unembedding": lambda m: unembedding(Architecture(m)),
        "weights": lambda m: weights_of(m),
        "count": lambda m: list(parameter_count(m).values()),
        "compared weights": lambda m: compare_weights(m, whole).change.copy(),
        **{f"call: {name}": CALLS[name] for name in calls},
    }


def starved(model):
    """A pass without enough memory, in one process alone: no batch is halved."""
    import activation_extraction

    real = activation_extraction.record

    def limited(arch, inputs, *args, **kwargs):
        if len(inputs["input_ids"]) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return real(arch, inputs, *args, **kwargs)

    activation_extraction.record = limited
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", SmallerBatchWarning)
            extractor = activation_extraction.ActivationExtractor(model)
            extractor.extract_batch_activations(ROWS, show_progress=False)
    except NotEnoughMemoryError as error:
        return str(error)
    finally:
        activation_extraction.record = real
    return "no error"


def main(folder, *calls):
    warnings.simplefilter("ignore")
    whole = AutoModelForCausalLM.from_pretrained(folder)
    split = ModelAnalyzer(folder, tp_plan="auto").model
    found = {what: compare(work, split, whole) for what, work in comparisons(whole, calls).items()}
    found |= {"out of memory": starved(split), "processes": dist.get_world_size()}
    found["said"] = [x for x in check_architecture(Architecture(split)).found if "processes" in x]
    Path(folder, f"{dist.get_rank()}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
