"""One toolkit and one model in a process of its own, driven by `peers.py` through JSON lines.

    python benchmarks/peer_worker.py TOOLKIT MODEL FOLDER DEVICE THREADS

Each line of input is ``{"do": "start" | "reference" | "check" | "time" | "untouched", "row": …}``;
each line of output is the answer, ``{"error": …}`` where something was raised. What libraries print
goes to the error stream.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(1, str(Path(__file__).parent.parent))

import torch
from peer_models import load_plain, make_task
from peer_toolkits import ROWS, TOOLKITS, Plain, Toolkit
from torch import Tensor, nn
from transformers import AutoTokenizer

REFERENCE = "reference.pt"
CLEAR = Path("/proc/self/clear_refs")


# --- Peak memory ----------------------------------------------------------------------------------


def _kilobytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


class Peak:
    """Memory at its highest above where it was at the start, in MiB.

    On CUDA what PyTorch allocated, on Linux resident memory, elsewhere the growth of its maximum.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        gc.collect()
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        elif CLEAR.exists():
            getattr(ctypes.CDLL(None), "malloc_trim", lambda _pad: None)(0)  # freed heap goes back
            CLEAR.write_text("5")  # the peak counts from here
            self.before = _kilobytes("VmRSS")
        else:
            self.before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def grown(self) -> float:
        """MiB so far."""
        if self.device == "cuda":
            return float((torch.cuda.max_memory_allocated() - self.before) / 2**20)
        if CLEAR.exists():
            return (_kilobytes("VmHWM") - self.before) / 2**10
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self.before) / 2**10


# --- Whether a model is what it was ---------------------------------------------------------------


