"""The page that inspection.page fills: TITLE and DATA, {"tokens": [...], "heads": {LAYER.HEAD: [[weight ...] ...]}}."""

PAGE = """<!DOCTYPE html>
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
<p><label>layer.head <select id="head"></select></label> &nbsp; Point at a cell or a word: blue is what it looks at.</p>
<p id="info"></p>
<div id="views"><svg id="map" role="img" aria-label="weights, a row for each token"></svg><div id="text"></div></div>
<script type="application/json" id="data">DATA</script>
<script>
const data = JSON.parse(document.getElementById("data").textContent);
const [head, info, map, text] = ["head", "info", "map", "text"].map(id => document.getElementById(id));
const names = Object.keys(data.heads), n = data.tokens.length, size = 12;
const shown = token => token.replace(/\\n/g, "\\u23ce").replace(/\\t/g, "\\u21e5").replace(/ /g, "\\u00b7");
const depth = weight => Math.sqrt(weight);  // so that small weights can be seen
map.setAttribute("width", n * size);
map.setAttribute("height", n * size);
const words = data.tokens.map((token, at) => {
  const span = document.createElement("span");
  span.textContent = shown(token);
  span.dataset.i = at;
  text.append(span);
  if (token.includes("\\n")) text.append(document.createElement("br"));
  return span;
});
names.forEach(name => head.append(new Option(name)));
function draw() {
  map.replaceChildren();
  data.heads[head.value].forEach((row, i) => row.forEach((weight, j) => {
    const cell = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    const side = size - 1;
    const of = {x: j * size, y: i * size, width: side, height: side, "fill-opacity": 0.04 + 0.96 * depth(weight)};
    Object.entries(of).forEach(([name, value]) => cell.setAttribute(name, value));
    Object.assign(cell.dataset, {i, j});
    map.append(cell);
  }));
}
function point(event) {
  const {i, j} = event.target.dataset;
  if (i === undefined) return;
  const row = data.heads[head.value][i];
  words.forEach((word, at) => {
    word.className = at == i ? "query" : "";
    word.style.background = at < row.length ? `rgba(31, 95, 168, ${0.8 * depth(row[at])})` : "";
  });
  const told = (at, weight) => `${at} ${shown(data.tokens[at])} ${(100 * weight).toFixed(2)} %`;
  const most = row.map((weight, at) => [weight, at]).sort((a, b) => b[0] - a[0]).slice(0, 5);
  info.textContent = `${i} ${shown(data.tokens[i])} \\u2190 `
    + (j === undefined ? most.map(([weight, at]) => told(at, weight)).join(", ") : told(j, row[j]));
}
head.addEventListener("change", draw);
[map, text].forEach(view => view.addEventListener("mouseover", point));
draw();
</script>
</body>
</html>
"""
