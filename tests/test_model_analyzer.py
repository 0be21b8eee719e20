"""The facade: the signatures that users rely on, one loaded model, and nothing written onto it."""

import inspect

import pytest
import torch
from transformers import AutoModelForCausalLM

import families
from activation_extraction import ActivationExtractor
from forward_pass import ArchitectureError, InputError, LayerError
from model_analyzer import ModelAnalyzer
from model_loader import DEMO_MODEL

REQUIRED = inspect.Parameter.empty
KEYWORDS = "**"

SIGNATURES = {
    "__init__": {"model_path": DEMO_MODEL, "device": None, "load_for_generation": True},
    "generate": {
        "prompt": REQUIRED,
        "max_new_tokens": 50,
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": 50,
        "return_activations": False,
        "seed": None,
        "generation_kwargs": KEYWORDS,
    },
    "extract_activations": {
        "prompt": REQUIRED,
        "layer_names": None,
        "layer_indices": None,
        "include_attention": False,
        "return_logits": False,
        "metadata": None,
    },
    "extract_batch_activations": {
        "prompts": REQUIRED,
        "layer_names": None,
        "layer_indices": None,
        "include_attention": False,
        "show_progress": True,
        "batch_size": 64,
    },
    "save_activations": {
        "record_or_records": REQUIRED,
        "output_path": REQUIRED,
        "format": "pickle",
    },
    "load_activations": {"path": REQUIRED},
    "logit_lens": {"text": REQUIRED, "layer_indices": None, "top_k": 10, "apply_ln": True},
    "print_logit_lens": {"text": REQUIRED, "layer_step": 1, "top_k": 5},
    "logit_lens_on_activation": {
        "record": REQUIRED,
        "layer_indices": None,
        "top_k": 10,
        "apply_ln": True,
        "token_position": -1,
    },
    "analyze_generation_token": {
        "prompt": REQUIRED,
        "target_token": None,
        "token_position": None,
        "max_new_tokens": 50,
        "layer_step": 1,
        "top_k": 5,
        "generation_kwargs": KEYWORDS,
    },
    "get_architecture_summary": {},
    "print_architecture_summary": {},
    "get_model_config": {},
    "get_parameter_count": {},
    "get_num_layers": {},
    "get_layer_names": {},
    "get_attention_layer_names": {},
    "get_mlp_layer_names": {},
    "get_layer_by_name": {"name": REQUIRED},
    "get_weights_by_layer": {"name": REQUIRED},
    "tokenize": {"text": REQUIRED},
    "decode": {"ids": REQUIRED},
    "get_tokens": {"text": REQUIRED},
}
"""Name, order and default of every argument; others may follow."""


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_those_that_users_write(name):
    parameters = list(inspect.signature(getattr(ModelAnalyzer, name)).parameters.values())[1:]
    of_keywords = [p.name for p in parameters if p.kind is p.VAR_KEYWORD]
    expected = {key: default for key, default in SIGNATURES[name].items() if default != KEYWORDS}
    found = {p.name: p.default for p in parameters[: len(expected)]}
    assert list(found.items()) == list(expected.items())
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters[: len(expected)])
    wanted = [key for key, default in SIGNATURES[name].items() if default == KEYWORDS]
    assert wanted in ([], of_keywords)
    others = [
        p for p in parameters[len(expected) :] if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]
    assert all(p.default is not REQUIRED for p in others), "what follows must be optional"


# --- Making one -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return families.tiny_tokenizer()


@pytest.fixture(scope="module")
def analyzer(tokenizer):
    return ModelAnalyzer(families.build("gpt2"), tokenizer=tokenizer)


@pytest.fixture(scope="module")
def folder(analyzer, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    analyzer.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_live_model_with_its_tokenizer(tokenizer):
    model = families.build("llama")
    analyzer = ModelAnalyzer(model, tokenizer=tokenizer)
    assert analyzer.model is model
    assert analyzer.config is model.config
    assert analyzer.tokenizer is tokenizer
    assert analyzer.device == torch.device("cpu")
    assert repr(analyzer) == "ModelAnalyzer('LlamaForCausalLM', 3 layers, cpu, torch.float32)"


def test_a_folder_gives_the_same_as_the_live_model(analyzer, folder):
    loaded = ModelAnalyzer(str(folder), "cpu", attn_implementation="eager")
    assert loaded.config._attn_implementation == "eager"
    assert loaded.generate("the cat", 5) == analyzer.generate("the cat", 5)


def test_the_weights_are_read_once(folder, monkeypatch):
    calls = []
    real = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *a, **k: calls.append(a) or real(*a, **k)
    )
    analyzer = ModelAnalyzer(folder, "cpu")
    analyzer.generate("the cat", 1)
    analyzer.extract_activations("the cat")
    analyzer.get_layer_by_name(0)
    analyzer.get_mlp_layer_names()
    analyzer.get_parameter_count()
    assert len(calls) == 1