def _hash(tensor: Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().flatten()
    return hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest()


def _calls(model: nn.Module) -> list[tuple[str, str]]:
    tables = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [
        (name, f"{table} {len(getattr(module, table))}")
        for name, module in model.named_modules()
        for table in tables
        if getattr(module, table)
    ]


_PLAIN = (bool, int, float, str, type(None))


def fingerprint(model: nn.Module, ids: Tensor) -> dict[str, Any]:
    """Everything of a model that a tool might change; `differences` compares two."""
    modules = list(model.named_modules())
    with torch.no_grad():
        logits: Any = model(ids)
    logits = getattr(logits, "logits", logits)
    return {
        "names of weights": sorted(model.state_dict()),
        "values of weights": {
            _hash(value) for value in [*model.state_dict().values(), *model.buffers()]
        },
        "module classes": [(n, f"{type(m).__module__}.{type(m).__qualname__}") for n, m in modules],
        "module attributes": {(n, key) for n, m in modules for key in m.__dict__},
        "attribute values": [
            (n, k, v) for n, m in modules for k, v in m.__dict__.items() if isinstance(v, _PLAIN)
        ],
        "hooks": sorted(hook for _, hook in _calls(model)),
        "requires_grad": sorted({p.requires_grad for p in model.parameters()}),
        "config": json.dumps(
            {**model.config.to_dict(), "attention": model.config._attn_implementation},  # type: ignore[union-attr, operator]
            default=str, sort_keys=True,
        ),
        "logits": _hash(logits),
    }  # fmt: skip


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Names of what is no longer the same, with the attributes that modules got.

    Values of weights have changed where one that was there is gone; more of them are a matter of
    names.
    """
    found = []
    for name, value in before.items():
        now = after[name]
        if name == "values of weights" and value <= now:
            continue
        if name == "module attributes" and (new := sorted({key for _, key in now - value})):
            name = f"module attributes (new: {', '.join(new[:4])}{', …' if new[4:] else ''})"
        elif name == "hooks":
            name = f"hooks ({len(value)} modules had some, {len(now)} have)"
        elif name == "requires_grad":
            name = f"requires_grad ({value} to {now})"
        if now != value:
            found.append(name)
    return found


# --- Comparing and measuring ----------------------------------------------------------------------


def as_tensors(result: Any) -> list[Tensor]:
    """A row's result as float64 tensors on the CPU."""
    found = [result] if isinstance(result, Tensor) else list(result)
    return [tensor.detach().double().cpu() for tensor in found]


def own_version() -> str:
    """The commit that is measured, and whether the tree differs from it."""
    root = Path(__file__).resolve().parent.parent
    git = ["git", "-C", str(root)]
    asked = ([*git, "rev-parse", "--short", "HEAD"], [*git, "status", "--porcelain", "-uno"])
    try:
        commit, changes = (
            subprocess.run(a, capture_output=True, text=True, check=True) for a in asked
        )
    except (OSError, subprocess.CalledProcessError):
        return "no git repository"
    return f"commit {commit.stdout.strip()}{' with changes' if changes.stdout.strip() else ''}"


def largest_difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """Over all tensors; axes of size 1 in front do not count, a wrong shape is an error."""
    if len(found) != len(expected):
        raise ValueError(f"{len(found)} tensors where the reference has {len(expected)}")
    pairs = [(a.squeeze(), b.squeeze()) for a, b in zip(found, expected, strict=True)]
    for a, b in pairs:
        if a.shape != b.shape:
            raise ValueError(f"shape {tuple(a.shape)} where the reference has {tuple(b.shape)}")
    return max(float((a - b).abs().max()) for a, b in pairs)


@contextmanager
def _collector_off() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class Worker:
    """Answers the commands."""

    def __init__(self, toolkit: str, model: str, folder: Path, device: str) -> None:
        self.name, self.model_name, self.folder, self.device = toolkit, model, folder, device
        self.before: dict[str, Any] = {}
        self.toolkit: Toolkit

    def start(self, _row: str) -> dict[str, Any]:
        """Import the toolkit and make the inputs."""
        began = time.perf_counter()
        self.toolkit = TOOLKITS[self.name]()
        seconds = time.perf_counter() - began
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        model = load_plain(self.folder, self.device)
        self.toolkit.task = make_task(self.model_name, model, self.device)
        package = self.toolkit.package
        return {
            "seconds": seconds,
            "version": own_version() if package == "ours" else version(package),
        }

    def reference(self, _row: str) -> dict[str, Any]:
        """Write every row by plain hooks, in float32 and in float64."""
        kept = {}
        for dtype in (torch.float32, torch.float64):
            plain = Plain()
            plain.wrap(load_plain(self.folder, self.device, dtype), self.tokenizer)
            plain.task = make_task(self.model_name, plain.model, self.device)
            with torch.no_grad():
                rows = {row: as_tensors(getattr(plain, row)()) for row in ROWS[2:]}
            kept[str(dtype)] = rows
        torch.save(kept, self.folder / REFERENCE)
        return {}

    def check(self, row: str) -> dict[str, Any]:
        """Run a row for the first time and compare it with the reference."""
        answer, result = self._run(row)
        if row in ROWS[2:]:
            kept = torch.load(self.folder / REFERENCE)
            found = as_tensors(result)
            answer["off32"] = largest_difference(found, kept["torch.float32"][row])
            answer["off64"] = largest_difference(found, kept["torch.float64"][row])
            answer["up_to"] = max(float(t.abs().max()) for t in kept["torch.float64"][row])
        return answer

    def time(self, row: str) -> dict[str, Any]:
        """Run a row once more."""
        return self._run(row)[0]

    def _run(self, row: str) -> tuple[dict[str, Any], Any]:
        call = self._call(row)
        with torch.no_grad():
            peak = Peak(self.device)
            with _collector_off():
                self._wait()
                began = time.perf_counter()
                result = call()
                self._wait()
                seconds = time.perf_counter() - began
            return {"seconds": seconds, "peak": peak.grown()}, result

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def _call(self, row: str) -> Callable[[], Any]:
        """What is timed; making a live model to wrap is not."""
        kit = self.toolkit
        if row == "load":
            return lambda: kit.load(self.folder, self.device)
        if row == "wrap":
            model = load_plain(self.folder, self.device)
            # the user's own hook, which must survive
            next(iter(model.children())).register_forward_hook(lambda *_: None)
            self.before = fingerprint(model, kit.task.text)
            self.user_model = model
            return lambda: kit.wrap(model, self.tokenizer)
        result: Callable[[], Any] = getattr(kit, row)
        return result

    def untouched(self, _row: str) -> dict[str, Any]:
        """What of the user's model has changed since before it was wrapped."""
        after = fingerprint(self.user_model, self.toolkit.task.text)
        return {"changed": differences(self.before, after)}

    def answer(self, command: dict[str, str]) -> dict[str, Any]:
        """Do one command; an exception is an answer too."""
        try:
            found: dict[str, Any] = getattr(self, command["do"])(command.get("row", ""))
        except Exception as error:  # noqa: BLE001 what a library raises is its row
            lines = f"{type(error).__name__}: {error}".splitlines()
            return {"error": lines[0]}
        return found


def main() -> None:
    """Read commands until the input ends."""
    toolkit, model, folder, device, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    answers = os.fdopen(os.dup(1), "w", buffering=1)  # a line at a time
    os.dup2(2, 1)  # libraries print too
    worker = Worker(toolkit, model, Path(folder), device)
    for line in sys.stdin:
        answers.write(json.dumps(worker.answer(json.loads(line))) + "\n")


if __name__ == "__main__":
    main()
