// An exported file in onnxruntime-web, as a model for sampler.js.

import { isFlow } from "./sampler.js";

/** Open a file's bytes (Uint8Array); `ort` is the onnxruntime-web that the caller imported.
 *  Returns `async (latents, timesteps, classLabels, rows) => modelOutput`. */
export async function openModel(ort, bytes, { in_channels: channels, input_size: side, process }) {
  const session = await ort.InferenceSession.create(bytes, {
    executionProviders: ["wasm"],
    // Weight-only linears (--adaln 8|4, --a 16) keep float inputs, as in the package's runners.
    extra: { session: { qdq_matmulnbits_accuracy_level: "1" } },
  });
  const integers = (values, rows) =>
    new ort.Tensor("int64", BigInt64Array.from(values, BigInt), [rows]);
  return async (latents, timesteps, classLabels, rows) => {
    const { model_output: output } = await session.run({
      latents: new ort.Tensor("float32", latents, [rows, channels, side, side]),
      timesteps: isFlow(process)
        ? new ort.Tensor("float32", Float32Array.from(timesteps), [rows])
        : integers(timesteps, rows),
      class_labels: integers(classLabels, rows),
    });
    return output.data;
  };
}
