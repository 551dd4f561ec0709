"""The web page: its noise in node against Random123 and Python, and the whole of it in headless Chromium against Python's images."""

import asyncio
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from exported_models import tiny_denoiser

import fastcm
from fastcm import kernels
from fastcm.benchmarks import browser
from fastcm.cli import main
from fastcm.errors import InputError
from fastcm.export import to_web
from fastcm.generation import editing
from fastcm.generation.request import seed_array
from fastcm.weights.model_folder import save_model

PAGE = Path(to_web.PAGE)
SEEDS = ("0", "7", "-1", "9223372036854775807", "-9223372036854775808", "4294967296", "-4294967297", "18446744073709551615")
node = pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")


def in_node(code: str):
    """What a script prints as JSON; it has the page's modules in `philox`."""
    script = f"import * as philox from {json.dumps((PAGE / 'philox.js').as_uri())};\n{code}"
    command = ["node", "--no-warnings", "--experimental-default-type=module", "--input-type=module", "-e", script]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def runtime() -> Path | None:
    """The npm package: named in FASTCM_WEB_RUNTIME, or in node_modules here or above."""
    try:
        return to_web.find_runtime(os.environ.get("FASTCM_WEB_RUNTIME"))
    except InputError:
        return None


@node
def test_words_match_random123():
    ones, pi = [0xFFFFFFFF] * 4, [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    cases = [([0] * 4, [0, 0]), (ones, ones[:2]), (pi, [0xA4093822, 0x299F31D0])]
    assert in_node(f"console.log(JSON.stringify({json.dumps(cases)}.map(([c, k]) => philox.philoxWords(c, k))))") == [
        [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8],
        [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ]


@node
def test_noise_is_pythons():
    """Every seed, steps and a number of elements that four does not divide."""
    found = in_node(f"""
        const seeds = {json.dumps(SEEDS)};
        console.log(JSON.stringify(seeds.map((seed) => [0, 3].map((step) => Array.from(philox.normals(seed, 3 * 5 * 7, step))))))
    """)
    seeds, zero = torch.from_numpy(seed_array([int(seed) for seed in SEEDS])), torch.zeros(1, dtype=torch.int64)
    expected = torch.stack([kernels.normal(seeds, zero, (3, 5, 7), stream=16 + step) for step in (0, 3)], dim=1)
    np.testing.assert_allclose(np.array(found), expected.flatten(2).numpy(), atol=1e-5)


@node
def test_seeds_are_read_as_64_bits():
    good = {**{seed: [int(seed) & 0xFFFFFFFF, int(seed) >> 32 & 0xFFFFFFFF] for seed in SEEDS}, " +0012 ": [12, 0], "-0": [0, 0]}
    bad = ["", "x", "1.5", "1e3", "18446744073709551616", "-9223372036854775809", "99999999999999999999", "0x10", "--1"]
    found = in_node(f"""
        const read = (seed) => {{ try {{ return philox.seedWords(seed); }} catch (error) {{ return error.name; }} }};
        console.log(JSON.stringify([{json.dumps(list(good))}, {json.dumps(bad)}].map((seeds) => seeds.map(read))))
    """)
    assert found == [list(good.values()), ["RangeError"] * len(bad)]


@node
def test_the_way_between_two_fields_is_pythons():
    zero = torch.zeros(1, dtype=torch.int64)
    start, end = (kernels.normal(torch.tensor([seed]), zero, (40,), stream=16)[0] for seed in (1, 2))
    found = in_node("""
        const [start, end] = ["1", "2"].map((seed) => philox.normals(seed, 40));
        console.log(JSON.stringify([0, 0.3, 1].map((way) => Array.from(philox.slerp(start, end, way)))
          .concat([Array.from(philox.slerp(start, start, 0.3))])))
    """)
    expected = torch.stack([*(editing.slerp(start, end, way) for way in (0.0, 0.3, 1.0)), start])
    np.testing.assert_allclose(np.array(found), expected.numpy(), atol=1e-4)


@node
@pytest.mark.parametrize("name", ["app.js", "model.js", "isolation.js", "philox.js"])
def test_scripts_parse_and_reach_nowhere(name):
    text = (PAGE / name).read_text(encoding="utf-8")
    result = subprocess.run(["node", "--input-type=module", "--check", "-"], input=text, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "http:" not in text and "https:" not in text


def false_package(folder: Path, *, lacks: str | None = None) -> Path:
    """A folder that looks like the npm package."""
    (folder / "dist").mkdir(parents=True)
    (folder / "package.json").write_text(json.dumps({"name": to_web.PACKAGE, "version": "1.30.0"}))
    for name in to_web.RUNTIME:
        if name != lacks:
            (folder / "dist" / name).write_text(name)
    return folder


def test_the_runtime_is_found_or_named(tmp_path, monkeypatch):
    package = false_package(tmp_path / "site" / "node_modules" / to_web.PACKAGE)
    inner = tmp_path / "site" / "a" / "b"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    assert to_web.find_runtime(None) == package
    assert to_web.find_runtime(tmp_path / "site") == package and to_web.find_runtime(package) == package
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no onnxruntime-web for --web: no node_modules here or above"):
        to_web.find_runtime(None)
    with pytest.raises(InputError, match="lacks dist/ort.wasm.min.mjs. Install onnxruntime-web@1.30.0"):
        to_web.find_runtime(false_package(tmp_path / "other", lacks="ort.wasm.min.mjs"))


def test_what_an_export_did_not_write_is_not_replaced(tmp_path, capsys):
    model = tmp_path / "model"
    save_model(model, tiny_denoiser(), {})
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "thesis.txt").write_text("mine")
    assert main(["export", str(model), "--web", str(tmp_path / "site")]) == 2
    assert "something else stands in --web" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "site").iterdir()] == ["thesis.txt"]
    for options, words in (
        (["--web", "x", "--onnx"], "several targets at once in fastcm export: --web, --onnx"),
        (["--web", "x", "--uint8"], "an option that --web decides itself: --uint8"),
        (["--onnx", "--runtime", "x"], "an option of --web alone: --runtime"),
        (["--web", str(tmp_path / "new"), "--runtime", str(tmp_path)], f"no onnxruntime-web in --runtime: {tmp_path}"),
    ):
        assert main(["export", str(model), *options]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


in_browser = [
    pytest.mark.slow,
    pytest.mark.skipif(browser.executable() is None, reason="Chromium is not installed"),
    pytest.mark.skipif(runtime() is None, reason="npm's onnxruntime-web is not installed: npm install onnxruntime-web"),
]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """(page, generator): exported by the command, and the model that it was exported from."""
    model, out = (tmp_path_factory.mktemp("web") / name for name in ("model", "site"))
    save_model(model, tiny_denoiser(), {"classes": ["ant", "bee", "cat"]})
    assert main(["export", str(model), "--web", str(out), "--runtime", str(runtime())]) == 0
    return out, fastcm.load(model, device="cpu")


class TestInTheBrowser:
    pytestmark = in_browser

    def test_the_page_draws_pythons_images(self, site):
        """Served by Python's static server, driven through its controls; then opened from disk."""
        out, generator = site
        mask = np.zeros((8, 8), np.uint8)
        mask[2:5, 1:7] = 255
        levels = tuple(json.loads((out / "manifest.json").read_text())["graphs"]["inpaint"]["sigmas"])
        kept = generator([-5], 2)[0]
        found = asyncio.run(_driven(out, mask))
        assert found["ready"].startswith("WebAssembly, ") and "thread" in found["ready"]
        assert found["isolated"]  # so that WebAssembly may use threads
        for (seed, label), pixels in found["images"].items():
            assert_close(pixels, generator([seed], label)[0])
        for end, seed in (("0", 1), ("1000", 2)):
            assert_close(found["ways"][end], generator([seed], 2)[0])
        assert_close(found["ways"]["500"], generator.interpolate([1, 2], 2, frames=3)[1])
        edited = generator.inpaint(kept, mask, [3], 2, sigmas=levels)[0]
        assert_close(found["edit"], edited)
        assert np.abs(found["edit"][mask == 0] - kept[mask == 0, 0].astype(int)).max() <= 1 and not np.array_equal(edited, kept)
        assert found["wrong"] and found["ms"].endswith(" ms")
        assert found["errors"] == [] and found["outside"] == []

    def test_webgpu_draws_pythons_images(self, site):
        out, generator = site
        found = asyncio.run(_drawn_by_webgpu(out))
        if found is None:
            pytest.skip("this Chromium has no WebGPU adapter")
        assert found["ready"] == "WebGPU" and found["errors"] == []
        for seed, label in ((5, 1), (-3, 0)):
            assert_close(found["images"][seed, label], generator([seed], label)[0])


def assert_close(pixels: np.ndarray, image: np.ndarray):
    assert image.std() > 5 and np.abs(pixels - image[..., 0].astype(int)).max() <= 1


async def _drawn_by_webgpu(folder: Path) -> dict | None:
    """Images of the page's model on a WebGPU adapter, None where there is none."""
    found = {"images": {}}
    with browser.static_server(folder) as address:
        async with browser.opened(f"{address}/?provider=webgpu", *browser.WEBGPU) as page:
            await page.until("Boolean(document.getElementById('status'))")
            if not await page.evaluate("(async () => Boolean(navigator.gpu && (await navigator.gpu.requestAdapter())))()"):
                return None
            await page.until("window.fastcm && window.fastcm.ready")
            found["ready"] = await page.evaluate("document.getElementById('status').textContent")
            for seed, label in ((5, 1), (-3, 0)):
                call = f"fastcm.model.generate({{ seed: '{seed}', label: {label} }}).then((result) => Array.from(result.pixels))"
                found["images"][seed, label] = np.array(await page.evaluate(call)).reshape(8, 8, 4)[..., 0]
            found["errors"] = page.errors
    return found


async def _driven(folder: Path, mask: np.ndarray) -> dict:
    """What the page shows after each of a user's steps."""
    found = {"images": {}, "ways": {}}
    with browser.static_server(folder) as address:
        async with browser.opened(address) as page:

            async def shown(canvas: str) -> np.ndarray:
                pixels = await page.evaluate(
                    f"Array.from(document.getElementById('{canvas}').getContext('2d').getImageData(0, 0, 8, 8).data)"
                )
                return np.array(pixels).reshape(8, 8, 4)[..., 0]

            async def settled():
                await page.evaluate("new Promise((done) => setTimeout(done, 30)).then(() => fastcm.model.last)")
                await page.evaluate("new Promise((done) => setTimeout(done, 30))")

            async def enter(control: str, value: str):
                event = "change" if control == "class" else "input"
                change = f"e.value = '{value}'; e.dispatchEvent(new Event('{event}'))"
                await page.evaluate(f"{{ const e = document.getElementById('{control}'); {change}; }}")
                await settled()

            await page.until("window.fastcm && window.fastcm.ready")
            found["ready"] = await page.evaluate("document.getElementById('status').textContent")
            found["isolated"] = await page.evaluate("self.crossOriginIsolated")
            for seed, label in ((0, 0), (2**63 - 1, 1), (-5, 2)):
                await enter("class", str(label))
                await enter("seed", str(seed))
                found["images"][seed, label] = await shown("image")
            found["ms"] = await page.evaluate("document.getElementById('image-ms').textContent")
            for way in ("0", "500", "1000"):
                await enter("way", way)
                found["ways"][way] = await shown("between")
            await page.evaluate("document.getElementById('edit').scrollIntoView()")
            box = await page.evaluate("JSON.parse(JSON.stringify(document.getElementById('edit').getBoundingClientRect()))")
            await enter("brush", "2")
            for row, column in zip(*np.nonzero(mask), strict=True):
                place = {"x": box["x"] + (column + 0.5) * box["width"] / 8, "y": box["y"] + (row + 0.5) * box["height"] / 8}
                for kind in ("mousePressed", "mouseReleased"):
                    await page.send("Input.dispatchMouseEvent", type=kind, button="left", buttons=1, clickCount=1, **place)
            await enter("fill-seed", "3")
            await page.evaluate("document.getElementById('fill').click()")
            await page.until("document.getElementById('fill-ms').textContent.endsWith(' ms')")
            found["edit"] = await shown("edit")
            await enter("seed", "1.5")
            found["wrong"] = await page.evaluate("document.getElementById('seed').classList.contains('wrong')")
            found["errors"] = page.errors
            found["outside"] = [request for request in page.requests if not request.startswith((address, "data:", "blob:"))]
    async with browser.opened((folder / "index.html").as_uri()) as page:
        # innerText has what is visible alone: the notice appears a second after the page.
        await page.until("document.getElementById('notice')?.innerText.includes('python3 -m http.server')", 20)
    return found
