"""The page of `highlight_view`: its style, its markup and its script, with nothing from elsewhere.

The page's data stand in a block of JSON: ``labels`` of the tokens, ``breaks`` (whether a line ends
behind each), ``targets``, ``places`` of these, ``limits`` of the colours for each, and ``scores``,
base64 of little-endian float32 ``[target, position]``. All text from outside enters the document
as text, never as markup. A score that is NaN is hatched, said in the legend, and last in order.
"""

STYLE = """
:root { color-scheme: light dark; --paper: 255,255,255; --ink: 31,41,51; --soft: 95,107,119;
  --line: 205,212,219; --plus: 178,24,43; --minus: 33,102,172; --mark: 31,41,51; }
@media (prefers-color-scheme: dark) { :root { --paper: 22,27,34; --ink: 228,232,237;
  --soft: 150,160,170; --line: 62,71,82; --plus: 214,96,77; --minus: 67,147,195;
  --mark: 228,232,237; } }
* { box-sizing: border-box; }
body { margin: 0; padding: 12px 16px; background: rgb(var(--paper)); color: rgb(var(--ink));
  font: 15px/1.45 system-ui, sans-serif; max-width: 70em; }
h1 { font-size: 17px; margin: 0 0 8px; overflow-wrap: anywhere; }
.bar { display: flex; flex-wrap: wrap; gap: 6px 18px; align-items: center; margin-bottom: 6px; }
select { font: inherit; color: inherit; background: rgb(var(--paper)); max-width: 100%;
  border: 1px solid rgb(var(--line)); border-radius: 4px; }
:focus-visible { outline: 2px solid rgb(var(--mark)); outline-offset: 2px; }
#says { min-height: 3em; margin: 0 0 6px; overflow-wrap: anywhere; }
#says b { font-weight: 600; }
#tokens { line-height: 2; overflow-wrap: anywhere; }
#tokens span { padding: 2px 1px; border-radius: 3px; white-space: pre-wrap; cursor: default;
  margin-right: 1px; box-decoration-break: clone; -webkit-box-decoration-break: clone; }
#tokens span.at { outline: 2px solid rgb(var(--mark)); }
#tokens span.after { color: rgb(var(--soft)); }
#tokens span.none { background-image: repeating-linear-gradient(45deg, transparent 0 3px,
  rgb(var(--line)) 3px 5px); }
#tokens span.beyond { text-decoration: underline double; text-underline-offset: 3px; }
#tokens span:hover, #tokens span.here { box-shadow: 0 0 0 2px rgb(var(--soft)); }
#legend { display: flex; gap: 8px; align-items: center; color: rgb(var(--soft));
  margin-top: 12px; flex-wrap: wrap; font-size: 13px; }
#legend i { width: 180px; height: 12px; border: 1px solid rgb(var(--line)); }
small { color: rgb(var(--soft)); }
"""

BODY = """
<h1 id="title"></h1>
<div class="bar"><label>prediction <select id="target"></select></label>
<small id="note"></small></div>
<p id="says" aria-live="polite"></p>
<div id="tokens" tabindex="0" role="listbox" aria-label="tokens"></div>
<div id="legend"><span id="low"></span><i id="ramp"></i><span id="high"></span>
<span id="what"></span></div>
<noscript>This page needs JavaScript.</noscript>
"""

