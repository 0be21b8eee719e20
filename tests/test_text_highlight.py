"""Coloured texts: what is drawn where, and what the page holds and does in a browser."""

import base64
import itertools
import json
import re

import numpy as np
import pytest
from matplotlib.collections import PatchCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from browser import CHROMIUM, DRIVER, browser
from heat_maps import NO_VALUE
from highlight_view import highlight_view, limit_of
from test_gradient_attribution import some_result
from text_highlight import LINE, plot_targets, plot_text, text_boxes, text_scale

HOSTILE = (
    " the",
    "</script><script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    " the",
    "\n",
    "&lt;$a$",
    "中",
    "",
)
needs_browser = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="needs Debian's chromium and chromium-driver"
)


# --- Boxes ----------------------------------------------------------------------------------------


def test_boxes_run_in_lines_and_do_not_touch():
    tokens = [" word", "s", " and", "\n", " more"] * 40
    boxes = text_boxes(tokens, 300.0)
    assert [box.position for box in boxes] == list(range(200))
    for left, right in itertools.pairwise(boxes):
        if left.line == right.line:
            assert right.left > left.left + left.width
        else:
            assert right.line == left.line + 1 and right.left == 0
    assert all(box.left + box.width <= 300 for box in boxes)


def test_a_newline_ends_a_line():
    boxes = text_boxes(["a", "\n", "b", ".\n\n", "c"], 300.0)
    assert [box.line for box in boxes] == [0, 0, 1, 1, 2]
    assert [box.text for box in boxes] == ["a", "↵", "b", ".↵↵", "c"]


def test_a_token_longer_than_a_line_is_shortened():
    (box,) = text_boxes(["x" * 500], 60.0)
    assert box.text.endswith("…") and box.width <= 60


@pytest.mark.parametrize("text", ["wonderful", "x" * 40, "abc", "……………", "ab"])
def test_the_narrowest_line_ends_too(text):
    widths = [text_boxes([text], float(width))[0].width for width in range(60, 0, -1)]
    assert widths == sorted(widths, reverse=True)
    (box,) = text_boxes([text], 1.0)
    assert 1 <= len(box.text) <= 2


# --- The picture ----------------------------------------------------------------------------------


def texts_of(figure):
    return [text.get_text() for text in figure.axes[0].texts]


def colors_of(figure):
    (cells,) = [c for c in figure.axes[0].collections if isinstance(c, PatchCollection)]
    return cells.get_facecolor()


def test_repeated_tokens_stay_apart_and_colours_follow_signs():
    figure = plot_text(np.array([2.0, -2.0, 0.0]), [" the", " the", " the"], mark=1)
    assert texts_of(figure) == ["·the"] * 3
    plus, minus, none = colors_of(figure)
    assert plus[0] > plus[2] and minus[2] > minus[0] and min(none[:3]) > 0.95
    inks = [to_rgb(text.get_color()) for text in figure.axes[0].texts]
    assert inks == [to_rgb("white"), to_rgb("white"), to_rgb("black")]
    (mark,) = [p for p in figure.axes[0].patches if p.get_gid() == "mark"]
    boxes = text_boxes([" the"] * 3, 500.0)
    assert mark.get_x() == pytest.approx(boxes[1].left)
    bar = figure.axes[0].child_axes[0]
    assert sum(bar.get_xlim()) == pytest.approx(0), "0 is in the middle"


def test_sizes_start_at_white():
    figure = plot_text(np.array([0.0, 1.0, 4.0]), ["a", "b", "c"], signed=False)
    brightness = colors_of(figure)[:, :3].sum(-1)
    assert brightness[0] > 2.8 and (np.diff(brightness) < 0).all()
    assert figure.axes[0].child_axes[0].get_xlim() == (0, 4)


def test_tokens_that_are_not_reached_set_no_colours():
    for signed in (True, False):
        scale = text_scale(np.array([0.0] * 90 + [0.1] * 6 + [3.0] * 4), signed)
        assert scale.high == 3 and not scale.above.any()


def test_a_value_far_outside_is_marked():
    scores = np.random.default_rng(0).standard_normal(50)
    scores[7] = 80
    figure = plot_text(scores, ["a"] * 50)
    lines = [line for line in figure.axes[0].lines if line.get_gid() == "beyond"]
    assert len(lines) == 1
    assert "beyond the colours" in figure.axes[0].child_axes[0].get_xlabel()
    assert figure.axes[0].child_axes[0].get_xlim()[1] < 10
    calm = plot_text(scores[:7], ["a"] * 7)
    assert not calm.axes[0].lines and "beyond" not in calm.axes[0].child_axes[0].get_xlabel()


def test_a_long_text_keeps_its_end_and_says_so():
    tokens = [" word"] * 3000
    figure = plot_text(np.ones(3000), tokens, max_lines=5)
    shown = [text for text in texts_of(figure) if text == "·word"]
    note = next(text for text in texts_of(figure) if "not shown" in text)
    assert str(3000 - len(shown)) in note and 0 < len(shown) < 200
    heights = {text.get_text(): text.get_position()[1] for text in reversed(figure.axes[0].texts)}
    assert heights["·word"] <= heights[note] - LINE + 1, "below what the first line says"
    assert figure.get_figheight() < 3


