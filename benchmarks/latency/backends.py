"""The ways from a seed on the host to uint8 images on the host that bench.py compares, all with the same weights."""

import importlib.util
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastcm import kernels
from fastcm.benchmarks.latency.first_image import CACHE, seconds_to_first_image
from fastcm.benchmarks.models import Model
from fastcm.benchmarks.plain import PlainDenoiser, plain_network
from fastcm.consistency.denoiser import Denoiser
from fastcm.errors import InputError, RunError
from fastcm.generation.generator import PRECISIONS, Generator, choose_precision
from fastcm.generation.sampler import SAMPLING_STREAM


class UnavailableError(Exception):
    """This machine or network cannot run the backend; the text says why."""


@dataclass(frozen=True)
class Job:
    """One model at one batch size on one device. precision: as `--precision` has it."""

    model: Model
    batch: int
    device: torch.device
    precision: str

    def seeds(self, turn: int) -> np.ndarray:
        return np.arange(turn * self.batch, (turn + 1) * self.batch, dtype=np.int64)

    def labels(self, seeds: np.ndarray) -> Tensor | None:
        return None if self.model.classes is None else torch.from_numpy(seeds % self.model.classes).to(self.device)

    def stream_noise(self, seeds: np.ndarray) -> Tensor:
        """The noise that a generator draws for the seeds, computed on the CPU."""
        keys = torch.from_numpy(seeds.copy())
        shape = (self.model.channels, self.model.resolution, self.model.resolution)
        return kernels.normal(keys, torch.zeros_like(keys), shape, stream=SAMPLING_STREAM).to(self.device)

    def torch_noise(self, seeds: np.ndarray) -> Tensor:
        """Noise as a plain program draws it: torch's generator on the device, seeded once for the batch."""
        generator = torch.Generator(self.device).manual_seed(int(seeds[0]))
        shape = (self.batch, self.model.channels, self.model.resolution, self.model.resolution)
        return torch.randn(shape, generator=generator, device=self.device)


@dataclass(frozen=True)
class Backend:
    """images: seeds int64 [B] -> uint8 [B, H, W, C] on the host, which is timed. same_noise: the same from the noise stream's noise,
    which is compared. on_device: the part of a call between noise and uint8 images on the device, None where it cannot be told apart."""

    images: Callable[[np.ndarray], np.ndarray]
    same_noise: Callable[[np.ndarray], np.ndarray]
    on_device: Callable[[], object] | None = None
    startup_s: float = 0.0
    first_images: tuple[float, float] | None = None  # seconds in fresh processes: with an empty compile cache, with a filled one


Start = Callable[[], Backend]


def build(name: str, job: Job) -> Backend:
    """The backend, warm: startup_s runs from its files or weights to its first image, imports apart. Raises UnavailableError."""
    start = BACKENDS[name](job)
    began = time.perf_counter()
    backend = start()
    backend.images(job.seeds(0))
    startup_s = time.perf_counter() - began
    for turn in range(2):
        backend.images(job.seeds(turn))
    return replace(backend, startup_s=startup_s)


def precision_of(name: str, job: Job) -> str:
    """What the backend computes in: fastcm as its users get it, the others bf16 on CUDA and fp32 on a CPU unless asked otherwise."""
    if name.startswith("onnxruntime"):
        return "fp32"
    if name.startswith("fastcm"):
        return choose_precision(job.precision, job.device)
    if job.precision != "auto":
        return choose_precision(job.precision, job.device)
    return "bf16" if job.device.type == "cuda" else "fp32"


def plain(job: Job, denoiser: Denoiser, *, precision: str, compiled: str | None = None) -> Backend:
    """The plain network in eager mode, or under torch.compile with the mode named."""
    network = plain_network(denoiser.network).to(job.device, PRECISIONS[precision])
    denoiser = PlainDenoiser(network, denoiser.preconditioning)
    sigma_max = denoiser.preconditioning.sigma_max

    def draw(noise: Tensor, labels: Tensor | None) -> Tensor:
        sigma = torch.full((noise.shape[0],), sigma_max, device=noise.device)
        return uint8_images(denoiser(sigma_max * noise, sigma, labels))

    run = draw if compiled is None else torch.compile(draw, mode=compiled, dynamic=False)

    def call(noise: Tensor, labels: Tensor | None) -> Tensor:
        if compiled is not None and noise.is_cuda:
            torch.compiler.cudagraph_mark_step_begin()
        with torch.inference_mode():
            return run(noise, labels)

    fixed = (job.torch_noise(job.seeds(0)), job.labels(job.seeds(0)))
    return Backend(
        images=lambda seeds: call(job.torch_noise(seeds), job.labels(seeds)).cpu().numpy(),
        same_noise=lambda seeds: call(job.stream_noise(seeds), job.labels(seeds)).cpu().numpy(),
        on_device=lambda: call(*fixed),
    )


