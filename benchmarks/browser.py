"""Headless Chromium by its DevTools protocol, and a plain static server for what it opens."""

import asyncio
import base64
import contextlib
import functools
import http.server
import json
import re
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless=new",
    "--remote-debugging-port=0",
    "--no-sandbox",
    "--no-first-run",
    "--disable-extensions",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1120,800",
    "--hide-scrollbars",
)

# A graphics processor in software, for machines that have none.
WEBGPU = ("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan")


def executable() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@contextlib.contextmanager
def static_server(folder: Path):
    """Yields the address of Python's own static server of a folder."""
    handler = functools.partial(QuietHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()


class Page:
    """One tab. errors: what its console and its exceptions said; requests: every address that it asked for."""

    def __init__(self, socket):
        self.socket, self.errors, self.requests = socket, [], []
        self.answers: dict[int, asyncio.Future] = {}
        self.reader = asyncio.create_task(self._read())

    async def _read(self):
        async for message in self.socket:
            content = json.loads(message.data)
            if "id" in content:
                self.answers.pop(content["id"]).set_result(content)
                continue
            event, values = content["method"], content["params"]
            if event == "Network.requestWillBeSent":
                self.requests.append(values["request"]["url"])
            elif event == "Runtime.exceptionThrown":
                self.errors.append(json.dumps(values["exceptionDetails"])[:500])
            elif event == "Log.entryAdded" and values["entry"]["level"] == "error":
                self.errors.append(f"{values['entry']['text']} {values['entry'].get('url')}")
            elif event == "Runtime.consoleAPICalled" and values["type"] in ("error", "assert"):
                self.errors.append(json.dumps(values["args"])[:500])

    async def send(self, method: str, **values):
        number = len(self.requests) + id(values) % 1000000
        while number in self.answers:
            number += 1
        answer = self.answers[number] = asyncio.get_running_loop().create_future()
        await self.socket.send_json({"id": number, "method": method, "params": values})
        content = await asyncio.wait_for(answer, 60)
        assert "error" not in content, content
        return content["result"]

    async def evaluate(self, expression: str):
        """The value of an expression, awaited where it is a promise."""
        result = await self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    async def until(self, expression: str, seconds: float = 60):
        """Waits until an expression is true; a page that is about to reload answers nothing."""
        end = asyncio.get_running_loop().time() + seconds
        while True:
            with contextlib.suppress(AssertionError):
                if await self.evaluate(expression):
                    return
            assert asyncio.get_running_loop().time() < end, (expression, self.errors)
            await asyncio.sleep(0.1)

    async def screenshot(self, path: Path):
        result = await self.send("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(result["data"]))


@contextlib.asynccontextmanager
async def opened(address: str, *flags: str):
    """Yields a page of a fresh browser at an address."""
    import aiohttp

    profile = tempfile.mkdtemp(prefix="fastcm-browser-")
    command = [executable(), *FLAGS, *flags, f"--user-data-dir={profile}", "about:blank"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    try:
        port = next(match[1] for line in process.stderr if (match := re.search(r"DevTools listening on ws://[^:]+:(\d+)/", line)))
        threading.Thread(target=process.stderr.read, daemon=True).start()
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                target = next(tab for tab in await answer.json(content_type=None) if tab["type"] == "page")
            async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                page = Page(socket)
                for domain in ("Runtime", "Log", "Network", "Page"):
                    await page.send(f"{domain}.enable")
                await page.send("Page.navigate", url=address)
                yield page
                page.reader.cancel()
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(profile, ignore_errors=True)
