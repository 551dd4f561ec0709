"""Reading data: decoding beside what Pillow alone decodes on the same cores, opening a large cache, and waiting for batches in training."""

import argparse
import copy
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from fastcm.benchmarks.interleaved import Limits, rounded, rounds
from fastcm.benchmarks.models import MODELS
from fastcm.benchmarks.options import add_options, names, sizes
from fastcm.benchmarks.results_file import ResultsFile, Row
from fastcm.benchmarks.training.backends import Job, dataset
from fastcm.data import cache_building, image_cache, sources
from fastcm.data.dataset import Dataset, open_dataset
from fastcm.data.decode_pool import cores
from fastcm.training.trainer_parts import build_trainer

IDENTITY = ("bench", "op", "pictures", "backend", "model", "batch")


class Kind(NamedTuple):
    """Pictures of one kind: how many are decoded (in a quick run a tenth), their size and format, and the resolution they get."""

    count: int
    size: tuple[int, int]
    form: str
    resolution: int


KINDS = {
    "png-32": Kind(50_000, (32, 32), "png", 32),  # CIFAR-10's training set in files
    "jpeg-500x375": Kind(2_000, (500, 375), "jpeg", 64),  # as ImageNet: its mean size
    "png-178x218": Kind(20_000, (178, 218), "png", 64),  # as CelebA
}
# What any loader must do, in as few words as Pillow allows: the share of one process, timed from a signal to the last picture.
PILLOW_ALONE = """
import sys, numpy as np
from PIL import Image
resolution, files = int(sys.argv[1]), sys.stdin.readline().split()
print("ready", flush=True)
sys.stdin.readline()
for file in files:
    image = Image.open(file).convert("RGB")
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = resolution / min(image.size)
    if scale != 1:
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - resolution) // 2, (image.height - resolution) // 2
    np.asarray(image.crop((left, top, left + resolution, top + resolution)))
print("done", flush=True)
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Measures what is asked for, prints a line per row, and writes the rows to --json."""
    parser = argparse.ArgumentParser(prog="python -m fastcm.benchmarks.training.data", description=__doc__)
    add_options(parser, models=MODELS, backends=("pillow", "fastcm"))
    parser.add_argument("--op", metavar="NAMES", help="decode, open, wait (default: all)")
    args = parser.parse_args(argv)
    results = ResultsFile(args.json, identity=IDENTITY)
    operations = {"decode": decode, "open": open_million, "wait": wait}
    with tempfile.TemporaryDirectory() as folder:
        for op in names(args.op, operations, "--op", tuple(operations)):
            for row in operations[op](Path(folder), args):
                results.add(row)
                print(json.dumps(row), flush=True)
    return 0


def write_pictures(root: Path, kind: Kind, count: int) -> None:
    """Smooth shapes under noise, so that files are about as large as photographs of that size."""
    generator = np.random.default_rng(0)
    root.mkdir()
    contents = []
    for _ in range(min(count, 50)):
        coarse = Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize(kind.size, Image.Resampling.BICUBIC)
        noisy = np.clip(np.asarray(coarse) + generator.normal(0, 8, (kind.size[1], kind.size[0], 3)), 0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(noisy).save(file, kind.form, quality=90)
        contents.append(file.getvalue())
    for index in range(count):
        (root / f"{index:06d}.{kind.form}").write_bytes(contents[index % len(contents)])


def decode(folder: Path, args: argparse.Namespace) -> list[Row]:
    """Images per second of both, in turns; fastcm's include starting its processes, hashing, and writing the cache."""
    rows = []
    for name, kind in KINDS.items():
        count = kind.count // (10 if args.quick else 1)
        root = folder / name
        write_pictures(root, kind, count)
        listing = sources.list_folder(root)
        calls = {"pillow": PillowAlone(listing, kind), "fastcm": build_cache(folder, listing, kind)}
        seconds = args.seconds if args.seconds is not None else 10 if args.quick else 60
        times = rounds(calls, Limits(seconds, fewest=3, most=50), settle_s=0.2)
        own = {"pillow": np.array(calls["pillow"].seconds) * 1e3, "fastcm": times["fastcm"]}
        per_second = {backend: count / np.median(values) * 1e3 for backend, values in own.items()}
        for backend, value in per_second.items():
            row = {
                "bench": "data",
                "op": "decode",
                "pictures": name,
                "backend": backend,
                "cores": cores(),
                "count": count,
                "rounds": len(own[backend]),
                "images_per_s": rounded(value),
                "percent_of_pillow": rounded(100 * value / per_second["pillow"]),
            }
            rows.append(row)
    return rows


class PillowAlone:
    """One process per core, each with its share of the files; `seconds` collects the time between the signal and the last answer."""

    def __init__(self, listing: sources.Listing, kind: Kind):
        self.files, self.kind, self.seconds = [span.path for span in listing.spans], kind, []

    def __call__(self, _: int) -> None:
        command = [sys.executable, "-c", PILLOW_ALONE, str(self.kind.resolution)]
        processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(cores())]
        for number, process in enumerate(processes):
            process.stdin.write(" ".join(self.files[number :: len(processes)]) + "\n")
            process.stdin.flush()
        for process in processes:
            process.stdout.readline()
        began = time.perf_counter()
        for process in processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        for process in processes:
            if process.stdout.readline() != "done\n":
                raise RuntimeError(f"Pillow alone ended early in {self.files[0]}")
        self.seconds.append(time.perf_counter() - began)
        for process in processes:
            process.communicate()


