"""What weights say of heads, against every matrix written out in float64, and a planted circuit."""

import dataclasses
import functools

import numpy as np
import pytest
import torch

import families
import head_circuits
from forward_pass import ArchitectureError, InputError, LayerError, RecordFileError, SiteError
from head_circuit_result import (
    CircuitTokens,
    CompositionScores,
    HeadDirections,
    HeadScores,
    head_place,
    padded,
)
from head_circuits import circuit_tokens, composition_scores, copying_scores, head_directions
from head_weights import all_head_weights
from induction_circuit import induction_circuit
from model_analyzer import ModelAnalyzer
from model_architecture import Architecture

NAMES = ("gpt2", "llama_tied", "falcon", "mistral", "gemma2", "cohere", "granite")
"""Fused, grouped, tied, multi-query; an odd head size, a norm behind, scaled logits, residuals."""


@functools.cache
def built(name):
    return families.build(name)


@functools.cache
def weights_of(name, fold_norm):
    found = all_head_weights(Architecture(built(name)), fold_norm=fold_norm)
    return [weights.expanded() for weights in found]


@functools.cache
def planted():
    return induction_circuit(copies=True)


def final_norm(name, model):
    """The linear part of the final norm, ``[d_model, d_model]`` for rows, from its parameters."""
    norm = Architecture(model).final_norm
    gain = norm.weight.detach().double() + (name in ("gemma2", "gemma3"))
    centred = torch.eye(len(gain)).double() - 1 / len(gain) * (name in ("gpt2", "falcon", "cohere"))
    return centred * gain


def dense(name, layer, head, circuit, fold_norm=False):
    """``W_E W_V W_O W_U`` or ``W_E W_Q W_Kᵀ W_Eᵀ``, ``[vocab, vocab]`` in float64."""
    model = built(name)
    weights = weights_of(name, fold_norm)[layer]
    start = model.get_input_embeddings().weight.detach().double()
    if circuit == "qk":
        return start @ weights.W_Q[head].double() @ weights.W_K[head].double().mT @ start.mT
    end = model.get_output_embeddings().weight.detach().double()
    written = weights.W_V[head].double() @ weights.W_O[head].double()
    written = written @ final_norm(name, model) if fold_norm else written
    return start @ written @ end.mT


# --- Copying --------------------------------------------------------------------------------------


@pytest.mark.parametrize("fold_norm", [False, True])
@pytest.mark.parametrize("circuit", ["ov", "qk"])
@pytest.mark.parametrize("name", NAMES)
def test_copying_is_the_share_of_positive_eigenvalues(name, circuit, fold_norm):
    found = copying_scores(Architecture(built(name)), circuit=circuit, fold_norm=fold_norm)
    assert found.folded is fold_norm
    for row, layer in enumerate(found.layers):
        for head in range(4):
            values = torch.linalg.eigvals(dense(name, layer, head, circuit, fold_norm))
            expected = (values.sum() / values.abs().sum()).real
            assert found.values[row, head] == pytest.approx(float(expected), abs=1e-4)
    assert np.abs(found.values).max() <= 1


def test_a_planted_copying_head_scores_1_and_its_contrary_minus_1():
    architecture = Architecture(planted())
    found = copying_scores(architecture)
    assert found.values[1].tolist() == pytest.approx([0, 0, 1])
    assert found.values[0].tolist() == pytest.approx([0, 0, 0])
    assert found.top(1)["head"][0] == "1.2"
    contrary = induction_circuit(copies=True)
    with torch.no_grad():
        contrary.transformer.h[1].attn.c_proj.weight.neg_()
    assert copying_scores(Architecture(contrary), -1).values[0, 2] == pytest.approx(-1)


def test_the_bundled_models_induction_heads_copy():
    analyzer = ModelAnalyzer(device="cpu")
    found = copying_scores(analyzer.architecture)
    induction = analyzer.find_heads("induction", show_progress=False)
    copying = [found.values[each.layer, each.head] for each in induction]
    assert np.mean(copying[:6]) > 0.6 and np.median(copying[6:]) < -0.9
    assert analyzer.copying_scores().values.tolist() == found.values.tolist()


