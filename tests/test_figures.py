"""Labels, heat maps, lens figures: the artists say what the numbers say, and nothing overlaps."""

import itertools
import sys
import warnings

import matplotlib as mpl
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import pyplot
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.text import Text
from matplotlib.textpath import TextPath

import figures
import heat_maps
from embedding_figures import place_labels, plot_paths, plot_scatter, point_colors
from figure_canvas import PALETTE, figure_of, finish, settle, text_colors, write_whole
from lens_fakes import WORDS, FakeLens, lens_result, words
from refinement_figure import spread
from token_labels import (
    axis_labels,
    can_draw,
    drawing,
    fitted_token,
    readable_token,
    shortened,
    text_width,
    thinned,
)


def image_of(figure, index=0):
    """Return the cells of a heat map as drawn, NaN where there is none."""
    image = figure.axes[index].images[0]
    return np.ma.filled(image.get_array(), np.nan)


def cell_texts(ax):
    return {t.get_position(): t.get_text() for t in ax.texts}


def boxes(texts, figure):
    """Return ``[text, 4]``: where each text is drawn, in pixels."""
    renderer = figure.canvas.get_renderer()
    # Text's own box: that of an annotation holds its line too.
    shown = [t for t in texts if t.get_text().strip()]
    return np.array([Text.get_window_extent(t, renderer).extents for t in shown])


def overlapping(rectangles, slack=0.5):
    """Return how many pairs of rectangles share more than ``slack`` pixels."""
    low, high = rectangles[:, None, :2], rectangles[:, None, 2:]
    shared = np.minimum(high, rectangles[None, :, 2:]) - np.maximum(low, rectangles[None, :, :2])
    return int((np.triu((shared > slack).all(-1), 1)).sum())


def drawn(figure):
    """Draw a figure with Agg as saving would, and return it."""
    FigureCanvasAgg(figure).draw()
    return figure


# --- Labels --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        (" the", "·the"),
        ("\n", "↵"),
        ("\t x", "⇥·x"),
        ("", "∅"),
        ("        ", "·×8"),
        ("a\r", "a\\x0d"),
        ("\u200b", "\\u200b"),
        ("\U000e0001", "\\u{e0001}"),
        ("❤\ufe0f", "❤"),
        ("$x$", "$x$"),
        ("<script>", "<script>"),
        ("中文", "中文"),
    ],
)
def test_a_token_reads_as_one_visible_line(token, shown):
    assert readable_token(token) == shown


def test_a_character_without_a_glyph_becomes_its_code():
    assert readable_token("a中b", drawable=str.isascii) == "a\\u4e2db"
    assert not can_draw("\u0530")
    assert can_draw("a")


@given(st.text(), st.integers(1, 12))
def test_a_shortened_token_keeps_its_length_and_its_start(token, length):
    full, short = readable_token(token), readable_token(token, length)
    assert len(short) <= max(length, 1)
    assert short == full or (short.endswith("…") and full.startswith(short[:-1]))
    assert short.isprintable() or not full.isprintable()


def test_a_length_of_nothing_is_refused():
    with pytest.raises(ValueError, match="max_length must be at least 1"):
        readable_token("a", 0)


@given(st.lists(st.sampled_from(WORDS), min_size=1, max_size=30))
def test_equal_tokens_get_different_labels(tokens):
    labels = axis_labels(tokens)
    assert len(set(labels)) == len(tokens)


def test_repeated_tokens_carry_their_position():
    assert axis_labels([" the", " cat", " the"]) == ["·the₀", "·cat", "·the₂"]
    assert axis_labels(["a", "a"], positions=[10, 12]) == ["a₁₀", "a₁₂"]


@given(st.integers(1, 200), st.floats(0.5, 50), st.floats(0.5, 50))
def test_thinned_labels_never_touch_and_keep_the_ends(count, spacing, size):
    kept = thinned(count, spacing, size)
    assert kept[0] == 0
    assert kept[-1] == count - 1
    gaps = np.diff(kept)
    assert len(kept) <= 2 or (gaps * spacing >= size - 1e-9).all()


def test_thinning_shows_all_where_there_is_room():
    assert thinned(5, 10, 9.9) == [0, 1, 2, 3, 4]
    assert thinned(49, 1, 3)[:3] == [0, 3, 6]
    assert thinned(0, 1, 1) == []


