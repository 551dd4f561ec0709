"""The whole generator as one exported program: unit noise and labels in, images out, with the noise levels folded into constants."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastcm import kernels
from fastcm.consistency.denoiser import Denoiser
from fastcm.generation.frozen import freeze
from fastcm.generation.sampler import GivenNoise, multistep

# Example shapes of the export: torch.export takes 0 and 1 for constants of the program, so the examples have more rows.
EXAMPLE_BATCH = 2


class Program(nn.Module):
    """noise fp32 [B, C, H, W] unit normal (K > 1 levels: [B, K, C, H, W]), labels int64 [B] -> images.

    images: fp32 [B, C, H, W] in [-1, 1], or uint8 [B, H, W, C] with uint8=True. Models without classes take noise alone.
    """

    def __init__(self, denoiser: Denoiser, sigmas: Sequence[float], *, classes: int | None, uint8: bool = False):
        super().__init__()
        self.levels = nn.ModuleList(freeze(denoiser, sigma, classes=classes) for sigma in sigmas)
        self.sigma_min = denoiser.preconditioning.sigma_min
        self.uint8 = uint8

    def forward(self, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        fields = [noise] if len(self.levels) == 1 else noise.unbind(1)
        images = multistep(list(self.levels), GivenNoise(fields), sigma_min=self.sigma_min, labels=labels)
        return kernels.to_uint8(images, layout="NHWC") if self.uint8 else images


def example_inputs(program: Program, *, channels: int, resolution: int, classes: int | None) -> tuple[Tensor, ...]:
    """Inputs of the program's shapes, from a fixed generator."""
    steps, image = len(program.levels), (channels, resolution, resolution)
    shape = (EXAMPLE_BATCH, *image) if steps == 1 else (EXAMPLE_BATCH, steps, *image)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return (noise, torch.arange(EXAMPLE_BATCH) % classes) if classes else (noise,)


def input_names(classes: int | None) -> list[str]:
    return ["noise", "labels"] if classes else ["noise"]


def export_program(program: Program, inputs: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    """torch.export with the batch symbolic; reference ops only, never a Triton kernel."""
    dynamic = tuple({0: torch.export.Dim("batch", min=1)} for _ in inputs)
    with torch.no_grad():
        return torch.export.export(program.eval(), inputs, dynamic_shapes=dynamic[: len(inputs)])
