"""The tuned lens: untrained it is the logit lens; training lowers KL on text that was held out."""

import math

import pytest
import torch
from torch.nn.functional import kl_div

import families
from array_files import write_arrays
from forward_pass import ArchitectureError, InputError, RecordFileError, Site, record
from logit_lens import LogitLens
from model_architecture import Architecture
from tuned_lens import KIND, TunedLens

CONTEXT = 16
TRAIN = families.token_ids(1, 60 * CONTEXT, seed=1)[0].tolist()
HELD_OUT = families.token_ids(1, 100, seed=2)[0].tolist()
OPTIONS = {"steps": 60, "batch_size": 8, "context": CONTEXT, "learning_rate": 5e-3}


@pytest.fixture(scope="module")
def architecture():
    return Architecture(families.build("gpt2"))


@pytest.fixture(scope="module")
def fitted(architecture):
    return TunedLens(**OPTIONS).fit(architecture, None, [TRAIN], show_progress=False)


def mean_kl(architecture, tuned=None, ids=HELD_OUT):
    """KL(final ‖ row) on held-out text, ``[row]``."""
    lens = LogitLens(architecture.model, tuned=tuned)
    return lens.run(ids, 1, metrics=("kl_divergence",)).metrics["kl_divergence"].mean(1)


# --- What it learns -------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"steps": 0}, {"steps": 2, "learning_rate": 0.0}])
def test_before_it_learns_it_is_the_logit_lens(architecture, options):
    tuned = TunedLens(context=CONTEXT, **options).fit(architecture, None, [TRAIN])
    plain, same = (LogitLens(architecture.model, tuned=t).run(HELD_OUT, 9) for t in (None, tuned))
    assert (plain.top_logits == same.top_logits).all()
    assert all((same.metrics[name] == table)[:, :-1].all() for name, table in plain.metrics.items())


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "cohere", "gptj"])
def test_kl_on_held_out_text_falls_at_every_row_but_the_last(name):
    """Also where soft-cap, scale, tuples or parallel blocks lie on the way."""
    architecture = Architecture(families.build(name))
    tuned = TunedLens(**OPTIONS).fit(architecture, None, [TRAIN], show_progress=False)
    before, after = mean_kl(architecture), mean_kl(architecture, tuned)
    assert (after[:-1] < 0.97 * before[:-1]).all()
    assert before[-1] == after[-1] == 0


def test_the_history_starts_at_the_logit_lens_and_falls(architecture, fitted):
    assert fitted.history_.shape == (OPTIONS["steps"], architecture.n_layers)
    assert (fitted.history_[-5:].mean(0) < fitted.history_[:5].mean(0)).all()
    one = TunedLens(steps=1, batch_size=1, context=CONTEXT).fit(
        architecture, None, [TRAIN[:CONTEXT]]
    )
    expected = mean_kl(architecture, ids=TRAIN[:CONTEXT])[:-1]
    torch.testing.assert_close(one.history_[0], torch.from_numpy(expected), rtol=1e-3, atol=1e-4)


def test_the_gradient_is_that_of_the_kl_by_hand(architecture):
    """One plain step of Adam goes against the sign of the gradient, by the learning rate."""
    ids = TRAIN[:CONTEXT]
    tuned = TunedLens(steps=1, batch_size=1, context=CONTEXT, learning_rate=1e-3)
    tuned.fit(architecture, None, [ids])
    inputs = architecture.inputs(torch.tensor([ids]))
    kept = record(architecture, inputs, [Site("resid_post", 0)], logits=True)
    bias = torch.zeros(families.HIDDEN, requires_grad=True)
    model = architecture.model
    logits = model.lm_head(model.transformer.ln_f(kept[Site("resid_post", 0)] + bias))
    target = kept.logits.log_softmax(-1)
    loss = kl_div(logits.log_softmax(-1), target, log_target=True, reduction="sum") / CONTEXT
    (gradient,) = torch.autograd.grad(loss, bias)
    clear = gradient.abs() > 1e-4
    assert clear.sum() > 10
    torch.testing.assert_close(
        tuned.bias_[1][clear], -1e-3 * gradient.sign()[clear], rtol=1e-2, atol=0
    )


def test_the_same_seed_gives_the_same_translators(architecture, fitted):
    state = torch.random.get_rng_state()
    again = TunedLens(**OPTIONS).fit(architecture, None, [TRAIN])
    assert torch.equal(again.weight_, fitted.weight_)
    assert torch.equal(again.bias_, fitted.bias_)
    other = TunedLens(**OPTIONS, seed=1).fit(architecture, None, [TRAIN])
    assert not torch.equal(other.weight_, fitted.weight_)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_every_row_of_text_is_seen_before_any_comes_again():
    rows = torch.arange(10)[:, None]
    batches = TunedLens(batch_size=5)._batches(rows)
    first, second = (
        [*next(batches).flatten().tolist(), *next(batches).flatten().tolist()] for _ in "12"
    )
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second


# --- The model is left alone ----------------------------------------------------------------------


def test_training_does_not_touch_the_model():
    model = families.build("llama")
    frozen = model.model.layers[0].mlp.up_proj.weight
    frozen.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    tuned = TunedLens(steps=3, context=CONTEXT).fit(Architecture(model), None, [TRAIN])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert [p is frozen for p in model.parameters()] == [
        not p.requires_grad for p in model.parameters()
    ]
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not tuned.weight_.requires_grad


