"""`fastcm serve`: the real server on a loopback port; images, batches, limits, bad clients and its end."""

import base64
import http.client
import io
import json
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from http_server import Served, served
from PIL import Image
from test_generator import small_denoiser, small_generator

import fastcm
from fastcm.cli import main
from fastcm.generation import generator as generator_module
from fastcm.weights.model_folder import save_model

CLASSES = ["ant", "bee", "cat"]
OPTIONS = ("--max-seeds", "32", "--max-queue", "40", "--max-body", "20000", "--window-ms", "30")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve") / "model"
    save_model(folder, small_denoiser(3), {"classes": CLASSES})
    return folder


@pytest.fixture(scope="module")
def server(model):
    with served(model, *OPTIONS) as running:
        yield running


@pytest.fixture(scope="module")
def generator(model):
    return fastcm.load(model, device="cpu")


def ask(server: Served, method: str, path: str, body=None, headers=None):
    """(status, body, headers) of one request on a connection of its own."""
    connection = http.client.HTTPConnection(server.host, server.port, timeout=60)
    try:
        connection.request(method, path, body=body if body is None or isinstance(body, bytes) else json.dumps(body), headers=headers or {})
        response = connection.getresponse()
        return response.status, response.read(), dict(response.getheaders())
    finally:
        connection.close()


def drawn(body: bytes) -> np.ndarray:
    """The images of a JSON answer."""
    content = json.loads(body)
    pixels = b"".join(base64.b64decode(image) for image in content["images"])
    return np.frombuffer(pixels, content["dtype"]).reshape(content["shape"])


def figure(server: Served, name: str) -> float:
    text = ask(server, "GET", "/metrics")[1].decode()
    return float(next(line for line in text.splitlines() if line.startswith(name + " ")).split()[1])


