"""However a model was loaded, placed or wrapped, the numbers are those of the plain model.

`loading_trials.results` takes one number of every kind. Where the same kernels run on the same
values, results must agree to the bit.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import families
import model_check
import numeric_trials
from activation_extraction import ActivationExtractor
from architecture_check import ArchitectureReport, Proof
from forward_pass import ArchitectureError, Site, edit, record, recording
from intervention import compute_feature_attribution
from loading_trials import (
    DROPOUT,
    assert_same,
    checkpoint,
    cpu_offloaded,
    dequantized,
    disk_offloaded,
    mapped,
    partly_offloaded,
    quantized,
    quietly_import,
    results,
    torchao_config,
)
from model_analyzer import ModelAnalyzer
from model_architecture import Architecture
from model_inspection import weight_of, weights_of
from model_loader import DEMO_MODEL, ModelLoadError, load_model
from numeric_trials import CLEAN, apart, inputs
from patch_oracle import hooks_on
from similarity import layer_similarity

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = ("gpt2", "llama", "gemma2", "mixtral", "mamba")


OTHER_ADDRESSES = 16 * torch.finfo(torch.float32).eps
"""Offloaded weights may lie at other addresses, where a product of matrices rounds differently:
Hugging Face's own generation then differs as well, by up to 5 roundings."""


def mostly_slow(quick, values):
    """Parameters of which the tests that run every time take one."""
    return [
        each if each == quick else pytest.param(each, marks=pytest.mark.slow) for each in values
    ]


@pytest.fixture(scope="module")
def plain():
    """The results of each family's plain model."""
    known = {}

    def of(name):
        if name not in known:
            known[name] = results(families.build(name))
        return known[name]

    return of


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    families.build("llama").save_pretrained(folder)
    families.tiny_tokenizer().save_pretrained(folder)
    return folder


# --- Where the weights lie ------------------------------------------------------------------------


@pytest.mark.parametrize("name", mostly_slow("llama", FAMILIES))
@pytest.mark.parametrize("way", [cpu_offloaded, disk_offloaded, partly_offloaded])
def test_offloaded_weights_give_the_same_numbers(name, way, plain, tmp_path):
    model = way(families.build(name), tmp_path)
    assert any(parameter.is_meta for parameter in model.parameters())
    before = {path: module.__dict__.get("forward") for path, module in model.named_modules()}
    assert_same(results(model), plain(name), OTHER_ADDRESSES)
    assert {p: m.__dict__.get("forward") for p, m in model.named_modules()} == before
    assert any(parameter.is_meta for parameter in model.parameters()), "they were put off again"


def test_a_device_map_with_a_part_on_disk(llama_folder, plain, tmp_path):
    model = mapped(Path(shutil.copytree(llama_folder, tmp_path / "llama")))
    assert model.model.layers[1].mlp.up_proj.weight.is_meta
    assert_same(results(model), plain("llama"), OTHER_ADDRESSES)


@pytest.mark.parametrize("way", [cpu_offloaded, disk_offloaded])
def test_weights_that_lie_elsewhere_are_fetched(way, tmp_path):
    here = families.build("llama")
    there = way(families.build("llama"), tmp_path)
    assert weights_of(there.model.layers[1]).keys() == weights_of(here.model.layers[1]).keys()
    for name, value in weights_of(here.model.layers[1]).items():
        assert torch.equal(weights_of(there.model.layers[1])[name], value)
    assert torch.equal(weight_of(there.lm_head), here.lm_head.weight)
    assert weight_of(there.lm_head, "bias") is None
    ours, theirs = (
        ModelAnalyzer(each, tokenizer=families.tiny_tokenizer()) for each in (there, here)
    )
    for read in (
        lambda a: a.copying_scores().values,
        lambda a: a.nearest_tokens(torch.ones(families.HIDDEN)).scores,
        lambda a: a.token_neighbors(" cat").scores,
        lambda a: a.head_weights(1).W_V.numpy(),
        lambda a: a.head_writes("the cat sat").values,
    ):
        assert (read(ours) == read(theirs)).all()
    assert ours.compare_models(here, ["the cat"]).weights.change.max() == 0


# --- Wrapped and unusual modes --------------------------------------------------------------------


