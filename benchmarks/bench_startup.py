"""What starting costs: importing the toolkit, and loading the bundled model, in fresh processes.

Floor of the second: transformers importing its own modeling code and reading the same folder.
"""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import time
import torch, transformers
start = time.perf_counter()
{body}
print(time.perf_counter() - start)
"""
OURS = "import model_analyzer"
READY = f"{OURS}; start = time.perf_counter(); model_analyzer.ModelAnalyzer(device='cpu')"
PLAIN = (
    "from transformers import AutoModelForCausalLM, AutoTokenizer; "
    "AutoModelForCausalLM.from_pretrained('demo_model'); "
    "AutoTokenizer.from_pretrained('demo_model')"
)


def seconds(body: str, runs: int = 3) -> list[float]:
    """Seconds that a statement takes in a fresh process after torch and transformers, sorted."""
    script = SCRIPT.format(body=body)
    outputs = [
        subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
        for _ in range(runs)
    ]
    return sorted(float(output.stdout.split()[-1]) for output in outputs)


def main() -> None:
    """Print the seconds of each, run by run."""
    ways = {
        "import model_analyzer (goal ≤ 0.2)": OURS,
        "ModelAnalyzer() after that (goal ≤ 2)": READY,
        "floor: plain Auto classes on the same folder": PLAIN,
    }
    for name, body in ways.items():
        print(f"  {name:<46}", "  ".join(f"{value:.2f} s" for value in seconds(body)))


if __name__ == "__main__":
    main()
