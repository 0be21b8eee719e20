"""What starting costs: importing the toolkit, loading the bundled model, each in a fresh process.

Beside it stand the same folder read by plain Auto classes, and `import transformers.modeling_utils`
alone: the module under every model class of transformers, which no way to load a model goes round.
The clock starts after ``import torch, transformers``. Every round runs each way once, in turn; the
figures are medians in seconds, of wall time and of CPU time, which a busy machine blurs less.

    python benchmarks/bench_startup.py [--rounds 5]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

SCRIPT = """
import time
import torch, transformers
{before}
wall, cpu = time.perf_counter(), time.process_time()
{body}
print(time.perf_counter() - wall, time.process_time() - cpu)
"""

WAYS = {
    "import model_analyzer (goal ≤ 0.2)": ("", "import model_analyzer"),
    "ModelAnalyzer() after that (goal ≤ 2)": (
        "import model_analyzer",
        "model_analyzer.ModelAnalyzer(device='cpu')",
    ),
    "ModelInspector().get_architecture_summary()": (
        "from model_loader import ModelInspector",
        "ModelInspector().get_architecture_summary()",
    ),
    "plain Auto classes on the same folder": (
        "",
        "transformers.AutoTokenizer.from_pretrained('demo_model'); "
        "transformers.AutoModelForCausalLM.from_pretrained('demo_model')",
    ),
    "import transformers.modeling_utils": ("", "import transformers.modeling_utils"),
}
"""What is done before the clock starts, and what is timed."""


def seconds(before: str, body: str) -> tuple[float, float]:
    """Wall and CPU seconds of a statement in a fresh process."""
    script = SCRIPT.format(before=before, body=body)
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    wall, cpu = map(float, done.stdout.split()[-2:])
    return wall, cpu


def main() -> None:
    """Print the medians of each way."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
    for _ in range(rounds):
        for name, way in WAYS.items():
            times[name].append(seconds(*way))
    print(f"  {'':<46} {'wall':>6} {'CPU':>7}   median of {rounds}")
    for name, pairs in times.items():
        wall, cpu = map(statistics.median, zip(*pairs, strict=True))
        print(f"  {name:<46} {wall:6.2f} s {cpu:6.2f} s")


if __name__ == "__main__":
    main()
