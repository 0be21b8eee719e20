"""Ours beside TransformerLens, nnsight and pyvene: time, memory, numbers, and the user's model.

    python benchmarks/peers.py [--models demo gqa gpt2-small] [--toolkits …] [--rounds 5] [--write]
                               [--python transformer_lens=/other/bin/python …] [--device cuda]

Each toolkit has a process of its own (of another interpreter where ``--python`` says so), which
stays for all rows of a model; the processes take turns, one call each per round, each round begun
by another, and only one works at a time. A row is first run once and compared with plain Hugging
Face and PyTorch hooks, in float32 and in float64; that first call is reported apart. Then come the
rounds: median, lowest and highest. A first call longer than `LONG` seconds counts as a round, and a
row stops once its rounds have taken `ENOUGH` seconds. `peer_toolkits.py` says which calls of a
toolkit are used.

``--write`` puts the tables between the markers in RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from peer_models import MODELS, make_folder
from peer_toolkits import ROWS, TOOLKITS

HERE = Path(__file__).parent
RESULTS = HERE / "RESULTS.md"
BEGIN, END = "<!-- peers: begin -->", "<!-- peers: end -->"
LONG = 2.0
ENOUGH = 20.0
PATIENCE = 240.0
"""Seconds after which a process that does not answer is ended; its rows then say so."""
TITLES = {
    "load": "loading from a folder",
    "wrap": "taking a loaded model",
    "forward": "forward, nothing attached",
    "record": "record 4 sites of every block, and logits",
    "lens": "lens, top 10 of every layer and token",
    "sweep": "`resid_pre` sweep, every layer and token",
    "heads": "head sweep, every head",
    "steer": "steered generation",
}


# --- Workers --------------------------------------------------------------------------------------


class Process:
    """A worker under way."""

    def __init__(self, python: str, arguments: Sequence[str], log: Path) -> None:
        self._log = log.open("w")
        self._process = subprocess.Popen(
            [python, str(HERE / "peer_worker.py"), *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
        )  # fmt: skip
        self.log = log

    def ask(self, do: str, row: str = "") -> dict[str, Any]:
        """Send a command and wait for the answer; a process that ended is an error."""
        pipe_in, pipe_out = self._process.stdin, self._process.stdout
        assert pipe_in is not None and pipe_out is not None
        clock = threading.Timer(PATIENCE, self._process.kill)
        try:
            pipe_in.write(json.dumps({"do": do, "row": row}) + "\n")
            pipe_in.flush()
            clock.start()
            line = pipe_out.readline()
        except BrokenPipeError:
            line = ""
        finally:
            clock.cancel()
        if not line:
            last = self.log.read_text().strip().splitlines()
            return {"error": f"the process ended: {last[-1] if last else 'no message'}"}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End it."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait(timeout=60)
        self._log.close()


@dataclass
class Measured:
    """One toolkit's calls of one row on one model."""

    first: float = float("nan")
    """Seconds of the first call."""
    seconds: list[float] = field(default_factory=list)
    peaks: list[float] = field(default_factory=list)
    """MiB above the start of the call."""
    off32: float | None = None
    """Largest difference from plain hooks in float32."""
    off64: float | None = None
    """The same from plain hooks in float64."""
    up_to: float | None = None
    """Largest value there."""
    error: str = ""

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    def take_first(self, answer: Mapping[str, Any]) -> None:
        """Note what `check` answered."""
        self.error = answer.get("error", "")
        if self.error:
            return
        self.first = answer["seconds"]
        self.off32, self.off64 = answer.get("off32"), answer.get("off64")
        self.up_to = answer.get("up_to")
        if self.first > LONG:
            self.take(answer)

    def take(self, answer: Mapping[str, Any]) -> None:
        """Note what `time` answered."""
        self.error = answer.get("error", "")
        if not self.error:
            self.seconds.append(answer["seconds"])
            self.peaks.append(answer["peak"])


@dataclass
class ModelRun:
    """All toolkits on one model."""

    model: str
    rows: dict[str, dict[str, Measured]] = field(default_factory=dict)
    """Row, toolkit."""
    imports: dict[str, float] = field(default_factory=dict)
    """Seconds to import the toolkit after torch and transformers."""
    versions: dict[str, str] = field(default_factory=dict)
    changed: dict[str, list[str] | str] = field(default_factory=dict)
    """What of the user's model is no longer the same, or the error."""


