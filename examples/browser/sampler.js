// DDPM and DDIM for an exported DiT, Euler for a flow (SiT, REPA): the numbers of diffusers'
// schedulers; runs in browsers and Node.
//
// `config` is `model.config` of the manifest beside the file (out.json). A model is
// `async (latents, timesteps, classLabels, rows) => modelOutput`, Float32Arrays in row order.

/** Return the betas of a process, from the cleanest step to the noisiest. */
export function betas({ beta_schedule, beta_start, beta_end, train_timesteps: count }) {
  const line = (start, end) =>
    Float64Array.from({ length: count }, (_, i) => start + ((end - start) * i) / (count - 1));
  const kept = (phase) => Math.cos((((phase + 0.008) / 1.008) * Math.PI) / 2) ** 2;
  switch (beta_schedule) {
    case "linear":
      return line(beta_start, beta_end);
    case "scaled_linear":
      return line(Math.sqrt(beta_start), Math.sqrt(beta_end)).map((root) => root * root);
    case "squaredcos_cap_v2":
      return Float64Array.from({ length: count }, (_, i) =>
        Math.min(1 - kept((i + 1) / count) / kept(i / count), 0.999),
      );
    default:
      throw new Error(
        `beta_schedule ${beta_schedule}; expected linear, scaled_linear or squaredcos_cap_v2`,
      );
  }
}

/** Return whether a process is a flow, whose models predict a velocity. */
export function isFlow({ prediction }) {
  return prediction === "velocity";
}

/** Return the steps of a sampler, noisiest first: `timestep`, and what is left of the image
 *  before (`alpha`) and after (`next`) the step, the product of all 1 - beta; of a flow `timestep`,
 *  and the part that is noise before (`sigma`) and after (`next`). */
export function makeSteps(process, sampler, steps) {
  if (isFlow(process)) return makeFlowSteps(process, sampler, steps);
  const trained = process.train_timesteps;
  if (!Number.isInteger(steps) || steps < 2 || steps > trained) {
    throw new Error(`${steps} steps; give 2 to ${trained}`);
  }
  const products = [];
  betas(process).forEach((beta, i) => products.push((products[i - 1] ?? 1) * (1 - beta)));
  return timestepsOf(sampler, steps, trained).map((timestep, i, all) => ({
    timestep,
    alpha: products[timestep],
    next: i + 1 < all.length ? products[all[i + 1]] : 1,
  }));
}

function makeFlowSteps({ time_ends_at: end }, sampler, steps) {
  if (sampler !== "euler") throw new Error(`sampler ${sampler}; expected euler`);
  if (!Number.isInteger(steps) || steps < 1) throw new Error(`${steps} steps; give 1 or more`);
  return Array.from({ length: steps }, (_, i) => {
    const sigma = 1 - i / steps;
    return { timestep: end === "data" ? 1 - sigma : sigma, sigma, next: 1 - (i + 1) / steps };
  });
}

function timestepsOf(sampler, steps, trained) {
  const places = Array.from({ length: steps }, (_, i) => steps - 1 - i);
  switch (sampler) {
    case "ddpm": // spread evenly, both ends included
      return places.map((i) => roundToEven((i * (trained - 1)) / (steps - 1)));
    case "ddim": // leading: every stride begins with its step
      if (trained % steps) {
        throw new Error(`ddim takes a number of steps that divides ${trained}, not ${steps}`);
      }
      return places.map((i) => i * (trained / steps));
    default:
      throw new Error(`sampler ${sampler}; expected ddpm or ddim`);
  }
}

function roundToEven(x) {
  const below = Math.floor(x);
  if (x - below !== 0.5) return Math.round(x);
  return below % 2 ? below + 1 : below;
}

/** Return the latents after a DDIM step (eta = 0). `epsilon` is as long as the latents. */
export function ddimStep({ alpha, next }, latents, epsilon) {
  return latents.map((x, i) => {
    const image = (x - Math.sqrt(1 - alpha) * epsilon[i]) / Math.sqrt(alpha);
    return Math.sqrt(next) * image + Math.sqrt(1 - next) * epsilon[i];
  });
}

/** Return the latents after an Euler step; `towards` is the end that the velocity points to. */
export function eulerStep({ sigma, next }, latents, velocity, towards) {
  const stride = towards === "noise" ? next - sigma : sigma - next;
  return latents.map((x, i) => x + stride * velocity[i]);
}

/** Return the latents after a DDPM step. `v` is what the model says of the variance, -1 for the
 *  posterior's and 1 for beta itself, or null where it is fixed; the last step takes no noise. */
