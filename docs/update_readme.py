"""Write what the README's first block prints into the README, between its output markers.

Run as ``PYTHONPATH=. python docs/update_readme.py``; `tests/test_readme.py` compares.
"""

import contextlib
import io
import re
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"
MARKERS = ("<!-- output: start -->", "<!-- output: end -->")


def main() -> None:
    """Run the block and put its output in place."""
    text = README.read_text(encoding="utf-8")
    block = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert block is not None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(block[1], str(README), "exec"), {"__name__": "__main__"})
    shown = f"{MARKERS[0]}\n```text\n{printed.getvalue()}```\n{MARKERS[1]}"
    pattern = f"{MARKERS[0]}.*?{MARKERS[1]}"
    README.write_text(re.sub(pattern, lambda _: shown, text, flags=re.DOTALL), encoding="utf-8")


if __name__ == "__main__":
    main()
