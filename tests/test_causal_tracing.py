"""Causal tracing against one plainly hooked forward pass per cell."""

import functools
from contextlib import ExitStack

import numpy as np
import pytest
import torch

import families
from ablation import ablate
from causal_tracing import (
    WINDOWS,
    CausalTracer,
    embedding_std,
    subject_positions,
    trace_subject,
)
from forward_pass import ArchitectureError, InputError, SiteError
from model_analyzer import ModelAnalyzer
from model_architecture import Architecture
from path_patching import patch_paths
from trace_result import CausalTrace

CLEAN = families.token_ids(1, 7, seed=1)[0]
CORRUPTED = CLEAN.clone()
CORRUPTED[1], CORRUPTED[3] = 50, 60
LONGER = families.token_ids(1, 9, seed=2)[0]
FLOAT32_ONLY = {"mixtral", "qwen2_moe", "gpt_oss"}
"""Their experts' products do not take float64."""
WITH_MLP = [name for name in families.FAMILIES if name != "mamba"]


@functools.cache
def built(name):
    model = families.build(name)
    return model if name in FLOAT32_ONLY else model.double()


def tolerance(name):
    return 2e-5 if name in FLOAT32_ONLY else 1e-7  # some families compute parts in float32


def count_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def run(model, ids, hooks=()):
    """Logits `[position, vocab]` with functions applied to outputs, or inputs, of modules."""

    def after(change, _module, _args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        new = change(hidden)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    with torch.no_grad(), ExitStack() as stack:
        for module, at_input, change in hooks:
            if at_input:
                pre = lambda _m, args, c=change: (c(args[0]), *args[1:])  # noqa: E731
                stack.callback(module.register_forward_pre_hook(pre).remove)
            else:
                hook = functools.partial(after, change)
                stack.callback(module.register_forward_hook(hook).remove)
        return model(ids[None], use_cache=False).logits[0]


def seen(model, ids, module, at_input=False, before=()):
    """What a module gives (or takes) in a run."""
    kept = []

    def keep(value):
        kept.append(value.clone())
        return value

    run(model, ids, [*before, (module, at_input, keep)])
    return kept[0]


def by_position(value):
    """`[position, d]`, also of a module that sees `[batch·position, d]`."""
    return value.view(-1, value.shape[-1])


def put(theirs, mine_at, theirs_at, columns=slice(None)):
    """A function that puts rows of another run in the place of some positions."""

    def change(value):
        new = by_position(value).clone()
        new[mine_at, columns] = by_position(theirs)[theirs_at][:, columns]
        return new.view_as(value)

    return change


def block_part(arch, layer, path):
    return arch.blocks[layer].get_submodule(path)


def distance(model, patched, other):
    clean, corrupted = run(model, CLEAN)[-1], run(model, other)[-1]
    return float((patched[-1] - clean).norm() / (corrupted - clean).norm())


# --- Heads and MLPs -------------------------------------------------------------------------------


@pytest.mark.parametrize("other", [CORRUPTED, LONGER], ids=["same length", "longer"])
@pytest.mark.parametrize("name", WITH_MLP)
def test_heads_and_mlps_are_those_of_one_hooked_pass_each(name, other):
    model = built(name)
    arch = Architecture(model)
    tracer = CausalTracer(model)
    heads, mlps = tracer.trace_attention_heads(CLEAN, other), tracer.trace_mlp_layers(CLEAN, other)
    assert heads.shape == (arch.n_layers, families.HEADS)
    assert list(mlps) == list(range(arch.n_layers))
    same = len(other) == len(CLEAN)
    places = (slice(None), slice(None)) if same else ([-1], [-1])
    for layer in range(arch.n_layers):
        found = arch.structure[layer]
        out, mlp = (block_part(arch, layer, path) for path in (found.out_proj, found.mlp_writer))
        z, written = seen(model, other, out, True), seen(model, other, mlp)
        patched = run(model, CLEAN, [(mlp, False, put(written, *places))])
        assert mlps[layer] == pytest.approx(distance(model, patched, other), abs=tolerance(name))
        d_head = z.shape[-1] // families.HEADS
        for head in range(families.HEADS):
            columns = slice(head * d_head, (head + 1) * d_head)
            patched = run(model, CLEAN, [(out, True, put(z, *places, columns))])
            truth = distance(model, patched, other)
            assert float(heads[layer, head]) == pytest.approx(truth, abs=tolerance(name))
    assert float(heads.max()) > 0.01
    assert min(mlps.values()) > 0.01
    assert count_hooks(model) == 0


def test_a_metric_is_given_the_logits_of_the_patched_run():
    model = built("llama")
    shapes = set()

    def metric(logits):
        shapes.add(tuple(logits.shape))
        return float(logits[0, 2, 5] - logits[0, -1, 7])

    found = CausalTracer(model).trace_mlp_layers(CLEAN, CORRUPTED, metric)
    assert shapes == {(1, len(CLEAN), families.VOCAB)}
    mlp = model.model.layers[1].mlp
    everywhere = put(seen(model, CORRUPTED, mlp), slice(None), slice(None))
    patched = run(model, CLEAN, [(mlp, False, everywhere)])
    assert found[1] == pytest.approx(float(patched[2, 5] - patched[-1, 7]), abs=1e-9)
    heads = CausalTracer(model).trace_attention_heads(CLEAN, CORRUPTED, metric)
    assert heads.dtype == torch.float64
    assert CausalTracer(families.build("llama")).trace_attention_heads(CLEAN, CORRUPTED).dtype == (
        torch.float32
    )


def test_text_prompts_of_unequal_length():
    tokenizer = families.tiny_tokenizer()
    tracer = CausalTracer(families.build("gpt2"), tokenizer)
    assert tracer.trace_attention_heads("the cat sat", "a cat sat on the mat").shape == (3, 4)
    assert repr(tracer) == "CausalTracer(GPT2LMHeadModel)"


def test_a_model_without_heads_or_mlps_says_so():
    tracer = CausalTracer(built("mamba"))
    with pytest.raises(SiteError, match="no site 'head_out'"):
        tracer.trace_attention_heads(CLEAN, CORRUPTED)
    with pytest.raises(SiteError, match="single writer"):
        tracer.trace_mlp_layers(CLEAN, CORRUPTED)
    with pytest.raises(ArchitectureError, match="needs the language-model head"):
        CausalTracer(built("gpt2").transformer)
    assert count_hooks(built("mamba")) == 0


# --- The trace of Meng et al. ---------------------------------------------------------------------

SUBJECT = [1, 2]
SAMPLES = 3


def naive_trace(model, windows, sigma, seed=0):
    """Clean and noised probability, and the effect `[site, layer, position]`, cell by cell."""
    arch = Architecture(model)
    embedding = model.get_input_embeddings()
    shape = (SAMPLES, len(SUBJECT), embedding.weight.shape[1])
    noise = sigma * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    answer = int(run(model, CLEAN)[-1].argmax())

    def noised(sample):
        def add(value):
            new = value.clone()
            new[0, SUBJECT] += noise[sample].to(value)
            return new

        return (embedding, False, add)

    def module(site, layer):
        found = arch.structure[layer]
        path = {"resid_post": "", "attn_out": found.attn_writer, "mlp_out": found.mlp_writer}[site]
        return block_part(arch, layer, path)

    def probability(hooks):
        return float(run(model, CLEAN, hooks)[-1].softmax(-1)[answer])

    low = [probability([noised(s)]) for s in range(SAMPLES)]
    effects = np.zeros((len(windows), arch.n_layers, len(CLEAN), SAMPLES))
    for row, (site, window) in enumerate(windows.items()):
        clean = [seen(model, CLEAN, module(site, layer)) for layer in range(arch.n_layers)]
        for layer, position, sample in np.ndindex(effects.shape[1:]):
            reach = range(layer - window // 2, layer - window // 2 + window)
            hooks = [(module(site, i), False, put(clean[i], [position], [position]))
                     for i in reach if 0 <= i < arch.n_layers]  # fmt: skip
            effects[row, layer, position, sample] = probability([noised(sample), *hooks])
    return probability([]), low, effects - np.array(low)


@pytest.mark.parametrize("name", ["gpt2", "llama", "granite", "gemma3", "bloom", "phi", "mixtral"])
def test_a_trace_is_that_of_one_hooked_pass_per_cell(name):
    model = built(name)
    windows = {"resid_post": 1, "mlp_out": 2, "attn_out": 3}
    result = trace_subject(
        model, None, CLEAN, SUBJECT, samples=SAMPLES, windows=windows, show_progress=False
    )
    clean, low, effects = naive_trace(model, windows, result.noise_std)
    assert result.clean == pytest.approx(clean, abs=tolerance(name))
    assert result.corrupted == pytest.approx(np.mean(low), abs=tolerance(name))
    assert np.allclose(result.values, effects.mean(-1), rtol=0, atol=tolerance(name))
    stderr = effects.std(-1, ddof=1) / SAMPLES**0.5
    assert np.allclose(result.stderr, stderr, rtol=0, atol=tolerance(name))
    assert np.abs(result.values[:, :, 1:]).max() > 1e-3
    assert result.passes <= (20 if name == "bloom" else 8)
    assert count_hooks(model) == 0


def test_what_a_trace_must_be():
    model = built("llama")
    result = CausalTracer(model).trace_subject(CLEAN, SUBJECT, samples=4, show_progress=False)
    assert result.sites == tuple(WINDOWS)
    assert result.windows == (1, 10, 10)
    assert not result.values[:, :, 0].any()  # before the subject nothing is noised
    stream = result.panel("resid_post")
    assert stream[-1, -1] == pytest.approx(result.total_effect)
    assert np.allclose(stream[-1, :-1], 0, atol=1e-12)  # nothing reads these any more
    wide = result.panel("mlp_out")
    assert np.allclose(wide, wide[:1])  # all three layers lie in every window
    assert result.subject == (1, 2)


def test_noise_has_its_seed_and_its_size():
    model = built("gpt2")
    options = {"samples": 2, "windows": {"resid_post": 1}, "show_progress": False}
    one, same, other, weak = (
        trace_subject(model, None, CLEAN, SUBJECT, **options | change)
        for change in ({}, {}, {"seed": 1}, {"noise": 1e-6})
    )
    assert np.array_equal(one.values, same.values)
    assert one.corrupted != other.corrupted
    assert abs(weak.total_effect) < 1e-6 < abs(one.total_effect)
    assert one.noise_std == pytest.approx(
        3 * float(model.transformer.wte.weight.detach().std()), rel=1e-3
    )
    tokens = [0, 6]
    some = trace_subject(model, None, CLEAN, SUBJECT, positions=tokens, **options)
    assert np.allclose(some.values, one.values[:, :, tokens], rtol=0, atol=1e-12)
    assert trace_subject(model, None, CLEAN, 1, **options | {"samples": 1}).stderr is None


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "granite", "opt"])
def test_the_standard_deviation_is_that_of_what_the_embedding_gives(name, monkeypatch):
    model = built(name)
    embedding = model.get_input_embeddings()
    with torch.no_grad():
        truth = float(embedding(torch.arange(families.VOCAB)).std(correction=0))
    monkeypatch.setattr("causal_tracing.VOCABULARY_PIECE", 10)
    assert embedding_std(Architecture(model)) == pytest.approx(truth, rel=1e-6)
    assert truth == pytest.approx(
        float(embedding.weight.detach().std()) * (families.HIDDEN**0.5 if name == "gemma3" else 1),
        rel=1e-2,
    )


