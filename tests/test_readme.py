"""The Python blocks of the README and the guides run, in order, as a reader would run them.

Within one file the names of a block are there for the next. A model path like
`"../models/gpt2_model"` stands for the bundled model, and `<!-- no-run -->` on the line above a
block leaves it out. The blocks of a file run in an empty folder.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DEMO_MODEL = ROOT / "demo_model"
NOT_GUIDES = {"DECISIONS.md"}
PAGES = [
    ROOT / "README.md",
    *sorted(ROOT.glob("*_GUIDE.md")),
    *(p for p in sorted((ROOT / "docs").rglob("*.md")) if p.name not in NOT_GUIDES),
]

BLOCK = re.compile(
    r"(?P<skip><!-- no-run -->\s*\n)?"
    r"^(?P<indent>[ ]*)```python[^\n]*\n(?P<code>.*?)^(?P=indent)```[ ]*$",
    re.MULTILINE | re.DOTALL,
)
MODEL_PATH = re.compile(r"""(?P<quote>["'])(?:\.\.?/)*models/[\w./-]+(?P=quote)""")


@dataclass(frozen=True)
class Block:
    line: int
    """Where the code starts in its page, from 1."""
    code: str


def blocks_of(text):
    """Return the blocks to run."""
    found = []
    for match in BLOCK.finditer(text):
        if match["skip"]:
            continue
        indent = len(match["indent"])
        code = "".join(line[indent:] or "\n" for line in match["code"].splitlines(keepends=True))
        found.append(Block(text.count("\n", 0, match.start("code")) + 1, code))
    return found


def with_demo_model(code, folder=DEMO_MODEL):
    """Put the bundled model in the place of every model path."""
    return MODEL_PATH.sub(lambda _: repr(str(folder)), code)


OUTPUT = re.compile(r"<!-- output: start -->\n```text\n(.*?)```\n<!-- output: end -->", re.DOTALL)


def run(blocks, page, names=()):
    """Run blocks in one namespace; an error names the page and the line in it."""
    namespace = {"__name__": "__main__", **dict(names)}
    for block in blocks:
        lines_before = "\n" * (block.line - 1)
        code = compile(lines_before + with_demo_model(block.code), str(page), "exec")
        try:
            exec(code, namespace)
        except Exception as error:
            error.add_note(f"in the block at {page}:{block.line}")
            raise
    return namespace


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    from matplotlib import pyplot

    pyplot.close("all")


# A reader sees warnings too, and some blocks show one on purpose (few points for t-SNE).
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_runs(page, empty_folder):
    blocks = blocks_of(page.read_text(encoding="utf-8"))
    assert blocks or page.name != "README.md", "no Python block found"
    run(blocks, page)


SAMPLE = """# Title

```python
x = 1
```

```bash
exit 1
```

<!-- no-run -->
```python
raise RuntimeError
```

- indented:

  ```python
  if x:

      y = x + 1
  ```
"""


def test_blocks_share_names_and_keep_their_lines():
    blocks = blocks_of(SAMPLE)
    assert [block.line for block in blocks] == [4, 19]
    assert run(blocks, "sample.md")["y"] == 2


def test_an_error_names_its_line():
    with pytest.raises(ZeroDivisionError) as caught:
        run(blocks_of("text\n\n```python\nx = 1\n1 / 0\n```\n"), "sample.md")
    assert caught.traceback[-1].lineno + 1 == 5
    assert caught.value.__notes__ == ["in the block at sample.md:4"]


@pytest.mark.parametrize("path", ["../models/gpt2_model", "models/gpt2", "./models/a-b.c"])
def test_model_paths_become_the_demo_model(path):
    assert with_demo_model(f'A("{path}", x)', Path("/d")) == "A('/d', x)"
    assert with_demo_model("A('my/models')") == "A('my/models')"


def test_the_readme_shows_what_its_first_block_prints(empty_folder, capsys):
    """Differences of rounding, the last column of the proofs, vary with the processor."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = OUTPUT.search(text)
    assert shown, "the README's first block has no output"
    run(blocks_of(text)[:1], "README.md")

    def without_rounding(lines):
        return [re.sub(r"\d\.\de-\d\d", "…", line).rstrip() for line in lines.splitlines()]

    assert without_rounding(capsys.readouterr().out) == without_rounding(shown[1])