@pytest.mark.parametrize("text", ["·incomprehensible", "Wij", "·the₁₂", "MMMM"])
def test_text_width_is_that_of_the_outline(text):
    path = TextPath((0, 0), text, size=50, prop=FontProperties(family="DejaVu Sans"))
    assert text_width(text, 50) == pytest.approx(path.get_extents().width, rel=0.12)


def test_a_token_is_fitted_or_left_out():
    assert fitted_token(" cat", 100, 8) == "·cat"
    short = fitted_token(" incomprehensible", 40, 8)
    assert short.endswith("…")
    assert text_width(short, 8) <= 40
    assert fitted_token(" incomprehensible", 8, 8) == ""


def test_labels_are_cut_with_their_subscripts_or_not_at_all():
    labels = axis_labels([" incomprehensible", " incomprehensible", "a"])
    cut = shortened(labels, 44, 8)
    assert cut[0].endswith("…₀")
    assert cut[2] == "a"
    assert shortened(labels, 12, 8) is None


def test_every_token_is_drawn_without_a_missing_glyph_or_a_formula():
    with drawing():
        figure = Figure()
        for i, token in enumerate(WORDS):
            figure.text(0, i / len(WORDS), readable_token(token, None, can_draw))
    drawn(figure)
    assert "$x$" in [text.get_text() for text in figure.texts]
    assert mpl.rcParams["text.parse_math"] is True


def test_what_the_users_font_lacks_comes_from_another():
    with mpl.rc_context({"font.family": ["cmr10"]}):
        assert can_draw("↵")
        with drawing():
            assert mpl.rcParams["font.family"] == ["cmr10", "DejaVu Sans"]
            figure = Figure()
            figure.text(0, 0, "a↵b")
        drawn(figure)


# --- Leaving the program -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ending", "start"),
    [(".png", b"\x89PNG"), (".pdf", b"%PDF"), (".svg", b"<?xml"), ("", b"\x89PNG")],
)
def test_a_figure_is_saved_in_the_format_of_its_name(ending, start, tmp_path):
    path = tmp_path / "new" / "folder" / f"figure{ending}"
    figure = figures.plot_heatmap(np.eye(2), save_path=path)
    written = path if ending else path.with_suffix(".png")
    assert written.read_bytes().startswith(start)
    assert [p.name for p in written.parent.iterdir()] == [written.name]
    assert isinstance(figure, Figure)


@pytest.mark.parametrize("ending", ["png", "pdf", "svg"])
def test_awkward_tokens_are_saved_in_every_format(ending, tmp_path):
    figures.plot_lens_heatmap(lens_result(WORDS, 2), save_path=tmp_path / f"lens.{ending}")
    assert (tmp_path / f"lens.{ending}").stat().st_size > 5000


def test_an_unknown_format_is_refused_with_those_that_are_known(tmp_path):
    with pytest.raises(ValueError, match=r"\.png, \.pdf or \.svg.*interactive=True"):
        finish(Figure(), tmp_path / "a.html")


def test_a_file_stays_as_it_was_if_writing_fails(tmp_path):
    path = tmp_path / "a.png"
    path.write_text("old")

    def fail(part):
        part.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_figure_is_shown_only_when_asked(monkeypatch):
    shown = []
    monkeypatch.setattr(pyplot, "show", lambda: shown.append(pyplot.get_fignums()))
    figures.plot_heatmap(np.eye(2))
    assert shown == []
    assert pyplot.get_fignums() == []
    figure = figures.plot_heatmap(np.eye(2), show=True)
    assert len(shown[0]) == 1
    pyplot.close(figure)


def test_a_notebook_gets_its_backend(monkeypatch):
    monkeypatch.setitem(sys.modules, "ipykernel", object())
    switched = []
    monkeypatch.setattr(pyplot, "switch_backend", switched.append)
    figures.plot_heatmap(np.eye(2))
    assert switched == [mpl.get_backend()]


