"""Similarity of layers, models and prompts, against the plain formulas."""

import numpy as np
import pytest
import torch

import families
import similarity
from activation_rows import read_rows
from forward_pass import InputError, LayerError, SiteError
from heat_maps import number_cells
from model_analyzer import ModelAnalyzer
from model_architecture import Architecture
from saved_files import read_after_damage
from similarity import (
    CKAMeter,
    SimilarityResult,
    centred_gram,
    cka_table,
    cosine_table,
    layer_similarity,
    linear_cka,
    minibatches,
    prompt_similarity,
)

RNG = np.random.default_rng(0)
X = RNG.normal(size=(30, 7)) + 5
Y = X[:, :4] @ RNG.normal(size=(4, 9)) + 0.5 * RNG.normal(size=(30, 9))


def hsic(x, y):
    """tr(K H L H) / (n − 1)² with the full tables (Kornblith et al. 2019, equation 3)."""
    n = len(x)
    centring = np.eye(n) - np.ones((n, n)) / n
    return np.trace(x @ x.T @ centring @ y @ y.T @ centring) / (n - 1) ** 2


def unbiased_hsic(x, y):
    """Song et al. (2012), equation 5, with the full tables and explicit ones."""
    n, one = len(x), np.ones(len(x))
    k, l_ = x @ x.T, y @ y.T
    np.fill_diagonal(k, 0)
    np.fill_diagonal(l_, 0)
    middle = (one @ k @ one) * (one @ l_ @ one) / ((n - 1) * (n - 2))
    return (np.trace(k @ l_) + middle - 2 / (n - 2) * (one @ k @ l_ @ one)) / (n * (n - 3))


def naive_cka(x, y, hsic=hsic):
    return hsic(x, y) / np.sqrt(hsic(x, x) * hsic(y, y))


# --- CKA ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["features", "gram", "auto"])
def test_cka_is_the_formula_with_whole_tables(form):
    assert linear_cka(X, Y, form=form) == pytest.approx(naive_cka(X, Y), abs=1e-12)
    debiased = linear_cka(X, Y, debiased=True, form=form)
    assert debiased == pytest.approx(naive_cka(X, Y, unbiased_hsic), abs=1e-10)
    assert abs(debiased - naive_cka(X, Y)) > 0.01


@pytest.mark.parametrize("debiased", [False, True])
def test_cka_does_not_see_rotation_scale_and_shift(debiased):
    turn = np.linalg.qr(RNG.normal(size=(7, 7)))[0]
    wanted = linear_cka(X, Y, debiased=debiased)
    assert linear_cka(-3.5 * X @ turn + 100, Y, debiased=debiased) == pytest.approx(wanted)
    assert linear_cka(X, 2 * X @ turn, debiased=debiased) == pytest.approx(1)
    stretched = X * np.geomspace(1, 30, 7)
    assert abs(linear_cka(stretched, Y, debiased=debiased) - wanted) > 0.05
    assert linear_cka(Y, X, debiased=debiased) == pytest.approx(wanted)


def test_a_large_mean_costs_no_digits():
    assert linear_cka(X + 1e6, Y) == pytest.approx(linear_cka(X, Y), abs=1e-6)


def test_unrelated_rows_are_alike_only_by_the_plain_estimate():
    pairs = [RNG.normal(size=(2, 24, 40)) for _ in range(40)]
    assert np.mean([linear_cka(a, b) for a, b in pairs]) > 0.5
    assert abs(np.mean([linear_cka(a, b, debiased=True) for a, b in pairs])) < 0.03


@pytest.mark.parametrize("debiased", [False, True])
def test_the_inner_product_of_centred_tables_is_hsic(debiased):
    k, l_ = centred_gram(X, debiased), centred_gram(Y, debiased)
    assert k.sum(0) == pytest.approx(np.zeros(30), abs=1e-8)
    n = len(X)
    wanted = unbiased_hsic(X, Y) * n * (n - 3) if debiased else hsic(X, Y) * (n - 1) ** 2
    assert (k * l_).sum() == pytest.approx(wanted)


