"""Consistency training as the published PyTorch code performs it, written anew from its description: what bench.py compares with.

Eager modules and losses; the generator's state saved before the student's pass and restored for the target's, so that dropout agrees;
torch.optim.RAdam over all parameters in its foreach form; one multiply and one add per parameter for the target and for each average.
"""

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastcm.benchmarks.plain import PlainDenoiser, plain_network
from fastcm.benchmarks.training.step_split import NO_CLOCK
from fastcm.consistency.noise_schedule import uniform_pair
from fastcm.data.dataset import Dataset
from fastcm.training.config import TrainConfig
from fastcm.training.schedule import step_values


class Draw(NamedTuple):
    """What is random about a step: unit normal noise [B, C, H, W] and adjacent noise levels [B], fp32."""

    noise: Tensor
    sigma_hi: Tensor
    sigma_lo: Tensor


class PublishedStep:
    """Consistency training (Song et al. 2023, Algorithm 3) with the l2 distance and uniform weights, from the settings of a `ct` config.

    network: copied, so that competitors start from the same weights. precision: fp32, or bf16 under torch.autocast with fp32 weights.
    compiled: student and target, each with its preconditioning, under torch.compile; the rest stays eager.
    """

    def __init__(self, config: TrainConfig, network: nn.Module, dataset: Dataset, *, device: torch.device, precision: str, compiled: bool):
        self.config, self.dataset, self.device = config, dataset, device
        autocast = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        network = plain_network(network).to(device).train()
        self.parameters = list(network.parameters())
        target = copy.deepcopy(network).requires_grad_(False)
        self.target_parameters = list(target.parameters())
        self.averages = [[p.detach().clone() for p in self.parameters] for _ in config.optimizer.ema_halflife_kimg]
        student, target = (PlainDenoiser(module, config.noise, autocast=autocast) for module in (network, target))
        self.student = torch.compile(student) if compiled else student
        self.target = torch.compile(target) if compiled else target
        settings = config.optimizer
        self.optimizer = torch.optim.RAdam(self.parameters, lr=settings.lr, betas=settings.betas, eps=settings.eps, foreach=True)
        self.nimg, self.loss, self.clock = 0, torch.zeros((), device=device), NO_CLOCK

    def train_step(self, given: Callable[[int], Draw] | None = None) -> None:
        """One update. given: noise and levels for the batch that begins at an image's number, instead of torch's generator."""
        mark, values = self.clock.mark, step_values(self.config, self.nimg)
        images, labels = self._load()
        mark("data")
        noise, sigma_hi, sigma_lo = self._draw(images, values.steps) if given is None else given(self.nimg)
        x_hi = images + sigma_hi.view(-1, 1, 1, 1) * noise
        x_lo = images + sigma_lo.view(-1, 1, 1, 1) * noise
        mark("perturb")
        state = self._random_state()
        D_hi = self.student(x_hi, sigma_hi, labels)
        mark("student")
        self._restore(state)
        with torch.no_grad():
            D_lo = self.target(x_lo, sigma_lo, labels)
        mark("target")
        loss = (D_hi - D_lo).square().mean(dim=(1, 2, 3)).mean()
        mark("distance")
        self.optimizer.zero_grad()
        loss.backward()
        mark("backward")
        self.optimizer.param_groups[0]["lr"] = values.lr
        self.optimizer.step()
        self._average(self.target_parameters, values.mu)
        for average, decay in zip(self.averages, values.ema_decays, strict=True):
            self._average(average, decay)
        mark("optimizer")
        self.loss = loss.detach()
        self.nimg += self.config.batch

    def _load(self) -> tuple[Tensor, Tensor | None]:
        images, labels, _ = self.dataset.batch(self.nimg, self.config.batch, seed=self.config.seed)
        images = images.float().div(127.5).sub(1).to(self.device, non_blocking=True)
        return images, None if labels is None else labels.to(self.device, non_blocking=True)

    def _draw(self, images: Tensor, steps: int) -> Draw:
        noise, u = torch.randn_like(images), torch.rand(images.shape[0], device=self.device)
        noise_range = self.config.noise
        pair = uniform_pair(u, steps, sigma_min=noise_range.sigma_min, sigma_max=noise_range.sigma_max, rho=noise_range.rho)
        return Draw(noise, *pair)

    def _random_state(self) -> list[Tensor]:
        states = [torch.get_rng_state()]
        return [*states, torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else states

    def _restore(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(states[1], self.device)

    @torch.no_grad()
    def _average(self, average: list[Tensor], decay: float) -> None:
        for value, parameter in zip(average, self.parameters, strict=True):
            value.mul_(decay).add_(parameter, alpha=1 - decay)
