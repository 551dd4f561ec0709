"""The editing tasks of an exported graph: pictures and noise in, one edited picture per seed out."""

import numpy as np
import torch

from fastcm.errors import InputError
from fastcm.generation import editing
from fastcm.generation.editing_tasks import EditingTasks
from fastcm.generation.onnx_contract import INPAINT, SUPERRES
from fastcm.generation.request import check_output, finished, label_array, seed_array


class PictureChecks(EditingTasks):
    """What EditingTasks asks of pictures and masks, on the CPU, whatever runs the graph."""

    device = "cpu"

    def __init__(self, channels: int, resolution: int):
        self.channels, self.resolution = channels, resolution


class OnnxEditing:
    """inpaint or superres, by the task that the graph was exported for; arguments, their checks and results are those of EditingTasks.

    sigmas, where given, must be the graph's own.
    """

    def inpaint(self, image, mask, seeds=(0,), labels=None, *, sigmas=None, output: str = "uint8"):
        self._require(INPAINT)
        checks = PictureChecks(self.channels, self.resolution)
        pictures = {"image": checks._picture(image), "mask": checks._mask(mask).float()}
        return self._edited(pictures, seeds, labels, sigmas, output)

    def superres(self, image, factor: int | None = None, seeds=(0,), labels=None, *, sigmas=None, output: str = "uint8"):
        """factor: the graph's own, which it may be left to."""
        self._require(SUPERRES)
        own = self.contract.factor
        if factor not in (None, own):
            raise InputError(f"another factor than the graph's in factor: {factor}. {self.path} enlarges {own} times.")
        small = self.resolution // own
        if np.shape(image)[:2] == (small, small):
            image = np.asarray(image).repeat(own, axis=0).repeat(own, axis=1)
        means = editing.patch_means(own)(PictureChecks(self.channels, self.resolution)._picture(image))
        return self._edited({"image": means[..., ::own, ::own]}, seeds, labels, sigmas, output)

    def _require(self, task: str) -> None:
        if self.contract.task != task:
            raise InputError(f"no {task} in an exported graph in MODEL: {self.path}. Export it with --task {task}.")

    def _edited(self, pictures: dict[str, torch.Tensor], seeds, labels, sigmas, output: str):
        seeds = seed_array(seeds)
        labels = label_array(labels, seeds, self.classes)
        self.sigmas(None, sigmas)
        arrays = {name: picture.numpy() for name, picture in pictures.items()}

        def repeated(count: int) -> dict[str, np.ndarray]:
            return {name: array.repeat(count, axis=0) for name, array in arrays.items()}

        batches = [images for _, _, images in self._batches(seeds, labels, check_output(output), repeated)]
        return finished(np.concatenate(batches), output)
