"""How an op is launched: kernel or reference, argument checks, device guard, block sizes by shape."""

import contextlib
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

try:
    import triton
    import triton.language as tl
    from triton.language.extra import libdevice
except ImportError:

    class _Absent:
        """Takes the place of triton where it is not installed, so that kernel files import; nothing of it is ever launched."""

        def __getattr__(self, name):
            return self

        def __call__(self, fn=None, **options):
            return fn if fn is not None else self

    triton = tl = libdevice = _Absent()
    HAS_TRITON = False
else:
    HAS_TRITON = True

INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")
# Kernels take `MATH: tl.constexpr`: the interpreter has no libdevice, so it takes the plain functions of triton.language.
PLAIN_MATH, FAST_MATH = 0, 1
MATH = PLAIN_MATH if INTERPRETED else FAST_MATH

OPS = ("philox", "perturb", "precondition", "distance", "group_norm", "optimizer_step", "ema_update", "renoise", "to_uint8")
# These beat Inductor by construction (random bits: 4 words per counter; optimizer: one pass), so they do not wait for a measurement.
UNMEASURED_TRITON = frozenset(("philox", "perturb", "renoise", "optimizer_step"))

# op -> ((elements, kernel is not slower than the compiled reference), ...), written by `python -m fastcm.benchmarks.pages.tables --auto`.
# auto table: begin
MEASURED: dict[str, tuple[tuple[int, bool], ...]] = {}
# auto table: end

_use = "auto"
_launchers: dict[torch.library.CustomOpDef, Callable[..., Any]] = {}


def use(implementation: str) -> None:
    """Sets which implementation every op takes in this process: "auto", "triton" or "reference".

    "auto": on the CPU the reference; on CUDA the kernel, but within a compiled graph, where the compiler fuses the reference with what
    stands around it, what the table of measurements says for the nearest size, and for sizes that were not measured the reference, except
    for philox, perturb, renoise and optimizer_step. "triton": the kernel wherever it can run.
    """
    if implementation not in ("auto", "triton", "reference"):
        raise ValueError(f'unknown implementation in kernels.use: {implementation!r}. Use "auto", "triton" or "reference".')
    global _use
    _use = implementation


def chosen(op: str, x: Tensor, *, elements: int | None = None, differentiated: Sequence[Tensor | None] = ()) -> str:
    """Returns "triton" or "reference": what `op` runs for the tensor x.

    elements: the size of the work where it is not that of x. differentiated: inputs that the op's kernel has no backward for; the
    reference is taken where one of them needs a gradient.
    """
    if _use == "reference" or not HAS_TRITON:
        return "reference"
    # A registered op under forward mode gives a tangent of zero without an error (torch 2.13), so the reference is taken there.
    if is_exporting() or forward_ad._current_level >= 0:
        return "reference"
    # Nor do torch.func's other transforms pass through the backward of a registered op.
    if not torch.compiler.is_compiling() and torch._C._functorch.maybe_current_level() is not None:
        return "reference"
    if not x.is_cuda and not (INTERPRETED and _use == "triton"):
        return "reference"
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in differentiated):
        return "reference"
    if _use == "triton" or not torch.compiler.is_compiling():
        return "triton"
    return "triton" if wins_compiled(op, x.numel() if elements is None else elements) else "reference"


def wins_compiled(op: str, elements: int) -> bool:
    """Returns whether "auto" takes the kernel for an input of this many elements on CUDA within a compiled graph."""
    near = [row for row in MEASURED.get(op, ()) if row[0] <= 4 * elements and elements <= 4 * row[0]]
    if not near:
        return op in UNMEASURED_TRITON
    return min(near, key=lambda row: max(row[0], elements) / max(1, min(row[0], elements)))[1]


def is_exporting() -> bool:
    """Returns whether torch.export is at work; the function of this name in torch 2.11 is also true within every compiled function."""
    return torch.compiler._is_exporting_flag


def call(op: torch.library.CustomOpDef, *arguments: Any) -> Any:
    """Calls a registered op that changes none of its arguments.

    Where its kernel runs and only the result counts - no gradient, no graph, plain tensors - this is its launcher: the op's own dispatch
    keeps the host busy for several times as long.
    """
    return (_launchers[op] if _only_results(arguments) else op)(*arguments)


def _only_results(arguments: Sequence[Any]) -> bool:
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch._C._functorch.maybe_current_level() is not None:
        return False
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    if not all(type(tensor) in (Tensor, torch.nn.Parameter) and (tensor.is_cuda or INTERPRETED) for tensor in tensors):
        return False
    return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))


