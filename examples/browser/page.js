// The page: opens both files, samples one after the other with the same noise.

import * as ort from "./ort/ort.wasm.min.mjs";
import { openModel } from "./model.js";
import { isFlow, sample, seededNoise } from "./sampler.js";

ort.env.wasm.wasmPaths = new URL("./ort/", import.meta.url).href;

const element = (id) => document.getElementById(id);
const state = { models: [], abort: null };

function say(text, { failed = false } = {}) {
  element("status").textContent = text;
  element("status").classList.toggle("failed", failed);
}

async function fetched(url) {
  const answer = await fetch(url);
  if (!answer.ok) throw new Error(`${url}: ${answer.status} ${answer.statusText}`);
  return answer;
}

/** Fetch and open a model, and make its part of the page. */
async function load(entry, config) {
  const bytes = new Uint8Array(await (await fetched(entry.url)).arrayBuffer());
  const figure = document.createElement("figure");
  figure.innerHTML =
    "<figcaption><strong></strong><progress value=0></progress><span class=said></span>" +
    "</figcaption><canvas></canvas>";
  const mebibytes = (bytes.length / 2 ** 20).toFixed(1);
  figure.querySelector("strong").textContent = `${entry.title}, ${mebibytes} MiB`;
  element("models").append(figure);
  return {
    run: await openModel(ort, bytes, config),
    progress: figure.querySelector("progress"),
    said: figure.querySelector(".said"),
    canvas: figure.querySelector("canvas"),
  };
}

/** Draw (N, 1 or 3, H, W) latents that are pictures side by side: -1 black, 1 white. */
function draw(canvas, latents, count, { in_channels: channels, input_size: side }) {
  canvas.width = count * side;
  canvas.height = side;
  const context = canvas.getContext("2d");
  for (let image = 0; image < count; image++) {
    const picture = context.createImageData(side, side);
    for (let i = 0; i < side * side; i++) {
      for (let c = 0; c < 3; c++) {
        const channel = channels === 1 ? 0 : c;
        const x = latents[(image * channels + channel) * side * side + i];
        picture.data[4 * i + c] = Math.floor(127.5 * x + 128); // clamped by the array
      }
      picture.data[4 * i + 3] = 255;
    }
    context.putImageData(picture, image * side, 0);
  }
}

/** Return what the form asks for, or throw what is wrong with it. */
function settings({ num_classes: classes }) {
  const form = new FormData(element("settings"));
  const labels = form.get("classes").split(/[\s,]+/).filter(Boolean).map(Number);
  const odd = labels.filter((label) => !(Number.isInteger(label) && 0 <= label && label < classes));
  if (!labels.length || odd.length) {
    throw new Error(`classes ${odd.join(", ") || "of nothing"}; give some of 0 to ${classes - 1}`);
  }
  const number = (name) => Number(form.get(name));
  return {
    labels,
    sampler: form.get("sampler"),
    steps: number("steps"),
    guidance: number("guidance"),
    seed: number("seed"),
  };
}

async function start(config) {
  state.abort = new AbortController();
  element("start").disabled = true;
  element("cancel").disabled = false;
  try {
    const { seed, ...wanted } = settings(config);
    for (const model of state.models) {
      model.progress.value = 0;
      model.said.textContent = "";
      model.canvas.width = 0;
    }
    say("Sampling …");
    for (const model of state.models) {
      let seconds = 0;
      let since = performance.now();
      const latents = await sample(model.run, config, {
        ...wanted,
        noise: seededNoise(seed),
        signal: state.abort.signal,
        onStep: async (done, all) => {
          seconds += (performance.now() - since) / 1000;
          model.progress.value = done / all;
          model.said.textContent = `step ${done} of ${all}, ${seconds.toFixed(1)} s`;
          await new Promise((go) => setTimeout(go)); // lets the page draw, and Cancel be heard
          since = performance.now();
        },
      });
      draw(model.canvas, latents, wanted.labels.length, config);
    }
    say("Done.");
  } catch (error) {
    if (state.abort.signal.aborted) say("Cancelled.");
    else say(error.message, { failed: true });
  } finally {
    element("start").disabled = false;
    element("cancel").disabled = true;
  }
}

try {
  const { config, models } = await (await fetched("models.json")).json();
  if (isFlow(config.process)) {
    element("settings").elements.sampler.replaceChildren(new Option("euler"));
  }
  for (const entry of models) state.models.push(await load(entry, config));
  element("settings").addEventListener("submit", (event) => {
    event.preventDefault();
    start(config);
  });
  element("cancel").addEventListener("click", () => state.abort.abort());
  element("start").disabled = false;
  say("Ready.");
} catch (error) {
  say(error.message, { failed: true });
}
