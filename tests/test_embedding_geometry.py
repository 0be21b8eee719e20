"""Nearest tokens against the dense product; anisotropy against the plain loop over pairs."""

import itertools

import numpy as np
import pytest
import torch

import embedding_geometry as geometry
import families
from activation_rows import read_rows
from embedding_geometry import (
    GeometryResult,
    NearestTokens,
    embedding_geometry,
    geometry_of,
    mean_cosine,
    measure_geometry,
    nearest_tokens,
    token_neighbors,
)
from forward_pass import ArchitectureError, InputError, LayerError
from model_architecture import Architecture
from saved_files import read_after_damage
from steering_direction import Direction


@pytest.fixture(scope="module")
def llama():
    return families.build("llama")


@pytest.fixture(scope="module")
def tokenizer():
    return families.tiny_tokenizer()


def dense(matrix, vectors, k, metric):
    """Scores of every token at once, float64, and the k best by a stable sort."""
    table, wanted = matrix.detach().double().numpy(), np.atleast_2d(np.asarray(vectors, float))
    scores = wanted @ table.T
    if metric == "cosine":
        lengths = np.linalg.norm(table, axis=1)
        scores = scores / lengths / np.linalg.norm(wanted, axis=1, keepdims=True)
    ids = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return ids, np.take_along_axis(scores, ids, 1)


# --- Nearest tokens -------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["cosine", "dot"])
@pytest.mark.parametrize("matrix", ["input", "output"])
@pytest.mark.parametrize("chunk", [1, 700, 2**22])
def test_nearest_tokens_are_those_of_the_dense_product(
    llama, tokenizer, metric, matrix, chunk, monkeypatch
):
    monkeypatch.setattr(geometry, "CHUNK_VALUES", chunk)
    vectors = torch.randn(3, families.HIDDEN, generator=torch.Generator().manual_seed(0))
    found = nearest_tokens(llama, tokenizer, vectors, 7, metric=metric, matrix=matrix)
    own = llama.get_input_embeddings() if matrix == "input" else llama.get_output_embeddings()
    ids, scores = dense(own.weight, vectors.numpy(), 7, metric)
    assert found.ids.tolist() == ids.tolist()
    assert found.scores == pytest.approx(scores, abs=1e-4)
    assert found.of(1) == [tokenizer.decode([i]) for i in ids[1]]
    assert (found.metric, found.matrix, found.labels) == (metric, matrix, ("0", "1", "2"))


def test_every_family_finds_a_token_by_its_own_embedding(family):
    _, model = family
    weight = model.get_output_embeddings().weight.detach()
    found = nearest_tokens(model, None, weight[[7, 50]] * 3.0, 2)
    assert found.ids[:, 0].tolist() == [7, 50]
    assert found.scores[:, 0] == pytest.approx([1, 1], abs=1e-5)


def test_what_is_excluded_stays_out(llama, tokenizer):
    weight = llama.get_input_embeddings().weight.detach()
    whole = nearest_tokens(llama, tokenizer, weight[20], 5, matrix="input")
    less = nearest_tokens(llama, tokenizer, weight[20], 4, matrix="input", exclude=[20])
    assert whole.ids[0, 0] == 20
    assert less.ids[0].tolist() == whole.ids[0, 1:].tolist()
    everything = nearest_tokens(llama, tokenizer, weight[20], 97, exclude=[0, 98])
    assert sorted(everything.ids[0].tolist()) == list(range(1, 98))


def test_a_direction_gives_its_own_name(llama, tokenizer):
    direction = Direction(llama.get_output_embeddings().weight[9].detach(), 1, label="nine")
    found = nearest_tokens(llama, tokenizer, direction, 3)
    assert found.labels == ("nine",)
    assert found.ids[0, 0] == 9
    assert nearest_tokens(llama, tokenizer, direction, 3, labels=["x"]).labels == ("x",)


def test_half_precision_is_searched_in_full(tokenizer):
    model = families.build("llama").bfloat16()
    vector = torch.randn(families.HIDDEN, generator=torch.Generator().manual_seed(1))
    ids, scores = dense(model.get_output_embeddings().weight, vector.numpy(), 5, "cosine")
    found = nearest_tokens(model, tokenizer, vector, 5)
    assert found.ids.tolist() == ids.tolist()
    assert found.scores == pytest.approx(scores, abs=1e-6)


@pytest.mark.parametrize("metric", ["cosine", "dot"])
def test_neighbours_are_the_nearest_but_for_the_token_itself(llama, tokenizer, metric):
    weight = llama.get_input_embeddings().weight.detach()
    cat, the = (tokenizer(text)["input_ids"][0] for text in (" cat", " the"))
    found = token_neighbors(llama, tokenizer, [" cat", the], 4, metric=metric)
    for row, token in enumerate((cat, the)):
        ids, scores = dense(weight, weight[token].numpy(), 99, metric)
        kept = ids[0] != token
        assert found.ids[row].tolist() == ids[0][kept][:4].tolist()
        assert found.scores[row] == pytest.approx(scores[0][kept][:4], abs=1e-4)
    assert found.labels == (" cat", " the")
    for several in (torch.tensor(found.ids[0]), found.ids[0]):
        assert len(token_neighbors(llama, tokenizer, several, 2).ids) == 4
    assert len(token_neighbors(llama, tokenizer, torch.tensor(5), 2).ids) == 1
    assert token_neighbors(llama, tokenizer, " cat", 98).ids.shape == (1, 98)


