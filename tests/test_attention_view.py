"""The page: what it holds, what it refuses, and what it does in a browser without any network."""

import base64
import html
import json
import re
import zlib

import numpy as np
import pytest

from attention_result import AttentionPatterns
from attention_view import attention_view, packed
from browser import CHROMIUM, DRIVER, browser
from forward_pass import InputError
from test_attention_figures import patterns

HOSTILE = (
    " the",
    "</script><script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    " the",
    "\n",
    "&lt;$a$",
)
needs_browser = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="needs Debian's chromium and chromium-driver"
)


def data_of(page):
    """Return the block of JSON in a page."""
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])


def unpacked(text, heads, length):
    raw = zlib.decompress(base64.b64decode(text))
    return (np.frombuffer(raw, np.uint8).reshape(heads, length, length) / 255.0) ** 2


def some_view(length=6, heads=3):
    found = AttentionPatterns(
        (patterns(heads, length, 1), patterns(heads, length, 2)),
        (1, 4),
        HOSTILE if length == 6 else tuple(f" w{i}" for i in range(length)),
        tuple(range(length)),
    )
    return found, found.view()


def test_the_page_holds_the_patterns():
    found, view = some_view()
    data = data_of(view.html)
    assert data["layers"] == [1, 4] and data["heads"] == [3, 3]
    assert data["labels"][0] == "·the₀" and data["labels"][3] == "·the₃"
    for text, pattern in zip(data["patterns"], found.patterns, strict=True):
        assert np.abs(unpacked(text, 3, len(HOSTILE)) - pattern).max() <= 0.004


def test_every_share_survives_to_within_four_thousandths():
    shares = np.linspace(0, 1, 1_000_000).reshape(1, 1000, 1000)
    assert np.abs(unpacked(packed(shares), 1, 1000) - shares).max() <= 0.004
    small = np.array([[[0.0, 1e-4], [1e-3, 1.0]]])
    np.testing.assert_allclose(unpacked(packed(small), 1, 2), small, rtol=0.4, atol=0)
    odd = np.array([[[np.nan, 1.0001], [-1e-9, 0.5]]])
    assert unpacked(packed(odd), 1, 2)[0, 0].tolist() == [0.0, 1.0]


def test_the_page_fetches_nothing_and_no_token_is_markup():
    page = some_view()[1].html
    ours = page.replace(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1], "")
    assert not re.search(r"https?://|//[a-z]+\.|src=|href=|@import|url\(|fetch\(", ours)
    assert "default-src 'none'" in page
    assert page.count("<script") == 2 and page.count("</script>") == 2
    assert "<img" not in page


def test_a_title_is_text():
    view = attention_view([patterns(1, 2)], [0], ["a", "b"], "<b>1 & 2</b>")
    assert "<title>&lt;b&gt;1 &amp; 2&lt;/b&gt;</title>" in view.html
    assert "<b>" not in view.html
    assert repr(view) == "AttentionView('<b>1 & 2</b>', 0.0 MB of html)"


def test_a_page_is_saved_whole_and_other_endings_are_refused(tmp_path):
    view = some_view()[1]
    path = view.save(tmp_path / "new" / "view")
    assert path.name == "view.html"
    assert path.read_text(encoding="utf-8") == view.html
    with pytest.raises(ValueError, match=r"saved as \.html; the path is view\.png"):
        view.save(tmp_path / "view.png")


def test_a_notebook_shows_the_page_in_a_frame():
    view = some_view()[1]
    frame = view._repr_html_()
    assert html.unescape(re.search(r'srcdoc="(.*?)" sandbox', frame, re.DOTALL)[1]) == view.html
    assert 'sandbox="allow-scripts"' in frame


def test_what_does_not_fit_together_is_refused():
    with pytest.raises(ValueError, match="1 layers of patterns came with 2 layer numbers"):
        attention_view([patterns(1, 2)], [0, 1], ["a", "b"])
    with pytest.raises(ValueError, match=r"of 3 tokens; came \(1, 2, 2\)"):
        attention_view([patterns(1, 2)], [0], ["a", "b", "c"])


# --- In a browser ---------------------------------------------------------------------------------


@needs_browser
def test_the_page_works_in_a_browser_without_network(tmp_path):
    found, view = some_view()
    page = view.save(tmp_path / "view.html")
    with browser(tmp_path) as window:
        window.open(page.as_uri())
        window.wait("bytes && document.querySelectorAll('#heads button').length === 3")
        check_tokens(window)
        check_pointer(window, found)
        check_pinning(window)
        check_pickers(window, found)
        check_keys(window)
        window.scheme("light")
        light = window.run("return getComputedStyle(document.body).backgroundColor")
        window.scheme("dark")
        window.wait(f"getComputedStyle(document.body).backgroundColor !== '{light}'")
        assert window.messages() == []


def says(window):
    """Return what the page says after its next frame."""
    window.wait("frame === 0")
    return window.run("return document.getElementById('says').textContent")


