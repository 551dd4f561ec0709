"""Mutants of files that fastcm accepts, read one after the other in a process that may fall: what came of them, in one JSON line.

Memory beyond what the process has and a limit is refused by the kernel; a mutant that takes too long ends the process.
"""

import faulthandler
import json
import os
import random
import resource
import sys
import time
from pathlib import Path

from fastcm.errors import InputError, RunError

ROOM = 3 << 30  # bytes of address space beside what a reader's libraries take
SECONDS = 30  # for one mutant, on a busy machine


def mutate(content: bytes, rng: random.Random) -> bytes:
    """One to four changes: bytes, runs of bytes, numbers blown up, parts cut out, repeated or moved."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at, kind = rng.randrange(max(1, len(data))), rng.randrange(8)
        # Half of the changes go to the first 512 bytes, where headers are.
        at = at % 512 if rng.random() < 0.5 else at
        size = rng.choice((1, 2, 4, 8, 64))
        if kind == 0:
            data[at : at + 1] = bytes([data[at] ^ 1 << rng.randrange(8)]) if at < len(data) else b"\0"
        elif kind == 1:
            data[at : at + size] = rng.randbytes(size)
        elif kind == 2:
            data[at : at + size] = rng.choice((b"\xff", b"\0", b"\x7f")) * size
        elif kind == 3:
            del data[at : at + size]
        elif kind == 4:
            data = data[: rng.randrange(len(data) + 1)]
        elif kind == 5:
            data[at:at] = data[at : at + 16 * size]
        elif kind == 6:
            other = rng.randrange(max(1, len(data)))
            data[at : at + size], data[other : other + size] = data[other : other + size], data[at : at + size]
        else:
            data[at:at] = rng.choice((b"999999999999", b"-1", b"1e308", b"../../", b"null", b"[[[[", b'"', b"\xff\xff\xff\x7f"))
        if not data:
            data = bytearray(b"\0")
    return bytes(data)


def read_onnx(path: Path) -> None:
    from fastcm.generation.onnx_generator import OnnxGenerator

    OnnxGenerator(path, provider="cpu")([0])


def read_model(path: Path) -> None:
    """A model folder, of whose two files the mutant is one."""
    from fastcm.weights.model_folder import load_model

    denoiser, _ = load_model(path.parent)
    sum(float(tensor.sum()) for tensor in denoiser.network.state_dict().values())


def read_data(path: Path) -> None:
    from fastcm.data.dataset import open_dataset

    data = open_dataset(path, resolution=8, cache_dir=path.parent / "cache", progress=False)
    data.batch(0, 4, seed=0)


def read_picture(path: Path) -> None:
    from fastcm.data.decoding import BadImageError, decode

    try:
        decode(path, resolution=8, channels=3)
    except BadImageError as error:
        raise InputError(str(error)) from error


def read_pt(path: Path) -> None:
    from fastcm.weights.openai import read_openai

    read_openai(path, image_size=8, head_channels=32)


def read_pickle(path: Path) -> None:
    from fastcm.weights.edm import read_edm

    read_edm(path)


def read_checkpoint_folder(path: Path) -> None:
    from fastcm.training.checkpoint import read_checkpoint

    read_checkpoint(path.parent)


def read_settings(path: Path) -> None:
    from fastcm import runs

    runs.plan(out=path.parent / "run", config_file=path, complete=False)


def read_statistics(path: Path) -> None:
    from fastcm.evaluation.reference import read_reference

    read_reference(path)


READERS = {
    "onnx": read_onnx,
    "safetensors": read_model,
    "config": read_model,
    "npz": read_data,
    "tar": read_data,
    "zip": read_data,
    "png": read_picture,
    "jpg": read_picture,
    "pt": read_pt,
    "pkl": read_pickle,
    "manifest": read_checkpoint_folder,
    "settings": read_settings,
    "statistics": read_statistics,
    "picture": read_picture,
    "data": read_data,
    "model": read_model,
}


def limit_memory() -> None:
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + ROOM, size + ROOM))


def read_all(good: list[tuple[str, str]], hostile: list[tuple[str, str]]) -> None:
    """Reads the good (kind, file)s, then the hostile ones with little memory. Prints [message or None, seconds] for each."""
    for kind, path in good:
        READERS[kind](Path(path))
    limit_memory()
    for kind, path in hostile:
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        began, said = time.monotonic(), None
        try:
            READERS[kind](Path(path))
        except (InputError, RunError) as error:
            said = str(error)
        except BaseException as error:
            said = f"UNEXPECTED {type(error).__name__}: {error}"[:300]
        print(json.dumps([said, round(time.monotonic() - began, 2)]), flush=True)
    faulthandler.cancel_dump_traceback_later()


def fuzz(kind: str, path: str, count: int, seed: int) -> None:
    """Reads `count` mutants of the file, each under its own name and in its own folder. Prints the outcome."""
    path = Path(path)
    content, rng, outcome = path.read_bytes(), random.Random(seed), {"refused": 0, "read": 0, "faults": []}
    READERS[kind](path)  # what is mutated is good, and what reading takes is loaded
    limit_memory()
    slowest, before = 0.0, sorted(path.parent.rglob("*"))
    for number in range(count):
        path.write_bytes(mutate(content, rng))
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        began = time.monotonic()
        try:
            READERS[kind](path)
            outcome["read"] += 1
        except (InputError, RunError) as error:
            outcome["refused"] += 1
            if "\n" in str(error):
                outcome["faults"].append(f"mutant {number}: more than one line: {error}")
        except BaseException as error:
            outcome["faults"].append(f"mutant {number}: {type(error).__name__}: {error}"[:300])
        slowest = max(slowest, time.monotonic() - began)
        faulthandler.cancel_dump_traceback_later()
    path.write_bytes(content)
    new = {str(file) for file in path.parent.rglob("*")} - {str(file) for file in before}
    outcome |= {
        "slowest_s": round(slowest, 2),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
        "new": sorted(file for file in new if not file.startswith(str(path.parent / "cache"))),
    }
    os.write(1, (json.dumps(outcome) + "\n").encode())
    sys.stdout.flush()
