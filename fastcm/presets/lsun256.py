"""Published runs on LSUN Bedroom and Cat at 256x256 in colour, unconditional."""

from dataclasses import replace

from fastcm.presets.settings import PublishedRun, objective, published
from fastcm.training.config import TrainConfig
from fastcm.weights.openai import TWO_STEP_SIGMAS

_ADM = {
    "kind": "adm",
    "resolution": 256,
    "in_channels": 3,
    "out_channels": 3,
    "channels": 256,
    "channel_mult": (1, 1, 2, 2, 4, 4),
    "blocks": 2,
    "attention_resolutions": (32, 16, 8),
    "head_channels": 64,
    "num_classes": None,
    "scale_shift_norm": False,
    "resblock_updown": True,
}
_LARGE_DECAY = 0.9999432189950708  # printed as 0.999943

# Song et al. 2023, Appendix C: as ImageNet-64 (Karras et al. 2022, Table 7) with batches of 2048.
_EDM = PublishedRun(
    network={**_ADM, "dropout": 0.1},
    objective=objective("edm"),
    steps=600_000,
    batch=2048,
    lr=1e-4,
    lr_warmup_kimg=10_000.0,
    optimizer="adamw",
    ema_decays=(_LARGE_DECAY,),
    ema_rampup=0.05,
    precision="fp16",
)
# Song et al. 2023, Table 3.
_CD = PublishedRun(
    network=_ADM,
    objective=replace(objective("cd"), distance="lpips", s0=40, s1=40, mu_schedule="fixed", mu0=0.95),
    steps=600_000,
    batch=2048,
    lr=1e-5,
    ema_decays=(_LARGE_DECAY,),
    precision="fp16",
    two_step=TWO_STEP_SIGMAS["cd_bedroom256_lpips"],
)
_CT = replace(
    _CD, objective=replace(objective("ct"), distance="lpips", mu0=0.95), steps=1_000_000, two_step=TWO_STEP_SIGMAS["ct_bedroom256"]
)


def lsun256(method: str = "ct", *, teacher: str | None = None, data: str | None = None) -> TrainConfig:
    """LSUN-256 as Song et al. 2023 print it (Table 3 and Appendix C), with LPIPS.

    edm: 600k steps are Bedroom's; Cat had 300k (--duration 614400kimg). cd: for Bedroom the paper found no average of the weights to
    work better than the one its table gives. The levels of two steps are Bedroom's.
    """
    return published("lsun256", method, {"edm": _EDM, "cd": _CD, "ct": _CT}, teacher=teacher, data=data)


def lsun256_code(method: str = "ct", *, teacher: str | None = None, data: str | None = None) -> TrainConfig:
    """LSUN-256 as scripts/launch.sh of openai/consistency_models runs it: batches of 256, where the paper has 2048.

    edm: RAdam without warm-up; its length is the paper's. cd: as the paper otherwise. ct: learning rate 5e-5, where Table 3 has 1e-5, and
    mu(k) divides by N - 1, where the paper has N. Three averages.
    """
    averages = (_LARGE_DECAY, 0.99994, 0.9999)
    edm_averages = (_LARGE_DECAY, 0.9999, 0.999)
    edm = replace(_EDM, batch=256, optimizer="radam", lr_warmup_kimg=0.0, ema_decays=edm_averages, ema_rampup=None)
    code_mu = replace(_CT.objective, mu_schedule="adaptive-code")
    runs = {
        "edm": edm,
        "cd": replace(_CD, batch=256, ema_decays=averages),
        "ct": replace(_CT, objective=code_mu, batch=256, lr=5e-5, ema_decays=averages),
    }
    return published("lsun256-code", method, runs, teacher=teacher, data=data)


def lsun256_l2(method: str = "cd", *, teacher: str | None = None, data: str | None = None) -> TrainConfig:
    """Distillation on LSUN-256 by the squared distance (Song et al. 2023, section 6.1): the run of lsun256 with l2 for LPIPS."""
    runs = {"cd": replace(_CD, objective=replace(_CD.objective, distance="l2"), two_step=TWO_STEP_SIGMAS["cd_bedroom256_l2"])}
    return published("lsun256-l2", method, runs, teacher=teacher, data=data)
