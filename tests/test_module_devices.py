"""Where modules compute, float64 where there is none, and every analysis on another device."""

import json
import os
import subprocess
import sys
from pathlib import Path

import accelerate
import pytest
import torch
from torch import nn
from torch.utils import backend_registration

import families
import generation
import module_devices
from long_calls import CALLS
from model_architecture import Architecture
from module_devices import compute_device, compute_devices, exact

HERE = Path(__file__).resolve().parent


def test_float64_is_made_where_the_tensor_lies():
    x = torch.tensor([1.5, -2.0], dtype=torch.bfloat16)
    assert exact(x).dtype == torch.float64
    assert exact(x).tolist() == [1.5, -2.0]
    assert exact(torch.empty(2, device="meta")).is_meta


def test_float64_is_made_on_the_cpu_where_a_device_has_none(monkeypatch):
    assert "mps" in module_devices.WITHOUT_FLOAT64
    monkeypatch.setattr(module_devices, "WITHOUT_FLOAT64", frozenset({"cpu"}))
    calls = []
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: calls.append("moved") or x)
    assert exact(torch.ones(2)).dtype == torch.float64
    assert calls == ["moved"]


def test_a_module_computes_where_its_weights_lie():
    assert compute_device(nn.Linear(2, 2)) == torch.device("cpu")
    assert compute_device(nn.Linear(2, 2, device="meta")) == torch.device("meta")
    assert compute_device(nn.ReLU()) == torch.device("cpu")


def test_an_offloaded_module_computes_where_accelerate_says():
    part = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    accelerate.cpu_offload(part, execution_device=torch.device("cpu"))
    assert {p.device.type for p in part.parameters()} == {"meta"}
    assert compute_device(part) == torch.device("cpu")
    assert compute_devices(part) == {torch.device("cpu")}


def test_a_bare_number_is_an_accelerator(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: None)
    assert module_devices._as_device(1) == torch.device("cuda", 1)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    assert module_devices._as_device(0) == torch.device("mps", 0)


def test_a_seed_leaves_the_random_state_of_mps_as_it_was(monkeypatch):
    """There is none here: the calls that it would get are noted."""
    calls = []
    for name in ("manual_seed", "get_rng_state", "set_rng_state"):
        monkeypatch.setattr(torch.mps, name, lambda *a, name=name: calls.append((name, *a)) or "s")
    monkeypatch.setattr(generation, "compute_devices", lambda _model: {torch.device("mps", 0)})
    architecture = Architecture(families.build("llama"))
    with pytest.raises(RuntimeError, match="stop"), generation.seeded(architecture, 7):
        raise RuntimeError("stop")
    assert calls == [("get_rng_state",), ("manual_seed", 7), ("set_rng_state", "s")]


# --- Another device -------------------------------------------------------------------------------


def python(*arguments):
    """What a process of its own prints: a pretended device stays for as long as a process lives."""
    paths = os.pathsep.join([str(HERE.parent), str(HERE)])
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=HERE, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def trials(family, chosen):
    return json.loads(python("accelerator_trials.py", family, chosen).splitlines()[-1])


def assert_alike(found):
    wrong = {name: each for name, each in found.items() if isinstance(each, str)}
    assert wrong == {}
    off = {name: each for name, each in found.items() if each is not None and each > 1e-4}
    assert off == {}


pretended = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this version of PyTorch cannot pretend a device",
)

RULES = """
import torch
from fake_accelerator import DEVICE, accelerator
with accelerator():
    x = torch.ones(2, device=DEVICE)
    here = torch.tensor([0])
    for wrong in (lambda: x + torch.ones(2), x.double, x.numpy, lambda: x.index_select(0, here)):
        try:
            wrong()
        except (TypeError, RuntimeError):
            continue
        raise SystemExit("allowed")
    assert (x.cpu() + torch.ones(2)).device.type == "cpu"
    (2 * x.requires_grad_()).sum().backward()
    print(x.device, x.tolist(), float(x.sum()), x[here].device, x.grad.device, x.grad.tolist())
"""


@pretended
def test_the_pretended_device_has_its_rules():
    """A test of the test: two devices do not meet, and float64 is refused."""
    assert python("-c", RULES) == "fake:0 [1.0, 1.0] 2.0 fake:0 fake:0 [2.0, 2.0]"


@pretended
def test_analyses_run_on_a_device_without_float64():
    """Nothing lies on the CPU by mistake, and nothing asks for float64: CUDA's and MPS's rules."""
    found = trials("llama", "quick")
    assert len(found) >= 14
    assert None not in found.values()
    assert_alike(found)


@pretended
@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "llama", "gptj", "gemma2", "mixtral", "mamba"])
def test_every_analysis_runs_on_a_device_without_float64(family):
    found = trials(family, "more")
    assert sum(each is not None for each in found.values()) >= 15
    assert_alike(found)


@pretended
@pytest.mark.slow  # tests/test_layout.py looks at every call of a factory each time
@pytest.mark.parametrize("family", ["gpt2", "llama", "bloom"])
def test_the_default_device_may_be_another(family):
    """What the user sets with ``torch.set_default_device`` gets none of the toolkit's tables."""
    found = trials(family, "calls")
    assert set(found) == set(CALLS)
    assert None not in found.values()
    assert_alike(found)