def test_a_token_is_left_out_wherever_it_stands(tokenizer):
    """By dot product longer embeddings come before the token's own, or leave no place for it."""
    model = families.build("llama")
    weight = model.get_input_embeddings().weight
    with torch.no_grad():
        weight[[9, 12, 7]] = weight[5] * torch.tensor([[4.0], [3.0], [2.0]])
    for k in (1, 2, 3, 5):
        found = token_neighbors(model, tokenizer, 5, k, metric="dot")
        ids, _ = dense(weight.detach(), weight[5].detach().numpy(), 99, "dot")
        assert ids[0].tolist().index(5) >= 3
        assert found.ids[0].tolist() == [token for token in ids[0] if token != 5][:k]


@pytest.mark.parametrize(
    ("vectors", "options", "message"),
    [
        (torch.ones(5), {}, r"with d = 32; came \[5\]"),
        (torch.zeros(32), {}, "zeros has no nearest"),
        (torch.full((32,), torch.nan), {}, "NaN"),
        (torch.ones(0, 32), {}, "vectors are"),
        (torch.ones(32), {"k": 0}, r"1\.\.99"),
        (torch.ones(32), {"k": 99, "exclude": [3]}, r"1\.\.98"),
        (torch.ones(32), {"exclude": [-1]}, "token ids"),
        (torch.ones(32), {"exclude": [" cat"]}, "token ids"),
        (torch.ones(32), {"exclude": " cat"}, "token ids"),
        (torch.ones(32), {"exclude": [True]}, "token ids"),
        (torch.ones(32), {"exclude": 5}, "token ids"),
        (["a", "b"], {}, r"vectors are \[d\]"),
        (torch.ones(32), {"k": 2.5}, r"1\.\.99; came 2.5"),
        (torch.ones(32), {"k": True}, r"1\.\.99; came True"),
        (torch.ones(32), {"metric": "l2"}, "metric is"),
        (torch.ones(32), {"matrix": "head"}, "matrix is"),
        (torch.ones(32), {"labels": ["a", "b"]}, "2 labels for 1 vectors"),
    ],
)
def test_impossible_searches_are_refused(llama, tokenizer, vectors, options, message):
    with pytest.raises(InputError, match=message):
        nearest_tokens(llama, tokenizer, vectors, **options)


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        ([], {}, "at least one"),
        (5.0, {}, "integers"),
        (True, {}, "integers"),
        ("the cat sat", {}, "token"),
        (99, {}, "99"),
        (" cat", {"k": 99}, r"1\.\.98"),
        (" cat", {"metric": "l2"}, "metric is"),
    ],
)
def test_impossible_neighbours_are_refused(llama, tokenizer, tokens, options, message):
    with pytest.raises(InputError, match=message):
        token_neighbors(llama, tokenizer, tokens, **options)


def test_a_model_without_head_has_no_output_embedding(llama, tokenizer):
    with pytest.raises(ArchitectureError, match="no output embedding"):
        nearest_tokens(llama.model, tokenizer, torch.ones(32))
    assert nearest_tokens(llama.model, tokenizer, torch.ones(32), matrix="input").ids.size == 10


# --- Anisotropy -----------------------------------------------------------------------------------


def cosine_by_pairs(x):
    found = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in itertools.combinations(x, 2)]
    return np.mean(found)


def test_the_mean_cosine_is_that_over_all_pairs():
    x = np.random.default_rng(0).normal(size=(23, 6)) + 0.7
    assert mean_cosine(x) == pytest.approx(cosine_by_pairs(x), abs=1e-12)
    with_zero = np.concatenate([x, np.zeros((2, 6))])
    assert mean_cosine(with_zero) == pytest.approx(cosine_by_pairs(x), abs=1e-12)
    assert mean_cosine(np.ones((4, 3))) == pytest.approx(1)
    assert np.isnan(mean_cosine(np.zeros((4, 3))))
    assert mean_cosine(np.array([[1.0, 0], [-2, 0]])) == pytest.approx(-1)


@pytest.mark.parametrize("size", [(50, 6), (6, 50)])
def test_the_spread_is_that_of_principal_components(size):
    x = np.random.default_rng(0).normal(size=size) * np.geomspace(1, 9, size[1]) + 2
    found = geometry_of(x)
    variances = np.linalg.svd(
        x.astype(np.float32).astype(float) - x.mean(0), compute_uv=False
    ) ** 2 / (size[0] - 1)
    assert found.participation_ratio[0] == pytest.approx(
        variances.sum() ** 2 / (variances**2).sum(), rel=1e-5
    )
    assert found.first_component[0] == pytest.approx(variances[0] / variances.sum(), rel=1e-5)
    assert found.mean_norm[0] == pytest.approx(np.linalg.norm(x, axis=1).mean(), rel=1e-5)
    assert (found.count, found.width) == size


