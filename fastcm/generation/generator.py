"""What applications embed: seeds in, images out, from one denoiser on one device."""

import copy
import logging
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fastcm import kernels
from fastcm.consistency.denoiser import Denoiser, Preconditioning
from fastcm.errors import InputError, RunError, nearest, reason_of
from fastcm.generation.compiled import CompiledLevel, chosen_compile
from fastcm.generation.cuda_choices import exact_fp32
from fastcm.generation.cuda_graph import CapturedBatch, cause_of
from fastcm.generation.devices import choose_device
from fastcm.generation.editing_tasks import EditingTasks
from fastcm.generation.frozen import FrozenLevel, freeze
from fastcm.generation.guided import chosen_guidance
from fastcm.generation.request import (
    chain_steps,
    check_output,
    chosen_churn,
    chosen_sampler,
    finished,
    label_array,
    noise_levels,
    seed_array,
    timestep_sigmas,
)
from fastcm.generation.sampler import CHURNED, TEACHER_STEPS, SeedNoise, multistep, teacher_grid, teacher_sampler
from fastcm.networks.inference import for_inference, settled, with_guidance
from fastcm.weights import hub
from fastcm.weights.model_folder import save_model

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Elements of one batch at the image's resolution: beyond this a larger batch is no faster, and activations stay below about 1 GB.
CPU_ELEMENTS, CUDA_ELEMENTS = 1 << 16, 1 << 21
# Folded levels and captured graphs that are kept, those used last: a server's clients may ask for any noise levels. A level of a thousand
# classes has a table of 100 MB.
LEVELS_KEPT, LEVEL_BYTES_KEPT, GRAPHS_KEPT = 64, 1 << 30, 64
log = logging.getLogger("fastcm")


def choose_precision(precision: str, device: torch.device, preconditioning: Preconditioning | None = None) -> str:
    """ "auto" is bf16 on CUDA, where the model's form bears it, and fp32 elsewhere."""
    if precision == "auto":
        fits = preconditioning is None or preconditioning.fits_16_bits
        return "bf16" if device.type == "cuda" and fits else "fp32"
    if precision not in PRECISIONS:
        raise InputError(f"unknown value in --precision: {precision}. Use auto, {', '.join(PRECISIONS)}.{nearest(precision, PRECISIONS)}")
    return precision


def class_names(denoiser: Denoiser, info: dict) -> list[str] | None:
    """The names in `info`, else the numbers of the classes that the network's configuration has, else None."""
    if info.get("classes"):
        return [str(name) for name in info["classes"]]
    count = getattr(getattr(denoiser.network, "config", None), "num_classes", None)
    return [str(number) for number in range(count)] if count else None


