"""The methods, what kind each is, and which of the loss's settings it reads."""

from fastcm.consistency.denoiser import BOUNDARY_FORMS

METHODS = ("edm", "cd", "ct", "ict", "ect", "scd", "sct", "tcm", "meanflow")
CONTINUOUS_METHODS = ("scd", "sct")
DIFFERENTIATED_METHODS = (*CONTINUOUS_METHODS, "meanflow")  # those that take the network's derivative
TAUGHT_METHODS = ("cd", "scd")  # those that read a diffusion teacher
ECT_METHODS = ("ect", "tcm")  # those whose pairs close by ECT's map
BOUNDARY_METHODS = ("cd", "ct", "ict")  # those whose denoiser is the identity at sigma_min rather than at 0


def form_of(method: str, base: str) -> str:
    """The form that the method trains, of a network that predicts `base` (denoiser.BASES): the identity at sigma_min for the methods on a
    grid, at 0 for those of continuous time, where "sample" has no identity of its own."""
    identity = method in BOUNDARY_METHODS or (method != "edm" and base == "sample")
    return BOUNDARY_FORMS[base] if identity else base


# The fields of ObjectiveConfig that each method reads. A change of any other would be ignored, and is refused.
_PAIR_FIELDS = ("distance", "huber_c", "loss_weight", "pairs", "P_mean", "P_std", "curriculum", "s0", "s1", "mu_schedule", "mu0")
_ECT_FIELDS = ("ect_q", "ect_k", "ect_b", "ect_limit")
_TANGENT_FIELDS = ("P_mean", "P_std", "tangent", "tangent_step", "tangent_c", "tangent_warmup_kimg", "adaptive_weight")
_GUIDANCE_FIELDS = ("guidance", "guidance_interval")
FIELDS_OF = {
    "edm": ("P_mean", "P_std", "adaptive_weight"),
    "cd": (*_PAIR_FIELDS, "solver", *_GUIDANCE_FIELDS),
    "ct": _PAIR_FIELDS,
    "ict": _PAIR_FIELDS,
    "ect": (*_PAIR_FIELDS, *_ECT_FIELDS),
    "tcm": (*_PAIR_FIELDS, *_ECT_FIELDS, "tcm_nu", "tcm_share", "tcm_weight"),
    "scd": (*_TANGENT_FIELDS, *_GUIDANCE_FIELDS),
    "sct": _TANGENT_FIELDS,
    "meanflow": ("P_mean", "P_std", "tangent", "tangent_step", "flow_share", "weight_power", "weight_c", "omega", "kappa", "velocity"),
}
