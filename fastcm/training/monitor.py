"""What a person watches while a run trains: the progress bar, log.jsonl, the logs of `--log`, sample grids, the measured quality."""

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from tqdm import tqdm

from fastcm import evaluation
from fastcm.generation import pictures
from fastcm.generation.generator import Generator
from fastcm.training.run_folder import CONFIG_NAME, RunFolder
from fastcm.training.run_logs import RunLog, RunLogs
from fastcm.training.trainer import Progress, Trainer
from fastcm.weights.model_folder import read_json

SAMPLE_SEEDS = range(40)
CONSISTENCY_IMAGES = 16  # of the run's first, for self-consistency: a figure to compare along one run
PLAIN_LINE_EVERY_S = 30.0


class Monitor:
    """Reports one run. As a context it owns the bar and the logs."""

    def __init__(self, folder: RunFolder, trainer: Trainer, logs: Sequence[RunLog] = ()):
        self.folder, self.trainer, self.logs = folder, trainer, RunLogs(logs)
        self.judge: Any = None

    def __enter__(self) -> "Monitor":
        trainer = self.trainer
        self.bar = tqdm(
            total=trainer.total_nimg, initial=trainer.nimg, unit="img", unit_scale=True, smoothing=0.1, disable=None, file=sys.stderr
        )
        self.logs.begin(folder=self.folder.path, config=read_json(self.folder.path / CONFIG_NAME), nimg=trainer.nimg)
        self.last_line = time.monotonic()
        self.says_compiled = trainer.compiled
        if trainer.compiled:
            self.bar.set_description("compiling")
            if self.bar.disable:
                print("compiling the network: the first step may take minutes", file=sys.stderr)
        return self

    def __exit__(self, *exc: object) -> None:
        self.bar.close()
        self.logs.end()

    def advance(self, nimg: int) -> None:
        self.bar.update(min(nimg, self.bar.total) - self.bar.n)

    def log(self, progress: Progress) -> None:
        """One row of log.jsonl, the bar's figures, the logs' scalars, and on a pipe a plain line now and then."""
        row = {k: v for k, v in asdict(progress).items() if k != "total_nimg"}
        if self.trainer.device.type == "cuda":
            row["memory_reserved_gb"] = round(torch.cuda.memory_reserved(self.trainer.device) / 1e9, 3)
        if self.says_compiled:
            self.says_compiled = False
            self.bar.set_description("")
            tqdm.write(f"first step {self.trainer.first_step_s:.1f} s, compiled; not counted in images/s", file=sys.stderr)
        self.folder.append_log(row)
        reserved = {"GB": f"{row['memory_reserved_gb']:.1f}"} if "memory_reserved_gb" in row else {}
        self.bar.set_postfix(loss=f"{progress.loss:.4g}", N=progress.steps, **reserved, refresh=False)
        self.logs.scalars({name: row[name] for name in ("loss", "grad_norm", "lr", "steps", "mu", "images_per_s")}, progress.nimg)
        now = time.monotonic()
        if self.bar.disable and (now - self.last_line >= PLAIN_LINE_EVERY_S or progress.nimg >= progress.total_nimg):
            self.last_line = now
            left = (progress.total_nimg - progress.nimg) / max(progress.images_per_s, 1e-9)
            print(
                f"{progress.nimg / 1000:.1f}/{progress.total_nimg / 1000:g} kimg  loss {progress.loss:.4g}  "
                f"{progress.images_per_s:.0f} images/s  {max(left, 0):.0f} s left"
                + "".join(f"  {value} GB reserved" for value in reserved.values()),
                file=sys.stderr,
            )

    def sample(self, generator: Generator) -> None:
        """A PNG grid of samples from fixed seeds: one step, or the teacher's Heun solver."""
        sampler = "heun" if self.trainer.config.method == "edm" else "consistency"
        images = generator(SAMPLE_SEEDS, sampler=sampler)
        path = self.folder.path / "samples" / f"nimg-{self.trainer.nimg:09d}.png"
        pictures.save_png(
            path, pictures.grid(images, columns=10), text={"nimg": str(self.trainer.nimg), "seeds": f"0-{len(SAMPLE_SEEDS) - 1}"}
        )
        self.logs.picture(path, self.trainer.nimg)
        if sampler == "consistency":
            self._self_consistency(generator)

    def _self_consistency(self, generator: Generator) -> None:
        """How far f moves along trajectories of the teacher, or along data paths where there is none: the property that training seeks."""
        trainer, count = self.trainer, CONSISTENCY_IMAGES
        images, labels, _ = trainer.dataset.batch(0, count, seed=trainer.config.seed)
        value = evaluation.self_consistency(
            generator.denoiser,
            images.to(trainer.device),
            labels=None if labels is None else labels.to(trainer.device),
            seed=0,
            teacher=trainer.method_loss.guided_teacher(),
        )
        self.folder.append_log({"nimg": trainer.nimg, "self_consistency": value})
        self.logs.scalars({"self_consistency": value}, trainer.nimg)

    def finish(self, generator: Generator) -> None:
        self.sample(generator)

    def evaluate(self, generator: Generator) -> dict[str, float]:
        """Accuracy and Frechet distance of the current average, judged as `fastcm evaluate` judges; "score" is what best/ minimises."""
        dataset = self.trainer.dataset
        if self.judge is None:
            self.judge = evaluation.TrainingJudge(dataset.images, dataset.labels)
        sampler = "heun" if self.trainer.config.method == "edm" else "consistency"
        figures = self.judge.figures(lambda seeds, labels: generator(seeds, labels, sampler=sampler))
        row = {"nimg": self.trainer.nimg, **figures}
        self.folder.append_log(row)
        self.logs.scalars(figures, self.trainer.nimg)
        self.bar.write(f"{self.trainer.nimg / 1000:.1f} kimg  " + "  ".join(f"{k} {v:.4g}" for k, v in figures.items()), file=sys.stderr)
        return figures