def every_figure(ax_of):
    """Call each function with the caller's axes."""
    lens = FakeLens(3)
    result = lens_result(words(5), 3, 8)
    points = np.random.default_rng(0).normal(size=(6, 2))
    yield figures.plot_heatmap(np.eye(3), ax=ax_of(1)[0])
    yield figures.plot_similarity(np.eye(3), ax=ax_of(1)[0])
    yield figures.plot_head_grid(np.eye(3), ax=ax_of(1)[0])
    yield figures.plot_lens_heatmap(result, ax=ax_of(1)[0])
    yield figures.plot_convergence_panels(lens.get_convergence_metrics("a b c"), axes=ax_of(4))
    yield figures.plot_preservation_panels(lens.compare_to_input("a b c"), axes=ax_of(2))
    yield figures.plot_refinement(result.top_tokens[:, 0], result.top_probs[:, 0], axes=ax_of(2))
    yield plot_scatter(points, ["a"] * 6, ax=ax_of(1)[0])
    yield plot_paths(points.reshape(2, 3, 2), "abc", "01", ax=ax_of(1)[0])


def test_the_callers_axes_are_used_and_no_figure_is_left_behind():
    made = []

    def ax_of(count):
        made.append(Figure(figsize=(8, 8)))
        return made[-1].subplots(1, count, squeeze=False)[0]

    before = dict(mpl.rcParams)
    for figure in every_figure(ax_of):
        assert figure is made[-1]
    assert pyplot.get_fignums() == []
    assert dict(mpl.rcParams) == before


def test_a_wrong_number_of_axes_is_refused():
    with pytest.raises(ValueError, match="axes must hold 2 axes, one per panel; it holds 3"):
        figures.plot_preservation_panels(
            FakeLens().compare_to_input("a"), axes=Figure().subplots(1, 3)
        )


# --- Colours -------------------------------------------------------------------------------------


def test_signed_data_is_centred_on_zero_and_other_data_is_not():
    scale = heat_maps.color_scale(np.array([[-1.0, 4.0]]))
    assert (scale.low, scale.high, scale.colormap) == (-4, 4, "RdBu_r")
    scale = heat_maps.color_scale(np.array([[1.0, 4.0]]))
    assert (scale.low, scale.high, scale.colormap) == (1, 4, "viridis")
    assert heat_maps.color_scale(np.array([[1.0, 4.0]]), True).low == -4
    assert heat_maps.color_scale(np.array([[-1.0, 4.0]]), False).low == -1
    with pytest.raises(ValueError, match="signed must be"):
        heat_maps.color_scale(np.eye(2), "yes")


def test_an_outlier_is_marked_and_does_not_flatten_the_rest():
    values = np.random.default_rng(0).normal(size=(10, 10))
    values[3, 4], values[5, 6], values[7, 8], values[1, 1] = 1000, -np.inf, np.nan, np.inf
    scale = heat_maps.color_scale(values)
    assert scale.high < 4
    assert np.argwhere(scale.above).tolist() == [[1, 1], [3, 4]]
    assert np.argwhere(scale.below).tolist() == [[5, 6]]
    assert scale.extend() == "both"
    figure = figures.plot_heatmap(values)
    marks = {c.get_gid(): np.round(c.get_offsets()).tolist() for c in figure.axes[0].collections}
    assert marks == {"above": [[1, 1], [4, 3]], "below": [[6, 5]]}
    assert np.isnan(image_of(figure)[7, 8])
    assert figure.axes[0].patch.get_hatch() == "////"


def test_the_ends_of_ordinary_data_are_no_outliers():
    for values in (
        np.arange(100.0),
        np.random.default_rng(0).random(500),
        np.array([0.0, 1, 1, 1]),
    ):
        scale = heat_maps.color_scale(values)
        assert (scale.low, scale.high) == (values.min(), values.max())
        assert scale.extend() == "neither"


@pytest.mark.parametrize(
    "values", [np.full((2, 2), np.nan), np.full((2, 2), 3.0), np.zeros((1, 1))]
)
def test_a_table_without_a_range_is_drawn(values):
    assert drawn(figures.plot_heatmap(values))


def test_ranks_are_coloured_by_their_logarithm():
    scale = heat_maps.color_scale(np.array([[0.0, 9, 99, 999]]), log=True, reverse=True)
    assert scale.colormap == "viridis_r"
    shares = np.asarray(scale.norm()(np.array([0.0, 9, 99, 999])))
    assert shares == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert scale.ticks() == [0, 1, 10, 100]
    with pytest.raises(ValueError, match="at least 0; one is -1"):
        heat_maps.color_scale(np.array([-1.0, 2]), log=True)