@pytest.mark.parametrize("backend", mostly_slow("eager", ("eager", "aot_eager")))
@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_model_gives_the_same_numbers(backend, in_place, plain):
    model = families.build("llama")
    if in_place:
        model.compile(backend=backend)
        used = model
    else:
        used = torch.compile(model, backend=backend)
    with torch.no_grad():
        logits = used(**inputs()).logits  # compiled before the toolkit sees it
    assert_same(results(model), plain("llama"))
    analyzer = ModelAnalyzer(used, tokenizer=families.tiny_tokenizer())
    assert analyzer.model is model
    record = analyzer.extract_activations(list(CLEAN), return_logits=True)
    assert torch.equal(record.logits, numeric_trials.plain(families.build("llama"))[0])
    with torch.no_grad():
        assert torch.equal(used(**inputs()).logits, logits), "it is as it was"


def training(name, **more):
    """A model in training mode with dropout, but for one part of it, and its modes."""
    model = families.build(name, **DROPOUT[name], **more).train()
    Architecture(model).blocks[1].eval()
    with torch.no_grad():
        drawn = [model(**inputs()).logits for _ in range(2)]
    assert not torch.equal(*drawn), "dropout is on"
    return model, {path: module.training for path, module in model.named_modules()}


def is_checkpointed(model):
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def modes(model):
    return {path: module.training for path, module in model.named_modules()}


@pytest.mark.parametrize("name", mostly_slow("gpt2", DROPOUT))
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_in_training_gives_the_numbers_of_one_that_is_not(name, checkpointing, plain):
    model, before = training(name)
    if checkpointing:
        checkpoint(model)
    draws = torch.get_rng_state()
    expected = plain(name)
    found = results(model, passes_of_the_users_own=False)
    assert_same(found, {key: expected[key] for key in found})
    assert torch.equal(torch.get_rng_state(), draws), "nothing was drawn"
    assert modes(model) == before
    assert is_checkpointed(model) == checkpointing


def test_modes_are_put_back_after_an_error():
    model, before = training("gpt2")
    arch = Architecture(model)

    def fail(_value):
        raise RuntimeError("stop")

    for verb in (record, numeric_trials.plain):
        with pytest.raises(RuntimeError, match="stop"), edit(arch, {Site("resid_post", 1): fail}):
            verb(*((arch, inputs(), [Site("resid_post", 2)]) if verb is record else (model,)))
    extractor = ActivationExtractor(model, None)
    with pytest.raises(RuntimeError, match="stop"), edit(arch, {Site("mlp_out", 0): fail}):
        extractor.extract_activations(list(CLEAN))
    assert modes(model) == before
    assert not any(hooks_on(model).values())


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_gradients_under_checkpointing(name):
    """Blocks are run twice then, hooks and all."""
    expected = compute_feature_attribution(families.build(name), None, list(CLEAN), 1)
    model = families.build(name, **dict.fromkeys(DROPOUT[name], 0.0)).train()
    checkpoint(model)
    found = compute_feature_attribution(model, None, list(CLEAN), 1)
    assert [f for f, _ in found] == [f for f, _ in expected]
    assert [v for _, v in found] == [v for _, v in expected]
    plain = families.build(name)
    arch = Architecture(plain)
    site = Site("resid_post", 1)
    with recording(arch, [site], detach=False) as kept:
        logits = plain(**inputs(), use_cache=False).logits
    (slope,) = torch.autograd.grad(logits[0, -1, 40], kept[site])
    model.train()
    with recording(Architecture(model), [site], detach=False) as kept:
        logits = model(**inputs(), use_cache=False).logits
    (again,) = torch.autograd.grad(logits[0, -1, 40], kept[site])
    assert apart([again], [slope]) < 1e-6


def test_tied_embeddings_are_one_matrix(plain):
    model = families.build("llama_tied")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    untied = families.build("llama", seed=0)
    untied.load_state_dict(model.state_dict())
    untied.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    assert_same(results(model), results(untied))
    count = ModelAnalyzer(model, load_tokenizer=False).get_parameter_count()["total"]
    assert count == sum(p.numel() for p in untied.parameters()) - untied.lm_head.weight.numel()
    assert model.lm_head.weight is model.model.embed_tokens.weight


# --- Quantized ------------------------------------------------------------------------------------


def needs(package):
    """Skip a test where an optional package is not installed."""
    try:
        quietly_import(package)
    except ImportError:
        pytest.skip(f"{package} is not installed")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", mostly_slow("llama", ("llama", "gpt_neox")))
