"""The page of `attention_view`: its style, its markup and its script, with nothing from elsewhere.

The page's data stand in a block of JSON: ``labels`` of the tokens, ``layers``, ``heads`` of each,
and for each layer base64 of deflated bytes ``[head, query, key]``, each the rounded
``255·√attention``. All text from outside enters the document as text, never as markup.
"""

STYLE = """
:root { color-scheme: light dark; --paper: 255,255,255; --ink: 31,41,51; --soft: 95,107,119;
  --line: 205,212,219; --accent: 8,81,156; --on: 255,255,255; --mark: 217,95,2; }
@media (prefers-color-scheme: dark) { :root { --paper: 22,27,34; --ink: 228,232,237;
  --soft: 150,160,170; --line: 62,71,82; --accent: 125,190,255; --on: 10,20,30;
  --mark: 255,166,87; } }
* { box-sizing: border-box; }
body { margin: 0; padding: 12px 16px; background: rgb(var(--paper)); color: rgb(var(--ink));
  font: 14px/1.45 system-ui, sans-serif; }
h1 { font-size: 17px; margin: 0 0 8px; overflow-wrap: anywhere; }
.bar { display: flex; flex-wrap: wrap; gap: 6px 18px; align-items: center; margin-bottom: 8px; }
fieldset { border: 0; margin: 0; padding: 0; display: flex; gap: 10px; }
select, button { font: inherit; color: inherit; background: rgb(var(--paper));
  border: 1px solid rgb(var(--line)); border-radius: 4px; }
#heads { display: flex; flex-wrap: wrap; gap: 4px; margin-bottom: 10px; }
#heads button { padding: 2px 3px; cursor: pointer; font-size: 12px; line-height: 1.3; }
#heads canvas { display: block; width: 56px; height: 56px; image-rendering: pixelated; }
#heads button[aria-pressed=true] { border-color: rgb(var(--mark));
  box-shadow: 0 0 0 1px rgb(var(--mark)); }
:focus-visible { outline: 2px solid rgb(var(--mark)); outline-offset: 2px; }
.panes { display: flex; flex-wrap: wrap; gap: 16px; align-items: flex-start; }
#square { position: relative; flex: none; width: min(514px, 100%); aspect-ratio: 1;
  border: 1px solid rgb(var(--line)); cursor: crosshair; }
#square canvas { width: 100%; height: 100%; display: block; image-rendering: pixelated; }
#square i { position: absolute; pointer-events: none; display: none; }
#row { left: 0; right: 0; border: solid rgb(var(--mark)); border-width: 1px 0; }
#column { top: 0; bottom: 0; border: solid rgb(var(--mark)); border-width: 0 1px; }
.text { flex: 1 1 380px; min-width: 0; }
#tokens { max-height: 62vh; overflow: auto; line-height: 1.9; padding: 2px;
  overflow-wrap: anywhere; }
#tokens span { display: inline-block; line-height: 1.35; padding: 1px 2px; margin: 0 1px;
  border-radius: 3px; cursor: pointer;
  white-space: pre-wrap; border: 1px solid rgba(var(--line), .6); }
#tokens span.at { outline: 2px solid rgb(var(--mark)); outline-offset: -1px; }
#tokens span.strong { color: rgb(var(--on)); }
#says { min-height: 4.5em; margin: 0 0 8px; }
small, #help { color: rgb(var(--soft)); }
"""

BODY = """
<h1 id="title"></h1>
<div class="bar">
<label>layer <select id="layer"></select></label>
<fieldset><legend hidden>direction</legend>
<label><input type="radio" name="way" value="from" checked> what the token looks at</label>
<label><input type="radio" name="way" value="to"> what looks at the token</label></fieldset>
<span id="help">click pins a token, Esc lets go; arrow keys move, Enter pins</span>
</div>
<div id="heads" role="group" aria-label="heads"></div>
<div class="panes">
<div id="square" role="img" aria-label="attention: a row per token that looks, a column per token looked at"><canvas></canvas><i id="row"></i><i id="column"></i></div>
<div class="text"><p id="says" aria-live="polite"></p>
<div id="tokens" tabindex="0" role="listbox" aria-label="tokens"></div></div>
</div>
<noscript>This page needs JavaScript.</noscript>
"""  # noqa: E501