def report() -> list[tuple[str, str, str]]:
    """Returns (op, "triton" or "reference", why) for every op, as this process would run it on this machine's default device."""
    rows = []
    for op in OPS:
        if not HAS_TRITON:
            row = (op, "reference", "triton is not installed")
        elif _use == "reference":
            row = (op, "reference", 'kernels.use("reference")')
        elif not torch.cuda.is_available() and not INTERPRETED:
            row = (op, "reference", "no CUDA device")
        elif _use == "triton":
            row = (op, "triton", 'kernels.use("triton")')
        elif INTERPRETED and not torch.cuda.is_available():
            row = (op, "reference", 'the interpreter runs kernels after kernels.use("triton")')
        elif op in MEASURED:
            wins = sum(kernel for _, kernel in MEASURED[op])
            row = (op, "triton", f"in compiled graphs at {wins} of {len(MEASURED[op])} measured sizes, where it is not slower")
        elif op in UNMEASURED_TRITON:
            row = (op, "triton", "in compiled graphs as well")
        else:
            row = (op, "triton", "in compiled graphs the reference: not measured")
        rows.append(row)
    return rows


def check_tensor(
    op: str,
    name: str,
    tensor: Tensor,
    *,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    shape: Sequence[int | None] | None = None,
    like: Tensor | None = None,
    contiguous: bool = False,
) -> None:
    """Raises ValueError naming op and argument unless `tensor` has one of the dtypes, the shape (None: any) and the device of `like`."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"wrong type in {op}({name}): {type(tensor).__name__}. Give a tensor of {_names(dtypes)}.")
    if tensor.dtype not in dtypes:
        raise ValueError(f"wrong dtype in {op}({name}): {_names([tensor.dtype])}. Use {_names(dtypes)}.")
    if shape is not None and (tensor.ndim != len(shape) or any(n is not None and m != n for m, n in zip(tensor.shape, shape, strict=True))):
        expected = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"wrong shape in {op}({name}): {list(tensor.shape)}. Use [{expected}].")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"wrong device in {op}({name}): {tensor.device}. Move it to {like.device}, where the other arguments are.")
    if contiguous and not tensor.is_contiguous():
        raise ValueError(f"non-contiguous tensor in {op}({name}): strides {list(tensor.stride())}. Call .contiguous() on it.")


def check_per_sample(
    op: str, name: str, tensor: Tensor, batch: int, *, dtypes: Sequence[torch.dtype] = (torch.float32,), like: Tensor | None = None
) -> None:
    """Raises ValueError unless `tensor` is [batch] or [1], of one of the dtypes, on the device of `like`."""
    check_tensor(op, name, tensor, dtypes=dtypes, like=like)
    if tensor.ndim != 1 or (tensor.shape[0] != 1 and tensor.shape[0] != batch):
        raise ValueError(f"wrong shape in {op}({name}): {list(tensor.shape)}. Use [{batch}] or [1].")


def check_layout(op: str, name: str, x: Tensor) -> None:
    """Raises ValueError unless x [B, C, H, W] is contiguous or channels-last: the two layouts that kernels read in place."""
    if not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)):
        raise ValueError(f"unsupported layout in {op}({name}): strides {list(x.stride())}. Call .contiguous() on it.")


def device_guard(x: Tensor):
    """Makes the device of x the current one around a launch; Triton launches on the current device, not on that of its arguments."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def strided(tensor: Tensor | None, batch: int) -> tuple[Tensor | None, int]:
    """Returns a per-sample tensor ([batch, ...], [1, ...] or None) and how far its samples lie apart: 0 where one serves the batch.

    A pair of kernel arguments. For [batch] it is 0 or 1, so that kernels may take it as a constant.
    """
    if tensor is None or tensor.shape[0] != batch or batch == 1 or tensor.stride(0) == 0:
        return tensor, 0
    tensor = tensor.contiguous()
    return tensor, tensor.stride(0)


def register(op: torch.library.CustomOpDef, launcher: Callable[..., object]) -> None:
    """Makes `launcher` the implementation of a registered op on CUDA, and on the CPU where the interpreter runs kernels."""
    _launchers[op] = launcher
    op.register_kernel("cuda")(launcher)
    if INTERPRETED:
        op.register_kernel("cpu")(launcher)


class QuarterGrid(NamedTuple):
    """How a noise kernel covers a batch in the stream's quarter layout: `programs`, with `block` counters of `samples` samples each."""

    programs: int
    block: int
    samples: int
    num_warps: int

    @property
    def constants(self) -> dict[str, int]:
        """What every noise kernel takes by these names."""
        return {"BLOCK": self.block, "SAMPLES": self.samples, "MATH": MATH, "num_warps": self.num_warps}


def quarter_grid(op: str, batch: int, elements: int) -> QuarterGrid:
    """Returns the grid for a batch of samples of this many elements. A thread takes four neighbouring counters: a 128-bit store a lane."""
    if elements >= 2**31:
        raise ValueError(f"too many elements per sample in {op}(shape): {elements}. Use fewer than 2^31; the batch is not limited.")
    quarter = (elements + 3) // 4
    # The largest power of two that divides a quarter leaves no masked tail, if it is not small.
    block = min(512, quarter & -quarter)
    if block < 128:
        block = max(4, min(512, 1 << (quarter - 1).bit_length()))
    # Small samples share the 32 threads of a program.
    samples = max(1, 128 // block)
    return QuarterGrid(-(-batch // samples) if samples > 1 else batch * -(-quarter // block), block, samples, max(1, block // 128))


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
