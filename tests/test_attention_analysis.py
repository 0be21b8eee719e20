"""Patterns and head scores against the model's own attentions, plain loops, a circuit by hand."""

import functools
import math

import numpy as np
import pytest
import torch

import attention_analysis
import families
from attention_analysis import (
    attention_patterns,
    batch_attention_patterns,
    find_heads,
    head_summary,
    repeated_random_tokens,
)
from attention_result import (
    KINDS,
    AttentionPatterns,
    HeadRanking,
    HeadScore,
    HeadSummary,
    kind_of,
)
from forward_pass import InputError, LayerError, Site, SiteError
from induction_circuit import INDUCTION, PREVIOUS, induction_circuit
from model_architecture import Architecture
from model_loader import load_model

TEXTS = [[9, 8, 7, 9, 8, 7, 7], [11, 12, 13, 11], [20, 21, 22, 23, 24, 20, 21, 22, 23], [30, 31]]
"""Of different lengths, with tokens that occur again, also side by side."""


@functools.cache
def built(name):
    return families.build(name)


@functools.cache
def demo():
    return load_model(device="cpu")


def count_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def plain_scores(texts_and_patterns, heads):
    """The definitions of `head_summary`, read aloud: ``{kind: [head]}``."""
    found = {kind: [[] for _ in range(heads)] for kind in KINDS}
    distances = [[0.0, 0.0] for _ in range(heads)]
    for ids, patterns in texts_and_patterns:
        for h, i in np.ndindex(heads, len(ids)):
            if i == 0:
                continue
            row = patterns[h][i].astype(float)
            copies = [j for j in range(i) if ids[j] == ids[i]]
            after = [j + 1 for j in copies if j + 1 < i]
            rest = max(0.0, 1 - row.sum())
            values = {
                "previous_token": row[i - 1],
                "current_token": row[i],
                "first_token": row[0],
                "no_token": rest,
                "entropy": -sum(p * math.log(p) for p in [*row, rest] if p > 0),
            }
            if copies:
                values["duplicate_token"] = row[copies].sum()
            if after:
                values["induction"] = row[after].sum()
            for kind, value in values.items():
                found[kind][h].append(value)
            distances[h][0] += sum(row[j] * (i - j) for j in range(len(ids)))
            distances[h][1] += row.sum()
    means = {kind: [np.mean(each) for each in rows] for kind, rows in found.items() if rows[0]}
    return means | {"distance": [a / b for a, b in distances]}


# --- Patterns -------------------------------------------------------------------------------------


def test_patterns_are_the_models_own_attentions(family):
    name, model = family
    architecture = Architecture(model)
    if not any(architecture.missing(Site("attn_pattern", i)) is None for i in range(3)):
        with pytest.raises(SiteError, match="attn_pattern"):
            attention_patterns(model, None, TEXTS[0])
        with pytest.raises(SiteError, match="attn_pattern"):
            head_summary(model, None, TEXTS)
        return
    found = attention_patterns(model, None, TEXTS[0])
    eager = families.build(name, attn_implementation="eager")
    with torch.no_grad():
        own = eager(torch.tensor([TEXTS[0]]), output_attentions=True).attentions
    own = [each for each in own if each is not None]
    assert len(found.layers) == len(own), name
    for layer, expected in zip(found.layers, own, strict=True):
        np.testing.assert_allclose(found[layer], expected[0].numpy(), atol=1e-6)
    assert found.token_ids == tuple(TEXTS[0])


def test_a_batch_is_the_same_as_one_by_one():
    model = built("gemma2")
    many = batch_attention_patterns(model, None, TEXTS, [1, 2], show_progress=False)
    for text, found in zip(TEXTS, many, strict=True):
        alone = attention_patterns(model, None, text, [1, 2])
        assert found.token_ids == tuple(text)
        assert found.layers == (1, 2)
        for layer in (1, 2):
            np.testing.assert_allclose(found[layer], alone[layer], atol=1e-5)