def test_the_table_is_cka_of_each_pair_and_minibatches_average_hsic():
    x, y = RNG.normal(size=(40, 3, 6)), RNG.normal(size=(40, 2, 5))
    y[:, 0] += x[:, 1, :5]
    for debiased in (False, True):
        table = cka_table(x, y, debiased=debiased)
        for i, j in np.ndindex(3, 2):
            wanted = linear_cka(x[:, i], y[:, j], debiased=debiased)
            assert table[i, j] == pytest.approx(wanted, abs=1e-12)
    meter, parts = CKAMeter(), minibatches(40, 15, seed=2)
    assert sorted(np.concatenate(parts)) == list(range(40))
    assert max(map(len, parts)) <= 15
    for part in parts:
        meter.add(x[part], y[part])
    cross, own_x, own_y = (
        np.mean([unbiased_hsic(a[part], b[part]) for part in parts])
        for a, b in ((x[:, 1], y[:, 0]), (x[:, 1], x[:, 1]), (y[:, 0], y[:, 0]))
    )
    # parts of 14 and 13 rows: each counts alike
    assert meter.values[1, 0] == pytest.approx(cross / np.sqrt(own_x * own_y))
    assert meter.rows == 40


def test_what_does_not_vary_has_no_cka():
    """Also where the mean is not exact, and where rows differ by rounding: NaN, and no number."""
    line = X[:1].repeat(10, 0)
    near = line.astype(np.float32) * (1 + 1e-7 * np.arange(-5, 5)[:, None]).astype(np.float32)
    assert np.ptp(near, axis=0).any()
    for x in (np.ones((10, 3)), np.full((10, 3), 0.1), line, near):
        for debiased in (False, True):
            for form in ("features", "gram"):
                assert np.isnan(linear_cka(x, X[:10], debiased=debiased, form=form))
            table = cka_table(
                np.stack([x, X[:10, : x.shape[1]].astype(x.dtype)], 1), None, debiased
            )
            assert np.isnan(table[0]).all() and np.isnan(table[:, 0]).all()
            assert table[1, 1] == pytest.approx(1)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((X, Y[:9]), {}, "same rows: 30 and 9"),
        ((X[:3], Y[:3]), {"debiased": True}, "at least 4 rows"),
        ((X[0], Y), {}, r"\[row, feature\]"),
        ((X, Y), {"form": "kernel"}, "form is"),
        ((np.full((10, 3), np.nan), Y[:10]), {}, "NaN or infinity"),
    ],
)
def test_representations_that_do_not_correspond_are_refused(arguments, options, message):
    with pytest.raises(InputError, match=message):
        linear_cka(*arguments, **options)


def test_a_meter_refuses_too_little_and_plain_parts():
    meter = CKAMeter(debiased=False)
    with pytest.raises(InputError, match="no rows"):
        _ = meter.values
    with pytest.raises(InputError, match="at least 2 rows"):
        meter.add(X[:1, None])
    with pytest.raises(InputError, match="same rows"):
        meter.add(X[:, None], Y[:4, None])
    meter.add(X[:, None])
    with pytest.raises(InputError, match="debiased=True"):
        meter.add(X[:, None])


def test_cosine_is_the_mean_over_rows():
    x, y = RNG.normal(size=(5, 3, 4)), RNG.normal(size=(5, 2, 4))
    x[2, 0] = 0
    wanted = np.zeros((3, 2))
    for i, j in np.ndindex(3, 2):
        for row in range(5):
            a, b = x[row, i], y[row, j]
            if a.any():
                wanted[i, j] += a @ b / np.linalg.norm(a) / np.linalg.norm(b) / 5
    assert cosine_table(x, y) == pytest.approx(wanted)


# --- Layers and models ----------------------------------------------------------------------------


