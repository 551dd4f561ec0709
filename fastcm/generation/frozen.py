"""A denoiser at one fixed noise level: the scalings and the whole noise embedding become constants."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcm import kernels
from fastcm.consistency.denoiser import Coefficients, Denoiser, expand, working_dtype
from fastcm.networks.blocks import GroupNorm, ScaleShift
from fastcm.networks.inference import constant, share
from fastcm.networks.magnitude import Modulation

# The most that a table of classes may take, and the numbers in the labels of the classes that are embedded together.
TABLE_BYTES, EMBEDDED_ELEMENTS = 256 << 20, 1 << 22


class ClassTable(nn.Module):
    """A row for each class and a last one for none. labels int64 [B] or None -> the row's pieces, each [B or 1, width, 1, 1].

    An exported graph gives a label that is no class the row for none, whatever its runtime makes of an index out of range.
    """

    def __init__(self, pieces: list[Tensor]):
        super().__init__()
        self.widths = [piece.shape[1] for piece in pieces]
        self.register_buffer("rows", torch.cat(pieces, dim=1)[:, :, None, None])

    def forward(self, labels: Tensor | None) -> tuple[Tensor, ...]:
        if labels is None:
            return self.rows[-1:].split(self.widths, dim=1)
        if torch.compiler.is_exporting():
            none = self.rows.shape[0] - 1
            labels = torch.where(labels < 0, none, torch.where(labels >= none, none, labels))
        rows = self.rows.index_select(0, labels)
        return rows.split(self.widths, dim=1)


class RowNorm(nn.Module):
    """A GroupNorm whose affine map comes with the call, one per image: silu(norm(x) A + B) for x [B, C, H, W], A and B [B or 1, C, 1, 1].

    fused: it runs as the kernel, which adds one to its scale: A is handed over less one.
    """

    def __init__(self, norm: GroupNorm, *, fused: bool):
        super().__init__()
        self.groups, self.eps, self.silu, self.fused = norm.groups, norm.eps, norm.silu, fused

    def forward(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        if self.fused:
            scale, shift = (t.flatten(1).expand(x.shape[0], -1) for t in (A, B))
            return kernels.group_norm(x, self.groups, None, None, eps=self.eps, scale=scale, shift=shift, silu=self.silu)
        x = torch.addcmul(B, F.group_norm(x, self.groups, eps=self.eps), A)
        return F.silu(x) if self.silu else x


class Pieces(nn.Module):
    """What stands in the place of a layer that reads the embedding: hands its pieces of the class's row, if there are any, to the norm.

    added, multiplied: the one piece is a term or a factor of the norm's input.
    """

    def __init__(self, *places: int, added: bool = False, multiplied: bool = False):
        super().__init__()
        self.places, self.added, self.multiplied = places, added, multiplied

    def forward(self, h: Tensor, row: tuple[Tensor, ...] | None, norm: nn.Module) -> Tensor:
        pieces = [row[place] for place in self.places]
        if self.multiplied:
            return norm(h * pieces[0])
        return norm(h + pieces[0]) if self.added else norm(h, *pieces)


class FrozenLevel(nn.Module):
    """D(x, sigma, labels) with sigma a constant: x fp32 [B, C, H, W], labels int64 [B] or None -> fp32 [B, C, H, W], unclamped.

    The arithmetic is the denoiser's; only what depends on sigma alone is computed once, here. table: what the blocks of a folded network
    with classes take in the place of labels.
    """

    def __init__(self, network: nn.Module, coefficients: Coefficients, sigma: float, table: ClassTable | None = None):
        super().__init__()
        self.network = network
        self.sigma = sigma
        self.table = table
        for name, value in coefficients._asdict().items():
            self.register_buffer(name, value)

    @property
    def table_bytes(self) -> int:
        """What the level holds beside the network's weights, nearly."""
        return 0 if self.table is None else self.table.rows.nbytes

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        given = labels if self.table is None else self.table(labels)
        F_x = self.network((expand(self.c_in, x) * x).to(working_dtype(self.network)), self.c_noise.expand(x.shape[0]), given)
        if x.is_cuda:
            return kernels.precondition(x, F_x, self.c_skip.expand(x.shape[0]), self.c_out.expand(x.shape[0]))
        return kernels.precondition(x, F_x, self.c_skip, self.c_out)


