"""The whole generator as one program: noise or seeds, labels and pictures in, images out, with the noise levels folded into constants."""

import copy
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcm import kernels
from fastcm.consistency.denoiser import Denoiser
from fastcm.generation import editing
from fastcm.generation.frozen import ClassTable, freeze
from fastcm.generation.onnx_contract import DENOISE, GENERATE, INPAINT, SUPERRES, Contract
from fastcm.generation.sampler import GivenNoise, Noise, SeedNoise, multistep
from fastcm.networks.inference import constant, for_inference

# Example shapes of the export: torch.export takes 0 and 1 for constants of the program, so the examples have more rows.
EXAMPLE_BATCH = 2
# Rows of all levels' tables up to which an embedding is folded, where there are several levels: ImageNet's classes at two.
FOLDED_ROWS = 2048
# torch.export reads a module's forward by the names of its arguments, so each set of inputs has a class of its own.


class Program(nn.Module):
    """noise fp32 [B, C, H, W] unit normal (K > 1 levels: [B, K, C, H, W]), labels int64 [B] -> images.

    images: fp32 [B, C, H, W], or uint8 [B, H, W, C] with contract.uint8. Models without classes take no labels.
    """

    def __init__(self, denoiser: Denoiser, sigmas: Sequence[float], contract: Contract):
        super().__init__()
        worker = worker_of(denoiser, contract)
        # Over many levels, a table per class and level would outweigh the network.
        folded = len(sigmas) == 1 or len(sigmas) * (contract.classes or 0) <= FOLDED_ROWS
        folded |= contract.floats  # class embeddings compare integers
        self.levels = nn.ModuleList(freeze(denoiser, s, classes=contract.classes, worker=worker, folded=folded) for s in sigmas)
        if contract.floats and contract.classes:
            for level in self.levels:
                level.table = OneHotTable(level.table)
        self.sigmas = tuple(sigmas)
        self.sigma_min = denoiser.preconditioning.sigma_min
        self.contract = contract

    def forward(self, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.generate(self.given(noise), labels)

    def given(self, noise: Tensor) -> GivenNoise:
        return GivenNoise([noise] if len(self.levels) == 1 else noise.unbind(1))

    def generate(self, noise: Noise, labels: Tensor | None) -> Tensor:
        return self.finish(multistep(list(self.levels), noise, sigma_min=self.sigma_min, labels=labels))

    def edit(self, known: Tensor, project: editing.Projection, noise: Tensor, labels: Tensor | None) -> Tensor:
        levels = iter(self.levels)  # `edit` visits them in order, each at its own sigma
        images = editing.edit(
            lambda x, sigma, labels: next(levels)(x, labels),
            self.given(noise),
            known,
            project=project,
            sigmas=self.sigmas,
            sigma_min=self.sigma_min,
            labels=labels,
        )
        return self.finish(images)

    def finish(self, images: Tensor) -> Tensor:
        if not self.contract.uint8:
            return images
        # Channels last before the cast: TensorRT and WebGPU have bytes at the border of a graph alone.
        return kernels.to_uint8(images.permute(0, 2, 3, 1).contiguous(), layout="NCHW")


def worker_of(denoiser: Denoiser, contract: Contract) -> nn.Module:
    """The denoiser's network for inference, in the contract's precision."""
    worker = for_inference(denoiser.network)
    return copy.deepcopy(worker).half() if contract.precision == "fp16" else worker


class OneHotTable(nn.Module):
    """A ClassTable for labels as rows: fp32 [B, classes], 1 at the class, zeros for none -> the row's pieces, each [B, width, 1, 1].

    Each piece is a product of its own, so that no runtime has to look up or to split.
    """

    def __init__(self, table: ClassTable):
        super().__init__()
        rows = table.rows.flatten(1)
        pieces = zip((rows[:-1] - rows[-1:]).split(table.widths, 1), rows[-1].split(table.widths), strict=True)
        self.pieces = nn.ModuleList(nn.Linear(len(rows) - 1, width) for width in table.widths)
        for layer, (weight, bias) in zip(self.pieces, pieces, strict=True):
            layer.weight, layer.bias = constant(weight.T.contiguous()), constant(bias.contiguous())

    def forward(self, labels: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(labels)[:, :, None, None] for layer in self.pieces)


class SeededProgram(Program):
    """seeds int64 [B], labels -> the images that a generator draws of these seeds: the noise stream is part of the program."""

    def forward(self, seeds: Tensor, labels: Tensor | None = None) -> Tensor:
        contract = self.contract
        return self.generate(SeedNoise(seeds, (contract.channels, contract.resolution, contract.resolution)), labels)


class InpaintProgram(Program):
    """image fp32 [B, C, H, W] in [-1, 1], mask fp32 [B, 1, H, W] (from 0.5 on a pixel is generated), noise, labels -> images."""

    def forward(self, image: Tensor, mask: Tensor, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        if self.contract.floats:
            kept = 1 - (mask + 0.5).floor().clamp(0, 1)
            project = lambda x: x * kept  # noqa: E731
        else:
            project = editing.outside(mask >= 0.5)
        return self.edit(project(image), project, noise, labels)


class SuperresProgram(Program):
    """image fp32 [B, C, H / factor, W / factor] in [-1, 1], noise, labels -> images [B, C, H, W] with these means of patches."""

    def forward(self, image: Tensor, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        known = F.interpolate(image, scale_factor=self.contract.factor, mode="nearest")
        return self.edit(known, editing.patch_means(self.contract.factor), noise, labels)


class DenoiseProgram(Program):
    """x fp32 [B, C, H, W], sigma fp32 [B], labels int64 [B] -> D(x, sigma, labels), fp32 [B, C, H, W], unclamped: the whole noise
    embedding is part of the program."""

    def __init__(self, denoiser: Denoiser, sigmas: Sequence[float], contract: Contract):
        super().__init__(denoiser, sigmas, contract)
        self.levels = nn.ModuleList([Denoiser(worker_of(denoiser, contract), denoiser.preconditioning)])

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.levels[0](x, sigma, labels)


def build(denoiser: Denoiser, sigmas: Sequence[float], contract: Contract) -> Program:
    """The program of a contract, with fp32 weights or a half-precision copy of them."""
    kinds = {GENERATE: SeededProgram if contract.seeded else Program, INPAINT: InpaintProgram, SUPERRES: SuperresProgram}
    kinds[DENOISE] = DenoiseProgram
    return kinds[contract.task](denoiser, sigmas, contract).eval()


def example_inputs(contract: Contract) -> tuple[Tensor, ...]:
    """Inputs of the contract's shapes, from a fixed generator."""
    random = np.random.default_rng(0)
    batch = contract.batch or EXAMPLE_BATCH
    arrays = []
    for shape, dtype in contract.inputs.values():
        whole = (batch, *shape)
        arrays.append(np.zeros(whole, dtype) if dtype == np.int64 else random.standard_normal(whole).clip(-1, 1).astype(dtype))
    return tuple(torch.from_numpy(array) for array in arrays)


def export_program(program: Program, inputs: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    """torch.export with the batch symbolic, or fixed where the contract says so; reference ops only, never a Triton kernel."""
    dynamic = tuple({0: torch.export.Dim("batch", min=1)} for _ in inputs) if program.contract.batch is None else None
    with torch.no_grad():
        return torch.export.export(program, inputs, dynamic_shapes=dynamic)
