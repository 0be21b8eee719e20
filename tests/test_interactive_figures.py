"""The twins for a browser: the same numbers, top tokens under the pointer, no foreign markup."""

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

import figures
import interactive_figures as twins
from lens_fakes import FakeLens, lens_result, words

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
NO_NETWORK = "--host-resolver-rules=MAP * ~NOTFOUND"
HOSTILE = (
    " the",
    "<script>document.title='owned'</script>",
    "</script><b>bold</b>",
    "%{x} &lt; $a$",
)


def numbers(array):
    return np.array(array, dtype=float)


def test_escaped_text_is_no_markup_and_no_formula():
    assert twins.escape("<b>&amp;$x$") == "&lt;b&gt;&amp;amp;&#36;x&#36;"
    assert twins.shown("\n<i>") == "↵&lt;i&gt;"
    assert twins.shown("a" * 50, 5) == "aaaa…"


@pytest.mark.parametrize("color_by", ["probability", "entropy", "kl", "logit"])
def test_the_lens_twin_has_the_numbers_of_the_figure(color_by):
    result = lens_result(words(6), 4)
    trace = twins.lens_heatmap(result, color_by).data[0]
    flat = figures.plot_lens_heatmap(result, color_by).axes[0].images[0]
    np.testing.assert_allclose(numbers(trace.z), np.ma.filled(flat.get_array(), np.nan))
    assert (trace.zmin, trace.zmax) == pytest.approx(flat.get_clim())
    assert str(trace.colorscale[0][1]) == (
        "#fde725" if color_by in ("entropy", "kl") else "#440154"
    )


def test_ranks_are_shown_as_ranks_under_a_logarithmic_scale():
    result = lens_result(words(6), 4)
    trace = twins.lens_heatmap(result, "rank").data[0]
    np.testing.assert_allclose(np.expm1(numbers(trace.z)), result.metrics["top1_rank"])
    assert list(trace.colorbar.ticktext)[:3] == ["0", "1", "10"]
    assert f"{result.metrics['top1_rank'][1, 2]:.4g}<br>" in trace.hovertext[1][2]


def test_every_cell_shows_its_top_tokens_under_the_pointer():
    result = lens_result(words(6), 4, k=5)
    about = twins.lens_heatmap(result).data[0].hovertext
    for row, column in np.ndindex(5, 6):
        lines = about[row][column].split("<br>")
        for token, probability in zip(
            result.top_tokens[row, column], result.top_probs[row, column], strict=True
        ):
            assert f"{twins.shown(token)}  {probability:.3f}" in lines
        found = result.metrics["next_token_rank"][row, column] == 0
        assert (lines[-1] == "the first is the true next token") == found


def test_chosen_rows_and_columns_keep_their_own_tokens():
    result = lens_result(words(6), 4)
    about = twins.lens_heatmap(result, rows=[0, 4], columns=[1, 3]).data[0].hovertext
    assert np.shape(about) == (2, 2)
    assert twins.shown(result.top_tokens[4, 3, 0]) in about[1][1]


def test_columns_named_alike_stay_columns():
    axis = twins.lens_heatmap(lens_result([" a", " a", " a"], 2)).layout.xaxis
    assert list(axis.tickvals) == [0, 1, 2]
    assert list(axis.ticktext) == ["·a₀", "·a₁", "·a₂"]


def test_frames_mark_the_cells_that_found_the_next_token():
    result = lens_result(words(5), 4)
    boxes = twins.lens_heatmap(result).layout.shapes
    centers = {(round((b.y0 + b.y1) / 2), round((b.x0 + b.x1) / 2)) for b in boxes}
    assert centers == {
        tuple(c) for c in np.argwhere(result.metrics["next_token_rank"] == 0).tolist()
    }


def test_the_panels_hold_the_tables():
    metrics = FakeLens(3).get_convergence_metrics("The quick brown fox")
    hover = np.full((4, 4), "best  0.5", dtype=object)
    figure = twins.metric_panels(metrics, figures.CONVERGENCE, hover=hover)
    for name, trace in zip(figures.CONVERGENCE, figure.data, strict=True):
        values = np.log1p(metrics[name]) if name == "top1_rank" else metrics[name]
        np.testing.assert_allclose(numbers(trace.z), values)
        assert trace.hovertext[0][0].endswith("best  0.5")
    assert figure.layout.annotations[0].text == "KL(final ‖ layer), nats"
    with pytest.raises(ValueError, match="the metrics lack kl_from_input"):
        twins.metric_panels(metrics, ["kl_from_input"])


