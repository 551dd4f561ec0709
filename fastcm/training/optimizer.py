"""RAdam and AdamW over flat fp32 masters, with the target network and the evaluation averages updated in the same pass."""

import torch
from torch import Tensor, nn

from fastcm import kernels
from fastcm.kernels.optimizer_step import row_tiles
from fastcm.networks.magnitude import unit_rows
from fastcm.training.config import OptimizerConfig
from fastcm.training.flat_buffers import FlatLayout, attach, is_attached


class FlatOptimizer:
    """Owns the weights of `student` (and of `target`, a module of the same structure) as views of flat buffers.

    dtype: what the modules compute in. fp32 modules are views of the masters themselves; bf16 and fp16 modules are views of a
    low-precision copy that each step refreshes. Averages are fp32 and belong to no module: `average(i)` names them.
    """

    def __init__(self, student: nn.Module, target: nn.Module | None, config: OptimizerConfig, *, dtype: torch.dtype = torch.float32):
        self.config = config
        self.student, self.target = student, target
        first = next(student.parameters())
        # Channels-last convolutions are the fast ones on CUDA, and on a CPU in fp32 (bf16 there prefers the plain layout).
        self.layout = FlatLayout(student, channels_last=first.is_cuda or dtype == torch.float32)
        self.buffers: dict[str, Tensor] = {"weights": self.layout.gather(list(student.parameters()), like=first.detach().float())}
        master = self.buffers["weights"]
        if target is not None:
            self.buffers["target"] = master.clone()
        for index in range(len(config.averages)):
            self.buffers[f"ema_{index}"] = master.clone()
        self.buffers["exp_avg"], self.buffers["exp_avg_sq"] = torch.zeros_like(master), torch.zeros_like(master)
        self.steps_taken = torch.zeros(1, dtype=torch.int64, device=master.device)  # updates applied; a skipped step does not count
        low = dtype != torch.float32
        self.low_precision = master.to(dtype) if low else None
        self.target_low_precision = master.to(dtype) if low and target is not None else None
        self.gradient = torch.zeros(self.layout.size, dtype=dtype, device=master.device)
        self.total: Tensor | None = None
        self.views, self.gradient_views = self.layout.views(self.low_precision if low else master), self.layout.views(self.gradient)
        # Weights that magnitude-preserving layers have at unit magnitude, as (start, rows, length), and what their kernel takes.
        self.unit_rows = self.layout.rows_of(unit_rows(student))
        self.tiles = row_tiles(self.unit_rows, self.layout.size, device=master.device) if self.unit_rows else None
        self._gathers, self._is_empty = False, True
        attach(student, self.views, self.gradient_views)
        if target is not None:
            self.target_views = self.layout.views(self.target_low_precision if low else self.buffers["target"])
            attach(target, self.target_views)

    def gather_gradients(self) -> None:
        """From here on a backward pass leaves its gradients where it makes them, and `collect` copies all of them at once.

        Into .grad that is preset autograd adds one parameter after the other: on CUDA hundreds of launches a step. Hooks of the backward
        pass find no gradient in the flat buffer.
        """
        self._gathers = True
        attach(self.student, self.views)

    def sum_in_fp32(self) -> None:
        """From here on several backward passes, or a scaled one, add up in fp32 where the modules' own dtype would round their sum."""
        if self.total is None and self.gradient.dtype != torch.float32:
            self.total = torch.zeros_like(self.gradient, dtype=torch.float32)

    @property
    def collected(self) -> Tensor:
        """What is reduced over processes, measured and applied: the gradients that `collect` took, or the gradient itself."""
        return self.gradient if self.total is None else self.total

    def zero_grad(self) -> None:
        self._is_empty = True
        if self._gathers:
            for parameter in self.student.parameters():
                parameter.grad = None
        else:
            self.gradient.zero_()
        if self.total is not None:
            self.total.zero_()

    @torch.no_grad()
    def collect(self, part: slice = slice(None)) -> None:
        """After a backward pass: moves this part of its gradient to the fp32 sum, where there is one."""
        if self._gathers:
            self._gather()
        if self.total is not None:
            self.total[part].add_(self.gradient[part])
            if self._gathers:
                self._is_empty = True
            else:
                self.gradient[part].zero_()

    def _gather(self) -> None:
        """Moves the parameters' gradients to their places in the flat one: instead of what is there, or to be added to it."""
        parameters = list(self.student.parameters())
        found = [(view, p.grad) for view, p in zip(self.gradient_views, parameters, strict=True) if p.grad is not None]
        if found:
            (torch._foreach_copy_ if self._is_empty else torch._foreach_add_)(*map(list, zip(*found, strict=True)))
        for view, parameter in zip(self.gradient_views, parameters, strict=True):
            if parameter.grad is None and self._is_empty:
                view.zero_()
            parameter.grad = None
        self._is_empty = False

    def gradient_norm(self) -> Tensor:
        """The collected gradient's L2 norm, [1] fp32; not finite where any element is not."""
        return torch.linalg.vector_norm(self.collected, dtype=torch.float32).reshape(1)

    def step(self, *, lr: Tensor, mu: Tensor, ema_decays: Tensor, grad_norm: Tensor) -> None:
        """One update, in place. lr, mu: fp32 [1]; ema_decays: fp32 [k]. A grad_norm that is not finite leaves every buffer as it was."""
        config, buffers = self.config, self.buffers
        kernels.optimizer_step(
            config.kind,
            buffers["weights"],
            self.collected,
            buffers["exp_avg"],
            buffers["exp_avg_sq"],
            step=self.steps_taken,
            lr=lr,
            grad_norm=grad_norm,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            clip=config.clip,
            target=buffers.get("target"),
            mu=mu if self.target is not None else None,
            averages=tuple(buffers[f"ema_{i}"] for i in range(len(config.averages))),
            decays=ema_decays,
            low_precision=self.low_precision,
            target_low_precision=self.target_low_precision,
            unit_rows=self.unit_rows,
            tiles=self.tiles,
        )

    def check_views(self) -> None:
        """Raises where a module's parameters are no longer views of the buffers, so that training would change nothing."""
        for name, module in (("student", self.student), ("target", self.target)):
            if module is not None and not is_attached(module, self.views if name == "student" else self.target_views):
                raise ValueError(
                    f"parameters of the {name} are not views of the optimizer's buffers. "
                    "Do not call .to(), .half() or load weights into it while training."
                )

    def average(self, index: int) -> dict[str, Tensor]:
        """The named weights of evaluation average `index`: fp32 contiguous clones on the CPU."""
        return self.layout.state_dict(self.buffers[f"ema_{index}"])

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Every buffer as named fp32 tensors on the CPU, by role, and the count of updates applied."""
        parts = {role: self.layout.state_dict(buffer) for role, buffer in self.buffers.items()}
        return {**parts, "counters": {"steps_taken": self.steps_taken.clone()}}

    @torch.no_grad()
    def load_state_dict(self, parts: dict[str, dict[str, Tensor]]) -> None:
        """Restores what `state_dict` returned; the low-precision copies are made anew from the masters."""
        for role, buffer in self.buffers.items():
            if role not in parts:
                raise ValueError(f"state without the part {role}; it has {', '.join(sorted(parts))}.")
            self.layout.load_state_dict(buffer, parts[role])
        self.steps_taken.copy_(parts["counters"]["steps_taken"])
        self.refresh()

    def tensors(self) -> list[Tensor]:
        """What the run's processes hold in common: the buffers, then the count of updates."""
        return [*self.buffers.values(), self.steps_taken]

    @torch.no_grad()
    def refresh(self) -> None:
        """Makes the low-precision copies anew from the masters."""
        if self.low_precision is not None:
            self.low_precision.copy_(self.buffers["weights"])
        if self.target_low_precision is not None:
            self.target_low_precision.copy_(self.buffers["target"])