def test_without_a_head(analyzer, folder):
    headless = ModelAnalyzer(folder, "cpu", load_for_generation=False)
    assert headless.get_layer_names() == analyzer.get_layer_names()
    assert headless.get_layer_by_name("transformer.h.1") is headless.model.h[1]
    expected = analyzer.extract_activations("the cat").layer_activations
    found = headless.extract_activations("the cat").layer_activations
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    for needs_head in (
        lambda: headless.generate("the cat"),
        lambda: headless.generate("the cat", return_activations=True),
        lambda: headless.extract_activations("the cat", return_logits=True),
        lambda: headless.logit_lens("the cat"),
    ):
        with pytest.raises(ArchitectureError, match="load_for_generation=True"):
            needs_head()


@pytest.mark.parametrize("live", [True, False])
def test_without_a_tokenizer_ids_do_and_text_says_what_is_missing(live, tmp_path):
    model = families.build("gpt2")
    model.save_pretrained(tmp_path)
    analyzer = ModelAnalyzer(model) if live else ModelAnalyzer(tmp_path, load_tokenizer=False)
    assert analyzer.tokenizer is None
    assert analyzer.extract_activations([5, 6]).tokens == ["<5>", "<6>"]
    assert analyzer.get_tokens([5, 6]) == ["<5>", "<6>"]
    for needs_tokenizer in (analyzer.tokenize, analyzer.generate, analyzer.extract_activations):
        with pytest.raises(InputError, match="pass tokenizer="):
            needs_tokenizer("the cat")


# --- Calls that only pass on ----------------------------------------------------------------------


def test_extraction_passes_every_argument_on(analyzer, tokenizer):
    options = {
        "layer_names": ["h.1"],
        "layer_indices": [-1],
        "include_attention": True,
        "return_logits": True,
        "positions": [1, 0],
        "sites": ("mlp_out",),
    }
    extractor = ActivationExtractor(analyzer.model, tokenizer)
    mine = analyzer.extract_activations("the cat", metadata={"label": 1}, **options)
    expected = extractor.extract_activations("the cat", metadata={"label": 1}, **options)
    (batched,) = analyzer.extract_batch_activations(
        ["the cat"], show_progress=False, batch_size=3, **options
    )
    for record in (mine, batched):
        assert record.positions == [1, 0]
        pairs = zip(record.tensors(), expected.tensors(), strict=True)
        assert all(a[:2] == b[:2] and torch.equal(a[2], b[2]) for a, b in pairs)
    assert mine.metadata == expected.metadata
    assert mine.metadata["label"] == 1


def test_records_go_through_a_file(analyzer, tmp_path):
    record = analyzer.extract_activations("the cat")
    analyzer.save_activations(record, tmp_path / "one.pkl", format="pickle")
    loaded = analyzer.load_activations(tmp_path / "one.pkl")
    assert loaded.tokens == record.tokens
    assert torch.equal(loaded.layer_activations[2], record.layer_activations[2])


def test_generation_passes_every_argument_on(analyzer):
    def sampled(top_p=0.9, top_k=5, seed=1):
        return analyzer.generate("the cat", 8, 9.0, top_p, top_k, False, seed)

    assert sampled() == sampled() != sampled(seed=2)
    greedy = analyzer.generate("the cat", 8)
    assert greedy == sampled(top_k=1) == sampled(top_p=0.001) != sampled()
    text, record = analyzer.generate("the cat", 8, 9.0, 0.9, 5, True, 1)
    assert text == record.prompt == sampled()
    assert analyzer.generate("the cat", 8, repetition_penalty=9.0) != greedy


def test_tokens_and_text(analyzer):
    ids = analyzer.tokenize("a cat sat")
    assert analyzer.get_tokens("a cat sat") == ["a", " cat", " sat"]
    for form in (ids, tuple(ids), torch.tensor(ids), torch.tensor([ids])):
        assert analyzer.decode(form) == "a cat sat"


