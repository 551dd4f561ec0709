"""The settings of a loss, which check themselves."""

import math
from dataclasses import dataclass

from fastcm.consistency.curriculum import CURRICULA, MU_SCHEDULES
from fastcm.consistency.guidance import checked_interval, checked_weight
from fastcm.consistency.objective import LOSS_WEIGHTS, PIXEL_DISTANCES
from fastcm.consistency.solver import STEPS
from fastcm.consistency.tangent import TANGENTS
from fastcm.errors import InputError
from fastcm.training.setting_checks import check_choice, check_number

MOST_AT_BOUNDARY = 0.99  # of a batch: beyond, nothing would be left to learn consistency from
PAIRS = ("uniform", "log-normal", "ect")
DISTANCES = (*PIXEL_DISTANCES, "lpips", "classifier")


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """The loss; `methods.FIELDS_OF` says which method reads which field.

    distance: l1, l2 (mean over the image), pseudo_huber with huber_c = 0.00054 sqrt(C H W) where None (iCT, section 3.3), lpips, or
      classifier: the features of a classifier trained on the run's own labelled pictures.
    pairs: how two levels are drawn: "uniform" over the grid (CM), "log-normal" over it (iCT, with P_mean and P_std), or "ect": log-normal
      and without a grid, with ect_q, ect_k, ect_b, ect_limit of its map (`noise_schedule.ect_lower`).
    tcm_nu, tcm_share, tcm_weight: tcm's levels (`noise_schedule.TruncatedStudentT`), of which a share is the transition itself, the
      boundary, and what the loss there weighs beside that of the others (`schedule.truncated_pair`).
    curriculum, s0, s1: N(k), or the number s1 of ECT's stages. mu_schedule, mu0: the target's decay. solver: the teacher's ODE step (cd).
    tangent, tangent_step (of a difference), tangent_c, tangent_warmup_kimg, adaptive_weight (of edm too): of continuous-time methods
      (`objective.continuous_loss`).
    flow_share: of MeanFlow's samples, those with r = t, which are flow matching's; weight_power, weight_c: p and c of its adaptive weight;
      omega, kappa: of guidance inside training; velocity: "data" or, as iMF, "network" (`mean_flow.mean_flow_loss`).
    guidance: the weight of the teacher's guidance (`guidance.guided`), 1 for none, or the range from which each sample draws its own, of
      which the student is told (Meng et al. 2023, 2210.03142, stage one); guidance_interval: the noise levels between which it holds.
    """

    distance: str = "l2"
    huber_c: float | None = None
    loss_weight: str = "uniform"
    pairs: str = "uniform"
    P_mean: float = -1.2
    P_std: float = 1.2
    curriculum: str = "fixed"
    s0: int = 18
    s1: int = 18
    mu_schedule: str = "fixed"
    mu0: float = 0.0
    solver: str = "heun"
    ect_q: float = 2.0
    ect_k: float = 8.0
    ect_b: float = 1.0
    ect_limit: float | None = None
    tcm_nu: float = 0.01
    tcm_share: float = 0.25
    tcm_weight: float = 0.1
    tangent: str = "jvp"
    tangent_step: float = 1e-3
    tangent_c: float = 0.1
    tangent_warmup_kimg: float = 0.0
    adaptive_weight: bool = True
    flow_share: float = 0.75
    weight_power: float = 1.0
    weight_c: float = 1e-3
    omega: float = 1.0
    kappa: float = 0.0
    velocity: str = "data"
    guidance: float | tuple[float, float] = 1.0
    guidance_interval: tuple[float, float] | None = None

    def __post_init__(self):
        for name, choices in (
            ("distance", DISTANCES),
            ("loss_weight", LOSS_WEIGHTS),
            ("pairs", PAIRS),
            ("curriculum", CURRICULA),
            ("mu_schedule", MU_SCHEDULES),
            ("solver", tuple(STEPS)),
            ("tangent", TANGENTS),
            ("adaptive_weight", (True, False)),
            ("velocity", ("data", "network")),
        ):
            check_choice(f"objective.{name}", getattr(self, name), choices)
        if self.huber_c is not None:
            check_number("objective.huber_c", self.huber_c, 0)
        check_number("objective.P_mean", self.P_mean, -math.inf)
        check_number("objective.P_std", self.P_std, 0, open_low=True)
        stages = self.curriculum == "stages"
        check_number("objective.s0", self.s0, 1 if stages else 2, whole=True)
        check_number("objective.s1", self.s1, self.s0, whole=True)
        if stages != (self.pairs == "ect"):
            raise InputError(f"curriculum of other pairs in objective.curriculum: {self.curriculum}. Pairs of ect take stages.")
        check_number("objective.ect_q", self.ect_q, 1, open_low=True)
        check_number("objective.ect_k", self.ect_k, 0)
        check_number("objective.ect_b", self.ect_b, 0)
        if self.ect_limit is not None:
            check_number("objective.ect_limit", self.ect_limit, 1, open_low=True)
        check_number("objective.tcm_nu", self.tcm_nu, 0, open_low=True)
        check_number("objective.tcm_share", self.tcm_share, 0, MOST_AT_BOUNDARY)
        check_number("objective.tcm_weight", self.tcm_weight, 0)
        check_number("objective.tangent_step", self.tangent_step, 0, 1, open_low=True)
        check_number("objective.tangent_c", self.tangent_c, 0)
        check_number("objective.tangent_warmup_kimg", self.tangent_warmup_kimg, 0)
        check_number("objective.mu0", self.mu0, 0, 1)
        check_number("objective.flow_share", self.flow_share, 0, 1)
        check_number("objective.weight_power", self.weight_power, 0)
        check_number("objective.weight_c", self.weight_c, 0, open_low=True)
        check_number("objective.omega", self.omega, 0, open_low=True)
        check_number("objective.kappa", self.kappa, 0, 1)
        object.__setattr__(self, "guidance", checked_weight(self.guidance, "--guidance"))
        if self.guidance_interval is not None:
            object.__setattr__(self, "guidance_interval", checked_interval(self.guidance_interval, "--guidance-interval"))
            if self.guidance == 1:
                raise InputError(f"unused option: --guidance-interval {self.guidance_interval}. Add --guidance W.")

    @property
    def draws_guidance(self) -> bool:
        """Whether each sample has a guidance weight of its own."""
        return isinstance(self.guidance, tuple)

    @property
    def ect_map(self) -> dict[str, float | None]:
        """The constants of ECT's pairs, by the names of `noise_schedule.ect_lower`."""
        return {"q": self.ect_q, "k": self.ect_k, "b": self.ect_b, "limit": self.ect_limit}
