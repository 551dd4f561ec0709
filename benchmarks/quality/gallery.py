"""The pictures of docs/generation.md: trains the two small models where that is not done, runs the page's commands, keeps what they draw.

`python -m fastcm.benchmarks.quality.gallery [--only digits|emoji32]`, from the folder that holds docs/ and runs/. The commands, with what
they drew, go between the page's marks of each model; the page shows nothing that was not run.
"""

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastcm.benchmarks.results_file import machine
from fastcm.data.dataset import open_dataset
from fastcm.generation import pictures

PAGE, FOLDER = Path("docs/generation.md"), Path("docs/generation")


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


@dataclass(frozen=True)
class Model:
    """A built-in data set, the picture of it that is edited, and how its edits are asked for.

    labels: the option that names the picture's class. box: what is inpainted. patch: the side of the squares of one colour in the painting.
    budget: the option that ends the training before the preset does, where that takes hours on a CPU.
    """

    name: str
    picture: int
    labels: str
    box: str
    factor: int
    patch: int
    sigma: float
    colour: bool
    budget: str = ""

    @property
    def run(self) -> str:
        return f"runs/{self.name}"

    @property
    def training(self) -> str:
        return f"fastcm train {self.name}{self.budget}"

    def samples(self) -> list[Shown]:
        seeds = "--seeds 0-3" if self.labels else "--seeds 0-31"
        how = [
            ("One step", "one-step", "", "One network call per image."),
            ("Two steps", "two-step", " --steps 2", "The same seeds, a second call at the middle of the grid."),
            ("Published timesteps", "timesteps", " --timesteps 0,22,39 --grid 40", "Levels by the indices that papers give: 80 and 1.38."),
        ]
        return [
            Shown(
                title,
                text,
                f"fastcm sample {self.run}{option} --report {seeds} --out {FOLDER}/{self.name}-{stem}.png",
                f"{FOLDER}/{self.name}-{stem}.png",
                f"{self.name}-{stem}.png",
            )
            for title, stem, option, text in how
        ]

    def edits(self) -> list[Shown]:
        image = f"--image {FOLDER}/{self.name}-picture.png"
        seeds = f"--seeds 0-4{self.labels}"
        asked = [
            ("Inpainting", "inpaint", f"{image} --box {self.box} {seeds}", "Known pixels come back as they were, to the bit."),
            ("Super-resolution", "superres", f"{image} --factor {self.factor} {seeds}", "Every patch keeps its mean."),
            ("Stroke-guided", "stroke", f"--image {FOLDER}/{self.name}-painting.png {seeds}", "From a rough painting."),
            (
                "Denoising",
                "denoise",
                f"--image {FOLDER}/{self.name}-noisy.npy --sigma {self.sigma:g}{self.labels}",
                f"One call on the picture with noise of deviation {self.sigma:g}; an array, because a picture file would clip the noise.",
            ),
        ]
        if self.colour:
            asked.insert(1, ("Colorization", "colorize", f"{image} {seeds}", "Every pixel keeps its luminance."))
        shown = [
            Shown(
                title,
                text,
                f"fastcm edit {task} {self.run} {options} --out {self.run}/{task}.png",
                f"{self.run}/{task}-compare.png",
                f"{self.name}-{task}.png",
            )
            for title, task, options, text in asked
        ]
        way = f"fastcm edit interpolate {self.run} --seeds 0,1{self.labels} --out {self.run}/interpolate.png"
        strip = "Sixteen steps along the great circle between two seeds' noise, one call each."
        animation = "The same as the animation that the command leaves beside the strip."
        return [
            *shown,
            Shown("Interpolation", strip, way, f"{self.run}/interpolate-compare.png", f"{self.name}-interpolate.png"),
            Shown("Animation", animation, way, f"{self.run}/interpolate.gif", f"{self.name}-interpolate.gif"),
        ]

    def inputs(self) -> dict[str, np.ndarray]:
        """The pictures that are edited, uint8 [H, W, C], by the end of their names."""
        image = open_dataset(self.name).images[self.picture].transpose(1, 2, 0)
        return {"picture": image, "painting": painting(image, self.patch)}

    def noisy(self) -> np.ndarray:
        """The picture with noise of deviation sigma, float32 [H, W, C] in units of [-1, 1]."""
        image = self.inputs()["picture"]
        noise = np.random.default_rng(0).standard_normal(image.shape)
        return (image / 127.5 - 1 + self.sigma * noise).astype(np.float32)


MODELS = {
    model.name: model
    for model in (
        Model("digits", picture=13, labels=" --labels 3", box="0,4,8,8", factor=2, patch=1, sigma=1.0, colour=False),
        Model("emoji32", picture=864, labels="", box="0,16,32,32", factor=4, patch=4, sigma=0.5, colour=True, budget=" --duration 64kimg"),
    )
}


def painting(image: np.ndarray, patch: int) -> np.ndarray:
    """The image in squares of patch x patch pixels and few colours, as somebody would dab it."""
    height, width, channels = image.shape
    means = image.reshape(height // patch, patch, width // patch, patch, channels).mean(axis=(1, 3))
    few = (np.round(means / 127.5) * 127.5).clip(0, 255).astype(np.uint8)
    return few.repeat(patch, axis=0).repeat(patch, axis=1)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastcm.benchmarks.quality.gallery", description=__doc__)
    parser.add_argument("--only", choices=MODELS, help="one model alone")
    args = parser.parse_args(argv)
    for name, model in MODELS.items():
        if args.only in (None, name):
            put_block(PAGE, name, drawn(model))
    return 0


def drawn(model: Model) -> str:
    """Runs every command of a model and returns its block of the page."""
    if not is_trained(model):
        call(model.training)
    for name, image in model.inputs().items():
        pictures.save_png(FOLDER / f"{model.name}-{name}.png", pictures.to_pil(image))
    np.save(FOLDER / f"{model.name}-noisy.npy", model.noisy())
    parts = [trained(model)]
    done = set()
    for shown in [*model.samples(), *model.edits()]:
        if shown.command not in done:
            call(shown.command)
            done.add(shown.command)
        kept = FOLDER / shown.name
        if kept != Path(shown.drawn):
            shutil.copyfile(shown.drawn, kept)
        parts.append(shown.markdown())
    return "\n".join(parts)


def log(model: Model) -> list[dict]:
    """The lines of the run's log, none where there is no run."""
    path = Path(model.run, "log.jsonl")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def is_trained(model: Model) -> bool:
    """True where the run went to its end, by whatever version of the settings."""
    lines, config = log(model), Path(model.run, "config.json")
    return bool(lines) and lines[-1]["nimg"] >= 1000 * json.loads(config.read_text(encoding="utf-8"))["duration_kimg"]


def trained(model: Model) -> str:
    """How the model came about, in a sentence: images, time and machine, as the run's own log and last checkpoint tell."""
    lines = log(model)
    speeds = sorted(line["images_per_s"] for line in lines if line.get("images_per_s"))
    minutes = lines[-1]["nimg"] / speeds[len(speeds) // 2] / 60
    facts = machine()
    state = max(Path(model.run, "checkpoints").glob("step-*/state.json"))
    threads = json.loads(state.read_text(encoding="utf-8"))["threads"]
    where = facts["gpu"] or f"{threads} thread{'s' * (threads > 1)} of {facts['processor']}"
    return f"`{model.training}`: {lines[-1]['nimg'] / 1000:g} kimg in about {minutes:.0f} minutes on {where}, torch {facts['torch']}.\n"


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
