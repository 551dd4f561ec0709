"""An exported graph in ONNX Runtime Web, in headless Chromium: WebAssembly with SIMD on one thread."""

import asyncio
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastcm.benchmarks import browser
from fastcm.benchmarks.latency.other_runtimes import Feeds
from fastcm.errors import InputError, RunError
from fastcm.export.to_web import PACKAGE, find_runtime

RUNTIME_FOLDER = "FASTCM_WEB_RUNTIME"  # where npm installed the package, if not in node_modules here or above
DRAW = """(async () => {
  const ort = await import('./dist/ort.wasm.min.mjs');
  ort.env.wasm.numThreads = 1;
  const session = await ort.InferenceSession.create('./graph.onnx');
  const array = { float32: Float32Array, int64: BigInt64Array };
  const feedsOf = (row) => Object.fromEntries(Object.entries(row).map(([name, { type, shape, data }]) =>
    [name, new ort.Tensor(type, array[type].from(type === 'int64' ? data.map(BigInt) : data), shape)]));
  const images = [], times = [];
  for (const row of ROWS) images.push(Array.from((await session.run(feedsOf(row))).images.data));
  const feeds = feedsOf(ROWS[0]), end = performance.now() + SECONDS * 1000;
  while (times.length < MOST && performance.now() < end) {
    const start = performance.now();
    await session.run(feeds);
    times.push(performance.now() - start);
  }
  return { images, times };
})()"""


class Drawn(NamedTuple):
    """images: fp32 [B, C, H, W]. milliseconds: fp64 [calls], of one image each."""

    images: np.ndarray
    milliseconds: np.ndarray


def version() -> str | None:
    """Of the npm package; None where it or Chromium is absent."""
    try:
        folder = find_runtime(os.environ.get(RUNTIME_FOLDER))
    except InputError:
        return None
    return None if browser.executable() is None else json.loads((folder / "package.json").read_text(encoding="utf-8"))["version"]


def draw(path: Path, feeds: Feeds, shape: tuple[int, ...], *, seconds: float, most: int = 200) -> Drawn:
    """Every row of the feeds, one call each, then timed calls of the first. RunError with one line where the runtime refuses the graph."""
    count = len(next(iter(feeds.values())))
    rows = [
        {
            name: {"type": str(array.dtype), "shape": [1, *array.shape[1:]], "data": array[index].ravel().tolist()}
            for name, array in feeds.items()
        }
        for index in range(count)
    ]
    script = DRAW.replace("ROWS", json.dumps(rows)).replace("SECONDS", str(seconds)).replace("MOST", str(most))
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(find_runtime(os.environ.get(RUNTIME_FOLDER)) / "dist", Path(folder) / "dist")
        shutil.copyfile(path, Path(folder) / "graph.onnx")
        (Path(folder) / "index.html").write_text(f"<!doctype html><title>{PACKAGE}</title>", encoding="utf-8")
        found = asyncio.run(_evaluated(Path(folder), script))
    return Drawn(np.array(found["images"], np.float32).reshape(count, *shape), np.array(found["times"]))


async def _evaluated(folder: Path, script: str) -> dict:
    with browser.static_server(folder) as address:
        async with browser.opened(f"{address}/index.html") as page:
            await page.until("document.readyState === 'complete'")
            try:
                return await page.evaluate(script)
            except AssertionError as error:
                details = error.args[0] if error.args and isinstance(error.args[0], dict) else {}
                text = details.get("exception", {}).get("description") or details.get("text") or str(error)
                raise RunError(f"ONNX Runtime Web refuses the graph: {text.strip().splitlines()[0][:120]}.") from None
