// The page: what the controls do. `window.fastcm` is there for scripts: {model, ready}.

import { Model } from "./model.js";
import { seedWords } from "./philox.js";

const $ = (id) => document.getElementById(id);
const state = { model: null, image: null, mask: null, erased: false };

function say(text) {
  $("status").textContent = text;
}

function checked(input) {
  try {
    seedWords(input.value);
    input.setCustomValidity("");
  } catch {
    input.setCustomValidity("A whole number from -2^63 to 2^64 - 1");
  }
  input.classList.toggle("wrong", !input.validity.valid);
  return input.validity.valid;
}

function show(canvas, pixels) {
  const { resolution } = state.model.manifest;
  canvas.getContext("2d").putImageData(new ImageData(pixels, resolution, resolution), 0, 0);
}

function milliseconds(ms) {
  return `${ms < 10 ? ms.toFixed(1) : Math.round(ms)} ms`;
}

const label = () => Number($("class").value || 0);

// Runs `work` for the newest request alone: while one is drawn, those between are dropped.
function newest(work) {
  let busy = false, again = false;
  return async function run() {
    if (busy) {
      again = true;
      return;
    }
    busy = true;
    try {
      await work();
    } catch (error) {
      console.error(error);
      say(`It failed: ${error.message}`);
    } finally {
      busy = false;
    }
    if (again) {
      again = false;
      await run();
    }
  };
}

const generate = newest(async () => {
  if (!checked($("seed"))) return;
  const { pixels, ms } = await state.model.generate({ seed: $("seed").value, label: label() });
  state.image = pixels;
  show($("image"), pixels);
  $("image-ms").textContent = milliseconds(ms);
  startMask();
});

const interpolate = newest(async () => {
  if (!checked($("seed-a")) || !checked($("seed-b"))) return;
  const fraction = Number($("way").value) / 1000;
  const { pixels, ms } = await state.model.generate({ seed: $("seed-a").value, other: $("seed-b").value, fraction, label: label() });
  show($("between"), pixels);
  $("between-ms").textContent = milliseconds(ms);
});

const fill = newest(async () => {
  if (!checked($("fill-seed"))) return;
  if (!state.mask.some(Boolean)) {
    $("fill-ms").textContent = "draw on the picture first";
    return;
  }
  const { pixels, ms } = await state.model.inpaint({ rgba: state.image, mask: state.mask, seed: $("fill-seed").value, label: label() });
  show($("edit"), pixels);
  $("fill-ms").textContent = milliseconds(ms);
});

function startMask() {
  const { resolution } = state.model.manifest;
  state.mask = new Uint8Array(resolution ** 2);
  if (state.image) show($("edit"), state.image);
}

// The pixels under a round brush become part of the mask and are shown in the accent colour.
function paint(event) {
  const canvas = $("edit"), box = canvas.getBoundingClientRect(), { resolution } = state.model.manifest;
  const x = ((event.clientX - box.left) / box.width) * resolution, y = ((event.clientY - box.top) / box.height) * resolution;
  const radius = Math.max(0.6, (Number($("brush").value) / 100) * resolution), context = canvas.getContext("2d");
  context.fillStyle = getComputedStyle(document.documentElement).getPropertyValue("--accent");
  for (let row = 0; row < resolution; row++) {
    for (let column = 0; column < resolution; column++) {
      if (Math.hypot(column + 0.5 - x, row + 0.5 - y) <= radius && !state.mask[row * resolution + column]) {
        state.mask[row * resolution + column] = 1;
        context.fillRect(column, row, 1, 1);
      }
    }
  }
}

function draggable(canvas) {
  canvas.addEventListener("pointerdown", (event) => {
    if (state.filled) startMask();
    state.filled = false;
    canvas.setPointerCapture(event.pointerId);
    paint(event);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (event.buttons) paint(event);
  });
}

function randomSeed() {
  return String(crypto.getRandomValues(new Uint32Array(1))[0]);
}

function connect() {
  $("seed").addEventListener("input", generate);
  $("class").addEventListener("change", () => Promise.all([generate(), interpolate()]));
  $("random").addEventListener("click", () => {
    $("seed").value = randomSeed();
    generate();
  });
  for (const id of ["seed-a", "seed-b", "way"]) $(id).addEventListener("input", interpolate);
  $("fill").addEventListener("click", async () => {
    await fill();
    state.filled = true;
  });
  $("clear").addEventListener("click", startMask);
  draggable($("edit"));
}

// Threads need a page that is isolated from other sites: by the server's headers, or by the service worker after one reload.
async function isolated() {
  if (self.crossOriginIsolated || !("serviceWorker" in navigator) || sessionStorage.getItem("isolation")) return true;
  sessionStorage.setItem("isolation", "asked");
  try {
    await navigator.serviceWorker.register("./isolation.js");
    await navigator.serviceWorker.ready;
  } catch {
    return true; // one thread, then
  }
  location.reload();
  return false;
}

async function start() {
  const manifest = await (await fetch("./manifest.json")).json();
  document.title = manifest.title;
  $("title").textContent = manifest.title;
  for (const canvas of document.querySelectorAll("canvas")) canvas.width = canvas.height = manifest.resolution;
  (manifest.classes || []).forEach((name, number) => $("class").add(new Option(name, number)));
  $("class-field").hidden = !manifest.classes;
  $("edit-card").hidden = !manifest.graphs.inpaint;
  say("loading the model");
  const forced = new URLSearchParams(location.search).get("provider");
  if (forced !== "webgpu" && !(await isolated())) return;
  state.model = await Model.load(manifest, forced);
  connect();
  await state.model.generate({ seed: "0" }); // the first run prepares the graph: its time says nothing
  await generate();
  await interpolate();
  say(state.model.runsOn);
  window.fastcm = { model: state.model, ready: true };
}

$("notice").remove();
$("page").hidden = false;
start().catch((error) => {
  console.error(error);
  say(`It failed: ${error.message}`);
});