SCRIPT = """
"use strict";
const $ = id => document.getElementById(id);
const data = JSON.parse($("data").textContent), n = data.labels.length;
const state = {entry: 0, head: 0, token: n - 1, key: -1, pinned: false, from: true};
const held = new Map();              // layers whose bytes are unpacked, the latest few
let bytes = null, ticket = 0, frame = 0, shades = [];

async function unpack(entry) {
  if (held.has(entry)) return held.get(entry);
  const packed = Uint8Array.from(atob(data.patterns[entry]), c => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  const raw = new Uint8Array(await new Response(stream).arrayBuffer());
  held.set(entry, raw);
  if (held.size > 4) held.delete(held.keys().next().value);
  return raw;
}
const at = (query, key) => bytes[(state.head * n + query) * n + key];
const within = i => Math.max(0, Math.min(n - 1, i));
const share = byte => (byte / 255) ** 2;
const color = name => getComputedStyle(document.documentElement)
  .getPropertyValue(name).split(",").map(Number);

function mixShades() {
  const paper = color("--paper"), accent = color("--accent");
  shades = Array.from({length: 256}, (_, b) =>
    paper.map((p, i) => Math.round(p + (accent[i] - p) * b / 255)));
}
function paint(canvas, size, value) {
  canvas.width = canvas.height = size;
  const pen = canvas.getContext("2d"), image = pen.createImageData(size, size);
  for (let q = 0, o = 0; q < size; q++) for (let k = 0; k < size; k++, o += 4) {
    const shade = shades[value(q, k)];
    image.data[o] = shade[0]; image.data[o + 1] = shade[1];
    image.data[o + 2] = shade[2]; image.data[o + 3] = 255;
  }
  pen.putImageData(image, 0, 0);
}
function thumbnail(canvas, head) {   // the largest byte of each patch
  const size = Math.min(n, 56), small = new Uint8Array(size * size), start = head * n * n;
  const place = Array.from({length: n}, (_, i) => Math.floor(i * size / n));
  for (let q = 0; q < n; q++) {
    const row = place[q] * size, from = start + q * n;
    for (let k = 0; k < n; k++) {
      const b = bytes[from + k], to = row + place[k];
      if (b > small[to]) small[to] = b;
    }
  }
  paint(canvas, size, (q, k) => small[q * size + k]);
}
function drawHead() {
  paint($("square").querySelector("canvas"), n, at);
  $("heads").querySelectorAll("button").forEach((button, head) =>
    button.setAttribute("aria-pressed", head === state.head));
  render();
}
function drawLayer() {
  const count = data.heads[state.entry], box = $("heads");
  state.head = Math.min(state.head, count - 1);
  box.replaceChildren(...Array.from({length: count}, (_, head) => {
    const button = document.createElement("button"), canvas = document.createElement("canvas");
    button.type = "button";
    button.append(canvas, data.layers[state.entry] + "." + head);
    button.setAttribute("aria-label", "head " + head);
    button.addEventListener("click", () => { state.head = head; drawHead(); });
    thumbnail(canvas, head);
    return button;
  }));
  drawHead();
}
async function chooseLayer() {
  state.entry = Number($("layer").value);
  const mine = ++ticket, raw = await unpack(state.entry);
  if (mine !== ticket) return;       // another layer was chosen meanwhile
  bytes = raw;
  drawLayer();
}
function render() {                  // what depends on the token alone
  const spans = $("tokens").children, t = state.token, found = [];
  for (let i = 0; i < n; i++) {
    const b = state.from ? at(t, i) : at(i, t), style = spans[i].style;
    style.backgroundColor = b ? "rgb(" + shades[b] + ")" : "";
    spans[i].className = (i === t ? "at " : "") + (b > 140 ? "strong" : "");
    if (b) found.push([b, i]);
    if (i === t || spans[i].ariaSelected === "true") spans[i].ariaSelected = String(i === t);
  }
  $("tokens").setAttribute("aria-activedescendant", "t" + t);
  found.sort((a, b) => b[0] - a[0]);
  const list = found.slice(0, 8).map(([b, i]) => data.labels[i] + " " + share(b).toFixed(2));
  const verb = state.from ? " looks at " : " is looked at by ";
  const cell = state.key < 0 ? "" : ", " + data.labels[state.key] + " " +
    share(state.from ? at(t, state.key) : at(state.key, t)).toFixed(3) + " under the pointer";
  $("says").textContent = "head " + data.layers[state.entry] + "." + state.head + ": " +
    data.labels[t] + " (" + t + ")" + verb + (list.join(",  ") || "nothing") + cell +
    (state.pinned ? "  — pinned" : "");
  bar("row", "top", "height", state.from ? t : state.key);
  bar("column", "left", "width", state.from ? state.key : t);
}
function bar(id, side, size, index) {
  const style = $(id).style;
  style.display = index < 0 ? "none" : "block";
  style[side] = "calc(" + 100 * index / n + "% - 1px)";
  style[size] = "calc(" + 100 / n + "% + 2px)";
}
function soon() {                    // once per frame, however fast the pointer moves
  if (!frame) frame = requestAnimationFrame(() => { frame = 0; if (bytes) render(); });
}
function look(token, key = -1) {
  if (state.pinned) return;
  state.token = token; state.key = key; soon();
}
function pin(token) {
  state.pinned = !(state.pinned && state.token === token);
  state.token = token; state.key = -1; soon();
}
function fill() {
  document.title = $("title").textContent = data.title;
  $("layer").append(...data.layers.map((layer, entry) => new Option(layer, entry)));
  $("tokens").append(...data.labels.map((label, i) => {
    const span = document.createElement("span");
    span.id = "t" + i; span.textContent = label; span.dataset.i = i;
    span.setAttribute("role", "option");
    return span;
  }));
}
function listen() {
  const box = $("tokens"), square = $("square");
  const hit = event => event.target.closest("[data-i]");
  const cell = event => {
    const r = square.getBoundingClientRect();
    const place = (x, from, size) => within(Math.floor((x - from) / size * n));
    const q = place(event.clientY, r.top, r.height), k = place(event.clientX, r.left, r.width);
    return state.from ? [q, k] : [k, q];
  };
  box.addEventListener("pointermove", e => { const s = hit(e); if (s) look(Number(s.dataset.i)); });
  box.addEventListener("click", e => { const s = hit(e); if (s) pin(Number(s.dataset.i)); });
  square.addEventListener("pointermove", e => look(...cell(e)));
  square.addEventListener("pointerleave", () => { state.key = -1; soon(); });
  square.addEventListener("click", e => pin(cell(e)[0]));
  box.addEventListener("keydown", e => {
    const steps = {ArrowLeft: -1, ArrowRight: 1, ArrowUp: -10, ArrowDown: 10, Home: -n, End: n};
    if (e.key in steps) {
      state.token = within(state.token + steps[e.key]);
      state.key = -1;
      $("t" + state.token).scrollIntoView({block: "nearest"});
      soon(); e.preventDefault();
    } else if (e.key === "Enter" || e.key === " ") { pin(state.token); e.preventDefault(); }
  });
  addEventListener("keydown", e => { if (e.key === "Escape") { state.pinned = false; soon(); } });
  $("layer").addEventListener("change", chooseLayer);
  document.querySelectorAll("[name=way]").forEach(radio => radio.addEventListener("change", () => {
    state.from = radio.value === "from" && radio.checked; state.key = -1; soon();
  }));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    mixShades(); if (bytes) drawLayer();
  });
}
mixShades(); fill(); listen(); chooseLayer();
"""