# --- Composition ----------------------------------------------------------------------------------


@pytest.mark.parametrize("fold_norm", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "llama", "falcon", "gemma2", "olmo2"])
def test_composition_is_the_ratio_of_frobenius_norms(name, fold_norm):
    architecture = Architecture(built(name))
    found = composition_scores(architecture, fold_norm=fold_norm)
    all_weights = weights_of(name, fold_norm)
    assert found.kinds == ("q", "k", "v")
    for later, reader in enumerate(all_weights):
        for earlier, writer in enumerate(all_weights):
            for one, two in np.ndindex(4, 4):
                place = (slice(None), earlier, one, later, two)
                if earlier >= later:
                    assert np.isnan(found.values[place]).all()
                    continue
                ov = (writer.W_V[one] @ writer.W_O[one]).double()
                qk = (reader.W_Q[two] @ reader.W_K[two].mT).double()
                own = [qk, qk.mT, (reader.W_V[two] @ reader.W_O[two]).double()]
                expected = [float((ov @ m).norm() / (ov.norm() * m.norm())) for m in own]
                assert found.values[place].tolist() == pytest.approx(expected, rel=1e-5)


def test_chance_is_what_heads_at_random_score():
    found = composition_scores(Architecture(built("gpt2")))
    values = found.values[~np.isnan(found.values)]
    assert found.chance == pytest.approx(32**-0.5)
    assert np.sqrt((values**2).mean()) == pytest.approx(found.chance, rel=0.15)


def test_the_planted_heads_compose_by_the_key_and_by_nothing_else():
    found = composition_scores(Architecture(planted()))
    keys = found.of("k", "1.2")
    assert keys[0].tolist() == pytest.approx([0, 32**-0.5, 0], abs=1e-6)
    assert not found.of("q", "1.2")[0].any()
    assert not found.of("v", "1.2")[0].any()
    best = found.top(1)
    assert best[["kind", "writer", "reader"]].iloc[0].tolist() == ["k", "0.1", "1.2"]


def test_some_kinds_and_layers():
    architecture = Architecture(built("gpt2"))
    whole = composition_scores(architecture)
    part = composition_scores(architecture, "vq", [2, 0])
    assert (part.kinds, part.layers) == (("v", "q"), (0, 2))
    np.testing.assert_array_equal(part.of("q")[0, :, 1], whole.of("q")[0, :, 2])
    np.testing.assert_array_equal(part.of("v", "2.3")[0], whole.of("v", "2.3")[0])


# --- Tokens ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("fold_norm", [False, True])
@pytest.mark.parametrize("circuit", ["ov", "qk"])
@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_the_largest_entries_of_the_whole_matrix(monkeypatch, name, circuit, fold_norm):
    monkeypatch.setattr(head_circuits, "CHUNK", 10)
    architecture = Architecture(built(name))
    options = {"circuit": circuit, "fold_norm": fold_norm, "k": 6}
    table = dense(name, 1, 2, circuit, fold_norm)
    found = circuit_tokens(architecture, None, "1.2", [7, 50, 7], **options)
    expected = table[[7, 50, 7]].topk(6)
    np.testing.assert_allclose(found.values, expected.values, rtol=2e-4)
    assert found.target_ids.tolist() == expected.indices.tolist()
    assert found.source_ids.tolist() == [[7] * 6, [50] * 6, [7] * 6]
    best = table.flatten().topk(6)
    everything = circuit_tokens(architecture, None, (1, 2), **options)
    np.testing.assert_allclose(everything.values[0], best.values, rtol=2e-4)
    pairs = everything.source_ids[0] * families.VOCAB + everything.target_ids[0]
    assert pairs.tolist() == best.indices.tolist()