def test_torchao_weights_give_the_numbers_of_what_they_stand_for(name, bits):
    needs("torchao")
    model = quantized(families.build(name), bits)
    expected = dequantized(model)
    unquantized = families.build(name)
    gap = apart([numeric_trials.plain(expected)[0]], [numeric_trials.plain(unquantized)[0]])
    assert gap > 1e-3, "quantizing changes the model"
    with torch.no_grad():
        rounding = apart([model(**inputs()).logits], [expected(**inputs()).logits])
    assert rounding < 1e-5
    assert_same(results(model), results(expected), allowed=1e-4)
    kept = record(Architecture(model), inputs(), [Site("resid_post", 1)], logits=True)
    assert torch.equal(kept.logits, numeric_trials.plain(model)[0]), "its own numbers, to the bit"
    weight = weight_of(model.get_output_embeddings())
    assert torch.equal(weight, expected.get_output_embeddings().weight)
    analyzer = ModelAnalyzer(model, tokenizer=families.tiny_tokenizer())
    assert analyzer.check().passed
    near, theirs = (
        ModelAnalyzer(each, tokenizer=families.tiny_tokenizer()).nearest_tokens(torch.ones(32))
        for each in (model, expected)
    )
    assert (near.ids == theirs.ids).all()


@pytest.mark.filterwarnings("ignore")
def test_torchao_while_loading(llama_folder):
    needs("torchao")
    config = transformers.TorchAoConfig(torchao_config(8))
    model, _ = load_model(llama_folder, "cpu", quantization_config=config)
    assert "torchao" in type(model.model.layers[0].mlp.up_proj.weight.data).__module__
    assert_same(results(model), results(dequantized(model)), allowed=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_bitsandbytes_where_it_is(llama_folder):
    needs("bitsandbytes")
    config = transformers.BitsAndBytesConfig(load_in_8bit=True)
    model, _ = load_model(llama_folder, "cpu", quantization_config=config)
    kept = record(Architecture(model), inputs(), [Site("resid_post", 1)], logits=True)
    assert torch.equal(kept.logits, numeric_trials.plain(model)[0])


# --- Attention implementations --------------------------------------------------------------------


IMPLEMENTATIONS = ["eager", "sdpa", "flex_attention", "flash_attention_2"]


def built(name, implementation):
    """A model with that implementation; skips where this machine has none that runs."""
    try:
        model = families.build(name, attn_implementation=implementation)
        with torch.no_grad():
            model(**inputs())
    except Exception as err:
        if implementation in ("eager", "sdpa"):
            raise
        pytest.skip(f"{implementation}: {str(err).splitlines()[0][:120]}")
    return model


def test_the_list_of_implementations_is_not_empty():
    assert built("llama", "eager").config._attn_implementation == "eager"
    assert built("llama", "sdpa").config._attn_implementation == "sdpa"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", mostly_slow("llama", ("llama", "gpt2", "mistral")))
@pytest.mark.parametrize("implementation", mostly_slow("sdpa", IMPLEMENTATIONS[1:]))
def test_implementations_agree_within_rounding(name, implementation):
    """In float64: what is left between two of them is no rounding."""
    model = built(name, implementation)
    eager = families.build(name, attn_implementation="eager")
    wide = implementation == "sdpa"
    ours, theirs = (each.double() if wide else each for each in (model, eager))
    with numeric_trials.in_float64() if wide else torch.no_grad():
        found = [f(ours) for f in (numeric_trials.steered, numeric_trials.swept("resid_post"))]
        expected = [f(theirs) for f in (numeric_trials.steered, numeric_trials.swept("resid_post"))]
    allowed = numeric_trials.ROUNDING_64 if wide else 2e-5
    for one, other in zip(found, expected, strict=True):
        assert apart(one, other) <= allowed


class Calls:
    """Which implementations the registry was asked for, in a context."""

    def __init__(self, monkeypatch):
        self.seen = []
        registry = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
        real = type(registry).get_interface

        def spy(own, implementation, default):
            self.seen.append(implementation)
            return real(own, implementation, default)

        monkeypatch.setattr(type(registry), "get_interface", spy)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("implementation", mostly_slow("sdpa", IMPLEMENTATIONS[:3]))
def test_the_users_choice_runs_wherever_no_weights_are_needed(implementation, monkeypatch):
    model = built("llama", implementation)
    calls = Calls(monkeypatch)
    arch = Architecture(model)
    free = [name for name in arch.available_sites(1) if name != "attn_pattern"]
    record(arch, inputs(), [Site(name, 1) for name in free])
    results_without_patterns = (
        numeric_trials.resumed, numeric_trials.steered, numeric_trials.swept("head_out"),
        numeric_trials.generated, numeric_trials.batched, numeric_trials.lens_of_last,
    )  # fmt: skip
    for each in results_without_patterns:
        each(model)
    assert set(calls.seen) == {implementation}
    calls.seen.clear()
    record(arch, inputs(), [Site("attn_pattern", 1)])
    assert set(calls.seen) == {"eager"}
    assert model.config._attn_implementation == implementation
    calls.seen.clear()
    with torch.no_grad():
        model(**inputs())
    assert set(calls.seen) == {implementation}


def test_the_users_choice_is_put_back_after_an_error():
    model = families.build("llama", attn_implementation="sdpa")
    arch = Architecture(model)

    def fail(_value):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), edit(arch, {Site("attn_pattern", 1): fail}):
        assert model.config._attn_implementation == "eager"
        model(**inputs())
    assert model.config._attn_implementation == "sdpa"