def test_patterns_are_found_by_layer_and_head_and_kept(tmp_path):
    model = built("llama")
    found = attention_patterns(model, families.tiny_tokenizer(), "the cat sat", [2, 0])
    assert repr(found) == f"AttentionPatterns(2 layers, 8 heads, {len(found.tokens)} tokens)"
    assert found[2, 3].shape == (len(found.tokens),) * 2
    np.testing.assert_array_equal(found[2][3], found[2, 3])
    np.testing.assert_array_equal(found[2, -1], found[2, 3])
    with pytest.raises(LayerError, match=r"no patterns of layer 1; there are those of \(0, 2\)"):
        found[1]
    with pytest.raises(InputError, match=r"layer 0 has the heads 0\.\.3; came 4"):
        found[0, 4]
    found.save(tmp_path / "patterns")
    again = AttentionPatterns.load(tmp_path / "patterns")
    assert (again.tokens, again.layers, again.token_ids) == (
        found.tokens,
        found.layers,
        found.token_ids,
    )
    np.testing.assert_array_equal(again[2], found[2])
    frame = found.to_frame()
    length = len(found.tokens)
    assert len(frame) == 2 * 4 * length * (length + 1) // 2
    row = frame[(frame.layer == 2) & (frame["head"] == 1) & (frame["query"] == 2)].iloc[1]
    assert row.attention == found[2, 1][2, 1]
    assert (row.query_token, row.key_token) == (found.tokens[2], found.tokens[1])
    with pytest.raises(InputError, match="one layer per pattern"):
        AttentionPatterns(found.patterns, (0,), found.tokens, found.token_ids)
    with pytest.raises(InputError, match=r"\[head, query, key\] of 1 tokens"):
        AttentionPatterns(found.patterns, found.layers, ("a",), (1,))


# --- The summary ----------------------------------------------------------------------------------


def test_scores_are_what_their_definitions_say(family):
    _, model = family
    architecture = Architecture(model)
    layers = [
        layer
        for layer in range(architecture.n_layers)
        if architecture.missing(Site("attn_pattern", layer)) is None
    ]
    if not layers:
        return
    before = count_hooks(model)
    summary = head_summary(model, None, TEXTS, show_progress=False)
    assert count_hooks(model) == before
    assert summary.layers == tuple(layers)
    assert (summary.texts, summary.tokens, summary.source) == (4, 22, "prompts")
    assert dict(zip(summary.kinds, summary.queries, strict=True)) == {
        "previous_token": 18, "duplicate_token": 9, "induction": 9, "first_token": 18,
        "current_token": 18, "no_token": 18, "entropy": 18, "distance": 18,
    }  # fmt: skip
    alone = [attention_patterns(model, None, text) for text in TEXTS]
    for layer in layers:
        pairs = [(text, found[layer]) for text, found in zip(TEXTS, alone, strict=True)]
        heads = architecture.heads(layer)[0]
        for kind, expected in plain_scores(pairs, heads).items():
            found = summary[kind][layers.index(layer)]
            np.testing.assert_allclose(found[:heads], expected, atol=2e-5, err_msg=kind)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_the_size_of_batches_changes_nothing(batch_size):
    model = built("gemma2")
    expected = head_summary(model, None, TEXTS).values
    found = head_summary(model, None, TEXTS, batch_size=batch_size).values
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_learned_sink_takes_attention_that_no_token_gets():
    sink = head_summary(built("gpt_oss"), None, TEXTS)
    assert sink["no_token"].min() > 0.01
    assert np.abs(head_summary(built("llama"), None, TEXTS)["no_token"]).max() < 1e-6


def test_no_more_blocks_run_than_are_needed_and_the_head_is_not():
    model = built("gpt2")
    len(Architecture(model).structure)  # found by a pass of its own
    run = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: run.append(name))
        for name, module in model.named_modules()
        if name in ("lm_head", "transformer.h.0.mlp", "transformer.h.1.mlp", "transformer.h.2.mlp")
    ]
    try:
        summary = head_summary(model, None, TEXTS[:1], layers=[1])
    finally:
        for handle in handles:
            handle.remove()
    assert summary.layers == (1,)
    whole = head_summary(model, None, TEXTS[:1])
    np.testing.assert_allclose(summary.values[:, 0], whole.values[:, 1], atol=1e-6)
    assert run == ["transformer.h.0.mlp", "transformer.h.1.mlp"]


def test_the_implementation_and_the_mode_of_the_model_are_put_back():
    model = families.build("llama")
    model.set_attn_implementation("sdpa")
    model.train()
    head_summary(model, None, TEXTS)
    assert model.config._attn_implementation == "sdpa"
    assert all(module.training for module in model.modules())


def test_memory_does_not_grow_with_the_number_of_texts(monkeypatch):
    """No tensor that a pass makes is held when the next pass begins, but sums of a few numbers."""
    import gc

    model = built("gpt2")
    own = attention_analysis._pass
    held = []

    def counting(*args):
        gc.collect()
        alive = {id(o): o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)}
        held.append(sum(tensor.numel() for tensor in alive.values()))
        return own(*args)

    monkeypatch.setattr(attention_analysis, "_pass", counting)
    head_summary(model, None, [list(range(10, 40))] * 8, batch_size=1)
    assert len(held) == 8
    assert held[-1] == held[2]