def uint8_images(D_x: Tensor) -> Tensor:
    """[B, C, H, W] in [-1, 1] -> uint8 [B, H, W, C], in torch's own operations."""
    return ((D_x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def eager(job: Job) -> Start:
    denoiser = job.model.denoiser()
    return lambda: plain(job, denoiser, precision=precision_of("eager", job))


def compile(job: Job) -> Start:
    return _compiled(job, "compile", "default")


def compile_max(job: Job) -> Start:
    """max-autotune, which replays CUDA graphs."""
    return _compiled(job, "compile_max", "max-autotune")


def _require_compiler(job: Job) -> None:
    if job.device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        raise UnavailableError("torch.compile finds no C++ compiler")


def _compiled(job: Job, name: str, mode: str) -> Start:
    _require_compiler(job)
    denoiser = job.model.denoiser()
    return lambda: plain(job, denoiser, precision=precision_of(name, job), compiled=mode)


def diffusers(job: Job) -> Start:
    """ConsistencyModelPipeline with the weights through fastcm's converter; one generator per batch and tensors out, its fastest form."""
    from fastcm.weights.diffusers import write_diffusers

    if not job.model.in_diffusers:
        what = f"{job.model.kind} network" if job.model.kind != "adm" else "network on patches"
        raise UnavailableError(f"diffusers has no {what}")
    if importlib.util.find_spec("diffusers") is None:
        raise UnavailableError("diffusers is not installed")
    try:
        from diffusers import ConsistencyModelPipeline
        from diffusers.utils import logging
    except (ImportError, RuntimeError) as error:
        raise UnavailableError(f"diffusers does not import ({error})") from None
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder = tempfile.TemporaryDirectory()
    write_diffusers(folder.name, job.model.denoiser(), job.model.info)

    def start() -> Backend:
        pipe = ConsistencyModelPipeline.from_pretrained(folder.name, low_cpu_mem_usage=False)
        folder.cleanup()
        pipe = pipe.to(job.device, PRECISIONS[precision_of("diffusers", job)])
        pipe.set_progress_bar_config(disable=True)
        return _pipeline(job, pipe)

    return start


def _pipeline(job: Job, pipe) -> Backend:
    def draw(seeds: np.ndarray, **source) -> Tensor:
        labels = job.labels(seeds)
        images = pipe(batch_size=job.batch, class_labels=labels, output_type="pt", **source).images
        return uint8_images(images * 2 - 1)

    def from_noise(noise: Tensor, seeds: np.ndarray) -> Tensor:
        checks = pipe.check_inputs
        pipe.check_inputs = lambda *arguments: None  # it refuses given noise of one channel, which the pipeline itself can draw
        try:
            return draw(seeds, latents=noise.to(pipe.unet.dtype))
        finally:
            pipe.check_inputs = checks

    fixed = job.torch_noise(job.seeds(0))
    return Backend(
        images=lambda seeds: draw(seeds, generator=torch.Generator(job.device).manual_seed(int(seeds[0]))).cpu().numpy(),
        same_noise=lambda seeds: from_noise(job.stream_noise(seeds), seeds).cpu().numpy(),
        on_device=lambda: from_noise(fixed, job.seeds(0)),
    )


def onnxruntime_cpu(job: Job) -> Start:
    return _onnxruntime(job, "cpu")


def onnxruntime_seeded(job: Job) -> Start:
    """The file that takes seeds and gives bytes: the noise stream is part of the graph."""
    return _onnxruntime(job, "cpu", seeded=True)


def onnxruntime_cuda(job: Job) -> Start:
    return _onnxruntime(job, "cuda")


def _require_onnx() -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise UnavailableError(f"{package} is not installed")


def _onnxruntime(job: Job, provider: str, *, seeded: bool = False) -> Start:
    """The exported file through fastcm's own call, noise included."""
    _require_onnx()
    from fastcm.generation.onnx_generator import OnnxGenerator

    path = exported(job.model, seeded=seeded)

    def start() -> Backend:
        try:
            generator = OnnxGenerator(path, provider)
        except (InputError, RunError) as error:
            raise UnavailableError(str(error)) from None
        return Backend(generator, generator)

    return start


def onnxruntime_unfolded(job: Job) -> Start:
    """The plain network as torch.onnx.export writes it by itself, noise embedding and all, in ONNX Runtime on the CPU.

    Its noise is the noise stream's, as the exported file's is: the graphs are what differs.
    """
    _require_onnx()
    path = unfolded(job.model)

    def start() -> Backend:
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

        def draw(seeds: np.ndarray) -> np.ndarray:
            labels = job.labels(seeds)
            feeds = {"noise": job.stream_noise(seeds).numpy(), **({} if labels is None else {"labels": labels.numpy()})}
            return uint8_images(torch.from_numpy(session.run(None, feeds)[0])).numpy()

        return Backend(draw, draw)

    return start


_exports: dict[str, tempfile.TemporaryDirectory] = {}


def exported(model: Model, *, seeded: bool = False) -> Path:
    """The model's .onnx file, from noise to floats or from seeds to bytes, written once per process."""
    from fastcm.export.to_onnx import export_onnx

    name = f"{model.name} seeded" if seeded else model.name
    if name not in _exports:
        folder = tempfile.TemporaryDirectory()
        export_onnx(model.denoiser(), model.info, out=Path(folder.name) / "model.onnx", seeded=seeded, uint8=seeded)
        _exports[name] = folder
    return Path(_exports[name].name) / "model.onnx"


class Unfolded(torch.nn.Module):
    """noise, labels -> images of a plain denoiser at sigma_max, computed from the noise level up."""

    def __init__(self, denoiser: Denoiser):
        super().__init__()
        self.denoiser = PlainDenoiser(plain_network(denoiser.network), denoiser.preconditioning)

    def forward(self, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        sigma_max = self.denoiser.preconditioning.sigma_max
        sigma = torch.full((noise.shape[0],), sigma_max)
        return self.denoiser(sigma_max * noise, sigma, labels).clamp(-1, 1)


def unfolded(model: Model) -> Path:
    """The model's .onnx file as torch alone makes it, any batch, written once per process."""
    from fastcm.export.quiet import quiet

    name = f"{model.name} unfolded"
    if name not in _exports:
        folder = tempfile.TemporaryDirectory()
        noise = torch.randn(2, model.channels, model.resolution, model.resolution, generator=torch.Generator().manual_seed(0))
        inputs = (noise,) if model.classes is None else (noise, torch.arange(2) % model.classes)
        with quiet(), torch.no_grad():
            torch.onnx.export(
                Unfolded(model.denoiser()).eval(),
                inputs,
                Path(folder.name) / "model.onnx",
                dynamo=True,
                verbose=False,
                input_names=["noise", "labels"][: len(inputs)],
                dynamic_shapes=tuple({0: "batch"} for _ in inputs),
            )
        _exports[name] = folder
    return Path(_exports[name].name) / "model.onnx"


def fastcm(job: Job) -> Start:
    """The generator as users get it."""
    return _generator(job, compile="off")


def _generator(job: Job, *, compile: str) -> Start:
    """On CUDA the device's part is one replay of the graph that the last call captured."""
    denoiser = job.model.denoiser()

    def start() -> Backend:
        generator = Generator(denoiser, job.model.info, device=str(job.device), precision=job.precision, compile=compile)
        generator.warm((job.batch,))
        graphs = list(generator._graphs.values())
        return Backend(generator, generator, graphs[-1].graph.replay if graphs and graphs[-1] else None)

    return start


def fastcm_compile(job: Job) -> Start:
    """The generator with compile="on": first in fresh processes, which leave their compile cache to this one."""
    _require_compiler(job)
    folder = tempfile.TemporaryDirectory()
    options = {"batch": job.batch, "device": job.device.type, "precision": job.precision, "cache": Path(folder.name)}
    first_images = tuple(seconds_to_first_image(job.model.name, **options) for _ in ("empty", "filled"))
    start = _generator(job, compile="on")

    def begin() -> Backend:
        before = os.environ.get(CACHE)
        os.environ[CACHE] = folder.name
        try:
            return replace(start(), first_images=first_images)
        finally:
            folder.cleanup()
            os.environ.pop(CACHE)
            os.environ.update({} if before is None else {CACHE: before})

    return begin


BACKENDS: dict[str, Callable[[Job], Start]] = {
    backend.__name__: backend
    for backend in (
        eager,
        diffusers,
        fastcm,
        onnxruntime_cpu,
        onnxruntime_seeded,
        onnxruntime_unfolded,
        onnxruntime_cuda,
        fastcm_compile,
        compile,
        compile_max,
    )
}