def prompts_of(count=6, length=7):
    rng = np.random.default_rng(1)
    return [[int(t) for t in rng.integers(4, 90, length + i % 2)] for i in range(count)]


def test_layers_of_every_family(family):
    _, model = family
    rows = read_rows(model, None, prompts_of(), read="each").values
    n_layers = len(Architecture(model).blocks)
    plain = layer_similarity(model, None, prompts_of(), debiased=False)
    cosine = layer_similarity(model, None, prompts_of(), metric="cosine", read="rest")
    assert plain.values.shape == (n_layers, n_layers)
    assert plain.values.diagonal() == pytest.approx(np.ones(n_layers))
    assert plain.values[0, 2] == pytest.approx(
        naive_cka(rows[:, 0].astype(float), rows[:, 2].astype(float)), abs=1e-9
    )
    assert (plain.count, cosine.count) == (sum(map(len, prompts_of())), len(rows) - 6)
    assert plain.row_labels == tuple(map(str, range(n_layers)))
    assert cosine.values.diagonal() == pytest.approx(np.ones(n_layers))


def test_two_models_and_an_analyzer(monkeypatch):
    one, two = families.build("llama"), families.build("llama", seed=1)
    found = layer_similarity(one, None, prompts_of(), two, debiased=False)
    x, y = (read_rows(m, None, prompts_of(), read="each").values.astype(float) for m in (one, two))
    assert found.between == "models"
    assert found.values[2, 1] == pytest.approx(naive_cka(x[:, 2], y[:, 1]), abs=1e-9)
    assert not np.allclose(found.values, found.values.T)
    same = layer_similarity(one, None, prompts_of(), ModelAnalyzer(two, "cpu"), debiased=False)
    assert same.values == pytest.approx(found.values)
    itself = layer_similarity(one, None, prompts_of(), families.build("llama"))
    assert itself.values.diagonal() == pytest.approx(np.ones(3))
    monkeypatch.setattr(similarity, "BATCH_ROWS", 16)
    parts = layer_similarity(one, None, prompts_of(), seed=3)
    meter = CKAMeter()
    for part in minibatches(len(x), 16, 3):
        meter.add(x[part])
    assert parts.values == pytest.approx(meter.values)


def test_models_of_other_widths_are_compared_by_cka_alone():
    one, two = families.build("llama"), families.build("gpt2", n_embd=16)
    assert layer_similarity(one, None, prompts_of(), two).values.shape == (3, 3)
    with pytest.raises(InputError, match="32 and 16 came: use CKA"):
        layer_similarity(one, None, prompts_of(), two, metric="cosine")


# --- Prompts --------------------------------------------------------------------------------------


def test_prompts_by_cosine():
    model, tokenizer = families.build("gemma2"), families.tiny_tokenizer()
    texts = ["the cat sat", "a mat", "the cat sat"]
    x = read_rows(model, tokenizer, texts, 1).values[:, 0].astype(float)
    found = prompt_similarity(model, tokenizer, texts, 1)
    units = x / np.linalg.norm(x, axis=1, keepdims=True)
    assert found.values == pytest.approx(units @ units.T)
    assert found.values[0, 2] == pytest.approx(1)
    assert found.row_labels == tuple(texts)
    assert (found.layer, found.count) == (1, 1)
    centred = prompt_similarity(model, tokenizer, texts, 1, centred=True)
    y = x - x.mean(0)
    assert centred.values[0, 1] == pytest.approx(
        y[0] @ y[1] / np.linalg.norm(y[0]) / np.linalg.norm(y[1])
    )
    assert centred.metric == "centred cosine"
    part = prompt_similarity(model, tokenizer, texts, -1, at=["cat", "mat", "cat"])
    assert part.layer == 3