def test_a_trace_by_another_metric():
    model = built("gpt2")
    options = {"samples": 2, "windows": {"resid_post": 1}, "show_progress": False}
    result = trace_subject(
        model, None, CLEAN, SUBJECT, metric="logit_diff", answer=5, foil=6, **options
    )
    logits = run(model, CLEAN)[-1]
    assert result.clean == pytest.approx(float(logits[5] - logits[6]))
    assert result.unit == "logits"
    everywhere = trace_subject(
        model, None, CLEAN, SUBJECT, metric=lambda z: z[0, 3, 5] - z[0, -1, 6], **options
    )
    assert everywhere.clean == pytest.approx(float(run(model, CLEAN)[3, 5] - logits[6]))
    assert everywhere.panel("resid_post")[2, 3] != 0


def test_a_state_space_model_is_traced_through_its_mixers():
    result = trace_subject(built("mamba"), None, CLEAN, SUBJECT, samples=2, show_progress=False)
    assert result.sites == ("resid_post", "attn_out")
    assert result.panel("resid_post")[-1, -1] == pytest.approx(result.total_effect, abs=1e-6)


# --- Subjects -------------------------------------------------------------------------------------


def test_a_subject_is_found_in_the_text():
    tokenizer = families.tiny_tokenizer(bos=True)
    prompt = "the cat sat on the mat"
    ids = tokenizer(prompt)["input_ids"]
    tokens = [tokenizer.decode([i]) for i in ids]
    assert tokens[:4] == ["<s>", "t", "he", " cat"]

    def find(subject, text=prompt):
        return subject_positions(tokenizer, text, ids, subject)

    assert find("cat") == find(" cat") == find("ca") == [3]
    assert find("the cat") == [1, 2, 3]
    assert find([4, 2]) == [2, 4]
    assert find(-1) == find("last") == [len(ids) - 1]
    assert find(slice(1, 3)) == [1, 2]
    with pytest.raises(InputError, match="'dog' does not occur in the prompt 'the cat"):
        find("dog")
    with pytest.raises(InputError, match=r"occurs 2 times, at positions \[1, 2\] and \[6\]"):
        find("the")
    with pytest.raises(InputError, match=r"give its positions instead, such as subject=\[1, 2\]"):
        find("cat", ids)
    with pytest.raises(InputError, match="say what the subject is"):
        find(None)
    with pytest.raises(InputError, match="does not occur"):
        find("")
    with pytest.raises(InputError, match="out of range"):
        find(99)


