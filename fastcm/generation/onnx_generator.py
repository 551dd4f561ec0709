"""An exported file as a generator: the same call as torch's, run by ONNX Runtime."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from fastcm import kernels
from fastcm.consistency.denoiser import Preconditioning
from fastcm.errors import InputError, RunError, nearest
from fastcm.generation.onnx_session import PROVIDERS, open_session
from fastcm.generation.request import check_output, finished, label_array, noise_levels, seed_array
from fastcm.generation.sampler import SeedNoise

# Elements of one batch: the CPU kernels of ONNX Runtime gain nothing beyond.
BATCH_ELEMENTS = 1 << 16


class OnnxGenerator:
    """generator(seeds, labels) -> images from a file that `fastcm export --onnx` wrote. Safe to call from many threads.

    provider: "auto", "cpu", "cuda" or "tensorrt"; `.provider` is the one that is really active. The graph's noise levels are fixed.
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
        self.device = "cpu" if active == "cpu" else "cuda"
        properties = self._properties()
        self.info, self.graph_sigmas, self.precision = properties
        self.preconditioning = Preconditioning(**self.info["preconditioning"])
        noise, image = self._session.get_inputs()[0], self._session.get_outputs()[0]
        self._uint8 = image.type == "tensor(uint8)"
        self.channels, self.resolution = noise.shape[-3], noise.shape[-1]
        self.classes = self._classes()
        self.batch_size = max(1, BATCH_ELEMENTS // (self.channels * self.resolution**2))

    def _properties(self) -> tuple[dict, tuple[float, ...], str]:
        properties = self._session.get_modelmeta().custom_metadata_map
        inputs, outputs = ([value.name for value in values] for values in (self._session.get_inputs(), self._session.get_outputs()))
        try:
            info, sigmas, precision = (json.loads(properties[f"fastcm.{name}"]) for name in ("config", "sigmas", "precision"))
        except (KeyError, ValueError):
            info = None
        if info is None or inputs not in (["noise"], ["noise", "labels"]) or outputs != ["images"]:
            found = f"inputs {', '.join(inputs)}"
            raise InputError(f"not a generator exported by fastcm in {self.path}: {found}. Use fastcm export MODEL --onnx.")
        return info, tuple(sigmas), precision

    def _classes(self) -> list[str] | None:
        if len(self._session.get_inputs()) == 1:
            return None
        count = self.info.get("network", {}).get("num_classes") or 0
        return self.info.get("classes") or [str(number) for number in range(count)]

    @property
    def sigma_range(self) -> tuple[float, float]:
        return self.preconditioning.sigma_min, self.preconditioning.sigma_max

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
        if sampler not in (None, "consistency"):
            raise InputError(f"a solver for an exported graph in --sampler: {sampler}. Use the folder that it was exported from.")
        if output == "float" and self._uint8:
            raise InputError(f"float images from a uint8 graph in output: {self.path}. Export it without --uint8.")
        return self._batches(seeds, labels, output)

    def _batches(self, seeds: np.ndarray, labels: np.ndarray | None, output: str):
        for start in range(0, len(seeds), self.batch_size):
            rows = slice(start, start + self.batch_size)
            part = None if labels is None else labels[rows]
            yield seeds[rows], part, self._batch(seeds[rows], part, output)

    def _batch(self, seeds: np.ndarray, labels: np.ndarray | None, output: str) -> np.ndarray:
        source = SeedNoise(torch.from_numpy(seeds.copy()), (self.channels, self.resolution, self.resolution))
        fields = [source.normal(step) for step in range(len(self.graph_sigmas))]
        feed = {"noise": (fields[0] if len(fields) == 1 else torch.stack(fields, dim=1)).numpy()}
        if labels is not None:
            feed["labels"] = labels
        try:
            images = self._session.run(["images"], feed)[0]
        except Exception as error:
            reason = str(error).strip().splitlines()[0]
            raise RunError(f"ONNX Runtime failed in {self.path}: {reason}. Export it again.") from None
        if self._uint8:
            return images
        finite = np.isfinite(images).reshape(len(images), -1).all(axis=1)
        if not finite.all():
            bad = seeds[~finite]
            where = f"seed {bad[0]} ({len(bad)} of {len(seeds)} images)"
            raise RunError(f"non-finite pixels in the image of {where} from {self.path}. Export it again.")
        if output == "float":
            return images.transpose(0, 2, 3, 1)
        return kernels.to_uint8(torch.from_numpy(images), layout="NHWC").numpy()
