"""The pictures of docs/generation.md: runs the page's commands on the shipped model and keeps what they draw.

`python -m fastcm.benchmarks.quality.gallery`, from the folder that holds docs/. The commands, with what they drew, go between the page's
marks; the page shows nothing that was not run.
"""

import argparse
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastcm.data.dataset import open_dataset
from fastcm.generation import pictures

PAGE, FOLDER = Path("docs/generation.md"), Path("docs/generation")
MODEL, DATA = "mnist", "mnist:held-out"
OUT, MARK = "runs/gallery", "pictures"
PICTURE, BOX, FACTOR, PATCH, SIGMA = 7, "0,14,28,28", 4, 4, 1.0


@dataclass(frozen=True)
class Shown:
    """A command of the page and what it draws. drawn: the file that is kept, as docs/generation/NAME."""

    title: str
    text: str
    command: str
    drawn: str
    name: str

    def markdown(self) -> str:
        return f"**{self.title}.** {self.text}\n\n```\n{self.command}\n```\n\n![{self.title}](generation/{self.name})\n"


def samples() -> list[Shown]:
    how = [
        ("One step", "one-step", "", "One network call per image."),
        ("Two steps", "two-step", " --steps 2", "The same seeds, a second call at the middle of the grid."),
        ("Published timesteps", "timesteps", " --timesteps 0,22,39 --grid 40", "Levels by the indices that papers give: 80 and 1.38."),
    ]
    return [
        Shown(
            title,
            text,
            f"fastcm sample {MODEL}{option} --report --seeds 0-5 --out {FOLDER}/{stem}.png",
            f"{FOLDER}/{stem}.png",
            f"{stem}.png",
        )
        for title, stem, option, text in how
    ]


def edits(label: int) -> list[Shown]:
    """label: the class of the picture that is edited."""
    image, labels = f"--image {FOLDER}/picture.png", f"--labels {label}"
    seeds = f"--seeds 0-4 {labels}"
    asked = [
        ("Inpainting", "inpaint", f"{image} --box {BOX} {seeds}", "Known pixels come back as they were, to the bit."),
        ("Super-resolution", "superres", f"{image} --factor {FACTOR} {seeds}", "Every patch keeps its mean."),
        ("Stroke-guided", "stroke", f"--image {FOLDER}/painting.png {seeds}", "From a rough painting."),
        (
            "Denoising",
            "denoise",
            f"--image {FOLDER}/noisy.npy --sigma {SIGMA:g} {labels}",
            f"One call on the picture with noise of deviation {SIGMA:g}; an array, because a picture file would clip the noise.",
        ),
    ]
    shown = [
        Shown(title, text, f"fastcm edit {task} {MODEL} {options} --out {OUT}/{task}.png", f"{OUT}/{task}-compare.png", f"{task}.png")
        for title, task, options, text in asked
    ]
    way = f"fastcm edit interpolate {MODEL} --seeds 0,1 {labels} --out {OUT}/interpolate.png"
    strip = "Sixteen steps along the great circle between two seeds' noise, one call each."
    animation = "The same as the animation that the command leaves beside the strip."
    return [
        *shown,
        Shown("Interpolation", strip, way, f"{OUT}/interpolate-compare.png", "interpolate.png"),
        Shown("Animation", animation, way, f"{OUT}/interpolate.gif", "interpolate.gif"),
    ]


def all_shown() -> list[Shown]:
    """Everything between the page's marks, in its order."""
    return [*samples(), *edits(int(open_dataset(DATA).labels[PICTURE]))]


def inputs() -> dict[str, np.ndarray]:
    """The pictures that are edited, uint8 [H, W, C], by name: one that no training has seen, and a rough painting of it."""
    image = open_dataset(DATA).images[PICTURE].transpose(1, 2, 0)
    return {"picture": image, "painting": painting(image, PATCH)}


def noisy() -> np.ndarray:
    """The picture with noise of deviation SIGMA, float32 [H, W, C] in units of [-1, 1]."""
    image = inputs()["picture"]
    noise = np.random.default_rng(0).standard_normal(image.shape)
    return (image / 127.5 - 1 + SIGMA * noise).astype(np.float32)


def painting(image: np.ndarray, patch: int) -> np.ndarray:
    """The image in squares of patch x patch pixels and few colours, as somebody would dab it."""
    height, width, channels = image.shape
    means = image.reshape(height // patch, patch, width // patch, patch, channels).mean(axis=(1, 3))
    few = (np.round(means / 127.5) * 127.5).clip(0, 255).astype(np.uint8)
    return few.repeat(patch, axis=0).repeat(patch, axis=1)


def main(argv: list[str] | None = None) -> int:
    argparse.ArgumentParser(prog="python -m fastcm.benchmarks.quality.gallery", description=__doc__).parse_args(argv)
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, image in inputs().items():
        pictures.save_png(FOLDER / f"{name}.png", pictures.to_pil(image))
    np.save(FOLDER / "noisy.npy", noisy())
    shown = all_shown()
    for command in dict.fromkeys(item.command for item in shown):
        call(command)
    for item in shown:
        kept = FOLDER / item.name
        if kept != Path(item.drawn):
            shutil.copyfile(item.drawn, kept)
    put_block(PAGE, MARK, "\n".join(item.markdown() for item in shown))
    return 0


def call(command: str) -> None:
    subprocess.run([sys.executable, "-m", *shlex.split(command)], check=True)


def put_block(page: Path, name: str, block: str) -> None:
    """Replaces what stands between the page's two marks of a model."""
    mark, text = f"<!-- {name} -->", page.read_text(encoding="utf-8")
    new, count = re.subn(f"{mark}.*?{mark}", lambda _: f"{mark}\n{block}{mark}", text, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"gallery: {page} needs the mark {mark} twice.")
    page.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