SCRIPT = """
"use strict";
const $ = id => document.getElementById(id);
const data = JSON.parse($("data").textContent), n = data.labels.length;
const state = {target: 0, token: -1};
const raw = Uint8Array.from(atob(data.scores), c => c.charCodeAt(0));
const view = new DataView(raw.buffer);
const at = (target, i) => view.getFloat32(4 * (target * n + i), true);
const color = name => getComputedStyle(document.documentElement)
  .getPropertyValue(name).split(",").map(Number);
const weight = value => Number.isNaN(value) ? -1 : Math.abs(value);
const mix = (paper, end, share) =>
  paper.map((p, i) => Math.round(p + (end[i] - p) * share));
const number = value => {
  if (Number.isNaN(value)) return "no number";
  const size = Math.abs(value);
  return size && (size < 1e-3 || size >= 1e5) ? value.toExponential(2) :
    String(Number(value.toPrecision(4)));
};
function bright(rgb) {
  const [r, g, b] = rgb.map(c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179;
}
function paint() {
  const t = state.target, place = data.places[t], limit = data.limits[t];
  const paper = color("--paper"), plus = color("--plus"), minus = color("--minus");
  const spans = $("tokens").querySelectorAll("span");
  for (let i = 0; i < n; i++) {
    const value = at(t, i), style = spans[i].style;
    const share = Math.min(1, Math.abs(value) / limit);
    const rgb = mix(paper, value < 0 ? minus : plus, share || 0);
    style.backgroundColor = share > 0 ? "rgb(" + rgb + ")" : "";
    style.color = share > 0 ? (bright(rgb) ? "#000" : "#fff") : "";
    spans[i].className = (i === place ? "at " : "") + (i > place ? "after " : "") +
      (Math.abs(value) > limit * 1.000001 ? "beyond " : "") +
      (Number.isNaN(value) ? "none " : "") + (i === state.token ? "here" : "");
    spans[i].title = data.labels[i] + "  token " + i + ": " + number(value);
  }
  $("low").textContent = data.signed ? number(-limit) : "0";
  $("high").textContent = number(limit);
  const rgb = end => "rgb(" + end + ")";
  $("ramp").style.background = "linear-gradient(to right," + (data.signed ?
    rgb(minus) + "," : "") + rgb(paper) + "," + rgb(plus) + ")";
  $("what").textContent = data.value + "; outlined: where the prediction is made" +
    ($("tokens").querySelector(".beyond") ? "; underlined twice: beyond the colours" : "") +
    ($("tokens").querySelector(".none") ? "; hatched: no number" : "");
  say();
}
function say() {
  const t = state.target, box = $("says"), i = state.token;
  if (i >= 0) {
    const name = document.createElement("b");
    name.textContent = data.labels[i];
    box.replaceChildren("token " + i + " ", name, "  score " + number(at(t, i)));
    return;
  }
  const order = Array.from({length: n}, (_, k) => k)
    .sort((a, b) => weight(at(t, b)) - weight(at(t, a)) || a - b).slice(0, 6);
  box.textContent = "most: " + order.map(k =>
    data.labels[k] + " (" + k + ") " + number(at(t, k))).join(",  ");
}
function look(i) {
  const spans = $("tokens").querySelectorAll("span");
  if (state.token >= 0) spans[state.token].classList.remove("here");
  state.token = i;
  if (i >= 0) spans[i].classList.add("here");
  say();
}
function fill() {
  document.title = $("title").textContent = data.title;
  $("note").textContent = data.note;
  $("target").append(...data.targets.map((name, t) => new Option(name, t)));
  const box = $("tokens");
  data.labels.forEach((label, i) => {
    const span = document.createElement("span");
    span.id = "t" + i; span.textContent = label; span.dataset.i = i;
    span.setAttribute("role", "option");
    box.append(span, data.breaks[i] ? document.createElement("br") :
      document.createElement("wbr"));
  });
}
function listen() {
  const box = $("tokens"), within = i => Math.max(0, Math.min(n - 1, i));
  $("target").addEventListener("change", () => {
    state.target = Number($("target").value); paint();
  });
  box.addEventListener("pointermove", e => {
    const span = e.target.closest("[data-i]");
    if (span && Number(span.dataset.i) !== state.token) look(Number(span.dataset.i));
  });
  box.addEventListener("pointerleave", () => look(-1));
  box.addEventListener("keydown", e => {
    const steps = {ArrowLeft: -1, ArrowRight: 1, ArrowUp: -10, ArrowDown: 10, Home: -n, End: n};
    if (e.key in steps) {
      look(within(state.token + steps[e.key]));
      $("t" + state.token).scrollIntoView({block: "nearest"});
      e.preventDefault();
    } else if (e.key === "Escape") look(-1);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
}
fill(); listen(); paint();
"""
