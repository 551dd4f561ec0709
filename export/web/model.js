// The exported graphs in ONNX Runtime Web: on WebGPU where the browser has it, else in WebAssembly with SIMD, and threads where the page
// is isolated from other sites.

import { normals, slerp } from "./philox.js";

async function hasWebGpu() {
  try {
    return Boolean(navigator.gpu && (await navigator.gpu.requestAdapter()));
  } catch {
    return false;
  }
}

export class Model {
  // forced: "webgpu" or "wasm" in the place of what the browser has.
  static async load(manifest, forced = null) {
    const gpu = forced ? forced === "webgpu" : await hasWebGpu();
    const ort = await import(gpu ? "./runtime/ort.webgpu.min.mjs" : "./runtime/ort.wasm.min.mjs");
    ort.env.wasm.wasmPaths = new URL("./runtime/", import.meta.url).href;
    ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(8, navigator.hardwareConcurrency || 1) : 1;
    ort.env.logLevel = "error";
    const model = new Model(manifest, ort, gpu ? "webgpu" : "wasm");
    model.graphs = { generate: await model.#open(manifest.graphs.generate) };
    return model;
  }

  constructor(manifest, ort, provider) {
    Object.assign(this, { manifest, ort, provider });
    this.runsOn = provider === "webgpu" ? "WebGPU" : `WebAssembly, ${ort.env.wasm.numThreads === 1 ? "1 thread" : `${ort.env.wasm.numThreads} threads`}`;
    this.size = manifest.channels * manifest.resolution ** 2;
    this.last = Promise.resolve();
  }

  async #open(graph) {
    const options = { executionProviders: [this.provider], graphOptimizationLevel: "all", logSeverityLevel: 3 };
    return this.ort.InferenceSession.create(new URL(graph.file, import.meta.url).href, options);
  }

  // The noise of a graph's steps for one seed, or between two seeds.
  noise(graph, seed, other = null, fraction = 0) {
    const whole = new Float32Array(graph.sigmas.length * this.size);
    graph.sigmas.forEach((_, step) => {
      let field = normals(seed, this.size, step);
      if (other !== null) field = slerp(field, normals(other, this.size, step), fraction);
      whole.set(field, step * this.size);
    });
    return whole;
  }

  // -> {pixels: Uint8ClampedArray RGBA of the image, ms: the graph's time}
  async generate({ seed, label = 0, other = null, fraction = 0 }) {
    const graph = this.manifest.graphs.generate;
    return this.#run("generate", { noise: this.noise(graph, seed, other, fraction) }, label);
  }

  // rgba: the picture that is kept where mask (Uint8Array, a byte per pixel) is 0.
  async inpaint({ rgba, mask, seed, label = 0 }) {
    if (!this.graphs.inpaint) this.graphs.inpaint = await this.#open(this.manifest.graphs.inpaint);
    const { channels, resolution } = this.manifest, plane = resolution ** 2, image = new Float32Array(this.size);
    for (let channel = 0; channel < channels; channel++) {
      for (let i = 0; i < plane; i++) image[channel * plane + i] = rgba[4 * i + channel] / 127.5 - 1;
    }
    const feeds = { image, mask: Float32Array.from(mask, (value) => (value ? 1 : 0)) };
    return this.#run("inpaint", { ...feeds, noise: this.noise(this.manifest.graphs.inpaint, seed) }, label);
  }

  // One run at a time: sessions share the WebAssembly memory.
  #run(name, arrays, label) {
    const result = this.last.then(() => this.#runNow(name, arrays, label));
    this.last = result.catch(() => {});
    return result;
  }

  async #runNow(name, arrays, label) {
    const graph = this.manifest.graphs[name], feeds = {};
    for (const [input, shape] of Object.entries(graph.inputs)) {
      // int64 as two words, low first
      const labels = input === "labels" && new BigInt64Array(new Int32Array([label, 0]).buffer);
      feeds[input] = labels ? new this.ort.Tensor("int64", labels, [1]) : new this.ort.Tensor("float32", arrays[input], [1, ...shape]);
    }
    const start = performance.now();
    const { images } = await this.graphs[name].run(feeds);
    const data = await images.getData();
    const ms = performance.now() - start;
    images.dispose();
    return { pixels: this.#pixels(data), ms };
  }

  // float32 [C, H, W] in [-1, 1] -> RGBA
  #pixels(data) {
    const { channels, resolution } = this.manifest, plane = resolution ** 2, pixels = new Uint8ClampedArray(4 * plane);
    for (let i = 0; i < plane; i++) {
      for (let channel = 0; channel < 3; channel++) pixels[4 * i + channel] = (data[(channels === 1 ? 0 : channel) * plane + i] + 1) * 127.5;
      pixels[4 * i + 3] = channels === 4 ? (data[3 * plane + i] + 1) * 127.5 : 255;
    }
    return pixels;
  }
}