def test_what_a_head_adds_to_the_logits_where_it_looks_at_one_token():
    """The OV circuit against the model itself, its own parts run one after the other."""
    model = built("gpt2")
    found = circuit_tokens(Architecture(model), None, "1.2", 50, k=families.VOCAB)
    attention = model.transformer.h[1].attn
    with torch.no_grad():
        x = model.transformer.wte.weight[50]
        value = (x @ attention.c_attn.weight)[2 * 32 + 16 : 2 * 32 + 24]
        logits = model.lm_head(value @ attention.c_proj.weight[16:24])
    by_id = found.values[0][np.argsort(found.target_ids[0])]
    np.testing.assert_allclose(by_id, logits.numpy(), rtol=1e-4, atol=1e-4)


def test_the_planted_head_says_the_token_that_it_looks_at():
    architecture = Architecture(planted())
    found = circuit_tokens(architecture, None, "1.2", list(range(32)))
    assert found.copies() == 1
    assert found.values[:, 0].tolist() == pytest.approx([1] * 32)
    assert circuit_tokens(architecture, None, "0.1", list(range(32)), k=3).copies() < 0.1


def test_text_is_shown_with_a_tokenizer():
    tokenizer = families.tiny_tokenizer()
    found = circuit_tokens(Architecture(built("llama")), tokenizer, "1.2", [" the", " cat"], k=2)
    assert found.sources == ((" the", " the"), (" cat", " cat"))
    texts = [tokenizer.convert_ids_to_tokens(int(i)).replace("Ġ", " ") for i in found.target_ids[0]]
    assert list(found.targets[0]) == texts


# --- Directions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("fold_norm", [False, True])
@pytest.mark.parametrize("circuit", ["ov", "qk"])
@pytest.mark.parametrize("name", ["gpt2", "mistral", "gemma2"])
def test_directions_are_those_of_the_dense_decomposition(name, circuit, fold_norm):
    model = built(name)
    found = head_directions(
        Architecture(model), None, "2.1", circuit=circuit, directions=5, k=4, fold_norm=fold_norm
    )
    weights = weights_of(name, fold_norm)[2]
    pair = (weights.W_V[1], weights.W_O[1]) if circuit == "ov" else (weights.W_Q[1], weights.W_K[1])
    matrix = (pair[0] @ (pair[1] if circuit == "ov" else pair[1].mT)).double()
    own = torch.linalg.svd(matrix)
    np.testing.assert_allclose(found.singular_values, own.S[:5], rtol=1e-4)
    np.testing.assert_allclose(found.share, own.S[:5] ** 2 / matrix.square().sum(), rtol=1e-4)
    start = model.get_input_embeddings().weight.detach().double()
    end = model.get_output_embeddings().weight.detach().double()
    end = end @ final_norm(name, model).mT if fold_norm else end
    end = end if circuit == "ov" else start
    for i in range(5):
        sign = float(np.sign(found.read[i] @ own.U[:, i].numpy()))
        np.testing.assert_allclose(found.read[i], sign * own.U[:, i], atol=1e-3)
        np.testing.assert_allclose(found.written[i], sign * own.Vh[i], atol=1e-3)
        read, written = (
            torch.tensor(found.read[i]).double(),
            torch.tensor(found.written[i]).double(),
        )
        for j, turned in enumerate((1, -1)):
            for side, products in enumerate((start @ read, end @ written)):
                best = (turned * products).topk(4)
                np.testing.assert_allclose(found.values[i, j, side], best.values, rtol=1e-3)
                assert found.token_ids[i, j, side].tolist() == best.indices.tolist()


# --- Errors ---------------------------------------------------------------------------------------


