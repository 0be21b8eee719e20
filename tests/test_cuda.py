"""On a real GPU: the CPU's numbers, Hugging Face's on the same GPU, and its memory's end.

Skipped where there is none. ``TEST_DEVICE=cpu`` tries the tests themselves without one.
"""

import copy
import os
import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import families
import numeric_trials
from activation_extraction import ActivationExtractor
from analysis_trials import MORE, QUICK, difference
from causal_tracing import trace_subject
from forward_pass import Site, SiteError, edit
from generation import generate
from loading_trials import assert_same, results
from long_calls import CALLS, same
from memory_estimate import estimate_memory
from memory_limits import NotEnoughMemoryError, SmallerBatchWarning
from model_analyzer import ModelAnalyzer
from model_architecture import Architecture
from model_loader import load_model
from numeric_trials import ROUNDING_64, TECHNIQUES, apart, applies, measure
from patch_oracle import assert_untouched, state_of
from test_threads import WORK, in_threads

DEVICE = os.environ.get("TEST_DEVICE") or ("cuda" if torch.cuda.is_available() else "")
pytestmark = pytest.mark.skipif(not DEVICE, reason="there is no GPU")
on_cuda = pytest.mark.skipif(not DEVICE.startswith("cuda"), reason="needs CUDA's allocator")
CPU_NUMBERS = 2e-4
"""Kernels of two devices add up in other orders; some results are differences of logits."""

DRAWN = {"generation", "steering sweep"}
"""Calls that draw with the device's own generator."""


def there(model):
    return copy.deepcopy(model).to(DEVICE)


# --- The CPU's numbers ----------------------------------------------------------------------------


def try_one(analysis, here, away):
    """The difference, the error, or None where the model has not what is asked for."""
    try:
        expected = analysis(here)
    except SiteError:
        return None
    except ValueError as err:
        fits = "no attention heads" in str(err) or "both prompts predict it" in str(err)
        return None if fits else f"on the CPU: {err}"
    try:
        return difference(expected, analysis(away))
    except Exception as err:  # noqa: BLE001  whatever it is, it is reported
        return f"{type(err).__name__}: {' '.join(str(err).split())[:300]}"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", families.FAMILIES)
def test_every_analysis_gives_the_cpus_numbers(name):
    model, tokenizer = families.build(name), families.tiny_tokenizer()
    here, away = (ModelAnalyzer(m, tokenizer=tokenizer) for m in (model, there(model)))
    before = state_of(away.model)
    found = {key: try_one(call, here, away) for key, call in {**QUICK, **MORE}.items()}
    assert_untouched(away.model, before)
    assert sum(each is not None for each in found.values()) >= 30
    wrong = {key: each for key, each in found.items() if isinstance(each, str)}
    off = [
        key for key, each in found.items() if isinstance(each, float) and not each <= CPU_NUMBERS
    ]
    wide = ModelAnalyzer(copy.deepcopy(model).double(), tokenizer=tokenizer) if off else here
    for key in off:  # is it rounding, as large on the CPU?
        own = difference({**QUICK, **MORE}[key](here), {**QUICK, **MORE}[key](wide))
        if not found[key] <= 4 * own + CPU_NUMBERS:
            wrong[key] = found[key], own
    assert wrong == {}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", families.FAMILIES)
def test_every_long_call_gives_the_cpus_numbers(name):
    model = families.build(name)
    away, off = there(model), {}
    for call in sorted(set(CALLS) - DRAWN):
        try:
            expected = CALLS[call](model)
        except ValueError:  # the model has not what is asked for
            continue
        try:
            found = CALLS[call](away)
            found = [f.cpu() if isinstance(f, torch.Tensor) else f for f in as_list(found)]
            same(found, as_list(expected), rtol=1e-3, atol=1e-3)
        except Exception as err:  # noqa: BLE001  whatever it is, it is reported
            off[call] = f"{type(err).__name__}: {' '.join(str(err).split())[:300]}"
    assert off == {}


def as_list(found):
    return list(found) if isinstance(found, list | tuple) else [found]


