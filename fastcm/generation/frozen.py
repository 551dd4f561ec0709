"""A denoiser at one fixed noise level: the scalings and the whole noise embedding become constants."""

import copy

import torch
from torch import Tensor, nn

from fastcm import kernels
from fastcm.consistency.denoiser import Coefficients, Denoiser, expand, working_dtype

# Where the networks of fastcm.networks read the embedding: one nn.Linear per residual block.
EMBEDDING_LAYERS = ("emb_layers.1", "affine")


class ClassTable(nn.Module):
    """What an embedding layer gives for each class, [classes + 1, C]; the last row is for no class."""

    def __init__(self, table: Tensor):
        super().__init__()
        self.register_buffer("table", table)

    def forward(self, rows: Tensor | None) -> Tensor:
        return self.table if rows is None else self.table.index_select(0, rows)


class FrozenLevel(nn.Module):
    """D(x, sigma, labels) with sigma a constant: x fp32 [B, C, H, W], labels int64 [B] or None -> fp32 [B, C, H, W], unclamped.

    The arithmetic is the denoiser's; only what depends on sigma alone is computed once, here.
    """

    def __init__(self, network: nn.Module, coefficients: Coefficients, sigma: float):
        super().__init__()
        self.network = network
        self.sigma = sigma
        for name, value in coefficients._asdict().items():
            self.register_buffer(name, value)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        F_x = self.network((expand(self.c_in, x) * x).to(working_dtype(self.network)), self.c_noise.expand(x.shape[0]), labels)
        if x.is_cuda:
            return kernels.precondition(x, F_x, self.c_skip.expand(x.shape[0]), self.c_out.expand(x.shape[0]))
        return kernels.precondition(x, F_x, self.c_skip, self.c_out)


def share(network: nn.Module) -> nn.Module:
    """A copy of the module tree that holds the same parameters and buffers."""
    tensors = [*network.parameters(), *network.buffers()]
    return copy.deepcopy(network, {id(tensor): tensor for tensor in tensors})


def can_fold(network: nn.Module) -> bool:
    """True for networks that offer `embed(c_noise, labels)` and read its result in EMBEDDING_LAYERS only."""
    return hasattr(network, "embed") and any(name.endswith(EMBEDDING_LAYERS) for name, _ in network.named_modules())


@torch.no_grad()
def fold(network: nn.Module, c_noise: Tensor, *, classes: int | None, worker: nn.Module) -> nn.Module:
    """A copy of `worker` that works at c_noise [1] only and shares its weights: every embedding layer is a table with a row per class.

    worker: `network` itself or its twin of another dtype. The tables are computed in the precision of `network`.
    """
    emb = network.embed(c_noise, None)
    if classes:
        every = torch.arange(classes, device=c_noise.device)
        emb = torch.cat([network.embed(c_noise.expand(classes), every), emb])
    folded = share(worker)
    for name, module in network.named_modules():
        if name.endswith(EMBEDDING_LAYERS):
            folded.set_submodule(name, ClassTable(module(emb).to(working_dtype(worker))))
    # The blocks index their tables with what `embed` returns: the labels themselves.
    folded.embed = (lambda c_noise, labels=None: labels) if classes else (lambda c_noise, labels=None: None)
    return folded


@torch.no_grad()
def freeze(
    denoiser: Denoiser, sigma: float, *, classes: int | None = None, worker: nn.Module | None = None, folded: bool = True
) -> FrozenLevel:
    """The denoiser at `sigma` alone. worker: the network's twin in the dtype to work in, the network itself where not given.

    A network that cannot be folded, or should not be, keeps its embedding, computed at every call.
    """
    worker = denoiser.network if worker is None else worker
    device = next((p.device for p in denoiser.parameters()), torch.device("cpu"))
    coefficients = denoiser.coefficients(torch.tensor([sigma], dtype=torch.float32, device=device))
    if folded and can_fold(denoiser.network):
        worker = fold(denoiser.network, coefficients.c_noise, classes=classes, worker=worker)
    return FrozenLevel(worker, coefficients, sigma).eval()