def embedded_blocks(network: nn.Module) -> list[nn.Module]:
    """The blocks that read the embedding, in a fixed order."""
    return [module for module in network.modules() if hasattr(module, "EMBEDDED")]


def can_fold(network: nn.Module, *, classes: int | None = None) -> bool:
    """True for networks that offer `embed(c_noise, labels)` and read its result in the EMBEDDED layers of their blocks only.

    False where the table of so many classes would take more than TABLE_BYTES.
    """
    blocks = embedded_blocks(network) if hasattr(network, "embed") else []
    width = sum(block.get_submodule(block.EMBEDDED[1]).out_features for block in blocks)
    return bool(blocks) and 4 * width * ((classes or 0) + 1) <= TABLE_BYTES


@torch.no_grad()
def fold(network: nn.Module, c_noise: Tensor, *, classes: int | None, worker: nn.Module) -> tuple[nn.Module, ClassTable | None]:
    """A copy of `worker` that works at c_noise [1] only and shares its weights, and the table that it takes in the place of labels.

    What the embedding does to a norm is merged with the norm's own weight and bias, or with the bias of the convolution before it: into
    constants where there are no classes, else into rows of the table; factors of channels are rows in any case.
    worker: `network` itself or its twin of another dtype; all is computed in the precision of `network` and cast once.
    """
    emb = network.embed(c_noise, None)
    if classes:
        # A network may take labels as rows of one number per class: some rows at a time.
        some = torch.arange(classes, device=c_noise.device).split(max(1, EMBEDDED_ELEMENTS // classes))
        emb = torch.cat([*(network.embed(c_noise.expand(len(labels)), labels) for labels in some), emb])
    folded, dtype, pieces = share(worker), working_dtype(worker), []
    for block, twin in zip(embedded_blocks(network), embedded_blocks(folded), strict=True):
        conv, layer, norm = (block.get_submodule(name) for name in block.EMBEDDED)
        own_conv, _, own_norm = (twin.get_submodule(name) for name in block.EMBEDDED)
        places = (len(pieces), len(pieces) + 1)
        if isinstance(layer, Modulation):
            pieces.append(layer.factors(emb))
            twin.set_submodule(block.EMBEDDED[1], Pieces(places[0], multiplied=True))
            continue
        rows = F.linear(emb, layer.weight, layer.bias)
        if isinstance(layer, ScaleShift):
            scale, shift = rows.chunk(2, dim=1)
            A, B = norm.weight * (1 + scale), norm.bias * (1 + scale) + shift
            if classes:
                fused = emb.is_cuda
                twin.set_submodule(block.EMBEDDED[2], RowNorm(norm, fused=fused))
                pieces += [A - 1 if fused else A, B]
            else:
                own_norm.weight, own_norm.bias = constant(A[0].to(dtype)), constant(B[0].to(dtype))
            folded_layer = Pieces(*places if classes else ())
        else:
            bias = conv.bias + rows
            own_conv.bias = None if classes else constant(bias[0].to(dtype))
            pieces += [bias] if classes else []
            folded_layer = Pieces(*places[:1], added=True) if classes else Pieces()
        twin.set_submodule(block.EMBEDDED[1], folded_layer)
    # The blocks take what `embed` returns: the row of their class.
    folded.embed = lambda c_noise, row=None: row
    return folded, ClassTable([piece.to(dtype) for piece in pieces]) if pieces else None


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
    table = None
    if folded and can_fold(denoiser.network, classes=classes):
        worker, table = fold(denoiser.network, coefficients.c_noise, classes=classes, worker=worker)
    return FrozenLevel(worker, coefficients, sigma, table).eval()
