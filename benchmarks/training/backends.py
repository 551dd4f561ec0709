"""The training steps that bench.py compares: the same network, weights, data and batch."""

import copy
import gc
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch

from fastcm import presets
from fastcm.benchmarks.models import MODELS, Model
from fastcm.benchmarks.training.published_step import PublishedStep
from fastcm.benchmarks.training.step_split import Clock, marked, split_step
from fastcm.data.dataset import Dataset, open_dataset
from fastcm.data.sources import BUILT_IN
from fastcm.training.captured_step import WARM_UP
from fastcm.training.config import OptimizerConfig, TrainConfig
from fastcm.training.parallel import Processes
from fastcm.training.run import resolve_compile, resolve_precision
from fastcm.training.trainer_parts import build_trainer

BACKENDS = ("published_step", "fastcm", "fastcm_compile", "compile")
# Pictures of random pixels stand in for data sets that are not at hand: a step's time does not depend on what they show.
RANDOM_BYTES = 48 << 20


@dataclass(frozen=True)
class Job:
    """One model at one batch size on one device. precision: fastcm's and the baselines', each as `--precision` has it."""

    model: Model
    batch: int
    device: torch.device
    precision: str
    baseline_precision: str
    processes: Processes | None = None  # that train together, each with its share of the batch; None: this one alone

    def precision_of(self, name: str) -> str:
        """fastcm as its users get it; the published code bf16 on CUDA, by autocast, and fp32 on a CPU unless asked otherwise."""
        if name.startswith("fastcm"):
            return resolve_precision(self.model.precision if self.precision == "auto" else self.precision, self.device)
        if self.baseline_precision != "auto":
            return self.baseline_precision
        return "bf16" if self.device.type == "cuda" else "fp32"

    def config(self) -> TrainConfig:
        """Consistency training with three evaluation averages, as published: Song et al. 2023, Table 3, with l2 for LPIPS."""
        return TrainConfig(
            preset=self.model.name,
            method="ct",
            data=self.model.name,
            network={"kind": self.model.kind, **self.model.options},
            noise=self.model.preconditioning,
            objective=presets.objective("ct"),
            optimizer=OptimizerConfig(lr=1e-4, ema_halflife_kimg=(500.0, 1000.0, 2000.0)),
            batch=self.batch,
            duration_kimg=5000.0,
        )


@dataclass(frozen=True)
class Backend:
    """step: one update, not waited for. marks(clock): within, steps mark their phases. startup_s: to the end of the first step.

    is_recorded: whether steps come from CUDA graphs.
    """

    step: Callable[[], object]
    loss: Callable[[], float]
    marks: Callable[[Clock], AbstractContextManager]
    is_recorded: Callable[[], bool] | None = None
    startup_s: float = 0.0
    peak_bytes: int | None = None

    def split(self, device: torch.device, *, steps: int) -> dict[str, float]:
        clock = Clock(device)
        with self.marks(clock):
            return split_step(lambda: self.step(), clock, steps=steps)


def dataset(model: Model) -> Dataset:
    if model.name in BUILT_IN and model.resolution == MODELS[model.name].resolution:
        return open_dataset(model.name).for_training()
    return random_pictures(model.resolution, model.channels, model.classes)


@cache
def random_pictures(resolution: int, channels: int, classes: int | None) -> Dataset:
    generator = np.random.default_rng(0)
    count = min(4096, RANDOM_BYTES // (channels * resolution**2))
    images = generator.integers(0, 256, (count, resolution, resolution, channels), dtype=np.uint8)
    return open_dataset((images, np.arange(count) % classes) if classes else images)


def build(name: str, job: Job, *, compiled: bool | None = None) -> Backend:
    """The backend after its first steps: three, or on CUDA as many as come before a recording, and one from it.

    compiled: instead of what the name says. On CUDA peak_bytes is what it takes at most, weights and activations, beside what was there
    before. Raises OutOfMemoryError where the batch did not fit in one pass.
    """
    network, cuda = job.model.network(), job.device.type == "cuda"
    gc.collect()  # an earlier step's memory would count as given back during this one
    before = torch.cuda.memory_allocated() if cuda else 0
    began = time.perf_counter()
    if compiled is None:
        compiled = name in ("compile", "fastcm_compile") or (name == "fastcm" and resolve_compile("auto", job.device))
    backend = (_trainer if name.startswith("fastcm") else _published)(name, job, network, compiled)
    backend.step()
    synchronize(job.device)
    startup_s = time.perf_counter() - began
    if cuda:  # compilation may take more memory than any step
        torch.cuda.reset_peak_memory_stats()
    for _ in range(WARM_UP + 1 if cuda else 2):
        backend.step()
    synchronize(job.device)
    if not np.isfinite(backend.loss()):
        raise RuntimeError(f"loss not finite after 3 steps: {backend.loss()}")
    peak = torch.cuda.max_memory_allocated() - before if cuda else None
    return replace(backend, startup_s=startup_s, peak_bytes=peak)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _trainer(name: str, job: Job, network: torch.nn.Module, compiled: bool) -> Backend:
    network = network.to(job.device).train()
    trainer = build_trainer(
        job.config(),
        network,
        copy.deepcopy(network).requires_grad_(False),
        dataset(job.model),
        device=job.device,
        precision=job.precision_of(name),
        compiled=compiled,
        processes=job.processes,
    )

    def loss() -> float:
        if trainer.microbatch < trainer.share:  # the trainer helps itself; a benchmark is of whole batches
            raise torch.OutOfMemoryError(f"out of memory with {trainer.share} images in one pass")
        return float(trainer.loss)

    return Backend(lambda: trainer.train_step(), loss, lambda clock: marked(trainer, clock), lambda: trainer.work.is_replayed)


def _published(name: str, job: Job, network: torch.nn.Module, compiled: bool) -> Backend:
    published = PublishedStep(
        job.config(), network, dataset(job.model), device=job.device, precision=job.precision_of(name), compiled=compiled
    )

    def marks(clock: Clock) -> AbstractContextManager:
        published.clock = clock
        return nullcontext()

    return Backend(lambda: published.train_step(), lambda: float(published.loss), marks)
