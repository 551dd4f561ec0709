"""The trainer: one `train_step` that reads as the paper's algorithm, and the loop that repeats it."""

import contextlib
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastcm import kernels
from fastcm.consistency.guidance import NO_CLASS
from fastcm.consistency.objective import Batch
from fastcm.data.dataset import Dataset
from fastcm.data.prefetch import batches
from fastcm.errors import RunError
from fastcm.generation.cuda_choices import exact_fp32
from fastcm.training.captured_step import CapturedStep, Graphs
from fastcm.training.config import TrainConfig
from fastcm.training.gradient_reduction import GradientReduction
from fastcm.training.loss_scale import LossScale
from fastcm.training.method_loss import MethodLoss
from fastcm.training.optimizer import FlatOptimizer
from fastcm.training.parallel import Processes
from fastcm.training.schedule import StepValues, step_values
from fastcm.training.step_scalars import StepScalars

FLIP_STREAM, LABEL_DROP_STREAM = 2, 3
# A run of this many updates in a row with a loss or gradient that is not finite ends the training.
NONFINITE_LIMIT = 10


@dataclass(frozen=True)
class Progress:
    """What a callback sees at a log line."""

    step: int
    nimg: int
    total_nimg: int
    loss: float
    grad_norm: float
    lr: float
    steps: int  # N; ECT's stage
    mu: float
    skipped: int  # updates left out so far because their gradient was not finite
    images_per_s: float
    waited: float  # share of the time since the last line that went by waiting for images