def close(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal up to a level: a pixel next to a half may round to either side in another batch."""
    return a.shape == b.shape and np.abs(a.astype(int) - b).max() <= 1 and a.std() > 10


def base64_png(pixels: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def test_an_image_is_the_generators(server, generator):
    status, body, headers = ask(server, "GET", "/image?seed=-7&label=bee")
    assert status == 200 and headers["Content-Type"] == "image/png"
    assert close(np.array(Image.open(io.BytesIO(body)))[None, ..., None], generator([-7], "bee"))
    seeds = [0, -(2**63), 2**63 - 1, 5]
    status, body, _ = ask(server, "POST", "/generate", {"seeds": [str(seed) for seed in seeds], "labels": ["cat", 0]})
    assert status == 200 and close(drawn(body), generator(seeds, ["cat", 0]))
    content = json.loads(body)
    assert content["seeds"] == seeds and content["labels"] == [2, 0, 2, 0] and content["shape"] == [4, 8, 8, 1]
    for options in ({"steps": 2}, {"sigmas": [80.0, 3.0, 0.5]}):
        status, body, _ = ask(server, "POST", "/generate", {"seeds": [1, 2], **options})
        assert status == 200 and close(drawn(body), generator([1, 2], **options))
    status, body, headers = ask(server, "POST", "/generate", {"seeds": [1, 2, 3, 4], "output": "png"})
    assert status == 200 and Image.open(io.BytesIO(body)).size == (134, 134)


def test_inpainting(server, generator):
    picture, mask = generator([9], 1)[0, ..., 0], np.zeros((8, 8), np.uint8)
    mask[:4] = 255
    asked = {"image": base64_png(picture), "mask": base64_png(mask), "seeds": [3], "labels": "ant", "sigmas": [80.0, 5.0]}
    status, body, _ = ask(server, "POST", "/inpaint", asked)
    expected = generator.inpaint(picture, mask, [3], "ant", sigmas=(80.0, 5.0))
    assert status == 200 and close(drawn(body), expected) and np.array_equal(drawn(body)[0, 4:, :, 0], picture[4:])
    asked["image"] = base64_png(np.zeros((9, 8), np.uint8))
    status, body, _ = ask(server, "POST", "/inpaint", asked)
    assert status == 400 and "wrong size in image: 8x9" in json.loads(body)["error"]
    asked["image"] = base64.b64encode(b"no picture").decode()
    assert ask(server, "POST", "/inpaint", asked)[0] == 400


def test_requests_of_one_moment_share_a_batch(server, generator):
    ask(server, "GET", "/health")
    images, batches = figure(server, "fastcm_images_total"), figure(server, "fastcm_batches_total")
    gate = threading.Barrier(12)

    def one(seed: int):
        gate.wait()
        return ask(server, "POST", "/generate", {"seeds": [seed], "steps": 1 + seed % 2})

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(one, range(12)))
    for seed, (status, body, _) in enumerate(answers):
        assert status == 200 and close(drawn(body), generator([seed], steps=1 + seed % 2)), seed
    assert figure(server, "fastcm_images_total") - images == 12
    assert figure(server, "fastcm_batches_total") - batches <= 8  # of two kinds of request, within a window of 30 ms


BAD = {
    "malformed": (b'{"seeds": [0', 400, "not JSON in the body"),
    "not UTF-8": (b"\xff\xfe", 400, "not JSON in the body"),
    "nested": (b"[" * 15000, 400, "nested too deeply"),
    "no object": (b"[1]", 400, "not a JSON object"),
    "unknown field": ({"seed": [0]}, 400, "unknown field in the body: seed. Did you mean 'seeds'?"),
    "no seeds": ({}, 400, "missing field in the body: seeds"),
    "empty seeds": ({"seeds": []}, 400, "wrong number of seeds in seeds: 0"),
    "too many seeds": ({"seeds": list(range(33))}, 400, "wrong number of seeds in seeds: 33"),
    "seed of 65 bits": ({"seeds": [2**64]}, 400, "seed out of range"),
    "seed of no number": ({"seeds": [0.5]}, 400, "not an integer in seeds: 0.5"),
    "seed of a flag": ({"seeds": [True]}, 400, "not an integer in seeds: True"),
    "huge number": (b'{"seeds": [' + b"9" * 5000 + b"]}", 400, "not JSON in the body"),
    "unknown class": ({"seeds": [0], "labels": "cow"}, 400, "unknown class in labels: cow"),
    "class out of range": ({"seeds": [0], "labels": [3]}, 400, "class out of range in labels: 3"),
    "no class": ({"seeds": [0], "labels": {"a": 1}}, 400, "not a class in labels"),
    "too many steps": ({"seeds": [0], "steps": 65}, 400, "illegal value in steps: 65"),
    "levels": ({"seeds": [0], "sigmas": [1.0, 80.0]}, 400, "out of order"),
    "level not a number": (b'{"seeds": [0], "sigmas": [NaN]}', 400, "out of range in sigmas: nan"),
    "both": ({"seeds": [0], "steps": 2, "sigmas": [80.0, 1.0]}, 400, "both steps and sigmas"),
    "output": ({"seeds": [0], "output": "jpeg"}, 400, "unknown value in output: jpeg"),
    "huge": (b" " * 20001, 413, "body too large: over 20000 bytes"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(server, case):
    body, status, words = BAD[case]
    answer = ask(server, "POST", "/generate", body)
    assert answer[0] == status and answer[1].count(b"\n") == 1 and words in json.loads(answer[1])["error"]


def test_bad_paths_and_queries(server):
    for method, path, status in (
        ("GET", "/nothing", 404),
        ("GET", "/generate", 405),
        ("POST", "/image", 405),
        ("GET", "/image?seed=x", 400),
        ("GET", "/image?label=cow", 400),
        ("GET", "/image?seed=1&seed=2", 400),
        ("GET", "/image?sed=1", 400),
        ("GET", "/image?steps=0", 400),
    ):
        answer = ask(server, method, path)
        assert answer[0] == status and json.loads(answer[1])["error"].count("\n") == 0, path
    assert ask(server, "GET", "/health")[:2] == (200, b'{"status": "ok"}\n')
    about = json.loads(ask(server, "GET", "/")[1])
    assert about["model"] == "model" and about["classes"] == CLASSES


def test_a_chunked_body_is_measured_too(server):
    def chunks():
        for _ in range(100):
            yield b" " * 1000

    connection = http.client.HTTPConnection(server.host, server.port, timeout=30)
    try:
        connection.request("POST", "/generate", body=chunks())
        assert connection.getresponse().status == 413
    except (BrokenPipeError, ConnectionResetError):
        pass  # the server closed it before all was sent
    finally:
        connection.close()
    assert ask(server, "GET", "/health")[0] == 200


def test_malformed_http_and_silent_clients(server):
    with socket.create_connection((server.host, server.port), timeout=30) as raw:
        raw.sendall(b"nonsense\r\n\r\n")
        assert b" 400 " in raw.recv(200)
    idle = [socket.create_connection((server.host, server.port), timeout=30) for _ in range(50)]
    for raw in idle:
        raw.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    start = time.perf_counter()
    assert ask(server, "GET", "/image?seed=1")[0] == 200
    assert time.perf_counter() - start < 5  # slow clients hold nobody up
    for raw in idle:
        raw.close()


@pytest.mark.slow
def test_a_full_queue_and_clients_that_leave(model, generator):
    """A slow model: 503 at once when the queue is full; the images of clients that left are not drawn."""
    with served(model, "--max-seeds", "8", "--max-queue", "8", "--max-batch", "1", "--window-ms", "0") as server:
        asked = json.dumps({"seeds": list(range(8)), "steps": 16})
        head = f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: {len(asked)}\r\n\r\n{asked}".encode()
        first = socket.create_connection((server.host, server.port), timeout=30)
        first.sendall(head)
        until(lambda: figure(server, "fastcm_queue_images") > 2)
        status, body, headers = ask(server, "POST", "/generate", {"seeds": list(range(8)), "steps": 16})
        assert status == 503 and "too many images wait" in json.loads(body)["error"] and headers["Retry-After"] == "1"
        first.close()
        until(lambda: figure(server, "fastcm_queue_images") == 0)
        assert figure(server, "fastcm_images_total") < 8
        status, body, _ = ask(server, "POST", "/generate", {"seeds": [5]})
        assert status == 200 and close(drawn(body), generator([5]))


def until(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.01)


@pytest.mark.slow
def test_memory_stays_flat(model):
    """Hundreds of requests of every kind, good, bad and abandoned, which write nothing to the log."""
    with served(model, *OPTIONS) as server:
        before = burdened(server, 50)
        after = burdened(server, 50)
        assert after - before < 15, (before, after)
        assert ask(server, "GET", "/health")[0] == 200
        server.process.terminate()
        assert server.process.communicate(timeout=30)[1] == ""


def test_levels_that_clients_make_up_are_not_kept(monkeypatch):
    monkeypatch.setattr(generator_module, "LEVELS_KEPT", 2)
    generator = small_generator(3)
    first = generator([1], sigmas=(80.0, 1.0))
    for sigma in (2.0, 3.0, 4.0):
        generator([1], sigmas=(80.0, sigma))
    assert len(generator._frozen) == 2 and np.array_equal(generator([1], sigmas=(80.0, 1.0)), first)


def burdened(server: Served, rounds: int) -> float:
    """Resident megabytes after so many rounds of requests."""
    for index in range(rounds):
        for body in ({"seeds": list(range(8))}, {"seeds": [index], "sigmas": [80.0, 1 + index / 1000]}, b"{", b" " * 30000):
            ask(server, "POST", "/generate", body)
        with socket.create_connection((server.host, server.port)) as raw:
            raw.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{")
    return server.resident_mb


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_end_finishes_what_was_accepted(model, generator, number):
    with served(model, "--max-batch", "2") as server:
        idle = http.client.HTTPConnection(server.host, server.port, timeout=30)
        idle.request("GET", "/health")
        idle.getresponse().read()
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(ask, server, "POST", "/generate", {"seeds": list(range(16)), "steps": 12})
            until(lambda: figure(server, "fastcm_images_total") > 0)
            server.process.send_signal(number)
            status, body, _ = answer.result(timeout=60)
        assert status == 200 and close(drawn(body), generator(range(16), steps=12))
        assert server.process.wait(timeout=30) == 128 + number
        assert server.process.stderr.read() == ""
        with pytest.raises(ConnectionRefusedError):
            ask(server, "GET", "/health")
        idle.close()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--port", "70000"], "port out of range in --port: 70000"),
        (["--max-batch", "0"], "illegal value in --max-batch: 0"),
        (["--window-ms", "-1"], "illegal value in --window-ms: -1.0"),
        (["--max-queue", "5"], "a queue shorter than one request in --max-queue: 5"),
    ],
)
def test_options_are_checked(capsys, model, options, words):
    assert main(["serve", str(model), *options]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.slow
def test_a_port_in_use_is_named(capsys, model):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", str(model), "--port", str(port)]) == 2
    assert f"cannot listen in --host, --port: 127.0.0.1:{port}" in capsys.readouterr().err