def test_an_outlier_and_a_missing_value_do_not_spoil_the_scale():
    values = np.random.default_rng(0).normal(size=(10, 10))
    values[0, 0], values[1, 1] = 1e6, np.nan
    trace = twins.heatmap(values).data[0]
    assert trace.zmax < 5
    assert trace.zmin == -trace.zmax
    assert np.isnan(numbers(trace.z)[1, 1])
    assert "1e+06" in trace.hovertext[0][0]


def test_the_refinement_follows_the_last_rows_tokens():
    result = lens_result(words(4), 5, 8)
    figure = twins.refinement(result.top_tokens[:, 1], result.top_probs[:, 1], result.row_labels)
    tracked = figures.track_tokens(result.top_tokens[:, 1], result.top_probs[:, 1])
    assert [trace.name for trace in figure.data] == [twins.shown(t, 14) for t in tracked.tokens]
    for trace, values in zip(figure.data, tracked.probabilities, strict=True):
        np.testing.assert_allclose(numbers(trace.y), values)
        assert len(trace.hovertext) == 6


def test_points_carry_their_labels():
    points = np.random.default_rng(0).normal(size=(5, 2))
    figure = twins.scatter(points, ["a", "<b>"], axis_labels=["PC 1", "PC 2"], note="kept")
    trace = figure.data[0]
    assert list(trace.hovertext) == ["a", "&lt;b&gt;", "point 2", "point 3", "point 4"]
    np.testing.assert_allclose(np.column_stack([trace.x, trace.y]), points)
    assert figure.layout.xaxis.title.text == "PC 1"
    assert figure.layout.title.text.endswith("<sub>kept</sub>")
    space = twins.scatter(np.eye(3), axis_labels=["a", "b", "c"])
    assert space.data[0].type == "scatter3d"
    assert space.layout.scene.zaxis.title.text == "c"


def test_many_points_are_drawn_by_the_graphics_card():
    assert twins.scatter(np.zeros((6000, 2)) + np.arange(6000)[:, None]).data[0].type == "scattergl"


def test_a_comparison_has_a_panel_per_method():
    figure = twins.comparison([np.eye(2), np.eye(2)], ["PCA\nkept 1", "t-SNE"], ["a", "b"])
    assert [note.text for note in figure.layout.annotations] == ["PCA<br>kept 1", "t-SNE"]
    assert len(figure.data) == 2


def test_paths_have_one_line_per_token():
    paths = np.random.default_rng(0).normal(size=(4, 3, 2))
    figure = twins.paths(paths, ["a", "b", "c"], list("0123"))
    for token, trace in enumerate(figure.data):
        np.testing.assert_allclose(np.column_stack([trace.x, trace.y]), paths[:, token])
    assert figure.data[1].hovertext[2] == "b, layer 2"


def test_without_plotly_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    with pytest.raises(ImportError, match=r"pip install 'mech-interp-toolkit\[interactive\]'"):
        twins.lens_heatmap(lens_result("ab", 2))


def test_an_html_file_is_whole_and_other_endings_are_refused(tmp_path):
    figure = twins.heatmap(np.eye(2))
    assert twins.finish_interactive(figure, tmp_path / "new" / "page") is figure
    page = (tmp_path / "new" / "page.html").read_text(encoding="utf-8")
    assert page.startswith("<html>") or page.startswith("<!DOCTYPE") or "<html" in page[:200]
    assert not re.search(r"<script[^>]+src=|<link[^>]+href=", page)
    with pytest.raises(ValueError, match=r"saved as \.html; the path is a\.png"):
        twins.finish_interactive(figure, tmp_path / "a.png")


def test_showing_is_asked_for(monkeypatch):
    figure = twins.heatmap(np.eye(2))
    shown = []
    monkeypatch.setattr(type(figure), "show", lambda self: shown.append(self))
    twins.finish_interactive(figure)
    assert shown == []
    twins.finish_interactive(figure, show=True)
    assert shown == [figure]


# --- Hostile text --------------------------------------------------------------------------------

MARKUP = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</script><script>alert(2)</script>",
    "</SCRIPT ><svg onload=alert(3)>",
    "<!--<script>",
    "]]>",
    "' onclick='alert(4)",
    "&lt;b&gt;&amp;",
    "`${alert(5)}`",
    "a\u2028b\u2029c",
    "\ud800 and \udfff",
    "%{x} $y$ \\(z\\)",
    "<a href='javascript:alert(6)'>x</a>",
    "\x00\x1b[31m\u202e",
)
PLAIN = tuple(f"word{i}" for i in range(len(MARKUP)))