def check_tokens(window):
    labels = window.run(
        "return [...document.querySelectorAll('#tokens span')].map(s => s.innerText)"
    )
    assert labels == window.run("return data.labels")
    assert labels[0] == "·the₀" and labels[1].startswith("</script><")
    assert window.run("return document.title") == "Attention, 2 layers, 6 tokens"
    assert window.run("return document.querySelectorAll('img, b').length") == 0


def check_pointer(window, found):
    """Hovering over a token colours the others by its row; over a cell it names the cell."""
    window.hover("#t4")
    told = says(window)
    row = found[1, 0][4]
    best = int(row.argmax())
    assert f"·the₀ {row[0]:.2f}"[:-1] in told and "↵ (4) looks at" in told
    assert window.run("return state.token") == 4 and "pinned" not in told
    shown = window.run("return data.labels.map((_, i) => share(at(4, i)))")
    np.testing.assert_allclose(shown, row, atol=0.004)
    colours = window.run(
        "return [...document.querySelectorAll('#tokens span')].map(s => s.style.backgroundColor)"
    )
    assert colours[5] == "" and len(set(colours[:5])) > 2
    deepest = window.run("return 'rgb(' + shades[at(4, arguments[0])].join(', ') + ')'", best)
    assert colours[best] == deepest
    size = window.run("return document.getElementById('square').getBoundingClientRect().width")
    window.hover("#square", x=int(-0.25 * size), y=int(0.25 * size))  # row 4, column 1
    window.wait("state.key === 1 && state.token === 4")
    assert f"{round(row[1], 2):.2f}"[:3] in says(window) and "under the pointer" in says(window)


def check_pinning(window):
    window.click("#t3")
    assert "pinned" in says(window)
    window.hover("#t5")
    assert window.run("return state.token") == 3
    window.click("#t3")
    window.hover("#t5")
    window.wait("state.token === 5")
    window.click("#t2")
    window.keys("#tokens", "\ue00c")  # Escape
    assert "pinned" not in says(window)


def check_pickers(window, found):
    """Layers by the list, heads by their buttons, and the other direction."""
    window.click("#heads button:nth-child(3)")
    window.run("const s = document.getElementById('layer'); s.value = '1';"
               "s.dispatchEvent(new Event('change'));")  # fmt: skip
    window.wait("state.entry === 1 && document.querySelector('#heads').textContent.includes('4.2')")
    assert window.run("return state.head") == 2
    pressed = "return [...document.querySelectorAll('#heads button')].map(b => b.ariaPressed)"
    assert window.run(pressed) == ["false", "false", "true"]
    shown = window.run("return data.labels.map((_, i) => share(at(5, i)))")
    np.testing.assert_allclose(shown, found[4, 2][5], atol=0.004)
    window.click("[value=to]")
    window.hover("#t1")
    window.wait("state.token === 1")
    assert "is looked at by" in says(window)
    colours = window.run(
        "return [...document.querySelectorAll('#tokens span')].map(s => s.style.backgroundColor)"
    )
    assert colours[0] == "" and all(colours[1:])  # only later tokens look at it
    window.click("[value=from]")


def check_keys(window):
    window.run("document.getElementById('tokens').focus()")
    window.keys("#tokens", "\ue011")  # Home
    window.wait("state.token === 0")
    window.keys("#tokens", "\ue014\ue014")  # right, twice
    window.wait("state.token === 2")
    selected = "[...document.querySelectorAll('[aria-selected=true]')].map(s => s.id).join()"
    window.wait(f"{selected} === 't2'")
    window.keys("#tokens", "\ue007")  # Enter
    assert "pinned" in says(window)
    window.keys("#heads button:nth-child(2)", " ")
    window.wait("state.head === 1")


@needs_browser
def test_five_hundred_tokens_stay_responsive(tmp_path):
    """A move of the pointer, layout and all, takes far less than the eye notices (100 ms)."""
    page = some_view(512, heads=12)[1].save(tmp_path / "long.html")
    with browser(tmp_path) as window:
        window.open(page.as_uri())
        window.wait("bytes && document.querySelectorAll('#heads button').length === 12")
        times = window.run(MOVES)
        assert sorted(times)[len(times) // 2] < 50, times
        assert window.run("return state.token") == 500


MOVES = """
const times = [];
for (let token = 0; token <= 500; token += 20) {
  const start = performance.now();
  document.getElementById("t" + token).dispatchEvent(
    new PointerEvent("pointermove", {bubbles: true}));
  cancelAnimationFrame(frame); frame = 0; render();
  document.body.getBoundingClientRect();
  times.push(performance.now() - start);
}
return times;
"""
"""What the next frame would do, at once, with the layout that follows."""


def test_a_path_is_no_title(tmp_path):
    with pytest.raises(InputError, match=r"title is a text; .*\.view\(\)\.save\("):
        AttentionPatterns((patterns(1, 2),), (0,), ("a", "b"), (5, 6)).view(tmp_path / "page.html")
