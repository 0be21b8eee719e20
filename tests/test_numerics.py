"""Every dtype against Hugging Face's own output and plain hooks, by the float64 rule.

`numeric_trials` has each technique both ways. A difference counts as rounding if the same weights
in float64 leave none of it, and if the toolkit is then no farther from the truth than the other
way is; no tolerance is chosen by hand. What makes the very same calls must agree to the bit.
"""

import re
from pathlib import Path

import pytest
import torch

import families
import numeric_trials
from forward_pass import InputError, Site, record
from logit_lens import LogitLens
from model_architecture import Architecture
from model_loader import load_model
from numeric_trials import DTYPES, ROUNDING_64, TECHNIQUES, apart, applies, inputs, measure

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = ("gpt2", "llama", "gemma2", "granite", "cohere", "falcon_new", "mamba", "mixtral")
QUICK = {("llama", "bfloat16"), ("gpt2", "float32")}
"""The pairs that every run of the tests tries; the others are slow."""

MORE = 3
"""How many times farther from the truth another order of adding up may end, by chance."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Where each family lies, saved in float32."""
    known = {}

    def folder(name):
        if name not in known:
            known[name] = tmp_path_factory.mktemp(name)
            families.build(name).save_pretrained(known[name])
        return known[name]

    return folder


def load(folder, dtype):
    model, _ = load_model(folder, "cpu", load_tokenizer=False, dtype=DTYPES[dtype])
    if dtype == "float64":
        numeric_trials.runnable_in_float64(model)
    return model


PAIRS = [
    pytest.param(name, dtype, marks=[] if (name, dtype) in QUICK else pytest.mark.slow)
    for name in FAMILIES
    for dtype in DTYPES
]


@pytest.mark.parametrize(("name", "dtype"), PAIRS)
def test_what_differs_is_rounding(name, dtype, folders):
    model = load(folders(name), dtype)
    assert model.dtype == DTYPES[dtype]
    tried = [technique for technique in TECHNIQUES if applies(technique, model)]
    assert len(tried) >= 9
    for technique in tried:
        found = measure(technique, model)
        assert found.between_64 <= ROUNDING_64, f"{technique}: {found}"
        if TECHNIQUES[technique].exact:
            assert found.same_bits, f"{technique}: {found}"
        if found.ours_off == found.ours_off:
            assert found.ours_off <= MORE * found.theirs_off + ROUNDING_64, f"{technique}: {found}"


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_rule_tells_a_mistake_from_rounding(name):
    """A tenth of a percent off is less than bfloat16's rounding, and is found all the same."""
    model = families.build(name).to(torch.bfloat16)

    def wrong(model):
        logits, _ = numeric_trials.plain(model)
        return [logits * (1 + 1e-3)]

    def right(model):
        return [numeric_trials.plain(model)[0]]

    assert apart(wrong(model), right(model)) < torch.finfo(torch.bfloat16).eps
    wide = numeric_trials.as_float64(model)
    with numeric_trials.in_float64():
        assert apart(wrong(wide), right(wide)) > ROUNDING_64


def test_float64_is_not_reached_while_parts_compute_in_float32():
    """The reason for `in_float64`: Llama's norms are float32, whatever the dtype."""
    narrow = numeric_trials.as_float64(families.build("llama"))
    with torch.no_grad():
        half_wide = narrow(**inputs()).logits
        with numeric_trials.in_float64():
            wide = narrow(**inputs()).logits
    assert half_wide.dtype == wide.dtype == torch.float64
    assert ROUNDING_64 < apart([half_wide], [wide]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_lens_of_a_stream_that_is_wider_than_the_model(dtype):
    """Mamba keeps its residual stream in float32; rounded, the lens would be off by a rounding."""
    model = families.build("mamba").to(dtype)
    arch = Architecture(model)
    last = Site("resid_post", arch.n_layers - 1)
    kept = record(arch, inputs(), [last], logits=True)
    assert kept[last].dtype == arch.stream_dtype == torch.float32
    assert torch.equal(LogitLens(model).apply_lens_to_hidden_state(kept[last]), kept.logits)
    assert Architecture(families.build("llama").to(dtype)).stream_dtype == dtype
    assert Architecture(model.float()).stream_dtype == torch.float32


# --- float64, where transformers itself overflows -------------------------------------------------


@pytest.mark.parametrize("name", ["bloom", "gemma2"])
def test_padding_in_float64_is_refused_where_it_would_be_nan(name):
    model = families.build(name).double()
    ids, mask = torch.tensor([[7, 11, 15], [0, 7, 11]]), torch.tensor([[1, 1, 1], [0, 1, 1]])
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits
    assert not logits[1, 1:].isfinite().all(), "transformers can do it now: let it"
    with pytest.raises(InputError, match=r"NaN of padding in float64; .*batch_size=1"):
        Architecture(model).inputs(ids, mask)
    assert "attention_mask" in Architecture(model.float()).inputs(ids, mask)


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "qwen3"])
def test_patterns_of_a_padded_batch_in_float64(name):
    """They come from eager attention, whose float32 softmax must not overflow."""
    from activation_extraction import ActivationExtractor

    extractor = ActivationExtractor(families.build(name).double(), None)
    prompts = [[7, 11, 15, 6, 49], [7, 11, 30]]
    batch = extractor.extract_batch_activations(
        prompts, include_attention=True, return_logits=True, show_progress=False
    )
    for prompt, mine in zip(prompts, batch, strict=True):
        alone = extractor.extract_activations(prompt, include_attention=True, return_logits=True)
        ours = [mine.logits, *mine.attention_weights.values()]
        theirs = [alone.logits, *alone.attention_weights.values()]
        assert apart(ours, theirs) < 1e-6


# --- Where values become float64 ------------------------------------------------------------------


def test_float64_is_made_on_the_cpu_or_by_exact():
    """Apple's GPU has no float64: ``x.double()`` fails on it, and on nothing that tests run on."""
    found = [
        f"{path.name}:{number}: {line.strip()}"
        for path in sorted(ROOT.glob("*.py"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(r"(?<!\.cpu\(\))\.double\(\)", line) and path.name != "module_devices.py"
    ]
    assert found == [], "write module_devices.exact(x), or x.cpu().double()"