def test_what_cannot_be_asked_is_refused_before_anything_runs(monkeypatch):
    architecture = Architecture(built("gpt2"))
    len(architecture.structure)
    monkeypatch.setattr(architecture, "inputs", None)  # a pass would fail otherwise
    tokenizer = families.tiny_tokenizer()
    with pytest.raises(InputError, match="a circuit is 'ov' or 'qk'; came 'vo'"):
        copying_scores(architecture, circuit="vo")
    with pytest.raises(InputError, match="compositions are 'q', 'k' and 'v'; came 'qx'"):
        composition_scores(architecture, "qx")
    for kinds in ("qq", 5, []):
        with pytest.raises(InputError, match="compositions are 'q', 'k' and 'v'"):
            composition_scores(architecture, kinds)
    with pytest.raises(LayerError, match="layer 9 is out of range"):
        copying_scores(architecture, [9])
    for k in (0, 2.5, True, "3"):
        with pytest.raises(InputError, match=f"k is 1 to 99 tokens; came {k!r}"):
            circuit_tokens(architecture, tokenizer, "1.2", " the", k=k)
    with pytest.raises(InputError, match="no token in an empty list; None means the whole voc"):
        circuit_tokens(architecture, tokenizer, "1.2", [])
    with pytest.raises(InputError, match="token"):
        circuit_tokens(architecture, tokenizer, "1.2", " the cat")
    for head in ("1.4", "mlp.1", "1"):
        with pytest.raises((InputError, SiteError), match="head"):
            circuit_tokens(architecture, tokenizer, head)
        with pytest.raises((InputError, SiteError), match="head"):
            head_directions(architecture, tokenizer, head)


def test_numbers_out_of_range_are_refused():
    architecture = Architecture(built("gpt2"))
    with pytest.raises(InputError, match="came one"):
        composition_scores(architecture, layers=[1])
    for options in ({"directions": 9}, {"directions": 0}, {"k": 100}, {"k": 1.0}):
        with pytest.raises(InputError, match="directions is 1 to 8 and k 1 to 99"):
            head_directions(architecture, None, "1.2", **options)
    wide = Architecture(families.build("llama", head_dim=64))  # wider than the stream's 32
    with pytest.raises(InputError, match="directions is 1 to 32 and k"):
        head_directions(wide, None, "1.2", directions=33)
    assert len(head_directions(wide, None, "1.2", directions=32).singular_values) == 32
    base = Architecture(built("gpt2").transformer)
    with pytest.raises(ArchitectureError, match="needs the language-model head"):
        copying_scores(base)
    assert copying_scores(base, circuit="qk").values.shape == (3, 4)
    with pytest.raises(SiteError, match="computes no attention"):
        copying_scores(Architecture(built("mamba")))


def test_tokens_are_named_in_every_way():
    architecture = Architecture(built("gpt2"))
    for one in (5, np.int64(5), np.array(5), torch.tensor(5), [5]):
        assert circuit_tokens(architecture, None, "1.2", one, k=3).sources == (("<5>",) * 3,)
    for several in ((5, 6), np.array([5, 6]), torch.tensor([5, 6])):
        found = circuit_tokens(architecture, None, "1.2", several, k=1)
        assert found.source_ids.tolist() == [[5], [6]]
    for wrong in ({5, 6}, 5.0, True, [[5]]):
        with pytest.raises(InputError, match="token ids must be integers"):
            circuit_tokens(architecture, None, "1.2", wrong)


def test_the_first_of_a_result_are_counted():
    scores, pairs = results()[:2]
    assert len(scores.top(3)) == len(pairs.top(3)) == 3
    for k in (0, -1, True, 2.5, "3"):
        for found in (scores, pairs):
            with pytest.raises(InputError, match="must be at least 1; came"):
                found.top(k)
    with pytest.raises(InputError, match="no composition 'x'; there are q, k, v"):
        pairs.top(3, "x")


# --- Results --------------------------------------------------------------------------------------


@functools.cache
def results():
    architecture, tokenizer = Architecture(built("gpt2")), families.tiny_tokenizer()
    return [
        copying_scores(architecture),
        composition_scores(architecture),
        circuit_tokens(architecture, tokenizer, "1.2", [" the", 7], k=3),
        circuit_tokens(architecture, tokenizer, "1.2", k=5, circuit="qk"),
        head_directions(architecture, tokenizer, "1.2", directions=2, k=3),
    ]


@pytest.mark.parametrize("number", range(5))
def test_results_are_kept(tmp_path, number):
    made = results()[number]
    made.save(tmp_path / "result.safetensors")
    again = type(made).load(tmp_path / "result.safetensors")
    assert repr(again) == repr(made) and "\n" not in repr(made)
    for field in dataclasses.fields(made):
        ours, own = getattr(again, field.name), getattr(made, field.name)
        if isinstance(own, np.ndarray):
            np.testing.assert_array_equal(ours, own)
            assert ours.dtype == own.dtype
        else:
            assert (ours, type(ours)) == (own, type(own))
    other = HeadDirections if number < 4 else HeadScores
    with pytest.raises(RecordFileError):
        other.load(tmp_path / "result.safetensors")


