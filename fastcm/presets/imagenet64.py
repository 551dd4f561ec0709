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

_EDM2 = {
    "kind": "edm2",
    "resolution": 64,
    "in_channels": 3,
    "out_channels": 3,
    "channels": 192,
    "channel_mult": (1, 2, 3, 4),
    "blocks": 3,
    "attention_resolutions": (16, 8),
    "head_channels": 64,
    "num_classes": 1000,
}
# Karras et al. 2024, Table 6, size S.
_EDM2_EDM = PublishedRun(
    network=_EDM2,
    objective=replace(objective("edm"), P_mean=-0.8, P_std=1.6, adaptive_weight=True),
    steps=(1024 << 20) / 2048,
    batch=2048,
    lr=0.01,
    lr_warmup_kimg=10_000.0,
    lr_decay_kimg=35_000 * 2048 / 1000,
    optimizer="adamw",
    betas=(0.9, 0.99),
    ema_widths=(0.05, 0.1),
    snapshot_every_kimg=(8 << 20) / 1000,
    flip=False,
    precision="fp16",
)
_EDM2_ECT = replace(_ECT, network={**_EDM2, "dropout": 0.4, "dropout_resolution": 16}, lr=1e-3, lr_decay_kimg=2_000 * 128 / 1000)
_EDM2_SCD = replace(_SCD, network=_EDM2, lr_decay_kimg=35_000 * 2048 / 1000, ema_halflife_kimg=(), ema_widths=(0.05,))
_EDM2_FASTGEN = replace(
    _EDM2_ECT,
    objective=replace(_ECT.objective, s1=48, ect_limit=256.0),
    steps=150_000,
    batch=1024,
    lr_decay_kimg=2_000 * 1024 / 1000,
    ema_decays=(),
    ema_widths=(0.01, 0.05, 0.1),
)
# Lee et al. 2024 and the README of their code (NVlabs/TCM), whose --duration is an upper limit: FastGen's length.
_EDM2_TCM = replace(
    _EDM2_FASTGEN,
    objective=replace(_ECT.objective, P_mean=0.0, P_std=0.2, ect_q=256.0, s1=1),
    steps=400_000,
    lr=5e-4,
    lr_decay_kimg=8_000 * 1024 / 1000,
    ema_widths=(0.05,),
    precision="fp16",
)
_EDM2_XL = {**_EDM2_ECT.network, "channels": 384, "dropout": 0.5}


def imagenet64(method: str = "ct", *, teacher: str | None = None, data: str | None = None) -> TrainConfig:
    """ImageNet-64 as the papers print it, on the ADM network of 296 M weights.

    edm: Karras et al. 2022, Table 7; mirrored pictures, as Song et al. 2023, Appendix C, trained their teacher.
    cd, ct: Song et al. 2023, Table 3, with LPIPS.
    ect: Geng et al. 2024 and their code's run_imgnet_ecm.sh with its preset edm2-img64-s. scd, sct: Lu and Song 2024, Table 4, size S.
      Those three ran on EDM2's networks: imagenet64-edm2 has them so, and this is their method on another network, with a constant
      learning rate and an average by half-life. All start from a diffusion model (--init; scd:
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


def imagenet64_edm2(method: str = "edm", *, teacher: str | None = None, data: str | None = None) -> TrainConfig:
    """ImageNet-64 on EDM2's network of size S, 280 M weights. Other sizes: docs/presets.md.

    edm: Karras et al. 2024, Table 6, and the preset edm2-img64-s of their code: the uncertainty-weighted loss, a snapshot of both averages
      every 8 Mi images.
    ect: Geng et al. 2024: run_imgnet_ecm.sh with the preset edm2-img64-s, from that model (--init).
    scd, sct: Lu and Song 2024, Table 4, size S, from an EDM2 model (scd: --teacher, sct: --init); the rate falls from 35,000 steps on.
      Theirs had TrigFlow's t, a positional embedding and pixel norms behind the embedding's factors, and trained its own teacher; here
      c_noise and embedding are those of the published models, whose frequencies NVIDIA's FastGen found unstable in this training:
      network.fourier_scale=0.02 narrows them for a teacher of one's own.
    tcm: Lee et al. 2024, from their first stage, nearly the ect of imagenet64-edm2-fastgen, given as --init.
    """
    runs = {
        "edm": _EDM2_EDM,
        "ect": _EDM2_ECT,
        "scd": _EDM2_SCD,
        "sct": replace(_EDM2_SCD, network={**_EDM2, "dropout": 0.45, "dropout_resolution": 16}),
        "tcm": _EDM2_TCM,
    }
    return published("imagenet64-edm2", method, runs, teacher=teacher, data=data)


def imagenet64_edm2_fastgen(method: str = "ect", *, teacher: str | None = None, data: str | None = None) -> TrainConfig:
    """EDM2-S as NVIDIA's FastGen v0.1.0 trains it (fastgen/configs/experiments/EDM2/config_cm_s.py, config_tcm_s.py).

    ect: its CM, from edm2-img64-s (--init). Its pairs close as ECT's, by q = 4 every 3,200 kimg, down to 1 / 256. Its clip of the gradient
      is not in that file, and there is none here. tcm: from that run (--init).
    """
    runs = {"ect": _EDM2_FASTGEN, "tcm": replace(_EDM2_TCM, ema_widths=_EDM2_FASTGEN.ema_widths)}
    return published("imagenet64-edm2-fastgen", method, runs, teacher=teacher, data=data)


def imagenet64_edm2_xl_fastgen(method: str = "tcm", *, teacher: str | None = None, data: str | None = None) -> TrainConfig:
    """The same on EDM2-XL (config_cm_xl.py, config_tcm_xl.py): smaller rates, and dropout 0.5."""
    runs = {
        "ect": replace(_EDM2_FASTGEN, network=_EDM2_XL, lr=7e-4),
        "tcm": replace(_EDM2_TCM, network=_EDM2_XL, lr=1e-4, ema_widths=_EDM2_FASTGEN.ema_widths),
    }
    return published("imagenet64-edm2-xl-fastgen", method, runs, teacher=teacher, data=data)