# --- From a folder, alone -------------------------------------------------------------------------


class NoNetwork(RuntimeError):
    """What a socket raises in these tests."""


@pytest.fixture
def no_sockets(monkeypatch):
    """Not even a socket can be made; and hub calls are allowed, so that one would be noticed."""

    def refuse(*_args, **_kwargs):
        raise NoNetwork("the network was used")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)


def test_a_folder_needs_no_network(llama_folder, no_sockets):
    with pytest.raises(NoNetwork):
        socket.socket()
    analyzer = ModelAnalyzer(llama_folder, device="cpu")
    assert analyzer.generate("the cat", max_new_tokens=2).startswith("the cat")
    assert analyzer.check().passed
    analyzer.lens.run("the cat")
    ModelAnalyzer(llama_folder, device="cpu", load_for_generation=False)


def test_the_bundled_model_needs_no_network(no_sockets):
    assert ModelAnalyzer(device="cpu").get_num_layers() == 12


def test_the_offline_switch_is_respected(tmp_path):
    """A hub id with HF_HUB_OFFLINE=1: refused at once, no socket made."""
    code = """
import socket
from model_loader import DEMO_MODEL, ModelLoadError, load_model
def refuse(*_args, **_kwargs):
    raise SystemExit("the network was used")
socket.socket = socket.create_connection = socket.getaddrinfo = refuse
try:
    load_model("nobody/nothing", "cpu")
except ModelLoadError as err:
    print(err)
"""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-500:]
    assert "nobody/nothing (no folder here, so taken as a hub id)" in done.stdout


@pytest.fixture
def folder_with_code(tmp_path):
    """A model whose folder brings code, which leaves a mark where it runs."""
    folder, mark = tmp_path / "custom", tmp_path / "mark"
    families.build("llama").save_pretrained(folder)
    families.tiny_tokenizer().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["model_type"] = "own_llama"
    config["architectures"] = ["OwnForCausalLM"]
    config["auto_map"] = {
        "AutoConfig": "own.OwnConfig",
        "AutoModel": "own.OwnForCausalLM",
        "AutoModelForCausalLM": "own.OwnForCausalLM",
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "own.py").write_text(
        "from pathlib import Path\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        f"Path({str(mark)!r}).touch()\n"
        "class OwnConfig(LlamaConfig):\n"
        "    model_type = 'own_llama'\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n"
        "    config_class = OwnConfig\n",
        encoding="utf-8",
    )
    return folder, mark


@pytest.fixture
def module_cache(tmp_path, monkeypatch):
    """Where transformers copies code that it may run; not into the user's own cache."""
    for place in ("transformers.dynamic_module_utils", "transformers.utils.hub"):
        monkeypatch.setattr(f"{place}.HF_MODULES_CACHE", str(tmp_path / "modules"), raising=False)
    before = list(sys.path)
    yield
    sys.path[:] = before
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


