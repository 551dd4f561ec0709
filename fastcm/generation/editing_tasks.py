"""The editing tasks as methods of a generator: pictures in, one edited picture per seed out."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fastcm.consistency.denoiser import Denoiser
from fastcm.errors import InputError
from fastcm.generation import editing
from fastcm.generation.request import check_output, finished, label_array, noise_levels, seed_array
from fastcm.generation.sampler import GivenNoise, SeedNoise

# Frames of an interpolation where none are asked for.
FRAMES = 16

# Called after every network call of an edit with the number of images in it.
Progress = Callable[[int], object]


class EditingTasks:
    """inpaint, colorize, superres, stroke, interpolate, denoise, for a class that draws batches as `Generator` does.

    Images are uint8 [H, W, C] or [H, W], or float in [-1, 1] of those shapes, at the model's resolution (`fastcm.picture` brings others to
    it). labels and output are those of a generator's call, but float images may pass the ends of [-1, 1], so that what is known is kept.
    sigmas, the noise levels to visit, are by default the 39 of the paper's grid; progress, where given, is called after every network call
    with the number of images in it. Every task raises InputError for an image that does not fit the model.

    The class has channels, resolution, classes, device, preconditioning, level(sigma), _worker (the network) and _batches.
    """

    def inpaint(self, image, mask, seeds=(0,), labels=None, *, sigmas=None, output: str = "uint8", progress: Progress | None = None):
        """Generates the pixels where `mask` [H, W] is not 0 (uint8: 128 or more); the others come back untouched, exactly."""
        picture, chosen = self._picture(image), self._mask(mask)
        project = editing.outside(chosen)
        return self._edited(project(picture), project, seeds, labels, sigmas=sigmas, output=output, progress=progress)

    def colorize(self, image, seeds=(0,), labels=None, *, sigmas=None, output: str = "uint8", progress: Progress | None = None):
        """Colours for the luminance of `image`, which may be grey or in colour."""
        if self.channels != 3:
            raise InputError(f"a model without colours for colorize: {self.channels} channels. Use a model of RGB images.")
        picture = self._picture(image, grey=True)
        return self._edited(editing.luminance(picture), editing.luminance, seeds, labels, sigmas=sigmas, output=output, progress=progress)

    def superres(
        self, image, factor: int, seeds=(0,), labels=None, *, sigmas=None, output: str = "uint8", progress: Progress | None = None
    ):
        """Details for an image of resolution / factor pixels, or for the patch means of one of full size."""
        if not isinstance(factor, int) or factor < 2 or self.resolution % factor:
            raise InputError(f"illegal value in factor: {factor}. Give an integer from 2 on that divides {self.resolution}.")
        project = editing.patch_means(factor)
        small = self.resolution // factor
        if np.shape(image)[:2] == (small, small):
            image = np.asarray(image).repeat(factor, axis=0).repeat(factor, axis=1)
        return self._edited(project(self._picture(image)), project, seeds, labels, sigmas=sigmas, output=output, progress=progress)

    def stroke(
        self, image, seeds=(0,), labels=None, *, sigmas=editing.STROKE_SIGMAS, output: str = "uint8", progress: Progress | None = None
    ):
        """A realistic image from a rough painting; sigmas[0] says how much of it is kept: the smaller, the more."""
        picture = self._picture(image)
        how = {"sigmas": sigmas, "output": output, "progress": progress}
        return self._edited(torch.zeros_like(picture), editing.nothing, seeds, labels, start=picture, **how)

    def denoise(self, image, sigma: float, labels=None, *, output: str = "uint8"):
        """D(image, sigma) [1, H, W, C] of an image whose pixels, in [-1, 1], have noise of deviation sigma."""
        picture = self._picture(image)
        (level,) = self._levels((sigma,))
        denoise = self._edit_denoiser()
        draw = lambda noise, labels: denoise(picture, picture.new_full((1,), level), labels).clamp(-1, 1)  # noqa: E731
        return self._drawn(draw, (0,), labels, output)

    def interpolate(self, seeds, labels=None, *, frames: int = FRAMES, output: str = "uint8"):
        """`frames` images on the way from the first seed's to the last's: spherical interpolation of their noise, one class throughout."""
        ends = seed_array(seeds)
        if len(ends) < 2:
            raise InputError(f"too few seeds to interpolate in seeds: {len(ends)}. Give two or more.")
        if not isinstance(frames, int) or frames < 2:
            raise InputError(f"illegal value in frames: {frames}. Give an integer of 2 or more.")
        if labels is None and self.classes:
            labels = int(ends[0] % len(self.classes))
        sigma_max = self.preconditioning.sigma_max
        shape = (self.channels, self.resolution, self.resolution)
        fields = editing.path(SeedNoise(torch.from_numpy(ends).to(self.device), shape).normal(0), frames)
        level = self.level(sigma_max)

        def draw(frame: SeedNoise, labels: Tensor | None) -> Tensor:
            return level(sigma_max * GivenNoise([fields[frame.seeds]]).normal(0), labels).clamp(-1, 1)

        return self._drawn(draw, range(frames), labels, output)  # a frame's number in a seed's place

    def _edited(
        self, known: Tensor, project, seeds, labels, *, sigmas, output: str, progress: Progress | None, start: Tensor | None = None
    ):
        visited, denoise = self._levels(sigmas), self._edit_denoiser()
        sigma_min = self.preconditioning.sigma_min

        def counted(x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
            D_x = denoise(x, sigma, labels)
            if progress is not None:
                progress(len(x))
            return D_x

        def draw(noise: SeedNoise, labels: Tensor | None) -> Tensor:
            return editing.edit(counted, noise, known, project=project, sigmas=visited, sigma_min=sigma_min, start=start, labels=labels)

        return self._drawn(draw, seeds, labels, output)

    def _edit_denoiser(self) -> Denoiser:
        """Unfolded: a table per class and level would outweigh the network over the many levels of an edit."""
        return Denoiser(self._worker, self.preconditioning)

    def _levels(self, sigmas) -> tuple[float, ...]:
        p = self.preconditioning
        if sigmas is None:
            return editing.edit_sigmas(sigma_min=p.sigma_range[0], sigma_max=p.sigma_max, rho=p.rho)
        return noise_levels(None, sigmas, p, {})

    def _drawn(self, draw: Callable[[SeedNoise, Tensor | None], Tensor], seeds, labels, output: str):
        """The images of draw(noise, labels), batch by batch; no CUDA graph, which would have to be captured for every picture."""
        seeds = seed_array(seeds)
        labels = label_array(labels, seeds, self.classes)
        batches = [images for _, _, images in self._batches((None, draw), seeds, labels, check_output(output))]
        return finished(np.concatenate(batches), output)

    def _picture(self, image, *, grey: bool = False) -> Tensor:
        """The image as fp32 [1, C, H, W] in [-1, 1]; with grey, one channel stands for three."""
        pixels = np.asarray(image)
        pixels = pixels[..., None] if pixels.ndim == 2 else pixels
        if grey and pixels.ndim == 3 and pixels.shape[2] == 1:
            pixels = pixels.repeat(3, axis=2)
        wanted = (self.resolution, self.resolution, self.channels)
        if pixels.shape != wanted:
            found = "greyscale for a colour model" if pixels.shape == (*wanted[:2], 1) else "wrong size"
            text = "x".join(str(size) for size in pixels.shape)
            raise InputError(f"{found} in image: {text}. The model has {'x'.join(str(size) for size in wanted)}.")
        if pixels.dtype == np.uint8:
            pixels = pixels / np.float32(127.5) - np.float32(1)
        elif not np.issubdtype(pixels.dtype, np.floating):
            raise InputError(f"wrong type in image: {pixels.dtype}. Give uint8, or float in [-1, 1].")
        if not np.isfinite(pixels).all():
            raise InputError("non-finite pixels in image: NaN or infinity. Give finite numbers.")
        return torch.from_numpy(np.ascontiguousarray(pixels, np.float32)).permute(2, 0, 1)[None].contiguous().to(self.device)

    def _mask(self, mask) -> Tensor:
        """bool [1, 1, H, W], True where pixels are generated."""
        chosen = np.asarray(mask)
        if chosen.shape != (self.resolution, self.resolution):
            text = "x".join(str(size) for size in chosen.shape)
            raise InputError(f"wrong size in mask: {text}. The model has {self.resolution}x{self.resolution}.")
        chosen = chosen >= 128 if chosen.dtype == np.uint8 else chosen != 0
        if not chosen.any():
            raise InputError("an all-black mask in mask: no pixel to generate. White (128 or more) is generated, black kept.")
        return torch.from_numpy(chosen)[None, None].to(self.device)
