"""Files made to harm: pickles with a payload, absurd numbers, bombs, paths that lead outside. Refused in a line, fast, in little memory."""

import io
import json
import os
import pickle
import struct
import zipfile

import numpy as np
import onnx
import pytest
import torch
from exported_models import exported
from forked_commands import called
from fuzz_worker import read_all
from onnx import TensorProto, helper
from random_pictures import png, write_tar
from test_faults_fuzz import FILES, PIXELS

HUGE = 10**12


class Payload:
    """Pickles as a call that leaves a file: the canary."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


def npy(shape, descr="<i8", content=b""):
    """An .npy that claims a shape, whatever follows."""
    header = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape!r}, }}".encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(header)) + header + content


def npz(path, **arrays):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in arrays.items():
            archive.writestr(f"{name}.npy", content)
    return path


def safetensors(header, length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + bytes(1000)


def tensor(shape, start):
    return {"a": {"dtype": "F32", "shape": shape, "data_offsets": [start, start + 4]}}


def model(folder, change=None, weights=None):
    """A good model folder with a changed config or other bytes for weights."""
    path = FILES["config"](folder)
    if change is not None:
        config = json.loads(path.read_text())
        change(config)
        path.write_text(json.dumps(config))
    if weights is not None:
        (folder / "model.safetensors").write_bytes(weights)
    return path


def graph(folder, change):
    whole = onnx.load_from_string(exported("plain").path.read_bytes())
    change(whole, folder)
    (folder / "x.onnx").write_bytes(whole.SerializeToString())
    return folder / "x.onnx"


def external(location):
    def change(whole, folder):
        tensor = whole.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)
        (folder.parent / "secret.bin").write_bytes(bytes(100_000))
        (folder / "link.bin").symlink_to(folder.parent / "secret.bin")

    return change


def set_network(**options):
    return lambda config: config["network"].update(options)


def file_of(name, content):
    def make(folder, canary):
        (folder / name).write_bytes(content(canary) if callable(content) else content)
        return folder / name

    return make


def saved_by_torch(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def with_payload(canary):
    return pickle.dumps(np.array([Payload(canary)], dtype=object), protocol=3)


GOOD = npy((4, 8, 8, 3), "|u1", PIXELS.tobytes())
DEEP = b"[" * 200_000
CASES = {
    # Pickles with a payload.
    "pt payload": ("pt", file_of("x.pt", lambda canary: saved_by_torch({"a": Payload(canary)}))),
    "pt raw payload": ("pt", file_of("x.pt", lambda canary: pickle.dumps(Payload(canary)))),
    "pkl payload": ("pkl", file_of("x.pkl", lambda canary: pickle.dumps({"ema": Payload(canary)}))),
    "npz of objects": ("data", lambda folder, canary: npz(folder / "x.npz", arr_0=npy((1,), "|O", with_payload(canary)))),
    "npz labels of objects": (
        "data",
        lambda folder, canary: npz(folder / "x.npz", arr_0=GOOD, arr_1=npy((4,), "|O", with_payload(canary))),
    ),
    "statistics of objects": ("statistics", lambda folder, canary: npz(folder / "x.npz", mu=npy((1,), "|O", with_payload(canary)))),
    # Numbers without sense.
    "npz of too many pictures": ("data", lambda folder, _: npz(folder / "x.npz", arr_0=npy((HUGE, 8, 8, 3), "|u1"))),
    "npz of too large pictures": ("data", lambda folder, _: npz(folder / "x.npz", arr_0=npy((1, HUGE, HUGE, 3), "|u1"))),
    "npz of negative pictures": ("data", lambda folder, _: npz(folder / "x.npz", arr_0=npy((-1, 8, 8, 3), "|u1"))),
    "npz of too many labels": ("data", lambda folder, _: npz(folder / "x.npz", arr_0=GOOD, arr_1=npy((HUGE,)))),
    "npz of code in a header": ("data", lambda folder, _: npz(folder / "x.npz", arr_0=npy((1,)).replace(b"(1,)", b"exit", 1))),
    "statistics of too many features": ("statistics", lambda folder, _: npz(folder / "x.npz", mu=npy((HUGE,), "<f8"), sigma=npy((1,)))),
    "safetensors with a header of 8 EB": ("model", lambda folder, _: model(folder, weights=safetensors({}, length=2**63))),
    "safetensors with a header of 200 MB": ("model", lambda folder, _: model(folder, weights=safetensors({}, length=2 * 10**8))),
    "safetensors of an absurd shape": ("model", lambda folder, _: model(folder, weights=safetensors(tensor([2**62, 8], 0)))),
    "safetensors of tensors outside": ("model", lambda folder, _: model(folder, weights=safetensors(tensor([1], 10**9)))),
    "safetensors with a deep header": ("model", lambda folder, _: model(folder, weights=safetensors(DEEP))),
    "network of too many blocks": ("model", lambda folder, _: model(folder, set_network(blocks=10**9))),
    "network of too many levels": ("model", lambda folder, _: model(folder, set_network(channel_mult=[1] * 10**6))),
    "network of too many channels": ("model", lambda folder, _: model(folder, set_network(channels=2**40, head_channels=2**40))),
    "network of too many classes": ("model", lambda folder, _: model(folder, set_network(num_classes=2**60))),
    "network of text": ("model", lambda folder, _: model(folder, set_network(channels="8"))),
    "network of a list": ("model", lambda folder, _: model(folder, lambda config: config.update(network=[1, 2]))),
    "noise of text": ("model", lambda folder, _: model(folder, lambda config: config["preconditioning"].update(sigma_max="80"))),
    "deep config": ("model", lambda folder, _: (model(folder), (folder / "config.json").write_bytes(DEEP), folder / "config.json")[-1]),
    "config with a number of a million digits": (
        "model",
        lambda folder, _: (model(folder), (folder / "config.json").write_bytes(b"9" * 10**6), folder / "config.json")[-1],
    ),
    "deep settings": ("settings", file_of("x.json", DEEP)),
    "deep settings in TOML": ("settings", file_of("x.toml", b"a = " + DEEP)),
    # Bombs.
    "picture bomb": ("picture", file_of("x.png", lambda _: bomb())),
    # Paths that lead outside.
    "onnx data above": ("onnx", lambda folder, _: graph(folder, external("../secret.bin"))),
    "onnx data by a link": ("onnx", lambda folder, _: graph(folder, external("link.bin"))),
    "onnx data by an absolute path": ("onnx", lambda folder, _: graph(folder, external(str(folder.parent / "secret.bin")))),
    "onnx with an unknown operator": (
        "onnx",
        lambda folder, _: graph(folder, lambda whole, _: whole.graph.node.append(helper.make_node("Shell", [], ["z"], domain="evil"))),
    ),
    "tar with a path above": ("data", lambda folder, _: write_tar(folder / "x.tar", {"../../above.png": png(PIXELS[0])})),
}
READ = ("tar with a path above",)  # nothing is unpacked: the name is a name


def bomb():
    """A PNG of 30,000 x 30,000 pixels in a hundred kilobytes."""
    from test_image_decoding import bomb_png

    return bomb_png()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """{case: (message or None, seconds)}, all read by one process with little memory; its canaries; its folder."""
    root = tmp_path_factory.mktemp("hostile")
    files = {}
    for number, (name, (kind, make)) in enumerate(CASES.items()):
        folder = root / str(number)
        folder.mkdir()
        files[name] = kind, str(make(folder, root / f"canary-{number}"))
    good = []
    for kind in ("config", "npz", "onnx", "png"):
        (root / f"good-{kind}").mkdir()
        good.append((kind, str(FILES[kind](root / f"good-{kind}"))))
    before = {path for path in root.rglob("*") if "cache" not in path.parts}
    code, text = called(read_all, (good, list(files.values())), root / "text", seconds=500)
    assert code == 0, text[-3000:]
    said = [json.loads(line) for line in text.splitlines() if line.startswith("[")]
    new = {path for path in root.rglob("*") if "cache" not in path.parts} - before - {root / "text"}
    return dict(zip(files, said, strict=True)), new, root


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_refused_in_a_line_and_in_time(outcomes, case):
    message, seconds = outcomes[0][case]
    if case in READ:
        assert message is None
    else:
        assert message is not None, "read as if nothing were wrong"
        assert "UNEXPECTED" not in message and "\n" not in message and len(message) < 1000, message
    assert seconds < 20


@pytest.mark.slow
def test_nothing_was_run_and_nothing_was_written(outcomes):
    _, new, root = outcomes
    assert new == set() and not list(root.glob("canary-*"))
    payload = pickle.dumps(Payload(root / "canary-live"))
    pickle.loads(payload)
    assert (root / "canary-live").exists(), "the payload does nothing: the test proves nothing"
