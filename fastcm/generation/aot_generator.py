"""A compiled package (.pt2) as a generator: the same call as torch's, run by machine code that the file brings. A file to trust."""

import json
from pathlib import Path

import numpy as np
import torch

from fastcm.consistency.denoiser import Preconditioning
from fastcm.errors import InputError, RunError, reason_of
from fastcm.generation.onnx_contract import Contract
from fastcm.generation.onnx_generator import Feeds, OnnxGenerator
from fastcm.weights.fields import check_model_fields


class AotGenerator(OnnxGenerator):
    """generator(seeds, labels) -> images from a file that `fastcm export --aot` wrote; what it can do is what an exported graph can.

    Loading it runs code of the file. Noise levels and task are those that it was exported with.
    """

    def __init__(self, path: str | Path):
        from torch._inductor import aoti_load_package

        self.path = Path(path)
        try:
            self._package = aoti_load_package(str(self.path))
            properties = self._package.get_metadata()
        except Exception as error:
            reason = reason_of(error)
            raise InputError(f"torch {torch.__version__} cannot load {self.path}: {reason}. Export it again with this torch.") from None
        try:
            info, sigmas, form = (json.loads(properties[f"fastcm.{name}"]) for name in ("config", "sigmas", "graph"))
            check_model_fields(info, self.path)
            contract, preconditioning = Contract(**form).checked(), Preconditioning(**info["preconditioning"])
        except (KeyError, TypeError, ValueError, InputError):
            raise InputError(f"not a generator exported by this fastcm in {self.path}. Use fastcm export MODEL --aot.") from None
        self._take(info, tuple(float(sigma) for sigma in sigmas), contract, preconditioning)
        self.provider, self.device = "AOTInductor cpu", "cpu"

    def run(self, feeds: Feeds) -> np.ndarray:
        """As `OnnxGenerator.run`. A package checks nothing itself: a wrong shape would read memory that is not its own."""
        feeds = {name: np.asarray(array) for name, array in feeds.items()}
        self.contract.check(feeds)
        shape, dtype = self.contract.output
        count = len(next(iter(feeds.values())))
        if count == 0:
            return np.empty((0, *shape), dtype)
        size = self.contract.batch or count
        parts = []
        for start in range(0, count, size):
            rows = np.minimum(np.arange(start, start + size), count - 1)  # the last row fills up what is missing
            tensors = [torch.from_numpy(np.ascontiguousarray(feeds[name][rows])) for name in self.contract.inputs]
            try:
                images = self._package(*tensors)
            except Exception as error:
                raise RunError(f"{self.path} failed: {reason_of(error)}. Export it again.") from None
            parts.append(images.numpy())
        return np.concatenate(parts)[:count]