def run_model(
    name: str, toolkits: Sequence[str], pythons: Mapping[str, str], rounds: int, options: Any
) -> ModelRun:
    """Measure every row of one model."""
    run = ModelRun(name)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_folder(name, folder)
        common = [name, place, options.device, str(options.threads)]
        workers: dict[str, Process] = {}
        started: dict[str, dict[str, Any]] = {}
        try:
            for kit in toolkits:  # one by one, so that no import is slowed down by another
                python = pythons.get(kit, sys.executable)
                workers[kit] = Process(python, [kit, *common], folder / f"{kit}.log")
                started[kit] = workers[kit].ask("start")
                run.imports[kit] = started[kit].get("seconds", float("nan"))
                run.versions[kit] = started[kit].get("version", started[kit].get("error", ""))
            workers["plain"].ask("reference")
            able = {kit: w for kit, w in workers.items() if "error" not in started[kit]}
            for row in ROWS:
                run.rows[row] = measure_row(row, able, rounds)
                for kit, each in run.rows[
                    row
                ].items():  # so that a run cut short has told something
                    line = _line(row, kit, each, run.rows[row].get("plain"))
                    print(f"{name} {line}", file=sys.stderr, flush=True)
            for kit, worker in able.items():
                answer = worker.ask("untouched")
                run.changed[kit] = answer.get("changed", answer.get("error", ""))
        finally:
            for worker in workers.values():
                worker.close()
    return run


def measure_row(row: str, workers: Mapping[str, Process], rounds: int) -> dict[str, Measured]:
    """The first call of every toolkit, then the rounds."""
    found = {kit: Measured() for kit in workers}
    for kit, worker in workers.items():
        found[kit].take_first(worker.ask("check", row))
    for turn in range(rounds):
        spent = sum(sum(each.seconds) for each in found.values())
        waiting = [k for k, each in found.items() if len(each.seconds) < rounds and not each.error]
        enough = all(len(found[kit].seconds) >= 2 for kit in waiting)
        if not waiting or (spent > ENOUGH and enough):
            break
        for kit in [*waiting[turn % len(waiting) :], *waiting[: turn % len(waiting)]]:
            found[kit].take(workers[kit].ask("time", row))
    return found


# --- Tables ---------------------------------------------------------------------------------------


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}"


def _off(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}" if value else "0"


def _line(row: str, kit: str, each: Measured, plain: Measured | None) -> str:
    if each.error:
        text = each.error.replace("|", "\\|")
        return f"| {TITLES[row]} | {kit} | failed: {text} | | | | | | | |"
    ratio = f"{each.median / plain.median:.2f}" if plain and plain.seconds and row != "wrap" else ""
    spread = f"{_ms(min(each.seconds))} – {_ms(max(each.seconds))}"
    wrong = row == "steer"
    off32 = _tokens(each.off32) if wrong else _off(each.off32)
    off64 = _tokens(each.off64) if wrong else _off(each.off64)
    return (
        f"| {TITLES[row]} | {kit} | {_ms(each.median)} | {spread} | {len(each.seconds)} | "
        f"{_ms(each.first)} | {ratio} | {statistics.median(each.peaks):.1f} | {off32} | {off64} |"
    )


def _tokens(value: float | None) -> str:
    return "" if value is None else "other tokens" if value else "same tokens"


HEADER = (
    "| | toolkit | median ms | lowest – highest | n | first call ms | ÷ plain | peak MiB "
    "| Δ float32 | Δ float64 |\n|---|---|--:|--:|--:|--:|--:|--:|--:|--:|"
)


def model_table(run: ModelRun) -> str:
    """Every row of one model, a line for each toolkit."""
    recipe = MODELS[run.model]
    lines = [
        f"**{recipe.title}**; {recipe.text} tokens run, recorded and read; sweeps of "
        f"{recipe.pair} tokens; {recipe.new} tokens generated.",
        "",
        HEADER,
    ]
    for row, kits in run.rows.items():
        lines += [_line(row, kit, each, kits.get("plain")) for kit, each in kits.items()]
    sizes = {row: kits["plain"].up_to for row, kits in run.rows.items() if "plain" in kits}
    told = ", ".join(f"{row} {size:.3g}" for row, size in sizes.items() if size and row != "steer")
    return "\n".join([*lines, "", f"Largest values of the reference: {told}."])