def test_a_failure_in_training_puts_the_gradients_back(monkeypatch):
    model = families.build("gpt2")
    architecture = Architecture(model)
    len(architecture.structure)
    calls = []

    def fail_later(hidden, forward=model.lm_head.forward):
        calls.append(1)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return forward(hidden)

    monkeypatch.setattr(model.lm_head, "forward", fail_later)
    tuned = TunedLens(context=CONTEXT)
    with pytest.raises(KeyboardInterrupt):
        tuned.fit(architecture, None, [TRAIN])
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert tuned.rows_ == ()


def test_training_works_where_gradients_are_switched_off(architecture, fitted):
    with torch.no_grad():
        again = TunedLens(**OPTIONS).fit(architecture, None, [TRAIN])
    assert torch.equal(again.weight_, fitted.weight_)


def test_half_precision_is_trained_in_single(tmp_path):
    model = families.build("gpt2").bfloat16()
    tuned = TunedLens(steps=3, context=CONTEXT).fit(Architecture(model), None, [TRAIN])
    assert tuned.weight_.dtype == torch.float32
    assert tuned.translate("0", torch.zeros(2, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert math.isfinite(float(mean_kl(Architecture(model), tuned).mean()))


# --- Texts and arguments --------------------------------------------------------------------------


def test_texts_are_joined_by_their_tokens(architecture):
    tokenizer = families.tiny_tokenizer()
    texts = ["the cat sat on the mat", " and the cat sat", " on the mat again"] * 3
    ids = [token for text in texts for token in tokenizer(text)["input_ids"]]
    options = {"steps": 4, "context": 8}
    by_text = TunedLens(**options).fit(architecture, tokenizer, texts)
    by_ids = TunedLens(**options).fit(architecture, None, [ids])
    assert torch.equal(by_text.weight_, by_ids.weight_)


@pytest.mark.parametrize(
    ("options", "texts", "message"),
    [
        ({"context": 50}, [[1] * 49], "the texts have 49 tokens; one row takes context=50"),
        ({}, [], "the texts have 0 tokens"),
        ({"context": 4}, [[1] * 4, [1, 1, 1, 99]], "token id 99 is outside"),
        ({"context": 200}, [[1] * 200], "context holds 128"),
        ({"batch_size": 0}, [TRAIN], "batch_size must be at least 1; came 0"),
        ({"steps": -1}, [TRAIN], "steps must be at least 0"),
        ({"learning_rate": math.nan}, [TRAIN], "learning_rate must be at least 0"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(architecture, options, texts, message):
    with pytest.raises(InputError, match=message):
        TunedLens(**options).fit(architecture, None, texts)


def test_a_model_without_a_head_is_refused():
    headless = Architecture(families.build("gpt2").transformer)
    with pytest.raises(ArchitectureError, match="the tuned lens needs the language-model head"):
        TunedLens().fit(headless, None, [TRAIN])


# --- Files and other models -----------------------------------------------------------------------


def test_a_file_gives_the_same_lens_back(architecture, fitted, tmp_path):
    path = tmp_path / "folder" / "tuned.safetensors"
    fitted.save(path)
    loaded = TunedLens.load(path)
    for name, value in vars(fitted).items():
        other = getattr(loaded, name)
        assert torch.equal(other, value) if isinstance(value, torch.Tensor) else other == value
    results = [LogitLens(architecture.model, tuned=t).run(HELD_OUT, 5) for t in (fitted, loaded)]
    assert (results[0].top_logits == results[1].top_logits).all()
    assert repr(loaded) == "TunedLens(3 rows, steps=60, seed=0)"


def test_the_wrong_model_is_refused(fitted):
    for other in ({"n_layer": 4}, {"n_embd": 64}):
        model = families.build("gpt2", **other)
        with pytest.raises(
            ArchitectureError, match="was fitted on 3 layers of width 32; the model"
        ):
            LogitLens(model, tuned=fitted)


def test_nothing_is_done_with_a_lens_that_was_not_fitted(architecture, tmp_path):
    tuned = TunedLens()
    assert repr(tuned) == "TunedLens(not fitted, steps=500, seed=0)"
    with pytest.raises(ArchitectureError, match="not fitted: call fit"):
        LogitLens(architecture.model, tuned=tuned)
    with pytest.raises(ArchitectureError, match="nothing to save"):
        tuned.save(tmp_path / "tuned.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_no_tuned_lens_are_refused(fitted, tmp_path):
    path = tmp_path / "tuned.safetensors"
    write_arrays(path, "safetensors", "lens result", 1, {}, {})
    with pytest.raises(RecordFileError, match=f"cannot be read as {KIND}"):
        TunedLens.load(path)
    content = {"arguments": {"steps": 1}, "rows": ["embed", "0"], "model": "GPT2LMHeadModel"}
    arrays = {"weight": fitted.weight_, "bias": fitted.bias_, "history": fitted.history_}
    write_arrays(path, "safetensors", KIND, 1, content, arrays)
    with pytest.raises(RecordFileError, match="2 rows, but A is"):
        TunedLens.load(path)