def test_known_shapes():
    wheel = np.concatenate([np.eye(8), -np.eye(8)])
    found = geometry_of(wheel)
    assert found.participation_ratio[0] == pytest.approx(8)
    assert found.mean_cosine[0] == pytest.approx(-16 / (16 * 15))
    line = geometry_of(np.outer(np.arange(1.0, 5), np.ones(6)))
    assert line.participation_ratio[0] == pytest.approx(1)
    assert line.first_component[0] == pytest.approx(1)
    assert line.mean_cosine[0] == pytest.approx(1)
    row = np.random.default_rng(0).normal(size=(1, 3))
    near = row * (1 + 1e-7 * np.arange(4)[:, None])
    for same in (np.ones((4, 3)), np.full((4, 3), 0.1), row.repeat(4, 0), near):
        flat = geometry_of(same)
        assert np.isnan(flat.participation_ratio[0])
        assert np.isnan(flat.first_component[0])
        assert flat.mean_cosine[0] == pytest.approx(1)


def test_every_familys_activations(family):
    _, model = family
    prompts = families.token_ids(3, 6).tolist()
    x = read_rows(model, None, prompts, read="each").values.astype(float)
    found = measure_geometry(model, None, prompts)
    assert found.layers == tuple(map(str, range(len(Architecture(model).blocks))))
    for layer in (0, 2):
        wanted = cosine_by_pairs(x[:, layer])
        assert found.mean_cosine[layer] == pytest.approx(wanted, abs=1e-6)
    rest = measure_geometry(model, None, prompts, [1], read="rest")
    assert (rest.count, rest.layers) == (15, ("1",))


def test_the_vocabularys_own_geometry(llama):
    found = embedding_geometry(llama, "output")
    table = llama.get_output_embeddings().weight.detach().double().numpy()
    assert found.mean_cosine[0] == pytest.approx(cosine_by_pairs(table), abs=1e-6)
    assert (found.count, found.layers) == (99, ("output embedding",))


def test_too_few_vectors_are_refused(llama):
    with pytest.raises(InputError, match="at least two"):
        measure_geometry(llama, None, [[5]])
    with pytest.raises(InputError, match="list of prompts"):
        measure_geometry(llama, None, "a text")
    with pytest.raises(LayerError, match="7"):
        measure_geometry(llama, None, [[5, 6]], 7)


# --- The results ----------------------------------------------------------------------------------


def test_results_survive_their_files_and_damage(llama, tokenizer, tmp_path):
    near = nearest_tokens(llama, tokenizer, torch.ones(2, 32), 4, labels=["a", "b\u2028"])
    near.save(tmp_path / "near")
    again = NearestTokens.load(tmp_path / "near")
    assert again.ids.tolist() == near.ids.tolist()
    assert again.scores.tolist() == near.scores.tolist()
    assert (again.tokens, again.labels, repr(again)) == (near.tokens, near.labels, repr(near))
    shape = measure_geometry(llama, None, [[5, 6, 7]])
    shape.save(tmp_path / "shape")
    other = GeometryResult.load(tmp_path / "shape")
    assert other.mean_cosine.tolist() == shape.mean_cosine.tolist()
    assert repr(other) == repr(shape)
    for found in (near, shape):
        assert "\n" not in repr(found)
        assert read_after_damage(found, tmp_path / "file") > 20


def test_frames_and_pictures(llama, tokenizer):
    near = nearest_tokens(llama, tokenizer, torch.eye(32)[:2], 3)
    frame = near.to_frame()
    row = frame[(frame["vector"] == "1") & (frame["rank"] == 2)]
    assert row["id"].item() == near.ids[1, 2]
    assert row["token"].item() == near.of(1)[2]
    drawn = np.asarray(near.plot().axes[0].images[0].get_array())
    assert drawn == pytest.approx(near.scores)
    shape = measure_geometry(llama, None, [[5, 6, 7, 8]])
    assert shape.to_frame()["participation_ratio"].tolist() == shape.participation_ratio.tolist()
    left, right = shape.plot().axes
    assert left.lines[0].get_ydata().tolist() == shape.mean_cosine.tolist()
    assert right.lines[0].get_ydata().tolist() == shape.participation_ratio.tolist()


def test_labels_that_do_not_fit_are_refused():
    ids, scores = np.zeros((2, 3), int), np.zeros((2, 3), np.float32)
    with pytest.raises(InputError, match="alike"):
        NearestTokens(ids, scores, ("a",), ("x", "y"), "dot", "input")
    with pytest.raises(InputError, match="3 numbers"):
        GeometryResult(*[np.zeros(2)] * 4, layers=("0", "1", "2"), count=5, width=4)