def ahead(runs: Sequence[ModelRun]) -> str:
    """Every row in which a peer is ahead of ours, by time, peak memory or float64 difference."""
    lines = []
    for run in runs:
        for row, kits in run.rows.items():
            ours = kits.get("ours")
            if ours is None or ours.error:
                continue
            for kit, each in kits.items():
                if kit in ("ours", "plain") or each.error:
                    continue
                found = _leads(each, ours, row)
                if found:
                    lines.append(f"- {run.model}, {TITLES[row]}: {kit} {'; '.join(found)}")
    return "\n".join(lines) or "- nowhere"


def _leads(peer: Measured, ours: Measured, row: str) -> list[str]:
    found = []
    if peer.median < ours.median:
        found.append(f"takes {_ms(peer.median)} ms, ours {_ms(ours.median)}")
    if peer.first < ours.first:
        found.append(f"first call {_ms(peer.first)} ms, ours {_ms(ours.first)}")
    peaks = statistics.median(peer.peaks), statistics.median(ours.peaks)
    if f"{peaks[0]:.1f}" != f"{peaks[1]:.1f}" and peaks[0] < peaks[1]:
        found.append(f"peak {peaks[0]:.1f} MiB, ours {peaks[1]:.1f}")
    for name, theirs, mine in (
        ("float32", peer.off32, ours.off32), ("float64", peer.off64, ours.off64),
    ):  # fmt: skip
        if row != "steer" and theirs is not None and mine is not None and theirs < mine:
            found.append(f"off {name} by {_off(theirs)}, ours {_off(mine)}")
    return found


def startup_table(runs: Sequence[ModelRun]) -> str:
    """Versions, import times, and what became of the user's model."""
    lines = ["| toolkit | version | import s, each process | changed in the user's model |"]
    lines.append("|---|---|--:|---|")
    for kit in runs[0].versions:
        times = ", ".join(f"{run.imports[kit]:.2f}" for run in runs)
        changed = {run.model: run.changed.get(kit, "did not start") for run in runs}
        told = {
            model: (", ".join(what) or "nothing") if isinstance(what, list) else what
            for model, what in changed.items()
        }
        same = set(told.values())
        text = same.pop() if len(same) == 1 else "; ".join(f"**{m}** {t}" for m, t in told.items())
        lines.append(f"| {kit} | {runs[0].versions[kit]} | {times} | {text} |")
    return "\n".join(lines)


def processor() -> str:
    """The processor's model as the system names it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} cores, {names[0]}" if names else platform.processor() or "unknown"


def report(runs: Sequence[ModelRun], options: Any, load: str) -> str:
    """The whole section."""
    device = torch.cuda.get_device_name() if options.device == "cuda" else processor()
    return "\n\n".join([
        f"{device}; {options.threads} thread(s); Python {platform.python_version()}, torch "
        f"{torch.__version__}, transformers {transformers.__version__}; load of the machine before "
        f"the run {load}. Nothing is rounded but in its last digit.",
        startup_table(runs),
        *map(model_table, runs),
        "Where a peer is ahead of ours in this run, however little:",
        ahead(runs),
    ])  # fmt: skip


def write(text: str, path: Path = RESULTS) -> None:
    """Put the text between the markers.

    Raises:
        ValueError: the file has no markers.
    """
    whole = path.read_text()
    if BEGIN not in whole or END not in whole:
        raise ValueError(f"{path.name} lacks the markers {BEGIN} and {END}")
    head, tail = whole.split(BEGIN)[0], whole.split(END)[1]
    path.write_text(f"{head}{BEGIN}\n\n{text}\n\n{END}{tail}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    known = [name for name in MODELS if name not in ("tiny", "llama-300m")]
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=known)
    parser.add_argument("--toolkits", nargs="+", choices=list(TOOLKITS), default=list(TOOLKITS))
    parser.add_argument("--python", nargs="+", default=[], metavar="TOOLKIT=PYTHON")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    load_file = Path("/proc/loadavg")
    load = load_file.read_text().split()[0] if load_file.exists() else "unknown"
    toolkits = list(dict.fromkeys(["plain", *options.toolkits]))
    pythons = dict(each.split("=", 1) for each in options.python)
    runs = [run_model(name, toolkits, pythons, options.rounds, options) for name in options.models]
    text = report(runs, options, load)
    print(text)
    if options.write:
        write(text)


if __name__ == "__main__":
    main()