def test_results_are_tabulated():
    scores, pairs, tokens, everything, directions = results()
    frame = scores.to_frame()
    assert list(frame.columns) == ["head", "layer", "index", "value"] and len(frame) == 12
    assert frame["value"][frame["head"] == "1.2"].item() == scores.values[1, 2]
    assert scores.top(3)["value"].tolist() == sorted(scores.values.ravel(), reverse=True)[:3]
    frame = pairs.to_frame()
    assert len(frame) == 3 * 3 * 16
    row = frame[(frame.kind == "v") & (frame.writer == "0.3") & (frame.reader == "2.1")]
    assert row["value"].item() == pairs.of("v")[0, 3, 2, 1]
    assert row["above_chance"].item() == row["value"].item() - pairs.chance
    assert set(pairs.top(5, "q")["kind"]) == {"q"}
    frame = tokens.to_frame()
    assert frame["source"].tolist()[:4] == [" the"] * 3 + [tokens.sources[1][0]]
    assert frame["target_id"].tolist() == tokens.target_ids.ravel().tolist()
    assert len(everything.to_frame()) == 5
    frame = directions.to_frame()
    assert len(frame) == 2 * 2 * 2 * 3
    row = frame[(frame.direction == 1) & (frame.sign == -1) & (frame.side == "writes")].iloc[2]
    assert row["value"] == directions.values[1, 1, 1, 2]
    assert row["token"] == directions.tokens[1][1][1][2]


def test_missing_heads_are_left_out():
    table = padded([np.ones(2), np.zeros(3)])
    np.testing.assert_array_equal(table, [[1, 1, np.nan], [0, 0, 0]])
    frame = HeadScores(table, (4, 6), "score").to_frame()
    assert frame["head"].tolist() == ["4.0", "4.1", "6.0", "6.1", "6.2"]
    assert head_place("6.2", (4, 6), 3) == (1, 2)
    for wrong in ("5.0", "4.3", "4", "4.-1", "x.1", "4.²"):
        with pytest.raises(InputError, match=r"write 'layer.head', with a layer out of \[4, 6\]"):
            head_place(wrong, (4, 6), 3)


def test_pictures_hold_the_numbers():
    scores, pairs, tokens, everything, directions = results()
    shown = lambda figure: np.ma.filled(figure.axes[0].images[0].get_array(), np.nan)  # noqa: E731
    np.testing.assert_array_equal(shown(scores.plot()), scores.values)
    image = scores.plot().axes[0].images[0]
    assert image.get_cmap().name == "RdBu_r" and sum(image.get_clim()) == 0
    table = pairs.plot("q").axes[0]
    assert [label.get_text() for label in table.get_yticklabels()][:2] == ["0.0", "0.1"]
    low, high = table.images[0].get_clim()
    assert low == -high  # white is chance
    above = pairs.of("q")[:2, :, 1:].reshape(8, 8) - pairs.chance
    np.testing.assert_array_equal(shown(pairs.plot("q")), above)
    np.testing.assert_array_equal(
        shown(pairs.plot("k", "2.1")), pairs.of("k", "2.1")[:2] - pairs.chance
    )
    np.testing.assert_array_equal(shown(tokens.plot()), tokens.values)
    assert tokens.plot().axes[0].get_yticklabels()[0].get_text() == "·the"
    assert "→" in everything.plot().axes[0].texts[0].get_text()
    rows = [label.get_text() for label in directions.plot().axes[0].get_yticklabels()]
    assert rows[:4] == ["0+ reads", "0+ writes", "0− reads", "0− writes"]
    with pytest.raises(InputError, match="no composition 'x'; there are q, k, v"):
        pairs.plot("x")


def test_kinds_of_results_are_told_apart():
    kinds = {each.KIND for each in (HeadScores, CompositionScores, CircuitTokens, HeadDirections)}
    assert len(kinds) == 4