# --- Hugging Face's numbers on the same device ----------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", families.FAMILIES)
def test_what_differs_is_rounding(name, dtype):
    model = there(families.build(name).to(numeric_trials.DTYPES[dtype]))
    off = {}
    with torch.device(DEVICE):  # where the trials make their inputs
        for technique in TECHNIQUES:
            if not applies(technique, model):
                continue
            try:
                found = measure(technique, model)
            except Exception as err:  # noqa: BLE001  whatever it is, it is reported
                off[technique] = f"{type(err).__name__}: {' '.join(str(err).split())[:300]}"
                continue
            exact = TECHNIQUES[technique].exact
            beyond = found.ours_off > 3 * found.theirs_off + ROUNDING_64
            if found.between_64 > ROUNDING_64 or (exact and not found.same_bits) or beyond:
                off[technique] = found
    assert off == {}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention", "flash_attention_2"])
def test_attention_implementations_agree(implementation):
    config = LlamaConfig(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=96, vocab_size=99, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    eager = AutoModelForCausalLM.from_config(config).to(DEVICE).eval()
    model = copy.deepcopy(eager)
    try:
        model.set_attn_implementation(implementation)
        model(input_ids=torch.tensor([[5, 6, 7]], device=DEVICE))
    except Exception as err:  # noqa: BLE001  not there, or not for float32
        pytest.skip(f"{implementation}: {str(err)[:200]}")
    for call in ("sweep", "pattern sweep", "lens", "extraction", "attention patterns", "paths"):
        same(CALLS[call](model), CALLS[call](eager), rtol=1e-3, atol=1e-4)
    assert model.config._attn_implementation == implementation


# --- Loading and placing --------------------------------------------------------------------------


def test_the_gpu_is_chosen_and_the_dtype_kept(tmp_path):
    families.build("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    families.tiny_tokenizer().save_pretrained(tmp_path)
    analyzer = ModelAnalyzer(str(tmp_path), device=None if DEVICE == "cuda" else DEVICE)
    assert analyzer.model.device.type == torch.device(DEVICE).type
    assert analyzer.model.dtype == torch.bfloat16
    assert analyzer.check().raise_if_failed() is None
    record = analyzer.extract_activations("the cat sat")
    for path in (tmp_path / "a.safetensors", tmp_path / "a.npz", tmp_path / "a.pt"):
        again = analyzer.load_activations(analyzer.save_activations(record, path))
        assert torch.equal(_first(again), _first(record))


def _first(record):
    return next(iter(record.layer_activations.values())).cpu()


@pytest.mark.filterwarnings("ignore")
def test_weights_on_gpu_cpu_and_disk(tmp_path):
    model = families.build("llama")
    model.save_pretrained(tmp_path / "model")
    gpu = 0 if DEVICE == "cuda" else DEVICE
    places = {"model.embed_tokens": gpu, "model.layers.0": gpu, "model.layers.1": "cpu"}
    places |= {"model.layers.2": "disk", "model.norm": gpu, "model.rotary_emb": gpu, "lm_head": gpu}
    mixed, _ = load_model(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "off", load_tokenizer=False
    )
    with torch.device(DEVICE):
        assert_same(results(mixed), results(there(model)), 1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_compiled_model_gives_the_same_numbers(name):
    model = there(families.build(name))
    with torch.device(DEVICE):
        expected = results(model)
        compiled = torch.compile(model)
        ids = torch.tensor([[5, 6, 7, 8]])
        with torch.no_grad():
            fast = compiled(input_ids=ids).logits
            assert_same(results(compiled), expected, 1e-5)
            assert apart([compiled(input_ids=ids).logits], [fast]) == 0.0


# --- Random numbers -------------------------------------------------------------------------------


@on_cuda
def test_a_seed_gives_the_same_text_and_leaves_the_random_state():
    architecture = Architecture(there(families.build("llama")))
    torch.manual_seed(1)
    before = torch.cuda.get_rng_state().clone(), torch.random.get_rng_state().clone()
    options = {"max_new_tokens": 12, "temperature": 1.0}
    texts = [generate(architecture, None, [5, 6, 7], seed=seed, **options) for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]
    after = torch.cuda.get_rng_state(), torch.random.get_rng_state()
    assert all(map(torch.equal, before, after))


def test_noise_is_drawn_alike_on_every_device():
    model = families.build("gpt2")
    options = {"answer": 20, "samples": 3, "seed": 5, "show_progress": False}
    one, other = (
        trace_subject(each, None, [5, 9, 12, 7], 1, **options).values
        for each in (model, there(model))
    )
    same(one, other, rtol=1e-3, atol=1e-3)


# --- Memory ---------------------------------------------------------------------------------------


def middling():
    """A model of 25 MiB of which a long batch takes a multiple."""
    config = LlamaConfig(
        hidden_size=256, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=1024, vocab_size=2000,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).to(DEVICE).eval()


@pytest.fixture
def little_memory():
    """A function that leaves this process so many bytes beyond what it holds."""

    def leave(nbytes):
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(
            (torch.cuda.memory_reserved() + nbytes) / total, 0
        )

    yield leave
    torch.cuda.set_per_process_memory_fraction(1.0, 0)
    torch.cuda.empty_cache()


@on_cuda
def test_a_batch_that_does_not_fit_is_halved(little_memory):
    model = middling()
    prompts = [families.token_ids(1, 256, vocab=2000, seed=n)[0].tolist() for n in range(128)]
    extractor = ActivationExtractor(model)
    options = {"positions": -1, "show_progress": False}
    expected = extractor.extract_batch_activations(prompts, batch_size=4, **options)
    before = state_of(model)
    little_memory(200 * 2**20)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = extractor.extract_batch_activations(prompts, batch_size=128, **options)
    torch.cuda.set_per_process_memory_fraction(1.0, 0)
    assert any(issubclass(each.category, SmallerBatchWarning) for each in said)
    for one, other in zip(found, expected, strict=True):
        assert apart([_first(one)], [_first(other)]) < 1e-5
    assert_untouched(model, before)


@on_cuda
def test_one_prompt_that_does_not_fit_is_an_error_with_the_number(little_memory):
    model = middling()
    prompts = [families.token_ids(1, 2000, vocab=2000)[0].tolist()]
    extractor, options = ActivationExtractor(model), {"show_progress": False}
    extractor.extract_batch_activations([[5, 6]], **options)
    before = state_of(model)
    little_memory(8 * 2**20)
    with pytest.raises(NotEnoughMemoryError, match="MiB"):
        extractor.extract_batch_activations(prompts, return_logits=True, **options)
    torch.cuda.set_per_process_memory_fraction(1.0, 0)
    assert_untouched(model, before)


@on_cuda
@pytest.mark.parametrize("attention", [False, True])
def test_the_estimate_is_near_what_is_used(attention):
    model = middling()
    extractor = ActivationExtractor(model)
    prompts = [families.token_ids(1, 256, vocab=2000, seed=n)[0].tolist() for n in range(32)]
    options = {"batch_size": 16, "include_attention": attention}
    expected = estimate_memory(Architecture(model), None, prompts, **options)
    extractor.extract_batch_activations(prompts[:2], **options, show_progress=False)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = extractor.extract_batch_activations(prompts, **options, show_progress=False)
    used = torch.cuda.max_memory_allocated() - before
    assert len(kept) == 32
    assert 0.6 < expected.needed / used < 1.7


@on_cuda
def test_one_token_keeps_the_bytes_of_one_token():
    model = middling()
    prompts = [families.token_ids(1, 256, vocab=2000, seed=n)[0].tolist() for n in range(64)]
    extractor, options = ActivationExtractor(model), {"positions": -1, "show_progress": False}
    extractor.extract_batch_activations(prompts[:2], **options)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    kept = extractor.extract_batch_activations(prompts, **options)
    torch.cuda.synchronize()
    held, exact = torch.cuda.memory_allocated() - before, 64 * 6 * 256 * 4
    assert len(kept) == 64
    assert held <= exact + 64 * 6 * 512  # the allocator's blocks are of 512 bytes


# --- Threads, edits -------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_two_threads_on_one_model_do_not_mix():
    model = there(families.build("llama"))
    expected = {work: CALLS[work](model) for work in WORK}
    orders = [WORK, WORK[::-1]]
    found = in_threads(*(lambda o=order: [(w, CALLS[w](model)) for w in o] for order in orders))
    for each in found:
        for work, result in each:
            same(result, expected[work], rtol=1e-3, atol=1e-3)


def test_an_edit_may_give_a_tensor_of_the_models_device():
    model = there(families.build("gpt2"))
    arch, ids = Architecture(model), torch.tensor([[5, 6, 7]], device=DEVICE)
    vector = torch.randn(arch.d_model, device=DEVICE)
    with torch.no_grad():
        with edit(arch, {Site("resid_post", 1): lambda value: value + vector}):
            found = model(input_ids=ids).logits
        handle = model.transformer.h[1].register_forward_hook(
            lambda _m, _a, out: (
                (out[0] + vector, *out[1:]) if isinstance(out, tuple) else out + vector
            )
        )
        expected = model(input_ids=ids).logits
        handle.remove()
    assert torch.equal(found, expected)
