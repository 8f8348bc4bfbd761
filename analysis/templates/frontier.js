// Frontier: quality against runtime. Hovering or focusing a point shows its cell, a click opens it.
const SIZE = { width: 1130, height: 460, left: 70, right: 30, top: 14, bottom: 48 };
const SHAPES = {  // of matplotlib's names, about 10 wide
  "o": "M5 0A5 5 0 1 1 -5 0A5 5 0 1 1 5 0Z",
  "s": "M-4.5 -4.5H4.5V4.5H-4.5Z",
  "^": "M0 -5.5L5.2 4.5H-5.2Z",
  "D": "M0 -6L6 0L0 6L-6 0Z",
  "v": "M0 5.5L5.2 -4.5H-5.2Z",
  "p": "M0 -5.5L5.2 -1.7L3.2 4.5H-3.2L-5.2 -1.7Z",
  "*": "M0 -7L1.6 -2.2H6.6L2.6 .8L4.1 5.6L0 2.6L-4.1 5.6L-2.6 .8L-6.6 -2.2H-1.6Z",
  "X": "M-5 -2.5L-2.5 -5L0 -2.5L2.5 -5L5 -2.5L2.5 0L5 2.5L2.5 5L0 2.5L-2.5 5L-5 2.5L-2.5 0Z",
};
const timed = settings.filter((setting) => setting.cost);

const svg = (name, attributes, ...children) => {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
};
const mark = (method, x = 0, y = 0) => svg("path", {
  d: SHAPES[looks[method].marker], fill: looks[method].colour, transform: `translate(${x} ${y})`,
});

// Round numbers between two ends, about `count` of them.
function ticks(low, high, count) {
  const power = 10 ** Math.floor(Math.log10((high - low) / count));
  const step = power * [1, 2, 5, 10].find((m) => m * power >= (high - low) / count);
  const first = Math.ceil(low / step);
  const values = Array.from({ length: Math.floor(high / step) - first + 1 }, (_, i) => (first + i) * step);
  const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  return values.map((value) => [value, value.toFixed(digits)]);
}

function axes(x, y, xs, ys, title) {
  const { width, height, left, right, top, bottom } = SIZE;
  const parts = [];
  for (const [value, text] of xs) {
    parts.push(svg("line", { class: "grid", x1: x(value), x2: x(value), y1: top, y2: height - bottom }));
    parts.push(svg("text", { x: x(value), y: height - bottom + 16, "text-anchor": "middle" }, text));
  }
  for (const [value, text] of ys) {
    parts.push(svg("line", { class: "grid", x1: left, x2: width - right, y1: y(value), y2: y(value) }));
    parts.push(svg("text", { x: left - 8, y: y(value) + 4, "text-anchor": "end" }, text));
  }
  const middle = (top + height - bottom) / 2;
  const upright = `rotate(-90 16 ${middle})`;
  parts.push(svg("text", { x: 16, y: middle, "text-anchor": "middle", transform: upright }, title));
  const unit = timed.every((setting) => setting.relative) ? "% of the reference" : "s";
  const centre = (left + width - right) / 2;
  parts.push(svg("text", { x: centre, y: height - 8, "text-anchor": "middle" }, `Runtime (${unit})`));
  return parts;
}

function drawFrontier() {
  const { width, height, left, right, top, bottom } = SIZE;
  const metric = metrics.find(({ name }) => name === $("metric").value);
  const points = timed
    .filter((setting) => setting.task === $("task").value && setting.metrics[metric.name])
    .map((setting) => ({ setting, ...setting.metrics[metric.name] }));
  hideCard();
  $("plot").querySelector("svg")?.remove();
  if (!points.length) return;

  const heights = points.flatMap(({ mean, low, high }) => [mean, low ?? mean, high ?? mean]);
  const pad = 0.06 * (Math.max(...heights) - Math.min(...heights) || 1);
  const range = [Math.min(...heights) - pad, Math.max(...heights) + pad];
  const far = 1.06 * Math.max(...points.map(({ setting }) => setting.cost[2]));
  const x = (cost) => left + (cost / far) * (width - left - right);
  const share = (value) => (value - range[0]) / (range[1] - range[0]);
  const y = (value) =>
    top + (height - top - bottom) * (metric.higher ? 1 - share(value) : share(value));

  const picture = svg("svg", {
    viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": `${metric.heading} against runtime`,
  });
  picture.append(...axes(x, y, ticks(0, far, 8), ticks(...range, 6), metric.heading));
  for (const [method, { colour }] of Object.entries(looks)) {
    const line = points
      .filter(({ setting, own }) => own && setting.method === method)
      .map(({ setting, mean }) => [x(setting.cost[0]), y(mean)])
      .sort((a, b) => a[0] - b[0]);
    picture.append(svg("polyline", { points: line.join(" "), fill: "none", stroke: colour, opacity: 0.5 }));
  }
  for (const point of points) picture.append(drawPoint(point, x, y));
  $("plot").append(picture);
  nameFront(picture, points, x, y);
}

