"""An exported file as a generator: the same call as torch's, run by ONNX Runtime."""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from fastcm import kernels
from fastcm.consistency.denoiser import Preconditioning
from fastcm.errors import InputError, RunError, nearest, reason_of
from fastcm.generation.onnx_binding import Buffers
from fastcm.generation.onnx_contract import DENOISE, GENERATE, Contract
from fastcm.generation.onnx_editing import OnnxEditing
from fastcm.generation.onnx_session import PROVIDERS, open_session
from fastcm.generation.request import check_output, finished, label_array, noise_levels, seed_array
from fastcm.generation.sampler import SeedNoise
from fastcm.weights.fields import check_model_fields

# Elements of one batch: the CPU kernels of ONNX Runtime gain nothing beyond.
BATCH_ELEMENTS = 1 << 16
Feeds = dict[str, np.ndarray]
TENSOR_TYPES = {np.float32: "tensor(float)", np.int64: "tensor(int64)", np.uint8: "tensor(uint8)"}


class OnnxGenerator(OnnxEditing):
    """generator(seeds, labels) -> images from a file that `fastcm export --onnx` wrote. Safe to call from many threads.

    provider: "auto", "cpu", "cuda", "tensorrt" or "tensorrt-rtx"; `.provider` is the one that is really active. Noise levels are fixed.
    A file of an editing task has that task as its method instead: generator.inpaint(image, mask, seeds), generator.superres(image).
    """

    def __init__(self, path: str | Path, provider: str = "auto"):
        self.path = Path(path)
        if provider not in ("auto", *PROVIDERS):
            hint = nearest(str(provider), PROVIDERS)
            raise InputError(f"unknown value in --provider: {provider}. Use one of auto, {', '.join(PROVIDERS)}.{hint}")
        if not self.path.is_file():
            raise InputError(f"no such file in MODEL: {self.path}. Give an exported .onnx.")
        self._session, active = open_session(self.path, provider)
        self.provider = f"ONNX Runtime {PROVIDERS[active]}"
        self.device = "cuda" if active in ("cuda", "tensorrt") else "cpu"  # of the buffers: a plugin copies from the host's
        self._take(*self._properties())
        self._buffers = Buffers(self._session, self.contract, self.device)

    def _take(self, info: dict, sigmas: tuple[float, ...], contract: Contract, preconditioning: Preconditioning) -> None:
        """What the file states becomes the generator's."""
        self.info, self.graph_sigmas, self.contract, self.preconditioning = info, sigmas, contract, preconditioning
        self.precision = contract.precision
        self.channels, self.resolution = contract.channels, contract.resolution
        self.classes = info.get("classes") or [str(number) for number in range(contract.classes or 0)] or None
        self.batch_size = contract.batch or max(1, BATCH_ELEMENTS // (contract.channels * contract.resolution**2))

    def _properties(self) -> tuple[dict, tuple[float, ...], Contract, Preconditioning]:
        """(config, noise levels, contract, scalings) as the file states them; InputError where its inputs are others than it says."""
        found = "names that are not UTF-8"  # which a damaged file may have
        try:
            found = f"inputs {', '.join(' '.join(value.name.split()) for value in self._session.get_inputs())}"[:200]
            properties = self._session.get_modelmeta().custom_metadata_map
            values = [(value.name, value.type, value.shape[1:]) for value in (*self._session.get_inputs(), *self._session.get_outputs())]
            info, sigmas, form = (json.loads(properties[f"fastcm.{name}"]) for name in ("config", "sigmas", "graph"))
            check_model_fields(info, self.path)
            contract, preconditioning = Contract(**form).checked(), Preconditioning(**info["preconditioning"])
            stated = {**contract.inputs, "images": contract.output}
            wanted = [(name, TENSOR_TYPES[dtype], list(shape)) for name, (shape, dtype) in stated.items()]
            names = info.get("classes")
            known = values == wanted and len(sigmas) == contract.steps and (not names or len(names) == contract.classes)
        except (KeyError, TypeError, ValueError, AttributeError, InputError):
            known = False
        if not known:
            raise InputError(f"not a generator exported by this fastcm in {self.path}: {found}. Use fastcm export MODEL --onnx.")
        return info, tuple(float(sigma) for sigma in sigmas), contract, preconditioning

    def warm(self, batch_sizes: Iterable[int] = (1,)) -> float:
        """Allocates, and on CUDA captures, what calls of these sizes need, by drawing one of each; returns the seconds."""
        began = time.perf_counter()
        for size in batch_sizes:
            self(range(size))
        return time.perf_counter() - began

    @property
    def sigma_range(self) -> tuple[float, float]:
        return self.preconditioning.sigma_range

    def sigmas(self, steps: int | None = None, sigmas=None) -> tuple[float, ...]:
        """The graph's own noise levels; InputError where `steps` or `sigmas` ask for others."""
        if steps is None and sigmas is None:
            return self.graph_sigmas
        asked = noise_levels(steps, sigmas, self.preconditioning, {str(len(self.graph_sigmas)): list(self.graph_sigmas)})
        if not (len(asked) == len(self.graph_sigmas) and np.allclose(asked, self.graph_sigmas, rtol=1e-6)):
            text = ",".join(f"{sigma:g}" for sigma in self.graph_sigmas)
            raise InputError(f"other noise levels than the graph's in steps or sigmas: {self.path} has {text}. Export again with those.")
        return asked

    def __call__(self, seeds, labels=None, *, steps: int | None = None, sigmas=None, output: str = "uint8", sampler: str | None = None):
        """As `Generator.__call__`; steps and sigmas must be the graph's own, and a uint8 graph has no float output."""
        check_output(output)
        batches = [images for _, _, images in self.batches(seeds, labels, steps=steps, sigmas=sigmas, output=output, sampler=sampler)]
        dtype = np.float32 if output == "float" else np.uint8
        images = np.concatenate(batches) if batches else np.empty((0, self.resolution, self.resolution, self.channels), dtype)
        return finished(images, output)

    def batches(
        self, seeds, labels=None, *, steps: int | None = None, sigmas=None, output: str = "uint8", sampler: str | None = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray | None, np.ndarray]]:
        """Yields (seeds, labels, images) of one batch after the other; arguments as in a call, checked at once."""
        seeds = seed_array(seeds)
        labels = label_array(labels, seeds, self.classes)
        self.sigmas(steps, sigmas)
        if self.contract.task == DENOISE:
            raise InputError(f"a denoiser in MODEL: {self.path}. It needs a solver outside the graph; docs/deploy.md has one in NumPy.")
        if self.contract.task != GENERATE:
            raise InputError(f"a graph that edits pictures in MODEL: {self.path}. Use fastcm edit {self.contract.task}.")
        if sampler not in (None, "consistency"):
            raise InputError(f"a solver for an exported graph in --sampler: {sampler}. Use the folder that it was exported from.")
        return self._batches(seeds, labels, output, lambda count: {})

    def _batches(self, seeds: np.ndarray, labels: np.ndarray | None, output: str, pictures: Callable[[int], Feeds]):
        """Images batch by batch; pictures(count): what an edit takes besides noise and labels, for so many images."""
        if output == "float" and self.contract.uint8:
            raise InputError(f"float images from a uint8 graph in output: {self.path}. Export it without --uint8.")
        for start in range(0, len(seeds), self.batch_size):
            rows = slice(start, start + self.batch_size)
            part = None if labels is None else labels[rows]
            feeds = {**pictures(len(seeds[rows])), **self._drawn_inputs(seeds[rows])}
            if part is not None:
                feeds["labels"] = self.contract.labels(part)
            yield seeds[rows], part, self._images(feeds, seeds[rows], output)

    def _drawn_inputs(self, seeds: np.ndarray) -> Feeds:
        """The seeds themselves, or the noise that they stand for."""
        if self.contract.seeded:
            return {"seeds": seeds}
        source = SeedNoise(torch.from_numpy(seeds.copy()), (self.channels, self.resolution, self.resolution))
        fields = [source.normal(step) for step in range(len(self.graph_sigmas))]
        return {"noise": (fields[0] if len(fields) == 1 else torch.stack(fields, dim=1)).numpy()}

    def run(self, feeds: Feeds) -> np.ndarray:
        """The graph itself: inputs by name with a row per image, as `.contract.inputs` has them -> its images, checked for nothing.

        Raises InputError for names, types, shapes and numbers that it does not take, RunError where ONNX Runtime fails.
        """
        feeds = {name: np.asarray(array) for name, array in feeds.items()}
        self.contract.check(feeds)
        shape, dtype = self.contract.output
        if len(next(iter(feeds.values()))) == 0:
            return np.empty((0, *shape), dtype)
        try:
            return self._buffers.run(feeds)
        except Exception as error:
            reason = reason_of(error)
            raise RunError(f"ONNX Runtime failed in {self.path}: {reason}. Export it again.") from None

    def _images(self, feeds: Feeds, seeds: np.ndarray, output: str) -> np.ndarray:
        """The images of one batch, uint8 or float32 [B, H, W, C]."""
        images = self.run(feeds)
        if self.contract.uint8:
            return images
        finite = np.isfinite(images).reshape(len(images), -1).all(axis=1)
        if not finite.all():
            bad = seeds[~finite]
            where = f"seed {bad[0]} ({len(bad)} of {len(seeds)} images)"
            raise RunError(f"non-finite pixels in the image of {where} from {self.path}. Export it again.")
        if output == "float":
            return images.transpose(0, 2, 3, 1)
        return kernels.to_uint8(torch.from_numpy(images), layout="NHWC").numpy()