def test_text_is_black_on_light_and_white_on_dark():
    colors = mpl.colormaps["viridis"](np.array([0.0, 1.0]))
    assert text_colors(colors).tolist() == ["white", "black"]
    for color in mpl.colormaps["viridis"](np.linspace(0, 1, 50)):
        linear = np.where(color <= 0.04045, color / 12.92, ((color + 0.055) / 1.055) ** 2.4)[:3]
        luminance = linear @ [0.2126, 0.7152, 0.0722]
        contrast = {"black": (luminance + 0.05) / 0.05, "white": 1.05 / (luminance + 0.05)}
        assert contrast[str(text_colors(color))] >= 4.5


# --- Heat maps -----------------------------------------------------------------------------------


def test_a_heat_map_shows_its_values_first_row_on_top():
    values = np.arange(6.0).reshape(2, 3)
    figure = drawn(
        figures.plot_heatmap(
            values, "abc", "de", [["x", "", "y"], ["z", "$1$", "w"]], value_label="v"
        )
    )
    ax, bar = figure.axes[:2]
    assert np.array_equal(image_of(figure), values)
    assert ax.get_ylim() == (1.5, -0.5)
    assert [t.get_text() for t in ax.get_xticklabels()] == ["a", "b", "c"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["d", "e"]
    assert cell_texts(ax) == {(0, 0): "x", (2, 0): "y", (0, 1): "z", (1, 1): "$1$", (2, 1): "w"}
    assert bar.get_ylabel() == "v"


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"values must be \[row, column\]"):
        figures.plot_heatmap(np.zeros(3))
    with pytest.raises(ValueError, match="x_labels must hold 2 labels; it holds 3"):
        figures.plot_heatmap(np.eye(2), "abc")
    with pytest.raises(ValueError, match="cell_text must be as the values"):
        figures.plot_heatmap(np.eye(2), cell_text=[["a"]])
    with pytest.raises(ValueError, match=r"a similarity is \[layer, layer\]"):
        figures.plot_similarity(np.zeros((2, 3)))


def test_a_similarity_has_its_numbers_and_a_head_grid_its_zero_in_the_middle():
    figure = figures.plot_similarity(np.array([[1, 0.5], [0.5, 1]]), ["0", "3"])
    assert sorted(cell_texts(figure.axes[0]).values()) == ["0.50", "0.50", "1.00", "1.00"]
    figure = figures.plot_head_grid(np.array([[-0.1, 0.3]]))
    assert figure.axes[0].images[0].get_clim() == (-0.3, 0.3)


# --- The lens ------------------------------------------------------------------------------------


def test_the_lens_heat_map_shows_each_cells_top_token():
    result = lens_result([" the", " cat", "sat", " the"], 3)
    figure = figures.plot_lens_heatmap(result)
    ax = figure.axes[0]
    assert np.array_equal(image_of(figure), result.top_probs[:, :, 0])
    texts = cell_texts(ax)
    for row, column in np.ndindex(4, 4):
        token = result.top_tokens[row, column, 0] or "∅"
        assert texts[column, row] == fitted_token(token, 37, 8) or texts[column, row].endswith("…")
    assert [t.get_text() for t in ax.get_yticklabels()] == ["embed", "0", "1", "2"]
    assert ax.get_ylim()[0] > ax.get_ylim()[1], "the last layer is at the bottom"
    assert [t.get_text() for t in ax.get_xticklabels()] == ["·the₀", "·cat", "sat", "·the₃"]
    above = next(child for child in ax.child_axes if child.get_gid() == "top labels")
    assert [t.get_text() for t in above.get_xticklabels()] == ["·cat", "sat", "·the", ""]


def test_framed_cells_are_those_that_found_the_next_token():
    result = lens_result(words(5), 4)
    figure = figures.plot_lens_heatmap(result)
    frames = next(
        c
        for c in figure.axes[0].collections
        if isinstance(c, LineCollection) and c.get_gid() == "found"
    )
    centers = {
        tuple(np.round(path.vertices[:4].mean(0)).astype(int)) for path in frames.get_paths()
    }
    found = np.argwhere(result.metrics["next_token_rank"] == 0)
    assert centers == {(column, row) for row, column in found}
    assert len(centers) > 2


@pytest.mark.parametrize(
    ("color_by", "table"),
    [
        ("logit", lambda r: r.top_logits[:, :, 0]),
        ("entropy", lambda r: r.metrics["entropy"]),
        ("rank", lambda r: r.metrics["top1_rank"]),
        ("kl", lambda r: r.metrics["kl_divergence"]),
        ("cross_entropy", lambda r: r.metrics["cross_entropy"]),
    ],
)
def test_the_lens_heat_map_is_coloured_by_what_was_asked_for(color_by, table):
    result = lens_result(words(4), 3)
    figure = figures.plot_lens_heatmap(result, color_by)
    assert np.array_equal(image_of(figure), table(result))


