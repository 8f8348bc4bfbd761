// Videos: only those on the stage are loaded. The first is the clock, the others follow it to
// within a frame.
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
    const box = element("input", { type: "checkbox", value: label, checked: shown.includes(label) });
    $("settings").append(element("label", {}, box, label));
  }
  $("all").addEventListener("click", tickAll);
  $("overlay").parentElement.hidden = !videos.some((v) => v.allocation);
  for (const id of ["prompt", "settings", "view"]) $(id).addEventListener("change", stage);
  $("overlay").addEventListener("change", paint);
  $("size").addEventListener("input", resize);
  $("play").addEventListener("click", () => (playing ? pause() : play()));
  $("scrub").addEventListener("input", () => { pause(); seek(Number($("scrub").value)); });
  $("size").value = Math.max(170, Math.min(360, videos[0].size[0]));
  resize();
}

// All settings, or if they are ticked already those that the page opened with.
function tickAll() {
  const boxes = [...$("settings").querySelectorAll("input")];
  const every = boxes.some((box) => !box.checked);
  for (const box of boxes) box.checked = every || shown.includes(box.value);
  stage();
}

function resize() {
  $("stage").style.setProperty("--tile", `${$("size").value}px`);
}

// Shows the ticked settings of the chosen prompt, at the frame where the last ones stood.
function stage() {
  const resume = playing;
  const frame = Number($("scrub").value);
  pause();
  for (const { video } of players) {  // lets the browser drop what it has loaded
    video.removeAttribute("src");
    video.load();
  }
  const wanted = ticked();
  players = videos
    .filter((v) => sameKey(v) === $("prompt").value && wanted.includes(v.label))
    .map(player);
  $("stage").replaceChildren(...players.map((p) => p.figure));
  $("scrub").max = players.length ? clock().data.frames - 1 : 0;
  paint();
  seek(Math.min(frame, Number($("scrub").max)));
  if (resume) play();
}

// The reference itself has no difference: its video stands beside those of the others.
function player(data) {
  const difference = $("view").value === "difference" && data.difference;
  const video = element("video", {
    muted: true, playsInline: true, preload: "auto", src: difference || data.video,
    width: data.size[0], height: data.size[1],
  });
  const tokens = element("div", { className: "tokens", hidden: true });
  const screen = element("div", { className: "screen" }, video, tokens);
  const name = element("button", { type: "button", textContent: data.label });
  const setting = settings.find((s) => s.task === data.task && s.label === data.label);
  name.addEventListener("click", () => openCell(tell(setting, data)));
  const legend = element("div", { className: "groups", hidden: true });
  for (const { name, colour } of data.allocation?.groups ?? []) {
    const swatch = element("i");
    swatch.style.background = colour;
    legend.append(element("span", {}, swatch, name));
  }
  if (data.allocation) {
    tokens.style.backgroundImage = `url("${data.allocation.strip}")`;
    tokens.style.backgroundSize = `100% ${100 * data.allocation.frames}%`;
  }
  const facts = data.caption.map((text) => element("span", { textContent: text }));
  const figure = element("figure", {}, screen, element("figcaption", {}, name, ...facts, legend));
  video.addEventListener("error", () => video.src && figure.classList.add("broken"));
  return { data, figure, video, tokens, legend };
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

// Resolves when the event comes, or an error in its place.
const once = (video, event) => new Promise((done) => {
  for (const name of [event, "error"]) video.addEventListener(name, done, { once: true });
});

// Moves a video to a time, as soon as it knows how long it is.
async function move(video, time) {
  if (!video.readyState && !video.error) await once(video, "loadedmetadata");
  if (video.error) return;
  const arrived = once(video, "seeked");
  video.pause();
  video.currentTime = time;
  await arrived;
}

// Lets the videos go together, once all of them stand at the same time.
async function start(time) {
  starting = true;
  const together = players;
  await Promise.all(together.map(({ video }) => move(video, time)));
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
  for (const { data, tokens } of players) {
    if (!data.allocation) continue;
    const last = data.allocation.frames - 1;  // the first latent frame is one frame, others are more
    const at = Math.ceil((frame * last) / Math.max(1, data.frames - 1));
    tokens.style.backgroundPosition = `0 ${(100 * at) / Math.max(1, last)}%`;
  }
}

// Lays the groups of the tokens over the videos, or takes them away.
function paint() {
  for (const { data, tokens, legend } of players) {
    tokens.hidden = legend.hidden = !(data.allocation && $("overlay").checked);
  }
}

if (videos.length) { build(); stage(); }
