"use strict";

// Tables: a click on a heading sorts by it, a second one the other way; missing values stay last.
const valueOf = (row, column) => {
  const text = row.cells[column].textContent.trim();
  const number = parseFloat(text.replace("\u2212", "-"));
  return text === "\u2013" ? null : Number.isNaN(number) ? text : number;
};
const compare = (a, b) =>
  typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });

for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => heading.addEventListener("click", () => {
    const sign = heading.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    headings.forEach((other) => other.removeAttribute("aria-sort"));
    heading.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    const rows = [...table.tBodies[0].rows].sort((a, b) => {
      const [x, y] = [valueOf(a, column), valueOf(b, column)];
      if (x === null || y === null) return (x === null) - (y === null);
      return sign * compare(x, y);
    });
    table.tBodies[0].append(...rows);
  }));
}

// Videos: the first one shown is the clock, the others follow it to within a frame.
const { videos, shown } = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
let players = [];
let playing = false;
let starting = false;

const sameKey = (video) => `${video.task} ${video.prompt_id}`;
const promptsOf = (all) => [...new Map(all.map((v) => [sameKey(v), v])).values()];
const labelsOf = (all) => [...new Set(all.map((v) => v.label))];
const ticked = () => [...$("settings").querySelectorAll(":checked")].map((box) => box.value);
const clock = () => players[0];
const frameAt = ({ data }, time) =>
  Math.min(data.frames - 1, Math.floor(time * data.fps + 1e-6));

function build() {
  for (const video of promptsOf(videos)) {
    $("prompt").add(new Option(`${video.task.toUpperCase()} \u00b7 ${video.prompt}`, sameKey(video)));
  }
  for (const label of labelsOf(videos)) {
    const tag = document.createElement("label");
    const box = Object.assign(document.createElement("input"), { type: "checkbox", value: label });
    box.checked = shown.includes(label);
    tag.append(box, label);
    $("settings").append(tag);
  }
  $("overlay").parentElement.hidden = !videos.some((v) => v.allocation);
  $("prompt").addEventListener("change", stage);
  $("settings").addEventListener("change", stage);
  $("overlay").addEventListener("change", draw);
  $("play").addEventListener("click", () => (playing ? pause() : play()));
  $("scrub").addEventListener("input", () => { pause(); seek(Number($("scrub").value)); });
}

// Shows the ticked settings of the chosen prompt, at the frame where the last ones stood.
function stage() {
  const resume = playing;
  const frame = Number($("scrub").value);
  pause();
  const wanted = ticked();
  players = videos
    .filter((v) => sameKey(v) === $("prompt").value && wanted.includes(v.label))
    .map(player);
  $("stage").replaceChildren(...players.map((p) => p.figure));
  $("scrub").max = players.length ? clock().data.frames - 1 : 0;
  seek(Math.min(frame, Number($("scrub").max)));
  if (resume) play();
}

function player(data) {
  const figure = document.createElement("figure");
  const screen = Object.assign(document.createElement("div"), { className: "screen" });
  const video = Object.assign(document.createElement("video"), {
    muted: true, playsInline: true, preload: "auto", src: `data:video/mp4;base64,${data.mp4}`,
    width: data.size[0], height: data.size[1],
  });
  const canvas = document.createElement("canvas");
  const caption = document.createElement("figcaption");
  const name = Object.assign(document.createElement("b"), { textContent: data.label });
  caption.append(name, ...data.caption.map((text) =>
    Object.assign(document.createElement("span"), { textContent: text })));
  screen.append(video, canvas);
  figure.append(screen, caption);
  const groups = data.allocation && bytes(data.allocation.data);
  return { data, figure, video, canvas, groups };
}

function seek(frame) {
  for (const p of players) p.video.currentTime = (frame + 0.5) / p.data.fps;
  show(frame);
}

function play() {
  if (!players.length) return;
  playing = true;
  $("play").textContent = "Pause";
  start(clock().video.ended ? 0 : clock().video.currentTime);
  requestAnimationFrame(tick);
}

function pause() {
  playing = false;
  $("play").textContent = "Play";
  for (const p of players) p.video.pause();
}

// Lets the videos go together, once all of them stand at the same time.
async function start(time) {
  starting = true;
  const together = players;
  await Promise.all(together.map(({ video }) => new Promise((ready) => {
    video.addEventListener("seeked", ready, { once: true });
    video.pause();
    video.currentTime = time;
  })));
  starting = false;
  if (!playing || together !== players) return;
  for (const { video } of players) video.play().catch(() => {});  // paused again: no error
}

function tick() {
  if (!playing || !players.length) return;
  const { video, data } = clock();
  if (!starting) {
    if (video.ended) start(0);
    for (const p of players.slice(1)) {
      const apart = Math.abs(p.video.currentTime - video.currentTime) * data.fps;
      if (apart >= 0.5 && !p.video.seeking) p.video.currentTime = video.currentTime;
    }
  }
  show(frameAt(clock(), video.currentTime));
  requestAnimationFrame(tick);
}

function show(frame) {
  $("scrub").value = frame;
  $("frame").textContent = players.length ? `${frame + 1} / ${clock().data.frames}` : "";
  draw();
}

// Full-budget tokens are painted, the smallest budget stays clear, others lie between.
function draw() {
  for (const { data, canvas, groups } of players) {
    if (!groups) continue;
    const [frames, height, width] = data.allocation.shape;
    const steps = Math.max(1, data.allocation.groups - 1);
    const last = Math.max(1, data.frames - 1);
    const at = Math.ceil(Number($("scrub").value) * (frames - 1) / last);
    canvas.width = width;
    canvas.height = height;
    if (!$("overlay").checked) continue;
    const context = canvas.getContext("2d");
    const image = context.createImageData(width, height);
    for (let i = 0; i < width * height; i++) {
      const share = 1 - groups[at * width * height + i] / steps;
      image.data.set([213, 94, 0, 170 * share], 4 * i);
    }
    context.putImageData(image, 0, 0);
  }
}

if (videos.length) { build(); stage(); }