def every_figure(tokens):
    """One of each kind, with text from elsewhere wherever text can go."""
    result = lens_result(tokens, 3)
    result.top_tokens[:] = np.resize(np.array(tokens, dtype=object), result.top_tokens.shape)
    points = np.random.default_rng(0).normal(size=(len(tokens), 3))
    named = {"title": "".join(tokens[:9])}
    table = np.eye(len(tokens))
    metrics = {**result.metrics, "input_tokens": tokens, "row_labels": tokens[:4]}
    more = {"axis_labels": tokens[:2], "note": tokens[1]}
    return {
        "heatmap": twins.heatmap(table, tokens, tokens, value_label=tokens[0], x_name=tokens[1],
                                 y_name=tokens[2], **named),
        "cells": twins.heatmap(table[:2], tokens, tokens[:2],
                               np.array([tokens, tokens], dtype=object)),
        "lens": twins.lens_heatmap(result),
        "panels": twins.metric_panels(metrics, ["kl_divergence", "entropy"]),
        "refinement": twins.refinement(result.top_tokens[:, 1], result.top_probs[:, 1],
                                       tokens[:4], **named),
        "scatter": twins.scatter(points[:, :2], tokens, list(tokens), **more, **named),
        "space": twins.scatter(points, tokens, axis_labels=tokens[:3], **named),
        "comparison": twins.comparison([points[:, :2]] * 2, tokens[:2], tokens),
        "paths": twins.paths(np.stack([points[:, :2]] * 4), tokens, tokens[:4], **more, **named),
    }  # fmt: skip


class Elements(HTMLParser):
    """The tags of a page, with their attributes' names, as a browser would see them."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.found = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, *sorted(name for name, _ in attrs)))


def strings_of(value):
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from (text for item in value.values() for text in strings_of(item))
    elif isinstance(value, list | tuple | np.ndarray):
        yield from (text for item in value for text in strings_of(item))


OURS = re.compile(r"<br>|</?sub>|</?b>")


@pytest.mark.parametrize("kind", every_figure(PLAIN))
def test_a_hostile_token_is_text_in_every_page(tmp_path, kind):
    plain, hostile = (every_figure(tokens)[kind] for tokens in (PLAIN, MARKUP))
    for text in strings_of(hostile.to_plotly_json()):
        assert not re.search(r"[<>]|\$", OURS.sub("", text)), text
    pages = []
    for figure in (plain, hostile):
        twins.finish_interactive(figure, tmp_path / "page.html")
        text = (tmp_path / "page.html").read_text(encoding="utf-8")
        pages.append(re.sub(r"[0-9a-f]{8}-[0-9a-f-]{27}", "", text))
    assert Elements(pages[1]).found == Elements(pages[0]).found
    drawn = pages[1][pages[1].rindex("Plotly.newPlot(") :]
    assert not re.search(r"<script|</script>(?!\s*</div>)|<img|<svg|\u2028|\u2029", drawn)


# --- In a browser --------------------------------------------------------------------------------


def document_of(page, profile):
    """Return the page's document after its scripts have run, with the network off."""
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        NO_NETWORK,
        f"--user-data-dir={profile}",
    ]
    command = [CHROMIUM, *options, "--virtual-time-budget=6000", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium")
def test_a_saved_page_works_in_a_browser_without_network(tmp_path):
    result = lens_result(HOSTILE, 3)
    result.top_tokens[2, 1, :4] = HOSTILE
    page = tmp_path / "lens.html"
    twins.finish_interactive(twins.lens_heatmap(result), page)
    hover = """<script>addEventListener('load', () => setTimeout(() => Plotly.Fx.hover(
        document.querySelector('.js-plotly-plot'), [{xval: 1, yval: 2}]), 200))</script></body>"""
    text = page.read_text(encoding="utf-8")
    page.write_text(text.replace("</body>", hover), encoding="utf-8")
    document = document_of(page, tmp_path / "profile")
    assert "owned" not in re.findall(r"<title[^>]*>(.*?)</title>", document)
    drawing = document[document.index('class="main-svg"') :]
    assert "·the" in drawing
    for token in HOSTILE[1:]:
        shown = twins.readable_token(token, twins.LONG)
        as_html = shown.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        assert as_html in drawing, token
    assert "<b>bold" not in drawing