class Generator(EditingTasks):
    """generator(seeds, labels) -> images. Safe to call from many threads; `.denoiser` is D(x, sigma, labels) in fp32, unfolded.

    denoiser: moved to `device`, put in eval mode and channels-last memory. info: the model's config.json (resolution, channels, classes,
    sampling). compile: "on" makes machine code of each noise level by torch.compile, "auto" and "off" do not.
    The image of a seed does not depend on the batch it is drawn in.
    """

    def __init__(self, denoiser: Denoiser, info: dict, *, device: str = "auto", precision: str = "auto", compile: str = "auto"):
        self._compiles = chosen_compile(compile)
        self.device = choose_device(device)
        self.precision = choose_precision(precision, self.device, denoiser.preconditioning)
        self.provider = f"torch {self.device.type}"
        self.denoiser = denoiser.to(self.device).eval().requires_grad_(False)
        self.info = info
        self.classes = class_names(denoiser, info)
        config = getattr(denoiser.network, "config", None)
        self.resolution = info.get("resolution") or getattr(config, "resolution", None)
        self.channels = info.get("channels") or getattr(config, "in_channels", None)
        if not (self.resolution and self.channels):
            raise InputError("missing field in config.json: resolution or channels. Give both in info.")
        self._worker = self._working_copy()
        self._frozen: dict[float, FrozenLevel | CompiledLevel] = {}
        self._graphs: dict[tuple, CapturedBatch | None] = {}
        if self.device.type == "cuda":
            self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(self.device)
        self._lock = threading.Lock()
        elements = CUDA_ELEMENTS if self.device.type == "cuda" else CPU_ELEMENTS
        # A network that is not folded may take labels as rows of one number per class.
        fitting = max(1, elements // max(self.channels * self.resolution**2, len(self.classes or ()) // 256))
        self.batch_size = 1 << (fitting.bit_length() - 1)  # a power of two, so that no CUDA graph of a long job is padded

    def _working_copy(self) -> nn.Module:
        network, dtype = settled(self.denoiser.network), PRECISIONS[self.precision]
        if dtype != torch.float32:
            network = copy.deepcopy(network).to(dtype)
        # Convolutions work in this order on both devices; only what is copied to it and back is saved.
        network = network.to(memory_format=torch.channels_last)
        if self.device.type == "cuda":
            order_grey_weights(network)
        return for_inference(network) if self._compiles else network

    @property
    def preconditioning(self) -> Preconditioning:
        return self.denoiser.preconditioning

    @property
    def sigma_range(self) -> tuple[float, float]:
        return self.preconditioning.sigma_range

    def level(self, sigma: float, guidance: float | None = None) -> FrozenLevel | CompiledLevel:
        """The denoiser at one noise level and guidance weight, folded and in the working precision; kept for the next call."""
        key = sigma if guidance is None else (sigma, guidance)
        with self._lock:
            level = self._frozen.pop(key, None)
            if level is None:
                with exact_fp32(self._is_exact):
                    denoiser, worker = self.denoiser, self._worker
                    if guidance is not None:
                        denoiser = Denoiser(with_guidance(denoiser.network, guidance), self.preconditioning)
                        worker = with_guidance(worker, guidance)
                    level = freeze(denoiser, sigma, classes=len(self.classes or ()), worker=worker)
                level = CompiledLevel(level) if self._compiles else level
            self._frozen[key] = level  # as the one used last
            while len(self._frozen) > LEVELS_KEPT or (len(self._frozen) > 1 and self._level_bytes() > LEVEL_BYTES_KEPT):
                self._forget(next(iter(self._frozen)))
            return level

    def _level_bytes(self) -> int:
        return sum(level.table_bytes for level in self._frozen.values())

    def _forget(self, level: float | tuple[float, float]) -> None:
        """Drops a level, and the graphs that would keep its memory."""
        del self._frozen[level]
        for key in [key for key in self._graphs if key[0] == "consistency" and level in key[1]]:
            del self._graphs[key]

    @property
    def _is_exact(self) -> bool:
        return self.device.type == "cuda" and self.precision == "fp32"

    def warm(self, batch_sizes: Iterable[int] = (1,), *, steps: int | None = None, sigmas=None) -> float:
        """Compiles, captures and allocates what calls of these sizes and noise levels need, by drawing one of each; returns the seconds."""
        began = time.perf_counter()
        for size in batch_sizes:
            self(range(size), steps=steps, sigmas=sigmas)
        return time.perf_counter() - began

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the model folder that fastcm.load reads: config.json, model.safetensors (fp32) and a card, README.md."""
        save_model(Path(folder), self.denoiser, self.info)

    def push_to_hub(self, repository: str, *, private: bool = True) -> str:
        """Uploads the model folder to `owner/name[@revision][:folder]` on the hub, made where it is new; returns the commit's address.

        Needs `pip install 'fastcm[hub]'` and a token (hf auth login, or HF_TOKEN). Raises InputError, RunError.
        """
        return hub.push(self.denoiser, self.info, hub.hub_id(hub.PREFIX + repository.removeprefix(hub.PREFIX)), public=not private)

    def sigmas(self, steps: int | None = None, sigmas=None) -> tuple[float, ...]:
        """The noise levels that a call with these arguments visits."""
        return noise_levels(steps, sigmas, self.preconditioning, self.info.get("sampling"))

    def __call__(
        self,
        seeds,
        labels=None,
        *,
        steps: int | None = None,
        sigmas=None,
        output: str = "uint8",
        sampler: str | None = None,
        churn=None,
        guidance: float | None = None,
        guidance_interval=None,
        guide: "Generator | None" = None,
    ):
        """Returns one image per seed: uint8 [N, H, W, C], with output="float" float32 in [-1, 1] of that shape, with "pil" a list.

        seeds: an int or ints of 64 bits. labels: a class (number or name), a list cycled over the seeds, or None for seed mod classes.
        steps: network calls, 1 by default, or sigmas: the noise levels from high to low (see `timesteps`). sampler: "consistency", or for
        diffusion teachers "heun" (their default), "euler", "dpm", "ancestral" on a Karras grid of `steps` (18) levels, or "ddim" on the
        steps of a discrete chain. churn: for heun and dpm S_churn, or (S_churn, S_tmin, S_tmax, S_noise).
        guidance: w of D_u + w (D_c - D_u), for a teacher between the two levels of guidance_interval, D_u being its own without the label,
        or a second model's, `guide`; for a student that was trained for a range of weights, the one that it is told.
        Raises InputError for arguments that do not fit the model, RunError where an image has non-finite pixels.
        """
        asked = {"steps": steps, "sigmas": sigmas, "sampler": sampler, "churn": churn}
        asked |= {"guidance": guidance, "guidance_interval": guidance_interval, "guide": guide}
        batches = [images for _, _, images in self.batches(seeds, labels, output=check_output(output), **asked)]
        dtype = np.float32 if output == "float" else np.uint8
        images = np.concatenate(batches) if batches else np.empty((0, self.resolution, self.resolution, self.channels), dtype)
        return finished(images, output)

    def batches(
        self, seeds, labels=None, *, steps: int | None = None, sigmas=None, output: str = "uint8", **how
    ) -> Iterator[tuple[np.ndarray, np.ndarray | None, np.ndarray]]:
        """Yields (seeds, labels, images) of one batch after the other, for long jobs; arguments as in a call, checked at once."""
        seeds = seed_array(seeds)
        labels = label_array(labels, seeds, self.classes)
        run = self._run(steps, sigmas, **how)
        return self._batches(run, seeds, labels, output)

    def timesteps(self, *indices: int, grid: int) -> tuple[float, ...]:
        """The noise levels of published integer timesteps: sigmas=generator.timesteps(0, 22, 39, grid=40)."""
        return timestep_sigmas(indices, grid, self.preconditioning)

    def _batches(self, run, seeds: np.ndarray, labels: np.ndarray | None, output: str):
        start = 0
        while start < len(seeds):
            rows = slice(start, start + self.batch_size)
            try:
                images = self._batch(run, seeds[rows], None if labels is None else labels[rows], output)
            except torch.OutOfMemoryError:
                if self.batch_size == 1:
                    raise RunError(f"out of memory on {self.device} with one image. Use a smaller model or --device cpu.") from None
                self.batch_size = max(1, self.batch_size // 2)
                continue
            yield seeds[rows], None if labels is None else labels[rows], images
            start += len(images)

    def _run(self, steps: int | None, sigmas, sampler: str | None = None, churn=None, guidance=None, guidance_interval=None, guide=None):
        """What draws a batch: (key, draw), draw(noise, labels) -> D fp32 [B, C, H, W] in [-1, 1]; None as key: no CUDA graph."""
        p = self.preconditioning
        sampler = chosen_sampler(sampler, self.info, p)
        churn = chosen_churn(churn, sampler)
        guidance = chosen_guidance(self, guidance, guidance_interval, guide, sampler=sampler)
        if sampler == "consistency":
            visited = self.sigmas(steps, sigmas)
            levels = [self.level(sigma, guidance.weight) for sigma in visited]
            if guidance.weight is not None:
                visited = tuple((sigma, guidance.weight) for sigma in visited)
            return ("consistency", visited), lambda noise, labels: multistep(levels, noise, sigma_min=p.sigma_min, labels=labels)
        solve = teacher_sampler(sampler)
        if sigmas is not None:
            raise InputError(f"sigmas with a solver in --sampler: {sampler}. Give steps; the solver's grid follows from them.")
        steps = TEACHER_STEPS if steps is None else len(self.sigmas(steps))
        if sampler == "ddim":
            chain = chain_steps(self.info, p)
            grid, options = chain.pairs(p.betas, steps), {"clip": chain.clip}
        else:
            grid = teacher_grid(steps, sigma_min=p.sigma_min, sigma_max=p.sigma_max, rho=p.rho)
            options = {"churn": churn} if sampler in CHURNED else {}
        denoise = guidance.denoiser(self)
        return (sampler, steps, churn, guidance), lambda noise, labels: solve(denoise, noise, grid, labels=labels, **options)

    @torch.inference_mode()
    def _batch(self, run, seeds: np.ndarray, labels: np.ndarray | None, output: str) -> np.ndarray:
        """The images of one batch, uint8 or float32 [B, H, W, C]."""
        key, draw = run
        shape = (self.channels, self.resolution, self.resolution)

        def draw_images(seeds: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
            D_x = draw(SeedNoise(seeds, shape), labels)
            images = D_x.permute(0, 2, 3, 1).contiguous() if output == "float" else kernels.to_uint8(D_x, layout="NHWC")
            return images, D_x.flatten(1).isfinite().all(dim=1)

        drawn = None
        if key is not None and self.device.type == "cuda":
            drawn = self._replay((*key, output == "float"), draw_images, seeds, labels)
        if drawn is None:
            tensors = [None if array is None else torch.from_numpy(array.copy()).to(self.device) for array in (seeds, labels)]
            with exact_fp32(self._is_exact):
                drawn = [result.cpu().numpy() for result in draw_images(*tensors)]
        images, finite = drawn
        bad = seeds[~finite]
        if len(bad):
            exact = self.precision == "fp32"
            cause = (
                "The weights are broken." if exact else f"The weights are broken, or overflow in {self.precision}: try --precision fp32."
            )
            raise RunError(f"non-finite pixels in the image of seed {bad[0]} ({len(bad)} of {len(seeds)} images). {cause}")
        return images

    def _replay(self, key: tuple, draw_images, seeds: np.ndarray, labels: np.ndarray | None) -> list[np.ndarray] | None:
        """draw_images as a CUDA graph; batches are padded to powers of two, so that few graphs serve every size. None: no graph of it."""
        size = 1 << (len(seeds) - 1).bit_length()
        padded = [None if array is None else np.pad(array, (0, size - len(array)), mode="edge") for array in (seeds, labels)]
        with self._lock, torch.cuda.device(self.device):
            graph = self._graphs.pop((*key, size), None) if (*key, size) in self._graphs else self._captured(draw_images, *padded)
            self._graphs[(*key, size)] = graph  # as the one used last
            if len(self._graphs) > GRAPHS_KEPT:
                del self._graphs[next(iter(self._graphs))]
            return graph and [output[: len(seeds)].copy() for output in graph(*padded)]

    def _captured(self, draw_images, seeds: np.ndarray, labels: np.ndarray | None) -> CapturedBatch | None:
        """None, and a line that says so, where CUDA refuses to capture what runs."""
        try:
            with exact_fp32(self._is_exact):
                return CapturedBatch(draw_images, seeds, labels, pool=self._pool, stream=self._stream)
        except RuntimeError as error:
            if isinstance(cause := cause_of(error), torch.OutOfMemoryError):
                raise cause from None
            log.warning(f"no CUDA graph for batches of {len(seeds)}: {reason_of(cause)}. Images are drawn without it.")
            return None


def order_grey_weights(network: nn.Module) -> None:
    """Gives weights of one input channel, which lie alike in both orders, channels-last strides: a convolution's result follows them."""
    for parameter in network.parameters():
        if parameter.ndim == 4 and parameter.shape[1] == 1:
            _, _, height, width = parameter.shape
            parameter.data = parameter.data.contiguous().as_strided(parameter.shape, (height * width, 1, width, 1))