function drawPoint({ setting, mean, low, high, front }, x, y) {
  const [cost, fast, slow] = setting.cost;
  const stroke = looks[setting.method].colour;
  const group = svg("g", {
    class: front ? "point" : "point faded", tabindex: 0, role: "button",
    "aria-label": `${setting.label}: ${setting.facts.map((fact) => fact.join(" ")).join("; ")}`,
  });
  if (low !== null) group.append(svg("line", { x1: x(cost), x2: x(cost), y1: y(low), y2: y(high), stroke }));
  group.append(svg("line", { x1: x(fast), x2: x(slow), y1: y(mean), y2: y(mean), stroke }));
  group.append(mark(setting.method, x(cost), y(mean)));
  group.append(svg("circle", { cx: x(cost), cy: y(mean), r: 11, class: "target" }));
  const show = () => showCard(setting, x(cost), y(mean));
  const open = () => openCell(tell(setting));
  for (const event of ["mouseenter", "focus"]) group.addEventListener(event, show);
  for (const event of ["mouseleave", "blur"]) group.addEventListener(event, hideCard);
  group.addEventListener("click", open);
  group.addEventListener("keydown", ({ key }) => (key === "Enter" || key === " ") && open());
  return group;
}

// Names what is on the front, each where it covers no other name.
function nameFront(picture, points, x, y) {
  const taken = points.map(({ setting, mean }) =>
    ({ left: x(setting.cost[0]) - 5, right: x(setting.cost[0]) + 5, top: y(mean) - 5, bottom: y(mean) + 5 }));
  for (const { setting, mean, front } of points) {
    if (!front) continue;
    const text = svg("text", { fill: looks[setting.method].colour, class: "name" }, setting.label);
    picture.append(text);
    const wide = text.getComputedTextLength();
    const spots = [[9, -8], [9, 14], [-9 - wide, -8], [-9 - wide, 14], [-wide / 2, -14], [-wide / 2, 22]]
      .map(([dx, dy]) => ({ left: x(setting.cost[0]) + dx, bottom: y(mean) + dy + 3 }))
      .map(({ left, bottom }) => ({ left, bottom, right: left + wide, top: bottom - 14 }));
    const free = spots.find((a) => a.right < SIZE.width && taken.every((b) =>
      a.right < b.left || b.right < a.left || a.bottom < b.top || b.bottom < a.top));
    if (!free) { text.remove(); continue; }
    text.setAttribute("x", free.left);
    text.setAttribute("y", free.bottom - 3);
    taken.push(free);
  }
}

function showCard(setting, x, y) {
  const scale = $("plot").clientWidth / SIZE.width;
  const card = $("card");
  card.replaceChildren(element("b", { textContent: setting.label }), pairs(setting.facts));
  card.hidden = false;
  const beyond = x * scale + card.offsetWidth + 24 > $("plot").clientWidth;
  card.style.left = `${x * scale + (beyond ? -card.offsetWidth - 16 : 16)}px`;
  card.style.top = `${Math.max(0, y * scale - card.offsetHeight / 2)}px`;
}

function hideCard() {
  $("card").hidden = true;
}

if (timed.length && metrics.length) {
  for (const task of new Set(timed.map((setting) => setting.task))) {
    $("task").add(new Option(task.toUpperCase(), task));
  }
  for (const metric of metrics) $("metric").add(new Option(metric.heading, metric.name));
  for (const method of new Set(timed.map((setting) => setting.method))) {
    const sign = svg("svg", { viewBox: "-8 -8 16 16", width: 16, height: 16, "aria-hidden": true }, mark(method));
    $("legend").append(element("li", {}, sign, method.replaceAll("_", " ")));
  }
  for (const id of ["task", "metric"]) $(id).addEventListener("change", drawFrontier);
  $("frontier").hidden = false;
  drawFrontier();
}
