"""Published runs on ImageNet at 64x64 in colour, by class."""

from dataclasses import replace

from fastcm.presets.settings import TRIGFLOW_TWO_STEP, PublishedRun, objective, published
from fastcm.training.config import TrainConfig
from fastcm.weights.openai import TWO_STEP_SIGMAS

_ADM = {
    "kind": "adm",
    "resolution": 64,
    "in_channels": 3,
    "out_channels": 3,
    "channels": 192,
    "channel_mult": (1, 2, 3, 4),
    "blocks": 3,
    "attention_resolutions": (32, 16, 8),
    "head_channels": 64,
    "num_classes": 1000,
    "scale_shift_norm": True,
    "resblock_updown": True,
}
_LARGE_DECAY = 0.9999432189950708  # half-life 50 million images in batches of 4096; printed as 0.999943

# Karras et al. 2022, Table 7.
_EDM = PublishedRun(
    network={**_ADM, "dropout": 0.1},
    objective=objective("edm"),
    steps=2_500_000_000 / 4096,
    batch=4096,
    lr=1e-4,
    lr_warmup_kimg=10_000.0,
    optimizer="adamw",
    ema_halflife_kimg=(50_000.0,),
    ema_rampup=0.05,
    precision="fp16",
)
# Song et al. 2023, Table 3.
_CD = PublishedRun(
    network=_ADM,
    objective=replace(objective("cd"), distance="lpips", s0=40, s1=40, mu_schedule="fixed", mu0=0.95),
    steps=600_000,
    batch=2048,
    lr=8e-6,
    ema_decays=(_LARGE_DECAY,),
    precision="fp16",
    two_step=TWO_STEP_SIGMAS["cd_imagenet64"],
)
_CT = replace(
    _CD, objective=replace(objective("ct"), distance="lpips", s1=200, mu0=0.95), steps=800_000, two_step=TWO_STEP_SIGMAS["ct_imagenet64"]
)
# Geng et al. 2024, ImageNet-64, size S.
_ECT = PublishedRun(
    network={**_ADM, "dropout": 0.4, "dropout_resolution": 16},
    objective=replace(objective("ect"), ect_q=4.0, s1=4, huber_c=0.06, loss_weight="karras", P_mean=-0.8, P_std=1.6),
    steps=100_000,
    batch=128,
    lr=1e-4,
    optimizer="adamw",
    betas=(0.9, 0.99),
    ema_decays=(0.9999,),
    flip=False,
    two_step=1.526,
)
# Lu and Song 2024, Table 4, size S. 28,391 kimg is the half-life of an average as wide as theirs: 0.05 of the run's length, times ln 2.
_SCD = PublishedRun(
    network=_ADM,
    objective=replace(objective("scd"), P_std=1.6, tangent_warmup_kimg=20_480.0),
    steps=400_000,
    batch=2048,
    lr=1e-4,
    optimizer="adamw",
    betas=(0.9, 0.99),
    eps=1e-11,
    ema_halflife_kimg=(28_391.0,),
    flip=False,
    precision="fp16",
    two_step=TRIGFLOW_TWO_STEP,
)
_SCT = replace(_SCD, network={**_ADM, "dropout": 0.45, "dropout_resolution": 16})


def imagenet64(method: str = "ct", *, teacher: str | None = None, data: str | None = None) -> TrainConfig:
    """ImageNet-64 as the papers print it, on the ADM network of 296 M weights.

    edm: Karras et al. 2022, Table 7; mirrored pictures, as Song et al. 2023, Appendix C, trained their teacher.
    cd, ct: Song et al. 2023, Table 3, with LPIPS.
    ect: Geng et al. 2024 and their code's run_imgnet_ecm.sh with its preset edm2-img64-s. scd, sct: Lu and Song 2024, Table 4, size S.
      Those three ran on the magnitude-preserving networks of EDM2, which fastcm has not: this is their method on another network, no
      published run. Their learning rates (1e-3 for ect, 1e-4 for scd and sct) fall with the square root of the step, and they average by
      power functions; here the rate is a constant 1e-4 and the average a half-life. All start from a diffusion model (--init; scd:
      --teacher) and share its c_noise, which for scd and sct is TrigFlow's t.
    """
    runs = {"edm": _EDM, "cd": _CD, "ct": _CT, "ect": _ECT, "scd": _SCD, "sct": _SCT}
    return published("imagenet64", method, runs, teacher=teacher, data=data)


def imagenet64_code(method: str = "ct", *, teacher: str | None = None, data: str | None = None) -> TrainConfig:
    """ImageNet-64 as scripts/launch.sh of openai/consistency_models runs it.

    edm: RAdam without warm-up; the script names no length, so the paper's stands. cd: as the paper, with three averages. ct: learning rate
    1e-4, where Table 3 has 8e-6, and mu(k) divides by N - 1, where the paper has N. The script's --loss_norm reaches nothing in that code:
    it always computes LPIPS.
    """
    averages = (_LARGE_DECAY, 0.9999, 0.999)
    edm = replace(_EDM, optimizer="radam", lr_warmup_kimg=0.0, ema_halflife_kimg=(), ema_decays=averages, ema_rampup=None)
    ct = replace(_CT, objective=replace(_CT.objective, mu_schedule="adaptive-code"), lr=1e-4, ema_decays=averages)
    runs = {"edm": edm, "cd": replace(_CD, ema_decays=averages), "ct": ct}
    return published("imagenet64-code", method, runs, teacher=teacher, data=data)


def imagenet64_l2(method: str = "cd", *, teacher: str | None = None, data: str | None = None) -> TrainConfig:
    """Distillation on ImageNet-64 by the squared distance (Song et al. 2023, section 6.1): the run of imagenet64 with l2 for LPIPS."""
    runs = {"cd": replace(_CD, objective=replace(_CD.objective, distance="l2"))}
    return published("imagenet64-l2", method, runs, teacher=teacher, data=data)