@pytest.mark.filterwarnings("error")
def test_hostile_tokens_are_drawn_as_they_are(tmp_path):
    scores = np.linspace(-1, 1, len(HOSTILE))
    figure = plot_text(scores, HOSTILE, title="中 $x$ </b>", save_path=tmp_path / "a.png")
    assert "&lt;$a$" in texts_of(figure) and "∅" in texts_of(figure)
    assert "$x$" in figure.axes[0].get_title("left")
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_on_axes_that_are_given():
    figure = Figure(figsize=(6, 3), layout="constrained")
    upper, lower = figure.subplots(2, 1)
    assert plot_text(np.ones(400), [" word"] * 400, ax=upper) is figure
    plot_text(np.ones(2), ["a", "b"], ax=lower)
    assert any("not shown" in text.get_text() for text in upper.texts)
    low, high = upper.get_ylim()
    assert high - low < 3 * 72 / 2 + LINE


def test_all_numbers_alike_or_missing_are_drawn():
    for scores in (np.zeros(3), np.full(3, np.nan), np.array([np.inf, 1.0, -1.0])):
        assert len(colors_of(plot_text(scores, ["a", "b", "c"]))) == 3


def test_a_token_without_a_number_is_no_zero():
    figure = plot_text(np.array([2.0, np.nan, 0.0, -2.0]), [" the"] * 4)
    (hatched,) = [p for p in figure.axes[0].patches if p.get_gid() == "missing"]
    boxes = text_boxes([" the"] * 4, 500.0)
    assert hatched.get_x() == pytest.approx(boxes[1].left) and hatched.get_hatch()
    assert colors_of(figure)[1][:3] == pytest.approx(NO_VALUE[:3])
    assert "hatched: no number" in figure.axes[0].child_axes[0].get_xlabel()
    calm = plot_text(np.array([2.0, 0.0]), ["a", "b"])
    assert "hatched" not in calm.axes[0].child_axes[0].get_xlabel() and not calm.axes[0].patches


def test_a_mark_counts_from_the_end_too():
    figure = plot_text(np.ones(3), ["a", "b", "c"], mark=-1)
    (mark,) = [p for p in figure.axes[0].patches if p.get_gid() == "mark"]
    assert mark.get_x() == pytest.approx(text_boxes(["a", "b", "c"], 500.0)[2].left)
    with pytest.raises(ValueError, match=r"mark must be a position, 0\.\.2; came 3"):
        plot_text(np.ones(3), ["a", "b", "c"], mark=3)
    cut = plot_text(np.ones(3000), [" word"] * 3000, mark=0, max_lines=5)
    assert "outlined" not in cut.axes[0].child_axes[0].get_xlabel(), "it is not shown"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.ones(2), ["a"]), "scores must be"),
        ((np.ones(0), []), "scores must be"),
        ((np.ones((1, 1)), ["a"]), "scores must be"),
    ],
)
def test_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        plot_text(*arguments)


def test_no_lines_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        plot_text(np.ones(1), ["a"], max_lines=0)


def test_targets_by_tokens_hides_what_cannot_matter():
    found = some_result(scores=np.array([[3.0, -5.0, 0.0], [1.0, 2.0, -4.0]]))
    (image,) = plot_targets(found).axes[0].images
    assert np.ma.getmaskarray(image.get_array()).tolist() == [[False] * 2 + [True], [False] * 3]
    assert image.get_clim() == (-5, 5)
    future = some_result(scores=np.array([[3.0, -5.0, 1.0], [1.0, 2.0, -4.0]]))
    (image,) = plot_targets(future).axes[0].images
    assert not np.ma.getmaskarray(image.get_array()).any(), "a value there is never hidden"
    sizes = some_result(method="saliency", scores=np.array([[3.0, 5.0, 0.0], [1.0, 2.0, 4.0]]))
    assert plot_targets(sizes).axes[0].images[0].get_clim() == (0, 5)


# --- The page -------------------------------------------------------------------------------------


def data_of(page):
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])


def some_page(tokens=HOSTILE, targets=("' a' <b>", "second")):
    scores = np.random.default_rng(1).standard_normal((len(targets), len(tokens)))
    scores[0, 5:] = 0
    places = (4, len(tokens) - 1)
    return scores, highlight_view(scores, tokens, targets, places, title="<b>1 & 2</b>")


def test_the_page_holds_the_numbers():
    scores, view = some_page()
    data = data_of(view.html)
    packed = np.frombuffer(base64.b64decode(data["scores"]), "<f4").reshape(scores.shape)
    np.testing.assert_array_equal(packed, scores.astype(np.float32))
    assert data["labels"][0] == data["labels"][3] == "·the" and data["labels"][4] == "↵"
    assert data["breaks"] == [token == "\n" for token in HOSTILE]
    assert data["places"] == [4, 7] and data["signed"] is True
    np.testing.assert_allclose(data["limits"], np.abs(scores).max(-1))


