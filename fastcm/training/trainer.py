"""The trainer: one `train_step` that reads as the paper's algorithm, and the loop that repeats it."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastcm import kernels
from fastcm.consistency.denoiser import Denoiser
from fastcm.consistency.objective import Batch
from fastcm.errors import RunError
from fastcm.training.config import TrainConfig
from fastcm.training.data import Dataset
from fastcm.training.method_loss import Guides, MethodLoss
from fastcm.training.optimizer import FlatOptimizer
from fastcm.training.schedule import StepValues, step_values

FLIP_STREAM = 2
# A run of this many updates in a row with a loss or gradient that is not finite ends the training.
NONFINITE_LIMIT = 10
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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


class Trainer:
    """Trains `network` on `dataset` as `config` says. All randomness is a function of (config.seed, nimg)."""

    def __init__(self, config: TrainConfig, network: nn.Module, target_network: nn.Module | None, dataset: Dataset, *, device: torch.device,
                 precision: str, compiled: bool, guides: Guides | None = None):  # fmt: skip
        self.config, self.dataset, self.device = config, dataset, device
        self.total_nimg = round(config.duration_kimg * 1000)
        self.optimizer = FlatOptimizer(network, target_network, config.optimizer, dtype=DTYPES[precision])
        self.student = Denoiser(torch.compile(network) if compiled else network, config.noise)
        self.target = self.student
        if target_network is not None:
            self.target = Denoiser(torch.compile(target_network) if compiled else target_network, config.noise)
        self.method_loss = MethodLoss(
            config, self.student, self.target, guides or Guides(), tangent_network=network,
            image_shape=(dataset.channels, dataset.resolution, dataset.resolution), compiled=compiled,
        )  # fmt: skip
        self.optimizers = {"": self.optimizer}  # by the prefix of their parts in a checkpoint
        if self.method_loss.log_weight is not None:
            self.optimizers["log_weight."] = FlatOptimizer(self.method_loss.log_weight.to(device), None, config.optimizer)
        self.seed = torch.tensor([config.seed], dtype=torch.int64, device=device)
        self.step, self.nimg = 0, 0
        # Scalars that change every step live on the device, so that compiled code and graphs see no new constants.
        self.lr, self.mu = torch.zeros(1, device=device), torch.zeros(1, device=device)
        self.ema_decays = torch.zeros(len(config.optimizer.ema_halflife_kimg), device=device)
        self.loss, self.grad_norm = torch.zeros((), device=device), torch.zeros(1, device=device)
        self.nonfinite_in_a_row = torch.zeros(1, dtype=torch.int64, device=device)
        self.nonfinite_longest = torch.zeros(1, dtype=torch.int64, device=device)

    def next_batch(self) -> Batch:
        images, labels, position = self.dataset.batch(self.nimg, self.config.batch, seed=self.config.seed)
        images, position = images.to(self.device, non_blocking=True), position.to(self.device, non_blocking=True)
        labels = None if labels is None else labels.to(self.device, non_blocking=True)
        flip = kernels.uniform(self.seed, position, stream=FLIP_STREAM) < 0.5 if self.config.flip else None
        return Batch(images, labels, self.seed, position, flip)

    def losses(self, batch: Batch, values: StepValues) -> Tensor:
        """The per-sample loss [B] fp32 of the configured method."""
        return self.method_loss(batch, values)

    def train_step(self) -> StepValues:
        """Algorithms 2 and 3 of Consistency Models: draw images, noise and a pair of levels; descend; update target and averages."""
        values = step_values(self.config, self.nimg)
        self._set_scalars(values)
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()
        loss = self.losses(self.next_batch(), values).mean()
        loss.backward()
        norms = [optimizer.gradient_norm() for optimizer in self.optimizers.values()]
        self.grad_norm = torch.linalg.vector_norm(torch.stack(norms), dim=0)
        for optimizer in self.optimizers.values():
            optimizer.step(lr=self.lr, mu=self.mu, ema_decays=self.ema_decays, grad_norm=self.grad_norm)
        self.loss = loss.detach()
        self._count_nonfinite()
        self.step += 1
        self.nimg += self.config.batch
        return values

    def _set_scalars(self, values: StepValues) -> None:
        self.lr.fill_(values.lr)
        self.mu.fill_(values.mu)
        for index, decay in enumerate(values.ema_decays):
            self.ema_decays[index] = decay

    def _count_nonfinite(self) -> None:
        skipped = ~torch.isfinite(self.grad_norm)
        self.nonfinite_in_a_row = (self.nonfinite_in_a_row + 1) * skipped
        self.nonfinite_longest = torch.maximum(self.nonfinite_longest, self.nonfinite_in_a_row)

    def progress(self, values: StepValues, images_per_s: float) -> Progress:
        """Reads the device: call it at log lines only. Raises RunError where training has stopped making updates."""
        skipped = self.step - int(self.optimizer.steps_taken)
        if int(self.nonfinite_longest) >= NONFINITE_LIMIT:
            raise RunError(
                f"loss or gradient not finite in {NONFINITE_LIMIT} steps in a row in --lr: {self.config.optimizer.lr}. "
                "The weights are those of the last finite step; lower --lr or use --precision fp32."
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
        )

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict]:
        """Everything a checkpoint holds: named tensors by part, and JSON-ready counters."""
        parts = {
            f"{prefix}{role}": tensors for prefix, optimizer in self.optimizers.items() for role, tensors in optimizer.state_dict().items()
        }
        parts["counters"]["nonfinite"] = torch.cat([self.nonfinite_in_a_row, self.nonfinite_longest])
        return parts, {"step": self.step, "nimg": self.nimg, "threads": torch.get_num_threads()}

    def restore(self, parts: dict[str, dict[str, Tensor]], state: dict) -> None:
        for prefix, optimizer in self.optimizers.items():
            optimizer.load_state_dict({name.removeprefix(prefix): part for name, part in parts.items() if name.startswith(prefix)})
        nonfinite = parts["counters"]["nonfinite"].to(self.device)
        self.nonfinite_in_a_row, self.nonfinite_longest = nonfinite[:1].clone(), nonfinite[1:].clone()
        self.step, self.nimg = state["step"], state["nimg"]

    def train(self, *, log_every_s: float, on_log: Callable[[Progress], None], on_step: Callable[[], bool]) -> None:
        """Steps until the run's total or until `on_step` returns False. on_log sees the device's figures every log_every_s seconds."""
        self.optimizer.check_views()
        began, began_nimg = time.monotonic(), self.nimg
        while self.nimg < self.total_nimg:
            values = self.train_step()
            now = time.monotonic()
            done = self.nimg >= self.total_nimg
            if done or now - began >= log_every_s:
                on_log(self.progress(values, (self.nimg - began_nimg) / max(now - began, 1e-9)))
                began, began_nimg = time.monotonic(), self.nimg
            if not on_step():
                return


Callback = Callable[[Progress, Trainer], None]
Callbacks = Sequence[Callback]
