"""The configured method's loss of a batch: which levels are drawn, who is the teacher, which distance and weight apply."""

import functools
import math
from dataclasses import dataclass

from torch import Tensor, nn

from fastcm import kernels
from fastcm.consistency.denoiser import Denoiser
from fastcm.consistency.guidance import guided
from fastcm.consistency.log_weight import LogWeight
from fastcm.consistency.mean_flow import mean_flow_loss
from fastcm.consistency.noise_schedule import TruncatedStudentT
from fastcm.consistency.objective import Batch, FeatureDistance, TeacherStep, consistency_loss, continuous_loss, edm_loss, loss_weight
from fastcm.consistency.solver import Denoise, solver_step
from fastcm.consistency.tangent import network_tangent
from fastcm.training.config import TrainConfig
from fastcm.training.methods import CONTINUOUS_METHODS, DIFFERENTIATED_METHODS, FIELDS_OF
from fastcm.training.schedule import flow_pair, sigma_draw, sigma_pair, truncated_pair
from fastcm.training.step_scalars import StepScalars

SIGMA_STREAM, GUIDANCE_STREAM, END_STREAM, FLOW_SHARE_STREAM = 1, 5, 6, 7


@dataclass(frozen=True, kw_only=True)
class Guides:
    """The frozen networks that a loss looks at, on the run's device; None where the method has none."""

    teacher: Denoiser | None = None
    guide: Denoise | None = None
    feature_distance: FeatureDistance | None = None
    first_stage: Denoiser | None = None


class MethodLoss:
    """loss(batch, scalars, factor) -> per-sample loss [B] fp32, times factor [1] fp32.

    student: its network may be a compiled module; tangent_network: the same weights uncompiled, for the derivative of
    scd, sct and meanflow.
    log_weight: the trained w(sigma) of edm and of continuous-time methods, to be optimised along; None elsewhere.
    """

    def __init__(
        self,
        config: TrainConfig,
        student: Denoiser,
        target: Denoiser,
        guides: Guides,
        *,
        tangent_network: nn.Module,
        image_shape: tuple[int, int, int],
        compiled: bool,
    ):
        self.config, self.student, self.target = config, student, target
        self.teacher = None if guides.teacher is None else guides.teacher.eval().requires_grad_(False)
        self.guide = guides.guide
        self.first_stage = guides.first_stage
        if self.first_stage is not None:  # shares the student's dropout masks, as the target does
            self.first_stage.train().requires_grad_(False)
        self.distance = config.objective.distance if guides.feature_distance is None else guides.feature_distance
        self.huber_c = huber_constant(config.objective.huber_c, image_shape)
        self.tangent, self.log_weight, self.levels = None, None, None
        if config.method == "tcm":
            nu, (low, high) = config.objective.tcm_nu, config.noise.sigma_range
            self.levels = TruncatedStudentT(nu=nu, P_mean=config.objective.P_mean, P_std=config.objective.P_std, low=low, high=high)
        if config.method in DIFFERENTIATED_METHODS:
            self.tangent = network_tangent(tangent_network, config.objective.tangent, step=config.objective.tangent_step, compiled=compiled)
        if "adaptive_weight" in FIELDS_OF[config.method] and config.objective.adaptive_weight:
            self.log_weight = LogWeight()

    def __call__(self, batch: Batch, scalars: StepScalars, factor: Tensor) -> Tensor:
        objective = self.config.objective
        u = kernels.uniform(batch.seed, batch.position, stream=SIGMA_STREAM)
        if objective.draws_guidance:
            low, high = objective.guidance
            batch = batch._replace(guidance=low + (high - low) * kernels.uniform(batch.seed, batch.position, stream=GUIDANCE_STREAM))
        if self.config.method == "edm":
            return edm_loss(self.student, batch, sigma_draw(objective, u), log_weight=self.log_weight, factor=factor)
        if self.config.method in CONTINUOUS_METHODS:
            return continuous_loss(
                self.student,
                batch,
                sigma_draw(objective, u),
                tangent=self.tangent,
                warmup=scalars.tangent_warmup,
                tangent_c=objective.tangent_c,
                teacher=self.guided_teacher(batch.guidance),
                log_weight=self.log_weight,
                factor=factor,
            )
        if self.config.method == "meanflow":
            others = (kernels.uniform(batch.seed, batch.position, stream=stream) for stream in (END_STREAM, FLOW_SHARE_STREAM))
            return mean_flow_loss(
                self.student,
                batch,
                *flow_pair(objective, u, *others),
                tangent=self.tangent,
                power=objective.weight_power,
                weight_c=objective.weight_c,
                omega=objective.omega,
                kappa=objective.kappa,
                velocity=objective.velocity,
                factor=factor,
            )
        if self.levels is not None:
            sigma_hi, sigma_lo, counts = truncated_pair(self.config, self.levels, u, scalars.steps)
            factor = factor * counts
        else:
            sigma_hi, sigma_lo = sigma_pair(self.config, u, scalars.steps)
        teacher = self.guided_teacher(batch.guidance)
        return consistency_loss(
            self.student,
            self.target,
            batch,
            sigma_hi,
            sigma_lo,
            weight=loss_weight(objective.loss_weight, sigma_hi, sigma_lo, sigma_data=self.config.noise.sigma_data) * factor,
            distance=self.distance,
            huber_c=self.huber_c,
            teacher_step=None if teacher is None else bind_teacher(teacher, objective.solver),
            first_stage=self.first_stage,
        )

    def guided_teacher(self, weight: Tensor | None = None) -> Denoise | None:
        """The teacher as the student sees it: guided with the configured weight, or with `weight` [B] of a range, the default of it."""
        objective = self.config.objective
        if self.teacher is None or objective.guidance == 1:
            return self.teacher
        if weight is None:
            weight = self.config.network["default_guidance"] if objective.draws_guidance else objective.guidance
        return functools.partial(guided, self.teacher, weight=weight, interval=objective.guidance_interval, guide=self.guide)


def bind_teacher(teacher: Denoise, solver: str) -> TeacherStep:
    """The ODE step of `solver` with the teacher as its denoiser."""
    step = solver_step(solver)
    return lambda x_hi, sigma_hi, sigma_lo, labels: step(teacher, x_hi, sigma_hi, sigma_lo, labels)


def huber_constant(configured: float | None, image_shape: tuple[int, int, int]) -> float:
    """c of the pseudo-Huber distance: as configured, else 0.00054 sqrt(C H W) (iCT, section 3.3)."""
    return 0.00054 * math.sqrt(math.prod(image_shape)) if configured is None else configured
