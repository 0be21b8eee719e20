"""The calls of the contract: what they hand to the figures, save, show and refuse."""

import inspect
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from matplotlib.figure import Figure

import families
import logit_lens
import visualization
from activation_extraction import ActivationExtractor
from dimensionality import fit_reduction
from lens_fakes import FakeLens, lens_result
from visualization import (
    compare_reduction_methods,
    layer_similarity,
    plot_convergence_analysis,
    plot_embeddings_2d,
    plot_embeddings_3d,
    plot_layer_embeddings,
    plot_layer_similarity,
    plot_lens_heatmap,
    plot_logit_lens_basic,
    plot_prediction_refinement,
    plot_token_preservation,
)

TEXT = "The quick brown fox jumps over the lazy dog today"
POINTS = np.random.default_rng(0).normal(size=(12, 6))


def cells(figure, index=0):
    return np.ma.filled(figure.axes[index].images[0].get_array(), np.nan)


def names(axis_labels):
    return [label.get_text() for label in axis_labels]


@pytest.fixture(scope="module")
def tiny():
    """Return a small model and its tokenizer."""
    return families.build("gpt2"), families.tiny_tokenizer()


# --- Signatures ----------------------------------------------------------------------------------

CONTRACT = {
    "plot_logit_lens_basic": "lens, text, layer_step=3, max_tokens=8",
    "plot_convergence_analysis": "lens, text, save_path=None",
    "plot_token_preservation": "lens, text, save_path=None",
    "plot_prediction_refinement": "lens, text, layers=None",
    "plot_embeddings_2d": "embeddings, labels=None, colors=None, method='pca', title=None",
    "plot_embeddings_3d": "embeddings, labels=None, colors=None, method='pca', title=None",
    "compare_reduction_methods": "embeddings, labels=None, colors=None",
    "plot_layer_embeddings": "model, tokenizer, text, layer_indices=None, method='pca'",
    "reduce_dimensions": "embeddings, method='pca', n_components=2",
}