def test_an_unknown_coloring_names_the_known_ones():
    with pytest.raises(ValueError, match=r"color_by='colour'.* probability, logit, rank, kl"):
        figures.plot_lens_heatmap(lens_result("ab", 2), "colour")


def test_rows_and_columns_can_be_chosen():
    result = lens_result(words(6), 4)
    cells = figures.lens_cells(result, rows=[0, 4], columns=[1, 3])
    assert np.array_equal(cells.values, result.top_probs[[0, 4]][:, [1, 3], 0])
    assert cells.next_tokens == (result.tokens[2], result.tokens[4])
    assert cells.row_labels == ("embed", "3")
    assert cells.positions == (1, 3)


def test_nothing_overlaps_with_60_tokens_and_48_layers():
    figure = figures.plot_lens_heatmap(lens_result(words(60), 48))
    FigureCanvasAgg(figure)
    settle(figure)  # as drawing would, but the pixels are not needed
    ax = figure.axes[0]
    rectangles = boxes(ax.texts, figure)
    assert len(rectangles) > 0.95 * 60 * 49
    assert overlapping(rectangles) == 0
    assert min(t.get_fontsize() for t in ax.texts) >= 7
    for labels in (ax.get_xticklabels(), ax.get_yticklabels(), ax.child_axes[0].get_xticklabels()):
        assert overlapping(boxes(labels, figure)) == 0
    assert len(ax.get_xticklabels()) == 60
    edges = ax.get_window_extent().extents
    assert (rectangles[:, 0] >= edges[0] - 1).all()
    assert (rectangles[:, 2] <= edges[2] + 1).all()


@pytest.mark.parametrize("size", [(6, 4), (4, 3)])
def test_a_small_figure_thins_its_labels_and_leaves_out_its_texts(size):
    figure = drawn(figures.plot_lens_heatmap(lens_result(words(60), 48), figsize=size))
    ax = figure.axes[0]
    assert len(ax.texts) == 0
    for labels in (ax.get_xticklabels(), ax.get_yticklabels()):
        assert 2 <= len(labels) < 40
        assert overlapping(boxes(labels, figure)) == 0


# --- Panels and refinement -----------------------------------------------------------------------


def test_the_panels_show_the_tables_of_the_lens():
    metrics = FakeLens(4).get_convergence_metrics("The quick brown fox")
    figure = drawn(figures.plot_convergence_panels(metrics))
    titles = [ax.get_title() for ax in figure.axes[:4]]
    assert titles[0] == "KL(final ‖ layer), nats"
    for index, name in enumerate(figures.CONVERGENCE):
        assert np.array_equal(image_of(figure, index), metrics[name])
        assert overlapping(boxes(figure.axes[index].get_xticklabels(), figure)) == 0
    kept = FakeLens(4).compare_to_input("The quick brown fox")
    figure = figures.plot_preservation_panels(kept)
    assert np.array_equal(image_of(figure, 0), kept["input_token_rank"])
    assert np.array_equal(image_of(figure, 1), kept["kl_from_input"])


def test_an_odd_number_of_panels_leaves_no_empty_frame():
    metrics = FakeLens(4).get_convergence_metrics("The quick brown fox")
    figure = figures.plot_metric_panels(metrics, figures.CONVERGENCE[:3])
    assert len(figure.axes) == 6  # three panels and their colour bars


def test_missing_and_misshapen_metrics_are_named():
    metrics = FakeLens(2).get_convergence_metrics("a b")
    with pytest.raises(ValueError, match="the metrics lack input_token_rank, kl_from_input"):
        figures.plot_preservation_panels(metrics)
    metrics["top1_rank"] = metrics["top1_rank"][1:]
    with pytest.raises(ValueError, match=r"top1_rank must be \[row, position\] = \(3, 2\)"):
        figures.plot_convergence_panels(metrics)


TOKENS = np.array([["a", "b", "c"], ["b", "a", "d"], ["d", "b", "a"]], dtype=object)
PROBS = np.array([[0.5, 0.3, 0.1], [0.6, 0.2, 0.1], [0.7, 0.2, 0.05]])