@pytest.mark.parametrize("options", [{}, {"trust_remote_code": False}, {"trust_remote_code": None}])
def test_code_in_a_folder_is_not_run(folder_with_code, module_cache, options, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked the user"))
    folder, mark = folder_with_code
    with pytest.raises(ModelLoadError, match="if you trust that code, pass trust_remote_code=True"):
        load_model(folder, "cpu", **options)
    assert not mark.exists()


def test_code_in_a_folder_is_run_when_asked_for(folder_with_code, module_cache):
    folder, mark = folder_with_code
    model, _ = load_model(folder, "cpu", trust_remote_code=True)
    assert mark.exists()
    assert type(model).__name__ == "OwnForCausalLM"
    assert_same(results(model), results(families.build("llama")))


def test_a_known_family_does_not_run_the_code_beside_it(llama_folder, tmp_path):
    """Transformers' own class is taken then, also where the folder names another."""
    folder = Path(shutil.copytree(llama_folder, tmp_path / "llama"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["auto_map"] = {"AutoModelForCausalLM": "own.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "own.py").write_text("raise SystemExit('it ran')", encoding="utf-8")
    model, _ = load_model(folder, "cpu")
    assert type(model) is transformers.LlamaForCausalLM


# --- What is no decoder ---------------------------------------------------------------------------


SMALL = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL |= {"intermediate_size": 37}


def encoder():
    return transformers.BertModel(transformers.BertConfig(**SMALL))


def masked_language_model():
    return transformers.RobertaForMaskedLM(transformers.RobertaConfig(**SMALL))


def encoder_decoder():
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=99, **sizes))


REFUSED = {
    encoder: "is an encoder: its tokens see later ones; this toolkit analyses decoder-only",
    masked_language_model: "is an encoder: its tokens see later ones",
    encoder_decoder: "is an encoder-decoder; this toolkit analyses decoder-only language models",
}


@pytest.mark.parametrize("make", REFUSED)
def test_what_is_no_decoder_is_refused(make):
    model = make()
    modes_before = modes(model)
    with pytest.raises(ArchitectureError, match=REFUSED[make]):
        ModelAnalyzer(model, load_tokenizer=False)
    assert modes(model) == modes_before
    assert not any(hooks_on(model).values())


@pytest.mark.parametrize("make", REFUSED)
def test_a_folder_with_no_decoder_is_refused(make, tmp_path):
    make().save_pretrained(tmp_path)
    with pytest.raises((ArchitectureError, ModelLoadError), match="encoder"):
        load_model(tmp_path, "cpu", load_tokenizer=False)


# --- The command ----------------------------------------------------------------------------------


def check(*arguments):
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "model_loader", "check", *map(str, arguments)],
        cwd=ROOT, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_the_check_of_a_good_model(llama_folder):
    done = check(llama_folder, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "every proof holds"
    assert "torch 2" in lines[0] and "transformers 5" in lines[0]
    assert "llama" in done.stdout and "attention 'sdpa'" in done.stdout
    assert sum("passed" in line for line in lines) >= 7
    assert "FAILED" not in done.stdout


def test_the_check_of_no_decoder(tmp_path):
    encoder().save_pretrained(tmp_path)
    done = check(tmp_path, "--device", "cpu")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("error: BertLMHeadModel is an encoder")
    assert "Traceback" not in done.stderr


def test_the_check_of_what_cannot_be_checked(tmp_path, capsys):
    encoder_decoder().save_pretrained(tmp_path)
    wrong = {
        (str(tmp_path),): "is an encoder-decoder; this toolkit analyses decoder-only",
        (str(tmp_path / "nowhere"),): "error: there is no folder",
        (str(DEMO_MODEL), "--device", "gpu"): "there is no device 'gpu'",
        (str(DEMO_MODEL), "--dtype", "float7"): "there is no dtype 'float7'; write float32,",
    }
    for arguments, message in wrong.items():
        assert model_check.main(["check", *arguments]) == 2
        printed = capsys.readouterr()
        assert message in printed.err
        assert printed.out == "", arguments


def test_the_check_of_a_model_that_is_not_understood(monkeypatch, capsys):
    """Code 1 is a proof that fails, and nothing else."""
    report = ArchitectureReport("Odd", 1, (Proof("parts", 1.0, 1e-6),), ())
    monkeypatch.setattr(model_check, "check_architecture", lambda _architecture: report)
    assert model_check.main(["check", str(DEMO_MODEL), "--device", "cpu"]) == 1
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == "NOT UNDERSTOOD: a proof failed"


def test_similarity_of_an_offloaded_model(tmp_path):
    """A technique of a later row, to stand for them."""
    here, there = families.build("gpt2"), disk_offloaded(families.build("gpt2"), tmp_path)
    tokenizer = families.tiny_tokenizer()
    texts = ["the cat sat", "a cat is on"]
    ours, theirs = (layer_similarity(each, tokenizer, texts).values for each in (there, here))
    assert abs(ours - theirs).max() < 1e-6