export function ddpmStep({ alpha, next, timestep }, latents, epsilon, v, noise, variance) {
  const beta = 1 - alpha / next;
  const posterior = Math.max(((1 - next) / (1 - alpha)) * beta, 1e-20);
  const deviation = (i) => {
    if (variance === "fixed_small") return Math.sqrt(posterior);
    if (variance === "fixed_large") return Math.sqrt(beta);
    const share = (v[i] + 1) / 2;
    return Math.exp((share * Math.log(beta) + (1 - share) * Math.log(posterior)) / 2);
  };
  return latents.map((x, i) => {
    const image = (x - Math.sqrt(1 - alpha) * epsilon[i]) / Math.sqrt(alpha);
    const mean =
      ((Math.sqrt(next) * beta) / (1 - alpha)) * image +
      ((Math.sqrt(1 - beta) * (1 - next)) / (1 - alpha)) * x;
    return timestep > 0 ? mean + deviation(i) * noise[i] : mean;
  });
}

/** Return one image per label as latents, a Float32Array (labels.length, C, H, W).
 *
 *  `noise(image, count)` draws that many normal numbers of an image, the first latents first;
 *  guidance acts on the first three channels of ε at most, on all where the velocity points to the
 *  noise (REPA), and 1 means none. `onStep(done, all)` is
 *  awaited after every step; an aborted `signal` ends the run with its reason. */
export async function sample(
  model,
  config,
  { labels, sampler, steps, guidance, noise, onStep = () => {}, signal },
) {
  const { in_channels: channels, input_size: side, process } = config;
  const plane = side * side;
  const size = channels * plane;
  const isGuided = guidance !== 1;
  if (isGuided && !(config.null_row && config.num_classes)) {
    throw new Error(`guidance ${guidance}, but this model has nothing to guide with; give 1`);
  }
  const towards = process.velocity_towards;
  const guided = (towards === "noise" ? channels : Math.min(3, channels)) * plane;
  const isLearned = process.variance === "learned_range";
  const fed = isGuided ? [...labels, ...labels.map(() => config.num_classes)] : labels;
  const draw = () => concat(labels.map((_, image) => noise(image, size)));
  const schedule = makeSteps(process, sampler, steps);

  let latents = draw();
  for (const [index, step] of schedule.entries()) {
    signal?.throwIfAborted();
    const rows = isGuided ? concat([latents, latents]) : latents;
    const output = await model(rows, fed.map(() => step.timestep), fed, fed.length);
    const width = output.length / fed.length; // 2 C H W with a learned variance, else C H W
    const epsilon = new Float32Array(latents.length);
    const v = isLearned ? new Float32Array(latents.length) : null;
    labels.forEach((_, image) => {
      const start = image * width;
      const own = output.slice(start, start + size);
      if (isGuided) {
        const nulls = output.subarray((labels.length + image) * width);
        for (let i = 0; i < guided; i++) own[i] = nulls[i] + guidance * (own[i] - nulls[i]);
      }
      epsilon.set(own, image * size);
      v?.set(output.subarray(start + size, start + 2 * size), image * size);
    });
    if (sampler === "euler") latents = eulerStep(step, latents, epsilon, towards);
    else if (sampler === "ddim") latents = ddimStep(step, latents, epsilon);
    else {
      const drawn = step.timestep > 0 ? draw() : null;
      latents = ddpmStep(step, latents, epsilon, v, drawn, process.variance);
    }
    await onStep(index + 1, schedule.length);
  }
  return latents;
}

function concat(parts) {
  const whole = new Float32Array(parts.reduce((sum, part) => sum + part.length, 0));
  let start = 0;
  for (const part of parts) {
    whole.set(part, start);
    start += part.length;
  }
  return whole;
}

/** Return a `noise` for `sample`: every image has a generator of its own, fixed by seed and image. */
export function seededNoise(seed) {
  const generators = new Map();
  return (image, count) => {
    if (!generators.has(image)) generators.set(image, normals(seed * 0x10001 + image));
    const draw = generators.get(image);
    return Float32Array.from({ length: count }, draw);
  };
}

function normals(seed) {
  let state = Math.imul(seed + 1, 0x9e3779b1);
  const uniform = () => {
    // Mulberry32, in (0, 1)
    state = (state + 0x6d2b79f5) | 0;
    let z = Math.imul(state ^ (state >>> 15), state | 1);
    z ^= z + Math.imul(z ^ (z >>> 7), z | 61);
    return (((z ^ (z >>> 14)) >>> 0) + 0.5) / 2 ** 32;
  };
  // Box and Muller
  return () => Math.sqrt(-2 * Math.log(uniform())) * Math.cos(2 * Math.PI * uniform());
}