def test_a_trace_of_text():
    tokenizer = families.tiny_tokenizer()
    result = trace_subject(
        families.build("gpt2"), tokenizer, "a cat sat on", "cat", samples=2, show_progress=False
    )
    assert [result.tokens[p] for p in result.subject] == [" cat"]
    assert result.answer


def test_the_facade_delegates():
    tokenizer, model = families.tiny_tokenizer(), families.build("gpt2")
    analyzer = ModelAnalyzer(model, tokenizer=tokenizer, device="cpu")
    options = {"samples": 2, "show_progress": False}
    traced = trace_subject(model, tokenizer, "a cat sat on", "cat", **options)
    again = analyzer.trace_subject("a cat sat on", "cat", **options)
    assert np.array_equal(again.values, traced.values)
    pair = ("the cat sat", "the sat sat")
    paths = patch_paths(model, tokenizer, *pair, "mlps", "2.1.q", metric="kl")
    assert np.array_equal(
        analyzer.patch_paths(*pair, "mlps", "2.1.q", metric="kl").values, paths.values
    )
    drops = ablate(model, tokenizer, pair[0], "mlps", "zero")
    assert np.array_equal(analyzer.ablate(pair[0], "mlps", "zero").values, drops.values)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"metric": "distance"}, InputError, "compares two prompts"),
        ({"metric": "fun"}, InputError, "no metric 'fun'"),
        ({"metric": "logit_diff"}, InputError, "needs a foil: pass foil="),
        ({"samples": 0}, InputError, "samples must be at least 1"),
        ({"noise": 0.0}, InputError, "noise must be above 0"),
        ({"windows": {}}, InputError, "windows is empty"),
        ({"windows": {"mlp_out": 0}}, InputError, "at least one layer"),
        ({"windows": {"head_out": 1}}, SiteError, "came 'head_out'"),
        ({"subject": "cat"}, InputError, "give its positions instead"),
    ],
)
def test_requests_that_make_no_sense(change, error, match):
    model = built("gpt2")
    options = {"subject": SUBJECT} | change
    with pytest.raises(error, match=match):
        trace_subject(model, None, CLEAN, **options)
    assert count_hooks(model) == 0