def test_bfloat16_is_added_up_in_float32():
    model = families.build("llama").bfloat16()
    summary = head_summary(model, None, TEXTS)
    assert summary.values.dtype == np.float64
    expected = plain_scores([(text, attention_patterns(model, None, text)[0]) for text in TEXTS], 4)
    np.testing.assert_allclose(summary["induction"][0], expected["induction"], atol=1e-2)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_rounding_of_a_row_is_no_sink(name):
    """In bfloat16 a row sums to 1 within 0.002; as one more token that is 0.01 nats of entropy."""
    model = families.build(name).bfloat16()
    texts = np.random.default_rng(0).integers(2, 60, size=(4, 40)).tolist()
    summary = head_summary(model, None, texts)
    assert not summary["no_token"].any()
    entropies = []
    for text in texts:
        rows = np.stack(attention_patterns(model, None, text).patterns)[:, :, 1:].astype(float)
        assert np.abs(1 - rows.sum(-1)).max() > 1e-4
        rows /= rows.sum(-1, keepdims=True)
        entropies.append(-(rows * np.log(np.where(rows > 0, rows, 1))).sum(-1))
    expected = np.concatenate(entropies, -1).mean(-1)
    np.testing.assert_allclose(summary["entropy"], expected, atol=5e-4)


def test_a_batch_that_does_not_fit_is_halved(monkeypatch):
    model = built("gpt2")
    own = attention_analysis._pass

    def small(architecture, batch, sites):
        if len(batch.ids) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return own(architecture, batch, sites)

    whole = head_summary(model, None, TEXTS)
    monkeypatch.setattr(attention_analysis, "_pass", small)
    with pytest.warns(UserWarning, match="texts at a time do not fit"):
        halved = head_summary(model, None, TEXTS)
    np.testing.assert_allclose(halved.values, whole.values, atol=1e-6)


# --- A circuit by hand, and the bundled model ----------------------------------------------------


def test_a_circuit_built_by_hand_is_named():
    model = induction_circuit()
    induction = find_heads(model, None, "induction")
    assert induction[0][:2] == INDUCTION
    assert induction[0].score > 0.5 > 5 * induction[1].score
    previous = find_heads(model, None, "previous-token heads")
    assert previous[0][:2] == PREVIOUS
    assert previous[0].score > 0.9 > 3 * previous[1].score


def test_the_bundled_models_heads_are_found():
    model, tokenizer = demo()
    summary = head_summary(model, tokenizer)
    assert summary.source == "repeated random tokens"
    induction = summary.rank("induction")
    assert induction[0][:2] == (4, 4)
    assert {each.layer for each in list(induction)[:6]} == {4}
    assert induction[0].score == pytest.approx(0.75, abs=0.03)
    previous = summary.rank("previous")
    assert {each.label for each in list(previous)[:3]} == {"1.1", "1.2", "1.3"}
    prose = find_heads(model, tokenizer, "previous", ["The capital of France is Paris."])
    assert prose[0].label in ("1.1", "1.2") and prose[0].score > 0.95


# --- Texts ----------------------------------------------------------------------------------------


def test_repeated_random_tokens_are_two_equal_halves():
    tokenizer = families.tiny_tokenizer(bos=True)
    config = built("gpt2").config
    rows = repeated_random_tokens(tokenizer, config, count=3, length=20, seed=5)
    assert rows == repeated_random_tokens(tokenizer, config, count=3, length=20, seed=5)
    assert rows != repeated_random_tokens(tokenizer, config, count=3, length=20, seed=6)
    for row in rows:
        assert row[0] == tokenizer.bos_token_id
        assert row[1:21] == row[21:]
        assert len(set(row[1:21])) == 20
        assert not set(row[1:]) & set(tokenizer.all_special_ids)
    without = repeated_random_tokens(families.tiny_tokenizer(), config, count=1, length=9)
    assert len(without[0]) == 18
    assert len(repeated_random_tokens(tokenizer, config, length=500)[0]) <= config.n_positions
    with pytest.raises(InputError, match="at least one text of two tokens, twice"):
        repeated_random_tokens(tokenizer, config, length=1)
    with pytest.raises(InputError, match="0 of 20"):
        repeated_random_tokens(tokenizer, config, count=0, length=20)


