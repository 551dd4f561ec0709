"""The server's answers, whatever HTTP library carries them: each path, its limits, and errors as one line of JSON."""

import asyncio
import base64
import functools
import io
import json
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

import fastcm.serving.requests as asked
from fastcm.errors import InputError, RunError
from fastcm.generation import pictures
from fastcm.serving.batching import Batcher, BusyError
from fastcm.serving.metrics import CONTENT_TYPE, Metrics

log = logging.getLogger("fastcm")
JSON = "application/json"
# Inpaintings that may wait for the drawing thread: each takes tens of network calls.
MOST_EDITS = 4


class Limits(NamedTuple):
    """body_bytes and seeds of one request; images that wait; images of a batch, and how long the first of them waits for others."""

    body_bytes: int
    seeds: int
    queue_images: int
    max_batch: int
    window_s: float


class Answer(NamedTuple):
    status: int
    body: bytes
    kind: str = JSON
    headers: dict[str, str] = {}


class Request(NamedTuple):
    method: str
    path: str
    query: Iterable[tuple[str, str]]
    read: Callable[[], Awaitable[bytes]]  # the body; may raise TooLargeError or TimeoutError


class TooLargeError(Exception):
    """A body over Limits.body_bytes."""


def failure(status: int, message: str, **headers: str) -> Answer:
    return Answer(status, _json({"error": message}), headers=headers)


class Endpoints:
    """`await answer(request)`, which never raises for what a client did. draining: set when the server is about to stop."""

    def __init__(self, generator, name: str, limits: Limits, *, clients: Callable[[], int]):
        self.generator, self.name, self.limits, self.clients = generator, name, limits, clients
        self.metrics = Metrics()
        self.draining = False
        self.edits = 0
        self.batcher = Batcher(
            self._draw,
            max_batch=limits.max_batch,
            window_s=limits.window_s,
            queue_images=limits.queue_images,
            clients=clients,
            drawn=self.metrics.drawn,
        )
        self.paths = {
            "/": ("GET", self.about),
            "/health": ("GET", self.health),
            "/metrics": ("GET", self.counts),
            "/image": ("GET", self.image),
            "/generate": ("POST", self.generate),
            "/inpaint": ("POST", self.inpaint),
        }

    def _draw(self, seeds: np.ndarray, labels: np.ndarray | None, how) -> np.ndarray:
        return self.generator(seeds, labels, **dict([how]))

    async def answer(self, request: Request) -> Answer:
        """The answer to one request, counted."""
        start = time.perf_counter()
        result = await self._answer(request)
        self.metrics.answered(request.path if request.path in self.paths else "other", result.status, time.perf_counter() - start)
        return result

    async def _answer(self, request: Request) -> Answer:
        method, endpoint = self.paths.get(request.path, (None, None))
        if endpoint is None:
            return failure(404, f"no such path: {request.path[:60]}. Use one of {', '.join(self.paths)}.")
        if request.method != method and not (request.method, method) == ("HEAD", "GET"):
            return failure(405, f"wrong method for {request.path}: {request.method[:20]}. Use {method}.", Allow=method)
        if self.draining and request.path not in ("/health", "/metrics"):
            return failure(503, "the server is about to stop. Ask another one.", Connection="close")
        try:
            return await endpoint(request)
        except InputError as error:
            return failure(400, str(error))
        except TooLargeError:
            return failure(413, f"body too large: over {self.limits.body_bytes} bytes. Send less in one request.", Connection="close")
        except TimeoutError:
            return failure(408, "the body did not arrive in time. Send it faster.", Connection="close")
        except BusyError:
            return failure(503, "too many images wait already. Try again in a second.", **{"Retry-After": "1"})
        except RunError as error:
            log.error("%s", error)
            return failure(500, str(error))
        except (ConnectionError, asyncio.CancelledError):
            raise
        except Exception:
            log.exception("a request failed")
            return failure(500, "the server failed. Its log says why.")

    async def about(self, request: Request) -> Answer:
        g = self.generator
        facts = {"model": self.name, "resolution": g.resolution, "channels": g.channels, "classes": g.classes, "runs on": g.provider}
        return Answer(200, _json({**facts, "limits": self.limits._asdict(), "paths": list(self.paths)}))

    async def health(self, request: Request) -> Answer:
        return Answer(503 if self.draining else 200, _json({"status": "stopping" if self.draining else "ok"}))

    async def counts(self, request: Request) -> Answer:
        text = self.metrics.text(waiting=self.batcher.waiting, clients=self.clients())
        return Answer(200, text.encode(), CONTENT_TYPE)

    async def image(self, request: Request) -> Answer:
        return await self._generated(asked.query_object(request.query))

    async def generate(self, request: Request) -> Answer:
        return await self._generated(asked.json_object(await request.read(), asked.GENERATE_FIELDS))

    async def _generated(self, fields: dict[str, Any]) -> Answer:
        wanted = asked.asked_of(fields, self.generator, most_seeds=self.limits.seeds)
        images = await self.batcher.images(wanted.seeds, wanted.labels, wanted.how)
        return await self._sent(images, wanted)

    async def inpaint(self, request: Request) -> Answer:
        fields = asked.json_object(await request.read(), asked.INPAINT_FIELDS)
        if not hasattr(self.generator, "inpaint"):
            raise InputError("a model that cannot edit in /inpaint. Serve a model folder.")
        wanted = asked.asked_of(fields, self.generator, most_seeds=self.limits.seeds, edit=True)
        picture = asked.decoded_picture(fields, "image", self.generator, grey=False)
        mask = asked.decoded_picture(fields, "mask", self.generator, grey=True)
        if self.edits >= MOST_EDITS:
            raise BusyError
        self.edits += 1
        try:
            levels = dict([wanted.how])
            edit = functools.partial(self.generator.inpaint, picture, mask, wanted.seeds, wanted.labels, **levels)
            return await self._sent(await self.batcher.alone(edit), wanted)
        finally:
            self.edits -= 1

    async def _sent(self, images: np.ndarray, wanted: asked.Asked) -> Answer:
        if wanted.output == "png":
            return Answer(200, await asyncio.to_thread(png, images), "image/png")
        return Answer(
            200,
            _json(
                {
                    "shape": list(images.shape),
                    "dtype": "uint8",
                    "seeds": wanted.seeds.tolist(),
                    "labels": None if wanted.labels is None else wanted.labels.tolist(),
                    "images": [base64.b64encode(image.tobytes()).decode() for image in images],
                }
            ),
        )


def png(images: np.ndarray) -> bytes:
    """A PNG of one image uint8 [1, H, W, C] as it is, or of several as a grid."""
    picture = pictures.to_pil(images[0]) if len(images) == 1 else pictures.grid(images)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, ensure_ascii=False).encode() + b"\n"