def build_cache(folder: Path, listing: sources.Listing, kind: Kind) -> Callable[[int], None]:
    form = cache_building.Form(kind.resolution, channels=3, exact=False)

    def call(number: int) -> None:
        entry = folder / f"cache-{os.urandom(4).hex()}"
        cache_building.build(entry, listing, form, bad_images="fail", progress=False)
        for file in entry.iterdir():
            file.unlink()
        entry.rmdir()

    return call


def open_million(folder: Path, args: argparse.Namespace) -> list[Row]:
    """Milliseconds until the first batch of a million 64x64 pictures whose cache (sparse) was made before, in a folder of 1,000 classes."""
    count, classes, cache, root = (100_000 if args.quick else 1_000_000), 1_000, folder / "million-cache", folder / "million"
    for index in range(classes):
        (root / f"{index:04d}").mkdir(parents=True)
    paths = [root / f"{index % classes:04d}" / f"{index:07d}.png" for index in range(image_cache.WATCHED_FILES)]
    for path in paths:
        path.touch()
    entry = cache / "entry"
    entry.mkdir(parents=True)
    with open(entry / "images.bin", "wb") as file:
        file.truncate(count * 3 * 64 * 64)
    np.save(entry / "labels.npy", np.arange(count) % classes)
    manifest = {
        "version": image_cache.VERSION,
        "shape": [count, 3, 64, 64],
        "labelled": True,
        "classes": [str(index) for index in range(classes)],
        "bad": 0,
        "fingerprint": "0",
    }
    (entry / "manifest.json").write_text(json.dumps(manifest))
    source = sources.find(str(root))
    watched = [*map(str, sorted(root.iterdir())), *map(str, paths)]
    image_cache.remember(cache, source.key(64, None), entry.name, image_cache.stamps(watched))
    call = {"open": lambda _: open_dataset(root, resolution=64, cache_dir=cache, progress=False).batch(0, 64, seed=0)}
    times = rounds(call, Limits(5 if args.seconds is None else args.seconds, fewest=5, most=50))["open"]
    return [{"bench": "data", "op": "open", "pictures": count, "backend": "fastcm", "p50_ms": rounded(np.median(times))}]


def wait(folder: Path, args: argparse.Namespace) -> list[Row]:
    """The share of a training step that the trainer spends waiting for its batch, from a cache on the disk."""
    rows, device = [], torch.device("cpu")
    for name in names(args.model, MODELS, "--model", ("digits",) if args.quick else ("digits", "colour32")):
        model = MODELS[name]
        batch = sizes(args.batch, "--batch", model.train_batches.get("cpu", (4,)))[0]
        images = dataset(model)
        entry = image_cache.build_entry(folder / f"wait-{name}", [images.images], shape=images.images.shape, labels=None, class_names=None)
        mapped = Dataset(entry.images, images.labels, images.class_names, name, entry.fingerprint)
        job, network = Job(model, batch, device, "auto", "auto"), model.network().train()
        trainer = build_trainer(
            job.config(),
            network,
            copy.deepcopy(network).requires_grad_(False),
            mapped,
            device=device,
            precision=job.precision_of("fastcm"),
            compiled=False,
        )
        trainer.train_step()
        source = trainer._batches
        waited, began, steps = source.wait_s, time.perf_counter(), 0
        least_s = args.seconds if args.seconds is not None else 5 if args.quick else 30
        while steps < 3 or time.perf_counter() - began < least_s:
            steps += 1
            trainer.train_step()
        seconds = time.perf_counter() - began
        source.close()
        rows.append(
            {
                "bench": "data",
                "op": "wait",
                "model": name,
                "batch": batch,
                "backend": "fastcm",
                "steps": steps,
                "step_ms": rounded(seconds / steps * 1e3),
                "percent_of_step": rounded(100 * (source.wait_s - waited) / seconds),
            }
        )
    return rows


if __name__ == "__main__":
    sys.exit(main())