def test_prompts_by_cka_of_their_tokens():
    model = families.build("olmo2")
    prompts = [[5, 9, 12, 7, 30], [6, 8, 12, 7, 31]]
    tables = [read_rows(model, None, [p], 1, read="each").values[:, 0] for p in prompts]
    found = prompt_similarity(model, None, prompts, 1, metric="cka")
    wanted = naive_cka(*(table.astype(float) for table in tables))
    assert found.values[0, 1] == pytest.approx(wanted, abs=1e-9)
    assert found.row_labels == ("text 0", "text 1")
    assert found.count == 5


@pytest.mark.parametrize(
    ("call", "arguments", "options", "error", "message"),
    [
        (layer_similarity, ([[5, 6]] * 3,), {"metric": "l2"}, InputError, "cka, cosine"),
        (layer_similarity, ([[5]],), {}, InputError, "at least 4 rows"),
        (layer_similarity, ("text",), {}, InputError, "list of prompts"),
        (layer_similarity, ([[5, 6]] * 3,), {"layers": [9]}, LayerError, "9"),
        (layer_similarity, ([[5, 6]] * 3,), {"site": "attn_pattern"}, SiteError, "as many"),
        (layer_similarity, ([[5, 6]] * 3, "a/folder"), {}, InputError, "other is a loaded model"),
        (layer_similarity, ([[5, 6]] * 3,), {"batch_size": "8"}, InputError, "batch_size"),
        (prompt_similarity, ([[5, 6]], 0), {}, InputError, "at least two"),
        (prompt_similarity, ([[5, 6], [7]], 0), {"read": "each"}, InputError, "several vectors"),
        (prompt_similarity, ([[5, 6], [7]], 0), {"centred": True}, InputError, "-1 always"),
        (prompt_similarity, ([[5, 6], [5]], 0), {"metric": "cka"}, InputError, "2, 1"),
        (prompt_similarity, ([[5], [6]], 0), {"metric": "cka"}, InputError, "two at least"),
        (prompt_similarity, ([[5, 6], [5]], 0), {"metric": "dot"}, InputError, "cka, cosine"),
        (prompt_similarity, ([[5, 6], [5]], 9), {}, LayerError, "9"),
    ],
)
def test_what_cannot_be_compared_is_refused(call, arguments, options, error, message):
    model = families.build("llama")
    with pytest.raises(error, match=message):
        call(model, None, *arguments, **options)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# --- The result -----------------------------------------------------------------------------------


def test_a_result_survives_its_file_and_damage(tmp_path):
    found = SimilarityResult(
        np.array([[1, np.nan], [0.5, 1]]), ("0", "a\u2028"), ("0", "1"), "models", "cka", "x", 9, 3
    )
    found.save(tmp_path / "table")
    again = SimilarityResult.load(tmp_path / "table")
    assert np.array_equal(again.values, found.values, equal_nan=True)
    assert repr(again) == repr(found)
    assert again.row_labels == found.row_labels
    assert read_after_damage(found, tmp_path / "table") > 20
    with pytest.raises(InputError, match="not as its labels say"):
        SimilarityResult(np.ones((2, 3)), ("0", "1"), ("0", "1"), "layers", "cka", "x", 9)


def test_numbers_stand_in_small_tables_alone():
    table = np.full((16, 3), 0.126)
    table[2, 1] = np.nan
    cells = number_cells(table)
    assert (cells[0, 0], cells[2, 1]) == ("0.13", "")
    assert number_cells(np.ones((17, 3))) is None


def test_the_frame_and_the_picture():
    found = prompt_similarity(
        families.build("llama"), None, [[5, 6], [7], [8, 9, 10]], 0, metric="cosine"
    )
    frame = found.to_frame()
    cell = frame[(frame["row"] == "text 0") & (frame["column"] == "text 2")]
    assert cell["value"].item() == found.values[0, 2]
    figure = found.plot()
    assert torch.equal(
        torch.tensor(figure.axes[0].images[0].get_array()), torch.tensor(found.values)
    )
    texts = {text.get_text() for text in figure.axes[0].texts}
    assert f"{found.values[0, 1]:.2f}" in texts