def test_what_cannot_be_measured_is_refused_before_anything_runs(monkeypatch):
    model = built("gpt2")
    monkeypatch.setattr(attention_analysis, "_pass", None)  # a pass would fail otherwise
    with pytest.raises(InputError, match=r"no kind of head 'copying'; there are previous_token"):
        find_heads(model, None, "copying")
    with pytest.raises(InputError, match="in none of these texts does one"):
        find_heads(model, None, "induction", [[5, 6, 7], [8, 9]])
    with pytest.raises(InputError, match="put a single one into a list"):
        head_summary(model, families.tiny_tokenizer(), "the cat")
    with pytest.raises(InputError, match=r"prompt 1: token id 500 is outside"):
        head_summary(model, None, [[5, 6], [500, 6]])
    with pytest.raises(InputError, match="none of the 2 prompts has two tokens"):
        head_summary(model, None, [[5], [6]])
    with pytest.raises(InputError, match="none of the 0 prompts"):
        head_summary(model, None, [])
    with pytest.raises(InputError, match="prompts is a list of texts; came 5"):
        head_summary(model, None, 5)
    for size in (0, "8", 2.5, True):
        with pytest.raises(InputError, match=f"batch_size must be at least 1; came {size!r}"):
            head_summary(model, None, TEXTS, batch_size=size)
    with pytest.raises(LayerError, match="layer 9 is out of range"):
        head_summary(model, None, TEXTS, layers=9)


def test_without_copies_induction_is_missing_and_says_so():
    summary = head_summary(built("gpt2"), None, [[5, 6, 7], [8, 9]])
    assert np.isnan(summary["induction"]).all()
    assert np.isfinite(summary["entropy"]).all()
    with pytest.raises(InputError, match="induction cannot be measured on these texts"):
        summary.rank("induction")


# --- Results --------------------------------------------------------------------------------------


def some_summary():
    values = np.zeros((len(KINDS), 2, 3))
    values[list(KINDS).index("induction")] = [[0.1, 0.5, 0.2], [0.9, np.nan, 0.3]]
    values[:, 1, 1] = np.nan
    return HeadSummary(values, tuple(KINDS), (2, 5), (7,) * len(KINDS), 3, 40, "prompts")


def test_a_summary_is_ranked_tabulated_and_kept(tmp_path):
    summary = some_summary()
    assert repr(summary) == "HeadSummary(2 layers × 3 heads, 3 texts, 40 tokens, prompts)"
    ranking = summary.rank("induction head")
    assert repr(ranking) == "HeadRanking(induction: 5.0 0.90, 2.1 0.50, 5.2 0.30, …)"
    assert list(ranking) == [
        HeadScore(5, 0, 0.9), HeadScore(2, 1, 0.5), HeadScore(5, 2, 0.3),
        HeadScore(2, 2, 0.2), HeadScore(2, 0, 0.1),
    ]  # fmt: skip
    assert [each.label for each in summary.rank("induction", lowest=True)][:2] == ["2.0", "2.2"]
    assert isinstance(ranking, HeadRanking) and len(ranking) == 5
    frame = ranking.to_frame()
    assert list(frame.columns) == ["layer", "head", "score"]
    assert frame.score.tolist() == [0.9, 0.5, 0.3, 0.2, 0.1]
    table = summary.to_frame()
    assert len(table) == 5
    assert table[(table.layer == 2) & (table["head"] == 1)].induction.item() == 0.5
    summary.save(tmp_path / "heads")
    again = HeadSummary.load(tmp_path / "heads")
    assert repr(again) == repr(summary)
    np.testing.assert_array_equal(again.values, summary.values)
    assert (again.kinds, again.layers, again.queries) == (
        summary.kinds,
        summary.layers,
        summary.queries,
    )
    with pytest.raises(InputError, match=r"values must be \[kind, layer, head\]"):
        HeadSummary(summary.values[:2], summary.kinds, (2, 5), summary.queries, 3, 40, "prompts")
    with pytest.raises(InputError, match="one number per kind"):
        HeadSummary(summary.values, summary.kinds, (2, 5), (1,), 3, 40, "prompts")


@pytest.mark.parametrize(
    ("spelled", "kind"),
    [
        ("induction", "induction"),
        ("Previous-Token", "previous_token"),
        ("previous", "previous_token"),
        ("duplicate token heads", "duplicate_token"),
        ("sink", "first_token"),
        ("entropy", "entropy"),
    ],
)
def test_kinds_have_several_spellings(spelled, kind):
    assert kind_of(spelled) == kind