class Trainer:
    """Steps of one run, from its parts (`trainer_parts.build_trainer`). All randomness is a function of (config.seed, nimg).

    Of every batch this process takes its share, and of its share `microbatch` images at a time, halved where memory runs out.
    """

    def __init__(
        self,
        config: TrainConfig,
        dataset: Dataset,
        *,
        optimizers: dict[str, FlatOptimizer],  # by the prefix of their parts in a checkpoint; "" is the network's
        method_loss: MethodLoss,
        loss_scale: LossScale | None,  # of fp16
        reduction: GradientReduction | None,  # of several processes
        graphs: Graphs | None,  # how steps are recorded, where they are
        processes: Processes,
        device: torch.device,
        precision: str,
        compiled: bool,
    ):
        self.config, self.dataset, self.processes = config, dataset, processes
        self.device, self.precision, self.compiled = device, precision, compiled
        self.optimizers, self.optimizer, self.method_loss = optimizers, optimizers[""], method_loss
        self.loss_scale, self.reduction = loss_scale, reduction
        self._is_exact = device.type == "cuda" and precision == "fp32"
        self.share, self.total_nimg = processes.share(config.batch), round(config.duration_kimg * 1000)
        self.set_microbatch(min(config.microbatch or self.share, self.share))
        self.step, self.nimg = 0, 0
        self.first_step_s: float | None = None  # in which torch.compile works
        self._batches = None  # from the first step on; see prefetch.batches
        self.seed = torch.tensor([config.seed], dtype=torch.int64, device=device)
        self.scalars = StepScalars(len(config.optimizer.averages), device)
        self.share_of_batch = torch.full((1,), 1 / config.batch, device=device)
        self.loss, self.grad_norm = torch.zeros((), device=device), torch.zeros(1, device=device)
        self.nonfinite = torch.zeros(2, dtype=torch.int64, device=device)  # skipped updates in a row: now, and at most
        # Not the trainer itself: in a cycle it would keep its memory on the device until Python looks for cycles.
        own = weakref.proxy(self)
        self.work = CapturedStep(
            lambda batch: own._passes(batch), lambda: own._update(), check=lambda: torch.stack((own.loss, *own._norm())), graphs=graphs
        )

    def train_step(self) -> StepValues:
        """Algorithms 2 and 3 of Consistency Models: draw images, noise and a pair of levels; descend; update target and averages."""
        values = step_values(self.config, self.nimg)
        self.scalars.set(values)
        with exact_fp32(self._is_exact):
            self._descend()
            self.work.update()
        self.step += 1
        self.nimg += self.config.batch
        return values

    def _descend(self) -> None:
        """Fills the flat gradients with those of the whole batch's mean loss, and `loss` with that loss, in every process the same."""
        while True:
            fitted = self._own_gradients()
            if self.reduction is not None:
                self.reduction.finish()
            (ran_out,) = self.processes.agree(int(not fitted))
            if not ran_out:
                break
            self._halve_microbatch()
        self.processes.sum(self.loss)
        if self.loss_scale is not None:
            unscale = self.loss_scale.value.reciprocal()
            for optimizer in self.optimizers.values():
                optimizer.collected.mul_(unscale)
            self.loss.mul_(unscale[0])

    def _own_gradients(self) -> bool:
        """This process's backward passes; False where memory ran out."""
        try:
            self.work.gradients(self.next_batch())
            return True
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        if self.device.type == "cuda":  # after the handler, which holds the failed pass's tensors
            for optimizer in self.optimizers.values():
                optimizer.zero_grad()  # of the failed pass
            with contextlib.suppress(RuntimeError):  # of an allocator that a failed recording has left broken: a help, not a need
                torch.cuda.empty_cache()
        return False

    def _passes(self, batch: Batch) -> None:
        """Fills the flat gradients and `loss` with this process's part of them."""
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()
        self.loss.zero_()
        for start in range(0, self.share, self.microbatch):
            last = start + self.microbatch >= self.share
            if last and self.reduction is not None:
                self.reduction.arm()
            loss = self.losses(piece(batch, start, self.microbatch)).sum()
            loss.backward()
            self.loss += loss.detach()
            if not (last and self.reduction is not None):
                for optimizer in self.optimizers.values():
                    optimizer.collect()

    def losses(self, batch: Batch) -> Tensor:
        """The configured method's loss of each sample, as its part of the batch's mean and times the loss scale: [B] fp32."""
        if self.config.flip:
            batch = batch._replace(flip=kernels.uniform(batch.seed, batch.position, stream=FLIP_STREAM) < 0.5)
        if self.config.label_drop:
            dropped = kernels.uniform(batch.seed, batch.position, stream=LABEL_DROP_STREAM) < self.config.label_drop
            batch = batch._replace(labels=batch.labels.masked_fill(dropped, NO_CLASS))
        factor = self.share_of_batch if self.loss_scale is None else self.share_of_batch * self.loss_scale.value
        return self.method_loss(batch, self.scalars, factor)

    def _norm(self) -> Tensor:
        """The L2 norm of all gradients, [1] fp32."""
        return torch.linalg.vector_norm(torch.stack([optimizer.gradient_norm() for optimizer in self.optimizers.values()]), dim=0)

    def _update(self) -> None:
        """Weights, target and averages, by the gradients as they stand."""
        # 0 * loss is NaN where the loss is not finite, whose gradient may be: such a step is left out as well.
        self.grad_norm.copy_(self._norm() + 0 * self.loss)
        scalars = self.scalars
        for optimizer in self.optimizers.values():
            optimizer.step(lr=scalars.lr, mu=scalars.mu, ema_decays=scalars.ema_decays, grad_norm=self.grad_norm)
        if self.loss_scale is not None:
            self.loss_scale.update(self.grad_norm)
        now, longest = self.nonfinite
        now = (now + 1) * ~torch.isfinite(self.grad_norm[0])
        self.nonfinite.copy_(torch.stack((now, torch.maximum(longest, now))))

    def next_batch(self) -> Batch:
        """This process's share of the batch that begins at nimg."""
        if self._batches is None:
            self._batches = batches(self.dataset, seed=self.config.seed, size=self.share, stride=self.config.batch, device=self.device)
        images, labels, position = self._batches.batch(self.nimg + self.processes.rank * self.share)
        images, position = images.to(self.device, non_blocking=True), position.to(self.device, non_blocking=True)
        labels = None if labels is None else labels.to(self.device, non_blocking=True)
        return Batch(images, labels, self.seed, position)

    def set_microbatch(self, images: int) -> None:
        """Takes this many images at a time. Gradients that several passes give, or a scaled one, are summed in fp32."""
        self.microbatch = images
        if images < self.share or self.loss_scale is not None:
            for optimizer in self.optimizers.values():
                optimizer.sum_in_fp32()

    def _halve_microbatch(self) -> None:
        if self.microbatch == 1:
            raise RunError(
                "out of memory with one image at a time in --microbatch: 1. "
                f"Use --set network.checkpoint=true,{' --precision bf16' if self.precision == 'fp32' else ''} or a smaller network."
            )
        self.work.stop()
        self.set_microbatch(-(-self.microbatch // 2))
        if self.processes.is_writer:
            print(
                f"fastcm: out of memory: from here on {self.microbatch} images at a time (--microbatch {self.microbatch}); "
                "batch and order stay as they are",
                file=sys.stderr,
            )

    def progress(self, values: StepValues, images_per_s: float, waited: float = 0.0) -> Progress:
        """Reads the device: call it at log lines only. Raises RunError where training has stopped making updates."""
        skipped = self.step - int(self.optimizer.steps_taken)
        if self.loss_scale is not None:  # whose search for a scale that fits skips as many updates as it takes
            self.loss_scale.check()
        elif int(self.nonfinite[1]) >= NONFINITE_LIMIT:
            raise RunError(
                f"loss or gradient not finite in {NONFINITE_LIMIT} steps in a row in --lr: {self.config.optimizer.lr}. "
                f"Lower --lr{'' if self.precision == 'fp32' else ', or use --precision fp32'}."
            )
        return Progress(
            self.step,
            self.nimg,
            self.total_nimg,
            float(self.loss),
            float(self.grad_norm),
            values.lr,
            values.steps,
            values.mu,
            skipped,
            images_per_s,
            waited,
        )

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict]:
        """Everything a checkpoint holds: named tensors by part, and JSON-ready counters."""
        parts = {
            f"{prefix}{role}": tensors for prefix, optimizer in self.optimizers.items() for role, tensors in optimizer.state_dict().items()
        }
        parts["counters"]["nonfinite"] = self.nonfinite
        if self.loss_scale is not None:
            parts["counters"]["loss_scale_exponent"] = self.loss_scale.exponent
        return parts, {"step": self.step, "nimg": self.nimg, "threads": torch.get_num_threads(), "processes": self.processes.size}

    def checkpoint_bytes(self) -> int:
        """What `state` takes on a disk, nearly: every buffer in fp32."""
        return sum(4 * buffer.numel() for optimizer in self.optimizers.values() for buffer in optimizer.buffers.values())

    def restore(self, parts: dict[str, dict[str, Tensor]], state: dict) -> None:
        for prefix, optimizer in self.optimizers.items():
            optimizer.load_state_dict({name.removeprefix(prefix): part for name, part in parts.items() if name.startswith(prefix)})
        self.nonfinite.copy_(parts["counters"]["nonfinite"])
        if self.loss_scale is not None:
            self.loss_scale.exponent.copy_(parts["counters"]["loss_scale_exponent"])
        self.step, self.nimg = state["step"], state["nimg"]

    def tensors(self) -> list[Tensor]:
        """What every process holds alike, in one order."""
        shared = [tensor for optimizer in self.optimizers.values() for tensor in optimizer.tensors()]
        return [*shared, self.nonfinite, *([] if self.loss_scale is None else [self.loss_scale.exponent])]

    def follow_writer(self) -> None:
        """At the start of a run, new or resumed: every process takes the weights, averages and counters of the writer."""
        self.step, self.nimg = self.processes.from_writer([self.step, self.nimg])
        self.processes.copy_from_writer([*self.tensors(), *self.optimizer.student.buffers()])
        for optimizer in self.optimizers.values():
            optimizer.refresh()

    def check_same(self) -> None:
        """RunError where the processes' weights, moments or averages have come apart."""
        self.processes.check_same([tensor for optimizer in self.optimizers.values() for tensor in optimizer.buffers.values()])

    def train(self, *, log_every_s: float, on_log: Callable[[Progress], None], on_step: Callable[[], bool]) -> None:
        """Steps until the run's total or until `on_step` returns False.

        In the writer's process on_log sees the device's figures every log_every_s seconds.
        """
        self.optimizer.check_views()
        try:
            began, began_nimg, began_wait_s = time.monotonic(), self.nimg, 0.0
            while self.nimg < self.total_nimg:
                values = self.train_step()
                now = time.monotonic()
                done = self.nimg >= self.total_nimg
                if self.first_step_s is None:
                    self.first_step_s = now - began
                    if self.compiled and not done:  # which says nothing of the speed
                        began, began_nimg, began_wait_s = now, self.nimg, self._batches.wait_s
                if self.processes.is_writer and (done or now - began >= log_every_s):
                    seconds = max(now - began, 1e-9)
                    waited = (self._batches.wait_s - began_wait_s) / seconds
                    on_log(self.progress(values, (self.nimg - began_nimg) / seconds, waited))
                    began, began_nimg, began_wait_s = time.monotonic(), self.nimg, self._batches.wait_s
                if not on_step():
                    return
        finally:
            self.close()

    def close(self) -> None:
        """Ends the preparation of batches; the next step begins it anew."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None


def piece(batch: Batch, start: int, images: int) -> Batch:
    """Some of a batch's images with what belongs to them."""
    part = slice(start, start + images)
    return Batch(batch.images[part], None if batch.labels is None else batch.labels[part], batch.seed, batch.position[part])


def is_out_of_memory(error: RuntimeError) -> bool:
    """torch's own error on CUDA; a message of its allocator on the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)


Callback = Callable[[Progress, Trainer], None]
Callbacks = Sequence[Callback]