def test_the_last_rows_tokens_are_followed():
    tracked = figures.track_tokens(TOKENS, PROBS, top_k=2)
    assert tracked.tokens == ("d", "b")
    assert tracked.probabilities.tolist()[1] == [0.3, 0.6, 0.2]
    assert tracked.ranks.tolist()[1] == [1, 0, 1]
    assert np.isnan(tracked.probabilities[0, 0])
    assert tracked.ranks[0, 1:].tolist() == [2, 0]


def test_tokens_of_the_same_text_are_followed_by_id():
    texts = np.full((2, 2), "a", dtype=object)
    tracked = figures.track_tokens(texts, PROBS[:2, :2], np.array([[1, 2], [2, 1]]))
    assert tracked.probabilities.tolist() == [[0.3, 0.6], [0.5, 0.2]]


def test_the_refinement_draws_lines_and_ranks():
    figure = drawn(figures.plot_refinement(TOKENS, PROBS, ["0", "5", "11"], top_k=2))
    lines, ranks = figure.axes
    assert [line.get_ydata()[-1] for line in lines.lines] == [0.7, 0.2]
    assert cell_texts(ranks)[0, 1] == "b"
    assert [t.get_text() for t in ranks.get_xticklabels()] == ["0", "5", "11"]
    assert [t.get_text() for t in ranks.get_yticklabels()] == ["#1", "#2"]
    with pytest.raises(ValueError, match=r"must both be \[row, k\]"):
        figures.plot_refinement(TOKENS, PROBS[0])


def test_the_names_of_near_lines_are_moved_apart():
    tokens = np.array([[f" token {i}" for i in range(6)]] * 2, dtype=object)
    figure = drawn(figures.plot_refinement(tokens, np.full((2, 6), 0.01), top_k=6))
    names = [t for t in figure.axes[0].texts if t.get_text()]
    assert len(names) == 6
    rectangles = boxes(names, figure)
    assert overlapping(rectangles) == 0
    assert rectangles[:, 2].max() <= figure.bbox.width


@given(st.lists(st.floats(0, 100), min_size=1, max_size=9))
def test_spread_keeps_order_gap_and_bounds(wanted):
    places = spread(np.array(wanted), 10, 100)
    assert (np.diff(np.sort(places)) >= 10 - 1e-6).all()
    assert places.min() >= 5 - 1e-6
    assert places.max() <= 95 + 1e-6
    assert (np.argsort(wanted, kind="stable") == np.argsort(places, kind="stable")).all()


# --- Points --------------------------------------------------------------------------------------


def test_labels_never_touch_and_stay_inside():
    random = np.random.default_rng(0)
    anchors = random.uniform(0, 300, (200, 2))
    sizes = np.column_stack([random.uniform(10, 60, 200), np.full(200, 10)])
    places = place_labels(anchors, sizes, (300, 300), anchors)
    kept = ~np.isnan(places[:, 0])
    rectangles = np.hstack([places - sizes / 2, places + sizes / 2])[kept]
    assert 40 < kept.sum() < 200
    assert overlapping(rectangles, slack=0) == 0
    assert rectangles.min() >= 0
    assert rectangles.max() <= 300


def test_a_lone_label_stands_beside_its_point():
    place = place_labels(np.array([[50.0, 50.0]]), np.array([[20.0, 10.0]]), (100, 100))
    assert place.tolist() == [[65, 50]]


@pytest.mark.parametrize("dimensions", [2, 3])
def test_drawn_labels_do_not_overlap(dimensions):
    points = np.random.default_rng(1).normal(size=(60, dimensions))
    figure = drawn(plot_scatter(points, words(60)))
    labels = [t for t in figure.axes[0].texts if t.get_gid() == "label"]
    assert len(labels) > 40
    assert overlapping(boxes(labels, figure), slack=1) == 0


def test_labels_that_do_not_fit_are_counted():
    points = np.random.default_rng(0).normal(size=(1000, 2))
    figure = plot_scatter(points, [f"token {i}" for i in range(1000)], axis_labels=["PC 1", "PC 2"])
    ax = figure.axes[0]
    written = sum(t.get_gid() == "label" for t in ax.texts)
    assert 50 < written < 1000
    assert ax.get_xlabel() == f"PC 1\n{1000 - written} of 1000 labels left out for lack of room"


