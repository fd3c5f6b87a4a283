"""A web page of attention maps: one HTML file with its data inside, which makes no network request."""

import html
import json
import re

from gkachat.inspection.statistics import Inspection


def page(inspection: Inspection) -> str:
    """Return the page, with a map for each head in `inspection.maps`."""
    title = f"{inspection.run}, step {inspection.step:,}: {inspection.attention}"
    heads = {
        name: [[round(weight, 4) for weight in row[: query + 1]] for query, row in enumerate(weights.tolist())]
        for name, weights in inspection.maps.items()
    }
    data = json.dumps({"tokens": inspection.tokens, "heads": heads}).replace("<", "\\u003c")  # no text ends the script
    contents = {"TITLE": html.escape(title), "DATA": data}
    return re.sub("TITLE|DATA", lambda match: contents[match[0]], TEMPLATE)  # in one pass: a run may be called DATA


# TITLE and DATA are filled in. DATA is {"tokens": [token ...], "heads": {"LAYER.HEAD": [[weight ...] ...]}}.
TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>TITLE</title>
<style>
body { font: 14px sans-serif; margin: 1.5em; color: #222 }
#views { display: flex; flex-wrap: wrap; gap: 2em; align-items: flex-start }
#text { font: 13px/1.9 monospace; flex: 1 1 20em; max-width: 60em; overflow-wrap: anywhere }
#text span { padding: 2px 0; cursor: default; border-bottom: 2px solid transparent }
#text span.query { border-color: #c33 }
#info { min-height: 1.4em; font-family: monospace; white-space: pre-wrap }
rect { fill: #1f5fa8 }
rect:hover { stroke: #c33; stroke-width: 2 }
</style>
</head>
<body>
<h1 style="font-size: 1.2em">TITLE</h1>
<p><label>layer.head <select id="head"></select></label> &nbsp; Point at a cell or a word; blue: what it attends to.</p>
<p id="info"></p>
<div id="views"><svg id="map" role="img" aria-label="weights, a row for each query"></svg><div id="text"></div></div>
<script type="application/json" id="data">DATA</script>
<script>
const data = JSON.parse(document.getElementById("data").textContent);
const [head, info, map, text] = ["head", "info", "map", "text"].map(id => document.getElementById(id));
const names = Object.keys(data.heads), n = data.tokens.length, size = 12;
const visibleSpaces = token => token.replace(/\\n/g, "\\u23ce").replace(/\\t/g, "\\u21e5").replace(/ /g, "\\u00b7");
const opacity = weight => Math.sqrt(weight);  // makes small weights visible
map.setAttribute("width", n * size);
map.setAttribute("height", n * size);
const words = data.tokens.map((token, i) => {
  const span = document.createElement("span");
  span.textContent = visibleSpaces(token);
  span.dataset.i = i;
  text.append(span);
  if (token.includes("\\n")) text.append(document.createElement("br"));
  return span;
});
names.forEach(name => head.append(new Option(name)));
function draw() {
  map.replaceChildren();
  data.heads[head.value].forEach((row, i) => row.forEach((weight, j) => {
    const cell = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    const side = size - 1, fill = 0.04 + 0.96 * opacity(weight);
    const attributes = {x: j * size, y: i * size, width: side, height: side, "fill-opacity": fill};
    Object.entries(attributes).forEach(([name, value]) => cell.setAttribute(name, value));
    Object.assign(cell.dataset, {i, j});
    map.append(cell);
  }));
}
function point(event) {
  const {i, j} = event.target.dataset;
  if (i === undefined) return;
  const row = data.heads[head.value][i];
  words.forEach((word, key) => {
    word.className = key == i ? "query" : "";
    word.style.background = key < row.length ? `rgba(31, 95, 168, ${0.8 * opacity(row[key])})` : "";
  });
  const describe = (key, weight) => `${key} ${visibleSpaces(data.tokens[key])} ${(100 * weight).toFixed(2)} %`;
  const largest = row.map((weight, key) => [weight, key]).sort((a, b) => b[0] - a[0]).slice(0, 5);
  info.textContent = `${i} ${visibleSpaces(data.tokens[i])} \\u2190 `
    + (j === undefined ? largest.map(([weight, key]) => describe(key, weight)).join(", ") : describe(j, row[j]));
}
head.addEventListener("change", draw);
[map, text].forEach(view => view.addEventListener("mouseover", point));
draw();
</script>
</body>
</html>
"""
