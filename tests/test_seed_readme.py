"""Every block of the text that the toolkit was asked for runs, where that text is at hand."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from test_readme import DEMO_MODEL, ROOT, blocks_of, run

SEED = ROOT.parent / "shared" / "seed_readme.md"
BLOCKS = blocks_of(SEED.read_text(encoding="utf-8")) if SEED.exists() else []

pytestmark = pytest.mark.skipif(not BLOCKS, reason=f"{SEED.name} is not there")


def taken_for_granted():
    """Return the names that single blocks use without making them."""
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL)
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    words = ["king", "queen", "man", "woman"]
    ids = [tokenizer.encode(word, add_special_tokens=False)[0] for word in words]
    return {
        "model": model,
        "tokenizer": tokenizer,
        "tokens": words,
        "embeddings": model.get_input_embeddings().weight[ids].detach().numpy(),
        "some_activation": torch.zeros(model.config.n_embd),
        "inputs": tokenizer("The cat sat on the mat", return_tensors="pt"),
    }


def as_meant(code):
    """Fill what a block leaves open: an ellipsis for arguments, a path of a reader's own."""
    steering = '("Today I feel", ["I am happy"], ["I am sad"], max_new_tokens=5)'
    code = code.replace("generate_with_steering(...)", f"generate_with_steering{steering}")
    return code.replace('"path/to/model"', repr(str(DEMO_MODEL)))


@pytest.mark.slow  # t-SNE and UMAP of a whole embedding matrix
@pytest.mark.filterwarnings("default")
def test_every_block_runs(tmp_path, monkeypatch, subtests):
    """In order, so that a name made in one block is there for the next, as for a reader."""
    monkeypatch.chdir(tmp_path)
    names = taken_for_granted()
    for block in BLOCKS:
        if "from_pretrained(model_name)" in block.code:  # downloads GPT-2
            continue
        with subtests.test(line=block.line):
            meant = type(block)(block.line, as_meant(block.code))
            names |= taken_for_granted() | run([meant], SEED, names)
    from matplotlib import pyplot

    pyplot.close("all")