def test_layers_by_every_spelling(analyzer):
    for name in (1, "1", -2, "h.1", "transformer.h.1"):
        assert analyzer.get_layer_by_name(name) is analyzer.model.transformer.h[1]
        assert "mlp.c_fc.weight" in analyzer.get_weights_by_layer(name)
    with pytest.raises(LayerError, match=r"valid are 0\.\.2"):
        analyzer.get_layer_by_name(7)


def test_the_check_of_the_architecture(analyzer):
    assert analyzer.check().passed


# --- Nothing is written onto the model or the tokenizer -------------------------------------------


def state_of(analyzer):
    """All that a user could find changed, tensors by their bits."""
    model, tokenizer = analyzer.model, analyzer.tokenizer
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    modules = dict(model.named_modules())
    return {
        "bits": {k: t.detach().numpy().tobytes() for k, t in tensors.items()},
        "writes": {k: t._version for k, t in tensors.items()},
        "gradients": {k: (t.requires_grad, t.grad) for k, t in tensors.items()},
        "config": model.config.to_dict(),
        "generation config": model.generation_config.to_dict(),
        "attention": model.config._attn_implementation,
        "training": {k: m.training for k, m in modules.items()},
        "attributes": {k: sorted(vars(m)) for k, m in modules.items()},
        "hooks": {
            k: [
                list(hooks) for hooks in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks)
            ]
            for k, m in modules.items()
        },
        "tokenizer": {k: repr(v) for k, v in vars(tokenizer).items() if k != "_tokenizer"},
        "tokenizer's backend": tokenizer.backend_tokenizer.to_str(),
        "padding": (tokenizer.pad_token, tokenizer.padding_side),
        "random state": torch.random.get_rng_state().tolist(),
    }


TEXTS = ["a cat sat on the mat", "the cat", "on it"]
CALLS = {
    "generate": lambda a: a.generate(TEXTS[0], 3),
    "sample": lambda a: a.generate(TEXTS[0], 3, temperature=1.0, seed=1),
    "record generation": lambda a: a.generate(TEXTS[0], 3, return_activations=True),
    "extract": lambda a: a.extract_activations(TEXTS[0], return_logits=True),
    "extract a part": lambda a: a.extract_activations(
        TEXTS[0], layer_indices=[0], positions="last"
    ),
    "extract attention": lambda a: a.extract_activations(TEXTS[0], include_attention=True),
    "extract a batch": lambda a: a.extract_batch_activations(TEXTS, show_progress=False),
    "logit_lens": lambda a: a.logit_lens(TEXTS[0]),
    "logit_lens_on_activation": lambda a: a.logit_lens_on_activation(
        a.extract_activations(TEXTS[0])
    ),
    "print_logit_lens": lambda a: a.print_logit_lens(TEXTS[0]),
    "analyze_generation_token": lambda a: a.analyze_generation_token(
        TEXTS[0], token_position=1, max_new_tokens=2
    ),
    "check": lambda a: a.check(),
    "print_architecture_summary": lambda a: a.print_architecture_summary(),
    "names": lambda a: (
        a.get_layer_names(),
        a.get_attention_layer_names(),
        a.get_mlp_layer_names(),
    ),
    "counts": lambda a: (a.get_parameter_count(), a.get_num_layers(), a.get_model_config()),
    "weights": lambda a: a.get_weights_by_layer(0),
    "tokens": lambda a: (a.decode(a.tokenize(TEXTS[0])), a.get_tokens(TEXTS[0])),
}


@pytest.fixture(scope="module", params=["gpt2", "gemma2", "bloom", "gpt_oss"])
def watched(request, tokenizer):
    """An analyzer whose model has marks of its user on it: a mode, a frozen part, a hook."""
    model = families.build(request.param)
    model.generation_config.update(do_sample=True, temperature=0.6)
    model.get_input_embeddings().weight.requires_grad_(False)
    first = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))[0]
    first.train()
    first.register_forward_hook(lambda *_: None)
    return ModelAnalyzer(model, tokenizer=tokenizer)


@pytest.mark.parametrize("call", CALLS)
def test_no_call_writes_onto_the_model_or_the_tokenizer(watched, call):
    before = state_of(watched)
    CALLS[call](watched)
    after = state_of(watched)
    assert [key for key in before if before[key] != after[key]] == []


def test_the_model_can_still_be_saved_and_loaded(watched, tmp_path):
    for call in ("extract attention", "record generation", "extract a part"):
        CALLS[call](watched)
    watched.model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = families.token_ids(1, 6)
    watched.model.eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, watched.model(ids).logits)