@pytest.mark.parametrize("name", CONTRACT)
def test_names_and_defaults_are_those_of_the_contract(name):
    parameters = inspect.signature(getattr(visualization, name)).parameters.values()
    shown = [
        p.name if p.default is p.empty else f"{p.name}={p.default!r}"
        for p in parameters
        if p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    assert ", ".join(shown).startswith(CONTRACT[name])
    if name.startswith("plot_"):
        asked = {p.name: p.default for p in parameters}
        assert (asked["interactive"], asked["show"], asked["save_path"]) == (False, False, None)
        assert {"ax", "axes"} & {*asked}


# --- Through a lens ------------------------------------------------------------------------------


def test_the_basic_plot_takes_every_third_layer_and_the_first_tokens():
    figure = plot_logit_lens_basic(FakeLens(8), TEXT)
    ax = figure.axes[0]
    assert names(ax.get_yticklabels()) == ["embed", "0", "3", "6", "7"]
    assert len(ax.get_xticklabels()) == 8
    assert ax.get_title() == "Logit lens, first 8 of 10 tokens"
    result = lens_result(FakeLens()._tokens(TEXT), 8, 10)
    assert np.array_equal(cells(figure), result.top_probs[[0, 1, 4, 7, 8]][:, :8, 0])


@pytest.mark.parametrize("wrong", [{"layer_step": 0}, {"max_tokens": 0}])
def test_steps_start_at_one(wrong):
    with pytest.raises(ValueError, match="layer_step and max_tokens start at 1"):
        plot_logit_lens_basic(FakeLens(), TEXT, **wrong)


def test_the_refinement_reads_one_position_and_keeps_more_than_it_lists():
    lens = FakeLens(6, vocabulary=30)
    figure = plot_prediction_refinement(lens, TEXT, layers=[0, 2, 5], position=2, top_k=3)
    assert lens.calls == [("get_layer_predictions", 30, [0, 2, 5])]
    lines, ranks = figure.axes
    assert names(ranks.get_xticklabels()) == ["0", "2", "5"]
    assert len(ranks.get_yticklabels()) == 3
    final = lens_result(lens._tokens(TEXT), 6, 30).top_probs[6, 2, :3]
    assert [line.get_ydata()[-1] for line in lines.lines] == pytest.approx(final)
    assert lines.get_title() == "Prediction after ·brown"
    with pytest.raises(ValueError, match="position=10 is outside the text's 10 tokens"):
        plot_prediction_refinement(lens, TEXT, position=10)


def test_panels_are_those_of_the_lens():
    lens = FakeLens(4)
    figure = plot_convergence_analysis(lens, TEXT)
    assert np.array_equal(cells(figure), lens.get_convergence_metrics(TEXT)["kl_divergence"])
    figure = plot_token_preservation(lens, TEXT)
    assert np.array_equal(cells(figure, 1), lens.compare_to_input(TEXT)["kl_from_input"])


def test_without_a_lens_one_is_made_from_the_path(monkeypatch):
    made = []

    def make(path):
        made.append(path)
        return FakeLens()

    monkeypatch.setattr(logit_lens, "LogitLens", make)
    assert plot_convergence_analysis(None, TEXT, model_path="some/model")
    assert made == ["some/model"]
    with pytest.raises(ValueError, match="give a lens, or lens=None and model_path="):
        plot_convergence_analysis(None, TEXT)


def test_a_real_lens_is_drawn(tiny):
    model, tokenizer = tiny
    lens = logit_lens.LogitLens(model, tokenizer=tokenizer)
    result = lens.run("the cat sat", 10)
    assert np.array_equal(
        cells(plot_lens_heatmap(lens, "the cat sat", "kl")), result.metrics["kl_divergence"]
    )
    metrics = lens.get_convergence_metrics("the cat sat")
    assert np.array_equal(
        cells(plot_convergence_analysis(lens, "the cat sat"), 2), metrics["top1_rank"]
    )
    assert plot_token_preservation(lens, "the cat sat")
    last = plot_prediction_refinement(lens, "the cat sat", layers=["h.0", -1]).axes[0].lines
    assert last[0].get_ydata()[-1] == pytest.approx(float(result.top_probs[-1, -1, 0]))


# --- Of points -----------------------------------------------------------------------------------


def test_embeddings_lie_where_the_reduction_puts_them():
    reduction = fit_reduction(POINTS)
    figure = plot_embeddings_2d(POINTS, [f"w{i}" for i in range(12)])
    ax = figure.axes[0]
    assert np.array_equal(ax.collections[0].get_offsets(), reduction.coordinates)
    assert ax.get_xlabel().split("\n")[:2] == [reduction.axis_labels()[0], reduction.kept()]
    assert ax.get_ylabel() == reduction.axis_labels()[1]
    assert ax.get_title() == "Embeddings (PCA)"
    assert plot_embeddings_2d(POINTS, title="Mine").axes[0].get_title() == "Mine"


def test_labels_can_be_left_out():
    figure = plot_embeddings_2d(POINTS, list("abcdefghijkl"), show_labels=False)
    assert [t for t in figure.axes[0].texts if t.get_gid() == "label"] == []


def test_embeddings_in_space():
    figure = plot_embeddings_3d(torch.tensor(POINTS), list("abcdefghijkl"))
    assert figure.axes[0].get_zlabel() == fit_reduction(POINTS, "pca", 3).axis_labels()[2]


def test_fewer_labels_than_points_warn_where_the_call_is():
    with pytest.warns(UserWarning, match="2 labels for 12 points: they name the first 2") as seen:
        figure = plot_embeddings_2d(POINTS, ["a", "b"])
    assert seen[0].filename == __file__
    written = [t.get_text() for t in figure.axes[0].texts if t.get_gid() == "label"]
    assert written == ["a", "b"]
    with pytest.raises(ValueError, match="13 labels for 12 points"):
        plot_embeddings_2d(POINTS, ["a"] * 13)


def test_reduction_arguments_are_handed_on():
    with pytest.warns(UserWarning, match="perplexity=50 is lowered to 3.66667") as seen:
        figure = plot_embeddings_2d(POINTS, method="tsne", perplexity=50, n_iter=260)
    assert seen[0].filename.endswith("embedding_visualization.py") or seen[0].filename == __file__
    assert figure.axes[0].get_xlabel().startswith("t-SNE 1")


@pytest.mark.slow
def test_a_vocabulary_is_drawn_quickly():
    matrix = np.random.default_rng(0).normal(size=(50257, 768)).astype(np.float32)
    start = time.process_time()
    with pytest.warns(UserWarning, match="4 labels for 50257 points"):
        plot_embeddings_2d(matrix, ["king", "queen", "man", "woman"])
    assert time.process_time() - start < 30


def test_methods_are_compared_side_by_side():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        figure = compare_reduction_methods(POINTS[:4], list("abcd"), methods=["pca", "tsne"])
    assert [ax.get_title() for ax in figure.axes] == ["PCA", "t-SNE"]
    first = figure.axes[0].collections[0].get_offsets()
    assert np.array_equal(first, fit_reduction(POINTS[:4]).coordinates)
    with pytest.raises(ValueError, match="methods is empty"):
        compare_reduction_methods(POINTS, methods=[])


@pytest.mark.slow
def test_four_words_work_with_every_method():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        figure = compare_reduction_methods(POINTS[:4], list("abcd"))
    assert [ax.get_title() for ax in figure.axes] == ["PCA", "t-SNE", "UMAP"]


def test_tokens_go_through_the_layers_in_one_projection(tiny):
    model, tokenizer = tiny
    text = "the cat the"
    record = ActivationExtractor(model, tokenizer).extract_activations(text)
    layers = [0, 2]
    states = np.stack([record.layer_activations[i][0].numpy() for i in layers])
    count = states.shape[1]
    expected = fit_reduction(states.reshape(-1, states.shape[-1])).coordinates
    figure = plot_layer_embeddings(model, tokenizer, text, layer_indices=layers)
    drawn = np.stack([line.get_xydata() for line in figure.axes[0].lines], 1)
    np.testing.assert_allclose(drawn, expected.reshape(2, count, 2), atol=1e-5)
    later = plot_layer_embeddings(model, tokenizer, text, positions=range(1, count))
    assert len(later.axes[0].lines) == count - 1
    with pytest.raises(ValueError, match="are not among the text's"):
        plot_layer_embeddings(model, tokenizer, text, positions=[99])


def held(stack):
    """Return a record of these layers, ``[layer, position, feature]``."""
    return {str(i): torch.tensor(layer)[None] for i, layer in enumerate(stack)}


def test_the_cosine_similarity_is_the_mean_over_positions():
    stack = np.random.default_rng(0).normal(size=(3, 5, 7))
    values, labels = layer_similarity(held(stack))
    for i, j in np.ndindex(3, 3):
        cosines = [
            a @ b / np.linalg.norm(a) / np.linalg.norm(b)
            for a, b in zip(stack[i], stack[j], strict=True)
        ]
        assert values[i, j] == pytest.approx(np.mean(cosines))
    assert labels == ["0", "1", "2"]


def test_cka_follows_its_formula_and_does_not_see_rotation_or_scale():
    random = np.random.default_rng(0)
    x, y = random.normal(size=(2, 9, 4))
    turn = np.linalg.qr(random.normal(size=(4, 4)))[0]
    values, _ = layer_similarity(held([x, y, 3 * x @ turn + 1]), "cka")
    xc, yc = x - x.mean(0), y - y.mean(0)
    cross = np.linalg.norm(yc.T @ xc) ** 2
    expected = cross / np.linalg.norm(xc.T @ xc) / np.linalg.norm(yc.T @ yc)
    assert values[0, 1] == pytest.approx(expected)
    assert values[0, 2] == pytest.approx(1)
    with pytest.raises(ValueError, match="'cosine' or 'cka'"):
        layer_similarity(held([x]), "dot")
    with pytest.raises(ValueError, match="at least two"):
        layer_similarity(held([x[:1]]), "cka")


def test_the_similarity_of_a_records_layers_is_drawn(tiny):
    model, tokenizer = tiny
    record = ActivationExtractor(model, tokenizer).extract_activations("the cat")
    values, labels = layer_similarity(record)
    figure = plot_layer_similarity(record)
    np.testing.assert_allclose(cells(figure), values)
    assert names(figure.axes[0].get_yticklabels()) == labels == ["0", "1", "2"]
    assert np.diag(values) == pytest.approx(1)


# --- One rule for all ----------------------------------------------------------------------------


def every_call(tiny):
    """Each plotting function, ready to be called with options, and how many axes it takes."""
    model, tokenizer = tiny
    lens, stack = FakeLens(3), held(np.random.default_rng(0).normal(size=(3, 4, 5)))
    labels = list("abcdefghijkl")
    methods = ["pca", "pca"]
    return {
        "basic": (lambda **o: plot_logit_lens_basic(lens, TEXT, **o), 1),
        "lens": (lambda **o: plot_lens_heatmap(lens, TEXT, **o), 1),
        "convergence": (lambda **o: plot_convergence_analysis(lens, TEXT, **o), 4),
        "preservation": (lambda **o: plot_token_preservation(lens, TEXT, **o), 2),
        "refinement": (lambda **o: plot_prediction_refinement(lens, TEXT, **o), 2),
        "2d": (lambda **o: plot_embeddings_2d(POINTS, labels, **o), 1),
        "3d": (lambda **o: plot_embeddings_3d(POINTS, labels, **o), 1),
        "compare": (lambda **o: compare_reduction_methods(POINTS, methods=methods, **o), 2),
        "layers": (lambda **o: plot_layer_embeddings(model, tokenizer, "the cat", **o), 1),
        "similarity": (lambda **o: plot_layer_similarity(stack, **o), 1),
    }


CALLS = tuple(every_call((None, None)))


@pytest.mark.parametrize("name", CALLS)
def test_each_returns_saves_and_takes_axes(name, tiny, tmp_path):
    call, count = every_call(tiny)[name]
    figure = call(save_path=tmp_path / "new" / "plot.png")
    assert isinstance(figure, Figure)
    assert (tmp_path / "new" / "plot.png").stat().st_size > 1000
    own = Figure(figsize=(9, 9))
    projection = {"projection": "3d"} if name == "3d" else {}
    axes = [own.add_subplot(1, count, i + 1, **projection) for i in range(count)]
    assert call(**({"ax": axes[0]} if count == 1 else {"axes": axes})) is own
    assert pyplot.get_fignums() == []


@pytest.mark.parametrize("name", CALLS)
def test_each_has_an_interactive_twin(name, tiny, tmp_path, monkeypatch):
    call, count = every_call(tiny)[name]
    figure = call(interactive=True, save_path=tmp_path / "plot.html")
    assert type(figure).__module__.startswith("plotly.")
    page = (tmp_path / "plot.html").read_text(encoding="utf-8")
    assert "Plotly.newPlot" in page
    with pytest.raises(ValueError, match=r"saved as \.html"):
        call(interactive=True, save_path=tmp_path / "plot.png")
    with pytest.raises(ValueError, match="leave out ax and axes"):
        call(interactive=True, **({"ax": 1} if count == 1 else {"axes": [1] * count}))
    shown = []
    monkeypatch.setattr(type(figure), "show", lambda self: shown.append(self))
    assert call(interactive=True, show=True) is shown[0]


def test_interactive_panels_show_the_top_tokens_of_every_cell():
    lens = FakeLens(3)
    for call in (plot_convergence_analysis, plot_token_preservation):
        for trace in call(lens, TEXT, interactive=True).data:
            best = lens.run(TEXT, 5)
            assert f"{best.top_probs[2, 1, 4]:.3f}" in trace.hovertext[2][1]


def test_nothing_is_shown_unless_asked(monkeypatch):
    shown = []
    monkeypatch.setattr(pyplot, "show", lambda: shown.append(True))
    plot_convergence_analysis(FakeLens(2), TEXT)
    assert shown == []
    figure = plot_convergence_analysis(FakeLens(2), TEXT, show=True)
    assert shown == [True]
    pyplot.close(figure)


def test_a_lens_without_the_embedding_row_is_drawn():
    result = lens_result(["a", " b"], 4)
    cut = SimpleNamespace(
        tokens=result.tokens,
        row_labels=result.row_labels[1:],
        top_tokens=result.top_tokens[1:],
        top_probs=result.top_probs[1:],
        top_logits=result.top_logits[1:],
        metrics={},
    )
    lens = SimpleNamespace(run=lambda text: cut)
    figure = plot_logit_lens_basic(lens, "a b", layer_step=2)
    assert names(figure.axes[0].get_yticklabels()) == ["0", "2", "3"]


def test_drawing_modules_import_no_torch_and_no_model():
    root = Path(visualization.__file__).parent
    for module in ("token_labels", "figure_canvas", "heat_maps", "refinement_figure", "figures"):
        source = (root / f"{module}.py").read_text(encoding="utf-8")
        assert "import torch" not in source
        assert "transformers" not in source
