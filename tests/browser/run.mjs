// What tests/test_browser.py asks of the JavaScript: a job as JSON on stdin, its answer on stdout.

import { readFile } from "node:fs/promises";
import { text } from "node:stream/consumers";

const job = JSON.parse(await text(process.stdin));
const from = (name) => import(new URL(name, job.folder));
const { betas, makeSteps, sample, seededNoise } = await from("sampler.js");

/** The noise that Python drew: of every image one long list, taken from its beginning. */
function givenNoise(images) {
  const left = images.map((numbers) => Float32Array.from(numbers));
  return (image, count) => {
    const taken = left[image].subarray(0, count);
    left[image] = left[image].subarray(count);
    return taken;
  };
}

/** The model of `Simple` in test_browser.py. */
async function simple(latents, timesteps, classLabels, rows) {
  const size = latents.length / rows;
  const width = size * (job.config.process.variance === "learned_range" ? 2 : 1);
  const output = new Float32Array(rows * width);
  for (let row = 0; row < rows; row++) {
    for (let i = 0; i < width; i++) {
      const x = latents[row * size + (i % size)];
      output[row * width + i] = i < size
        ? 0.3 * x + timesteps[row] / 2000 + classLabels[row] / 100
        : Math.sin(3 * x);
    }
  }
  return output;
}

async function exported(path) {
  const ort = await from("node_modules/onnxruntime-web/dist/ort.node.min.mjs");
  ort.env.wasm.numThreads = 1;
  const { openModel } = await from("model.js");
  return openModel(ort, new Uint8Array(await readFile(path)), job.config);
}

const jobs = {
  schedule: () => ({
    betas: Array.from(betas(job.process)),
    steps: job.asked.map(([sampler, steps]) => makeSteps(job.process, sampler, steps)),
  }),
  sample: async () => {
    const model = job.file ? await exported(job.file) : simple;
    const noise = givenNoise(job.noise);
    return Array.from(await sample(model, job.config, { ...job.settings, noise }));
  },
  outputs: async () => {
    const outputs = [];
    for (const file of job.files) {
      const model = await exported(file);
      outputs.push(
        Array.from(await model(Float32Array.from(job.latents), job.timesteps, job.labels, job.labels.length)),
      );
    }
    return outputs;
  },
  noise: () => {
    const draw = seededNoise(job.seed);
    return job.images.map((image) => Array.from(draw(image, job.count)));
  },
};

try {
  process.stdout.write(JSON.stringify({ result: await jobs[job.name]() }));
} catch (error) {
  process.stdout.write(JSON.stringify({ error: error.message }));
}