def test_fewer_labels_name_the_first_points_and_grey_the_rest():
    points = np.arange(20.0).reshape(10, 2)
    figure = plot_scatter(points, ["a", "b"])
    ax = figure.axes[0]
    assert {t.get_text(): t.xy for t in ax.texts if t.get_text()} == {"a": (0, 1), "b": (2, 3)}
    others, named = ax.collections
    assert np.array_equal(others.get_offsets(), points[2:])
    assert np.array_equal(named.get_offsets(), points[:2])
    assert (others.get_sizes() < named.get_sizes()).all()
    with pytest.raises(ValueError, match="11 labels for 10 points"):
        plot_scatter(points, list("abcdefghijk"))


def test_what_colors_mean():
    assert point_colors("red", 2).colors == ["#ff0000"] * 2
    assert point_colors(["red", "#00ff00"], 2).colors == ["#ff0000", "#00ff00"]
    groups = point_colors(["noun", "verb", "noun"], 3)
    assert list(groups.categories) == ["noun", "verb"]
    assert groups.colors[0] == groups.colors[2] != groups.colors[1]
    numbers = point_colors(np.array([0, 5, 10]), 3)
    assert numbers.colors[0] == mpl.colors.to_hex(mpl.colormaps["viridis"](0.0))
    assert numbers.colors[2] == mpl.colors.to_hex(mpl.colormaps["viridis"](1.0))
    with pytest.raises(ValueError, match="colors must hold one per point, 3; they hold 2"):
        point_colors(["a", "b"], 3)


def test_groups_get_a_legend_and_numbers_a_color_bar():
    points = np.eye(3)[:, :2]
    legend = plot_scatter(points, colors=["n", "v", "n"]).axes[0].get_legend()
    assert [t.get_text() for t in legend.get_texts()] == ["n", "v"]
    assert len(plot_scatter(points, colors=[1, 2, 3]).axes) == 2


def test_dimensions_and_axes_must_agree():
    with pytest.raises(ValueError, match="3 dimensions need an axes with as many"):
        plot_scatter(np.eye(3), ax=Figure().subplots())
    with pytest.raises(ValueError, match=r"coordinates must be \[point, 2 or 3\]"):
        plot_scatter(np.eye(4))


def test_labels_in_space_follow_their_points_when_turned():
    figure = drawn(plot_scatter(np.eye(3), "abc"))
    ax = figure.axes[0]
    before = [t.xy for t in ax.texts if t.get_gid() == "label"]
    ax.view_init(80, 10)
    drawn(figure)
    after = [t.xy for t in ax.texts if t.get_gid() == "label"]
    assert all(a != b for a, b in zip(before, after, strict=True))


def test_a_path_goes_through_the_layers_and_ends_at_its_name():
    paths = np.random.default_rng(0).normal(size=(4, 3, 2))
    figure = drawn(plot_paths(paths, ["a", "b", "a₂"], ["0", "1", "5", "11"], note="kept"))
    ax = figure.axes[0]
    for token, line in enumerate(ax.lines):
        assert np.array_equal(line.get_xydata(), paths[:, token])
    assert {t.get_text(): t.xy for t in ax.texts} == {
        name: tuple(paths[-1, i]) for i, name in enumerate(["a", "b", "a₂"])
    }
    bar = figure.axes[1]
    assert [t.get_text() for t in bar.get_yticklabels()] == ["0", "1", "5", "11"]
    with pytest.raises(ValueError, match=r"\[layer, token, 2\] = \[4, 2, 2\]"):
        plot_paths(paths, "ab", "0123")


def test_a_figure_may_lie_in_a_subfigure():
    figure = Figure(figsize=(8, 4), layout="constrained")
    left, right = figure.subfigures(1, 2)
    assert figures.plot_heatmap(np.eye(2), ax=left.subplots()) is figure
    assert plot_scatter(np.eye(2), ["a", "b"], ax=right.subplots()) is figure
    assert figure_of(left.axes[0]) is figure


def test_no_warning_is_hidden_while_drawing():
    with warnings.catch_warnings(record=True) as seen, drawing():
        warnings.simplefilter("always")
        warnings.warn("mine", UserWarning, stacklevel=1)
    assert [str(w.message) for w in seen] == ["mine"]


def test_the_palette_has_no_colour_twice():
    assert all(a != b for a, b in itertools.combinations(PALETTE, 2))