def test_limits_leave_out_what_lies_far_outside():
    scores = np.random.default_rng(0).standard_normal(50)
    assert limit_of(np.array([*scores, 90.0]), True) < 5
    assert limit_of(np.abs(scores), False) == np.abs(scores).max()
    assert limit_of(np.zeros(3), True) > 0


def test_the_page_fetches_nothing_and_no_token_is_markup():
    page = some_page()[1].html
    ours = page.replace(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1], "")
    assert not re.search(r"https?://|//[a-z]+\.|src=|href=|@import|url\(|fetch\(", ours)
    assert "default-src 'none'" in page and "<title>&lt;b&gt;1 &amp; 2&lt;/b&gt;</title>" in page
    assert page.count("<script") == 2 and page.count("</script>") == 2
    assert "<img" not in page and "<b>" not in page


def test_page_saves_and_shows_in_a_notebook(tmp_path):
    view = some_page()[1]
    assert view.save(tmp_path / "deep" / "page").read_text(encoding="utf-8") == view.html
    with pytest.raises(ValueError, match=r"saved as \.html"):
        view.save(tmp_path / "page.png")
    assert 'sandbox="allow-scripts"' in view._repr_html_() and "kB of html" in repr(view)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.ones((1, 2)), ["a"], ["t"], [0]), "scores are"),
        ((np.ones((0, 1)), ["a"], [], []), "scores are"),
        ((np.ones((1, 1)), ["a"], ["t"], []), "0 places came for 1 targets"),
    ],
)
def test_pages_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        highlight_view(*arguments)


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile"), (700, 600)) as opened:
        yield opened


def background(window, i):
    found = window.run(f"return getComputedStyle(document.getElementById('t{i}')).backgroundColor")
    return [float(part) for part in re.findall(r"[\d.]+", found)]


@needs_browser
@pytest.mark.slow
def test_the_page_in_a_browser(window, tmp_path):
    scores, view = some_page()
    window.open(view.save(tmp_path / "page.html").as_uri())
    window.wait("document.querySelectorAll('#tokens span').length == 8")
    assert window.run("return document.title") == "<b>1 & 2</b>", "no token's script ran"
    assert window.run("return document.querySelectorAll('#tokens img, #tokens script').length") == 0
    for i in range(5):
        red, _, blue = background(window, i)[:3]
        assert (red > blue) == (scores[0, i] > 0)
    assert window.run("return t4.className").strip() == "at"
    assert window.run("return t6.className").strip() == "after"
    window.hover("#t3")
    window.wait("document.getElementById('says').textContent.startsWith('token 3')")
    said = window.run("return document.getElementById('says').textContent")
    assert "·the" in said and f"{scores[0, 3]:.3g}"[:4] in said
    window.run("target.value = 1; target.dispatchEvent(new Event('change'))")
    red, _, blue = background(window, 7)[:3]
    assert (red > blue) == (scores[1, 7] > 0)
    assert window.run("return t7.className").strip() == "at"
    window.keys("#tokens", "\ue010")
    assert window.run("return says.textContent").startswith("token 7")
    assert window.messages() == []


@needs_browser
@pytest.mark.slow
def test_a_token_without_a_number_in_the_page(window, tmp_path):
    scores = np.array([[np.nan, 1.0, -3.0, np.inf, 0.0], [1.0, 2.0, 3.0, 4.0, 5.0]])
    view = highlight_view(scores, list("abcde"), ["one", "two"], [4, 4])
    window.open(view.save(tmp_path / "nan.html").as_uri())
    window.wait("document.querySelectorAll('#tokens span').length == 5")
    image = "return getComputedStyle(document.getElementById('t{}')).backgroundImage"
    hatched = ["gradient" in window.run(image.format(i)) for i in range(5)]
    assert hatched == [True, False, False, False, False]
    assert "hatched: no number" in window.run("return what.textContent")
    order = re.findall(r"(\w) \((\d)\)", window.run("return says.textContent"))
    assert [int(i) for _, i in order] == [3, 2, 1, 4, 0]
    assert window.run("return says.textContent").endswith("a (0) no number")
    window.run("target.value = 1; target.dispatchEvent(new Event('change'))")
    assert "hatched" not in window.run("return what.textContent")
    assert "gradient" not in window.run(image.format(0))
    assert window.messages() == []


@needs_browser
@pytest.mark.slow
def test_a_long_text_wraps(window, tmp_path):
    _, view = some_page([" word"] * 1500 + ["x" * 300])
    window.open(view.save(tmp_path / "long.html").as_uri())
    window.wait("document.querySelectorAll('#tokens span').length == 1501")
    wide = "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
    assert window.run(f"return {wide}")
    assert window.run("return document.getElementById('tokens').offsetHeight") > 1000
    assert window.messages() == []