def test_a_failure_leaves_the_model_untouched():
    model = built("gpt2")
    calls = []

    def breaks(logits):
        calls.append(logits)
        if len(calls) > 5:
            raise KeyboardInterrupt
        return logits[0, -1, 0]

    with pytest.raises(KeyboardInterrupt):
        trace_subject(model, None, CLEAN, SUBJECT, metric=breaks, show_progress=False)
    assert count_hooks(model) == 0
    assert "forward" not in model.transformer.h[0].__dict__


# --- The result -----------------------------------------------------------------------------------


def test_a_result_is_drawn_tabulated_and_kept(tmp_path):
    result = trace_subject(
        built("gpt2"), families.tiny_tokenizer(), CLEAN, SUBJECT, samples=2, show_progress=False
    )
    assert repr(result) == (
        "CausalTrace(resid_post, mlp_out, attn_out: 3 layers × 7 positions, prob, 2 samples)"
    )
    frame = result.to_frame()
    assert len(frame) == 3 * 3 * 7
    row = frame[(frame.site == "attn_out") & (frame.layer == 1) & (frame.position == 2)].iloc[0]
    assert row.value == result.values[2, 1, 2]
    assert (row.window, row.token, row.in_subject) == (10, result.tokens[2], True)
    top = result.top(2, "resid_post")
    assert set(top.site) == {"resid_post"}
    assert abs(top.value[0]) == np.abs(result.panel("resid_post")).max()
    assert len(result.top(5)) == 5
    with pytest.raises(InputError, match="site 'query' was not traced"):
        result.panel("query")
    result.save(tmp_path / "trace")
    again = CausalTrace.load(tmp_path / "trace")
    for name in ("sites", "windows", "layers", "positions", "tokens", "subject", "clean", "answer"):
        assert getattr(again, name) == getattr(result, name)
    assert np.array_equal(again.values, result.values)
    assert np.array_equal(again.stderr, result.stderr)


def test_the_picture_has_a_panel_per_site_and_marks_the_subject():
    result = trace_subject(built("gpt2"), None, CLEAN, SUBJECT, samples=2, show_progress=False)
    figure = result.plot()
    panels = [ax for ax in figure.axes if ax.get_title()]
    assert [ax.get_title() for ax in panels] == [
        "resid post, single layer",
        "mlp out, window of 10 layers",
        "attn out, window of 10 layers",
    ]
    labels = [label.get_text() for label in panels[0].get_xticklabels()]
    assert [label.endswith("*") for label in labels] == [p in SUBJECT for p in range(len(CLEAN))]
