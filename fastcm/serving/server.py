"""HTTP by aiohttp around the endpoints: connections, time limits, and an end that finishes what was accepted."""

import asyncio
import contextlib
import logging
import signal
from collections.abc import Callable

from fastcm.errors import InputError
from fastcm.serving.endpoints import Endpoints, Limits, Request, TooLargeError, failure

# Seconds that a client has for a request's head, and between two requests; for its body; and that accepted ones have when the server ends.
IDLE_S, BODY_S, GRACE_S = 75.0, 10.0, 30.0
MOST_CONNECTIONS = 1024


def serve(generator, *, name: str, host: str, port: int, limits: Limits, ready: Callable[[str], object]) -> int:
    """Serves until SIGINT or SIGTERM, finishes what was accepted, and returns the signal's number. port 0: any free one.

    ready: called with the server's address once it listens. Raises InputError where it cannot listen there.
    """
    return asyncio.run(_serve(generator, name, host, port, limits, ready))


async def _serve(generator, name: str, host: str, port: int, limits: Limits, ready: Callable[[str], object]) -> int:
    from aiohttp import web

    app = web.Application(client_max_size=limits.body_bytes)
    # A client that leaves cancels its handler, which takes its images out of the queue.
    runner = web.AppRunner(
        app,
        handle_signals=False,
        access_log=None,
        handler_cancellation=True,
        keepalive_timeout=IDLE_S,
        lingering_time=1.0,
        shutdown_timeout=GRACE_S,
        tcp_keepalive=True,
        logger=_silent(),
    )
    endpoints = Endpoints(generator, name, limits, clients=lambda: len(runner.server.connections))
    app.router.add_route("*", "/{path:.*}", _handler(endpoints))
    await runner.setup()
    site = web.TCPSite(runner, host, port)
    try:
        await site.start()
    except OSError as error:
        await runner.cleanup()
        reason = (error.strerror or str(error)).rpartition("] ")[2]
        raise InputError(f"cannot listen in --host, --port: {host}:{port} ({reason}). Choose another port.") from None
    batches = asyncio.create_task(endpoints.batcher.run())
    stopped = _signals()
    address = runner.addresses[0]
    ready(f"http://{'[' + address[0] + ']' if ':' in address[0] else address[0]}:{address[1]}")
    try:
        done, _ = await asyncio.wait([batches, stopped], return_when=asyncio.FIRST_COMPLETED)
        if batches in done:
            batches.result()  # raises what ended it
        return stopped.result()
    finally:
        endpoints.draining = True
        await runner.cleanup()  # stops listening, closes idle connections, waits for the requests in hand
        batches.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await batches


def _silent() -> logging.Logger:
    """For what aiohttp has to say: our endpoints answer and log every fault but a client's, which must not fill the log."""
    logger = logging.getLogger("fastcm.http")
    logger.setLevel(logging.CRITICAL + 1)
    return logger


def _signals() -> asyncio.Future:
    """The number of the first SIGINT or SIGTERM; the second ends the process at once."""
    loop = asyncio.get_running_loop()
    stopped = loop.create_future()

    def stop(number: int) -> None:
        loop.remove_signal_handler(number)
        signal.signal(number, signal.SIG_DFL)
        if not stopped.done():
            stopped.set_result(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop, number)
    return stopped


def _handler(endpoints: Endpoints):
    """aiohttp's requests to ours, and our answers to its responses."""
    from aiohttp import web

    async def handle(request: web.Request) -> web.Response:
        async def read() -> bytes:
            if (request.content_length or 0) > endpoints.limits.body_bytes:
                raise TooLargeError
            try:
                return await asyncio.wait_for(request.read(), BODY_S)
            except web.HTTPRequestEntityTooLarge:
                raise TooLargeError from None

        if endpoints.clients() > MOST_CONNECTIONS:
            answer = failure(503, "too many connections. Try again in a second.", Connection="close")
        else:
            try:
                answer = await endpoints.answer(Request(request.method, request.path, request.query.items(), read))
            except ConnectionError:
                answer = failure(400, "the client left.", Connection="close")
        response = web.Response(status=answer.status, body=answer.body, headers={"Content-Type": answer.kind, **answer.headers})
        if answer.headers.get("Connection") == "close":
            response.force_close()
        return response

    return handle
