"""The tiny models are what they were asked to be: else every other test would prove little."""

import logging
import warnings

import pytest
import torch
from torch import nn

import families


@pytest.fixture(scope="module", params=families.FAMILIES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def model(name):
    return families.build(name)


def blocks_of(model, layers):
    return [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == layers]


def logits_of(model, length=24, **inputs):
    with torch.no_grad():
        return model(families.token_ids(2, length), **inputs).logits


def test_sizes_are_as_asked(name, model):
    config = model.config
    layers = families.FAMILIES[name].layers
    assert layers == (4 if name in {"gpt_neo", "gemma2", "gemma3", "gpt_oss"} else 3)
    assert (config.num_hidden_layers, config.hidden_size) == (layers, families.HIDDEN)
    assert name == "mamba" or config.num_attention_heads == families.HEADS
    assert blocks_of(model, layers), "no list of that many blocks"
    shape = (families.VOCAB, families.HIDDEN)
    assert tuple(model.get_input_embeddings().weight.shape) == shape
    assert tuple(model.get_output_embeddings().weight.shape) == shape
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert not model.training


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "mistral",
        "mixtral",
        "qwen3",
        "gemma2",
        "gemma3",
        "gpt_oss",
        "granite",
        "falcon_new",
    ],
)
def test_grouped_queries_have_fewer_key_heads(name):
    config = families.build(name).config
    key_heads = getattr(config, "num_kv_heads", None) or config.num_key_value_heads
    assert (config.num_attention_heads, key_heads) == (4, 2)


def test_head_size_is_not_always_hidden_over_heads():
    projection = families.build("qwen3").model.layers[0].self_attn.q_proj
    assert projection.weight.shape == (families.HEADS * 16, families.HIDDEN)


def test_a_config_typo_is_refused():
    with pytest.raises(ValueError, match=r"GPT2Config knows no \['n_heads'\]"):
        families.build("gpt2", n_heads=4)


def test_overrides_reach_the_model():
    assert families.build("llama", vocab_size=120).get_input_embeddings().weight.shape[0] == 120


def test_no_parameter_is_left_at_its_start(name, model):
    for path, parameter in model.named_parameters():
        for start in (0.0, 1.0):
            assert (parameter - start).abs().mean() > 0.1, f"{path} stays near {start}"
        assert parameter.std() > 0.1, f"{path} is nearly constant"


def test_tied_heads_are_tied():
    tied = {n for n in families.FAMILIES if is_tied(families.build(n))}
    assert tied == {"gpt2", "llama_tied", "gemma2", "gemma3"}


def is_tied(model):
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_blocks_add_about_as_much_as_the_stream_holds(name, model):
    """So that a wrong block, sublayer or layer index shows in every number."""
    ratios = []

    def hook(block, args, kwargs, output):
        before = args[0] if args else kwargs["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        ratios.append(((after - before).norm() / before.norm()).item())

    layers = families.FAMILIES[name].layers
    blocks = blocks_of(model, layers)[0]
    handles = [block.register_forward_hook(hook, with_kwargs=True) for block in blocks]
    logits_of(model)
    for handle in handles:
        handle.remove()
    assert len(ratios) == layers
    assert all(0.3 < ratio < 5 for ratio in ratios), ratios


def test_logits_are_large_and_vary(name, model):
    logits = logits_of(model)
    assert logits.isfinite().all()
    assert logits.std() > (5 if name == "gemma2" else 8)
    assert len(logits[0].argmax(-1).unique()) > 3
    everything = torch.ones(2, 24, dtype=torch.long)
    torch.testing.assert_close(logits_of(model, attention_mask=everything), logits)


def test_no_model_warns(name, monkeypatch):
    """Neither through `warnings` nor in the log, but for Mamba, which says that it is slow here."""
    said = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("transformers").addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ids = families.token_ids(2, 7)
            out = families.build(name).generate(ids, max_new_tokens=3, do_sample=False)
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert out.shape == (2, 10)
    assert [m for m in said if "reference PyTorch implementation" not in m] == []


def test_the_same_seed_gives_the_same_model(name, model):
    torch.manual_seed(123)
    state = torch.random.get_rng_state()
    again = families.build(name)
    assert torch.equal(torch.random.get_rng_state(), state), "the global state was used"
    for (path, ours), theirs in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs), path
    other = families.build(name, seed=1)
    assert not torch.equal(logits_of(other), logits_of(model))


def test_gemma2_caps_bite():
    """Both: without them the same weights give other logits."""
    capped = families.build("gemma2")
    cap = capped.config.final_logit_softcapping
    assert 0.99 * cap < logits_of(capped).abs().max() <= cap
    free = logits_of(families.build("gemma2", final_logit_softcapping=None))
    assert free.abs().max() > 2 * cap
    torch.testing.assert_close(cap * torch.tanh(free / cap), logits_of(capped))
    no_attention_cap = logits_of(families.build("gemma2", attn_logit_softcapping=None))
    assert (no_attention_cap - logits_of(capped)).abs().max() > 0.5


def test_multipliers_bite():
    for name, key in [
        ("granite", "embedding_multiplier"),
        ("granite", "residual_multiplier"),
        ("granite", "attention_multiplier"),
        ("granite", "logits_scaling"),
        ("cohere", "logit_scale"),
    ]:
        plain = families.build(name, **{key: 1.0})
        difference = (logits_of(plain) - logits_of(families.build(name))).abs().max()
        assert difference > 1, (name, key)


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3", "gpt_oss", "gpt_neo"])
def test_windows_bite(name):
    """A wide window gives the same first positions and other last ones."""
    key = "window_size" if name == "gpt_neo" else "sliding_window"
    wide = logits_of(families.build(name, **{key: 64}), length=10)
    narrow = logits_of(families.build(name), length=10)
    window = families.WINDOW
    torch.testing.assert_close(wide[:, :window], narrow[:, :window])
    assert (wide - narrow)[:, window:].abs().amax((0, 2)).min() > 0.1


def test_token_ids_are_reproducible_and_not_special():
    ids = families.token_ids(3, 50)
    assert ids.shape == (3, 50)
    assert ids.min() >= len(families.SPECIAL_TOKENS)
    assert ids.max() < families.VOCAB
    assert torch.equal(ids, families.token_ids(3, 50))
    assert not torch.equal(ids, families.token_ids(3, 50, seed=1))


def test_tokenizer_round_trip():
    tokenizer = families.tiny_tokenizer()
    assert len(tokenizer) == families.VOCAB
    text = "The cat sat on the mat, and 12 cats.\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.tokenize("cat cat") == ["c", "at", "Ġcat"]
    assert tokenizer.tokenize("é") == ["<unk>", "<unk>"]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (None, None, None)


def test_tokenizer_options():
    tokenizer = families.tiny_tokenizer(bos=True, eos=True, pad=True)
    batch = tokenizer(["the", "the cat"], padding=True, padding_side="left")
    assert [ids[0] for ids in batch.input_ids] == [tokenizer.pad_token_id, tokenizer.bos_token_id]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 3)
    assert len(families.tiny_tokenizer(85)) == 85
    with pytest.raises(ValueError, match="vocab_size=20"):
        families.tiny_tokenizer(20)
