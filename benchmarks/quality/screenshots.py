"""The pictures of pages that draw: docs/web.png and docs/evaluation-report.png, of the shipped model in headless Chromium.

`python -m fastcm.benchmarks.quality.screenshots [--only web|report]`, from the folder that holds docs/. Needs Chromium and, for the web
page, npm's onnxruntime-web in node_modules here or above, or where FASTCM_WEB_RUNTIME says.
"""

import argparse
import asyncio
import os
import sys
from pathlib import Path

from fastcm.benchmarks import browser
from fastcm.benchmarks.quality.gallery import DATA, MODEL, OUT, call

DOCS = Path("docs")
SITE, REPORT = Path(OUT) / "web", Path(OUT) / "report"
EVALUATE = f"fastcm evaluate {MODEL} --data {DATA.partition(':')[0]} --steps 1,2,3 --metrics fid,fd,accuracy,neighbours --report {REPORT}"
ENTERED = {"class": "3", "seed": "5", "seed-a": "11", "seed-b": "42", "way": "400", "brush": "12"}
PAINTED = [(column, row) for row in (0.15, 0.3, 0.45) for column in (0.2, 0.35, 0.5, 0.65, 0.8)]  # shares of the picture's sides
WIDTH, WEB_HEIGHT, REPORT_HEIGHT = 1120, 660, 1580


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastcm.benchmarks.quality.screenshots", description=__doc__)
    parser.add_argument("--only", choices=("web", "report"), help="one of the two")
    args = parser.parse_args(argv)
    if browser.executable() is None:
        raise SystemExit(f"screenshots: no browser in PATH: {', '.join(browser.NAMES)}. Install Chromium.")
    if args.only != "report":
        runtime = os.environ.get("FASTCM_WEB_RUNTIME")
        call(f"fastcm export {MODEL} --web {SITE}" + (f" --runtime {runtime}" if runtime else ""))
        asyncio.run(web(DOCS / "web.png"))
    if args.only != "web":
        call(EVALUATE)
        asyncio.run(report(DOCS / "evaluation-report.png"))
    return 0


async def web(out: Path) -> None:
    """The page of --web with an image, one between two seeds, and a part painted over."""
    with browser.static_server(SITE) as address:
        async with browser.opened(address) as page:
            await sized(page, WEB_HEIGHT)
            await page.until("window.fastcm && window.fastcm.ready")
            for control, value in ENTERED.items():
                event = "change" if control == "class" else "input"
                change = f"e.value = '{value}'; e.dispatchEvent(new Event('{event}'))"
                await page.evaluate(f"{{ const e = document.getElementById('{control}'); {change}; }}")
                await page.evaluate("new Promise((done) => setTimeout(done, 50)).then(() => fastcm.model.last)")
            box = await page.evaluate("JSON.parse(JSON.stringify(document.getElementById('edit').getBoundingClientRect()))")
            for column, row in PAINTED:
                place = {"x": box["x"] + column * box["width"], "y": box["y"] + row * box["height"]}
                for kind in ("mousePressed", "mouseReleased"):
                    await page.send("Input.dispatchMouseEvent", type=kind, button="left", buttons=1, clickCount=1, **place)
            await page.evaluate("new Promise((done) => setTimeout(done, 300))")
            await page.screenshot(out)


async def report(out: Path) -> None:
    """The top of a report page."""
    async with browser.opened((REPORT / "index.html").resolve().as_uri()) as page:
        await sized(page, REPORT_HEIGHT)
        await page.until("document.readyState === 'complete'")
        await page.screenshot(out)


async def sized(page: browser.Page, height: int) -> None:
    await page.send("Emulation.setDeviceMetricsOverride", width=WIDTH, height=height, deviceScaleFactor=1, mobile=False)


if __name__ == "__main__":
    sys.exit(main())
