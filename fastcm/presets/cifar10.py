"""Published runs on CIFAR-10: 32x32 in colour, unconditional."""

from dataclasses import replace

from fastcm.presets.settings import TRIGFLOW_TWO_STEP, PublishedRun, objective, published
from fastcm.training.config import TrainConfig

_SONG = {
    "kind": "song",
    "resolution": 32,
    "in_channels": 3,
    "out_channels": 3,
    "channels": 128,
    "channel_mult": (2, 2, 2),
    "blocks": 4,
    "attention_resolutions": (16,),
    "num_classes": None,
}
_DDPMPP = {**_SONG, "embedding": "positional", "channel_mult_noise": 1, "encoder": "standard", "resample_filter": (1, 1)}
_NCSNPP = {**_SONG, "embedding": "fourier", "channel_mult_noise": 2, "encoder": "residual", "resample_filter": (1, 3, 3, 1)}

# Karras et al. 2022, Table 7. AdamW without weight decay is their Adam.
_EDM = PublishedRun(
    network={**_DDPMPP, "dropout": 0.13},
    objective=objective("edm"),
    steps=200_000_000 / 512,
    batch=512,
    lr=1e-3,
    lr_warmup_kimg=10_000.0,
    optimizer="adamw",
    ema_halflife_kimg=(500.0,),
    ema_rampup=0.05,
)
# Song et al. 2023, Table 3. With mu = 0 the target is the student itself.
_CD = PublishedRun(
    network=_NCSNPP,
    objective=replace(objective("cd"), distance="lpips", mu_schedule="zero"),
    steps=800_000,
    batch=512,
    lr=4e-4,
    ema_decays=(0.9999,),
    two_step=0.585,
)
_CT = replace(_CD, objective=replace(objective("ct"), distance="lpips"), two_step=None)
_ICT = PublishedRun(
    network={**_NCSNPP, "fourier_scale": 0.02, "dropout": 0.3},
    objective=replace(objective("ict"), s1=1280),
    steps=400_000,
    batch=1024,
    lr=1e-4,
    ema_decays=(0.99993,),
    two_step=0.821,
)
_ECT = PublishedRun(
    network={**_DDPMPP, "dropout": 0.2},
    objective=objective("ect"),
    steps=200_000,
    batch=128,
    lr=1e-4,
    ema_decays=(0.9999,),
    flip=False,
    two_step=0.821,
)
_SCD = PublishedRun(
    network=_DDPMPP,
    objective=objective("scd"),
    steps=400_000,
    batch=512,
    lr=1e-4,
    betas=(0.9, 0.99),
    ema_halflife_kimg=(500.0,),
    two_step=TRIGFLOW_TWO_STEP,
)
# Geng et al. 2025, appendix. AdamW without weight decay is their Adam.
_MEANFLOW = PublishedRun(
    network={**_DDPMPP, "dropout": 0.2, "second_time": "gap"},
    objective=objective("meanflow"),
    steps=800_000,
    batch=1024,
    lr=6e-4,
    lr_warmup_kimg=10_000 * 1.024,
    optimizer="adamw",
    ema_decays=(0.99995,),
)
_SCT = replace(_SCD, network={**_DDPMPP, "dropout": 0.2}, objective=objective("sct"))
# Lee et al. 2024 and the README of their code (NVlabs/TCM), whose --duration is an upper limit.
_TCM = replace(_ECT, objective=objective("tcm"), steps=300_000, batch=1024, lr=5e-5, two_step=1.0)


def cifar10(method: str = "ict", *, teacher: str | None = None, data: str | None = None) -> TrainConfig:
    """CIFAR-10 as the papers print it.

    edm: Karras et al. 2022, Table 7, DDPM++ with the VP column. Theirs had the augmentation pipe, which fastcm has not: pictures are
      mirrored here, as in their runs without it, and the network takes no augmentation labels.
    cd, ct: Song et al. 2023, Table 3, with LPIPS, on NCSN++. cd distils an NCSN++ teacher: that of cifar10-code.
    ict: Song and Dhariwal 2023, Table 1 and Appendix: NCSN++ with Fourier scale 0.02. The mirroring is that of Song et al. 2023.
    ect: Geng et al. 2024 and run_ecm.sh of their code: DDPM++, 200k steps from a diffusion model given as --init, no augmentation.
    scd, sct: Lu and Song 2024, Appendix G: DDPM++, from a diffusion model (scd: --teacher, sct: --init). Their length is that of the
      appendix's comparison with ECT. Theirs has double normalisation too.
    meanflow: Geng et al. 2025 (2505.13447), appendix, and cifar10_v0.sh of their code: DDPM++ with t and t - r embedded, without
      preconditioning, 75 % of the samples with r < t. Theirs had EDM's augmentation pipe without vertical mirrors and samples from t = 1.
    tcm: Lee et al. 2024, from their first stage, the ect of cifar10-fastgen, given as --init. Its length is that of cifar10-fastgen.
    """
    runs = {"edm": _EDM, "cd": _CD, "ct": _CT, "ict": _ICT, "ect": _ECT, "scd": _SCD, "sct": _SCT, "meanflow": _MEANFLOW, "tcm": _TCM}
    return published("cifar10", method, runs, teacher=teacher, data=data)


def cifar10_code(method: str = "ct", *, teacher: str | None = None, data: str | None = None) -> TrainConfig:
    """CIFAR-10 as the code of Song et al. 2023 runs it (openai/consistency_models_cifar10: configs/cifar10_k_ve.py, cifar10_ve_cd.py,
    cifar10_ve_ct_adaptive.py with the options of launch.sh).

    edm: the NCSN++ teacher of cd. The code's average has no ramp-up. cd: as the paper; the 10M images of warm-up in its configuration
    do not reach RAdam. ct: mu(k) divides by N - 1, where the paper has N.
    """
    runs = {
        "edm": replace(_EDM, network={**_NCSNPP, "dropout": 0.13}, steps=400_000, ema_rampup=None),
        "cd": _CD,
        "ct": replace(_CT, objective=replace(_CT.objective, mu_schedule="adaptive-code")),
    }
    return published("cifar10-code", method, runs, teacher=teacher, data=data)


def cifar10_ict_deep(method: str = "ict", *, teacher: str | None = None, data: str | None = None) -> TrainConfig:
    """iCT-deep (Song and Dhariwal 2023, section 4): the run of cifar10 with twice the residual blocks."""
    runs = {"ict": replace(_ICT, network={**_ICT.network, "blocks": 8})}
    return published("cifar10-ict-deep", method, runs, teacher=teacher, data=data)


def cifar10_ect_hour(method: str = "ect", *, teacher: str | None = None, data: str | None = None) -> TrainConfig:
    """ECT in an hour of one A100 (Geng et al. 2024 and run_ecm_1hour.sh of their code): q = 256 from the start, one stage.

    The script's first measurement, after 80 ticks of 12.8 kimg, is the hour; it goes on to 25,600 kimg. Needs --init.
    """
    loss = replace(_ECT.objective, ect_q=256.0, s1=1)
    return published(
        "cifar10-ect-hour", method, {"ect": replace(_ECT, objective=loss, steps=8_000, ema_decays=(0.9993,))}, teacher=teacher, data=data
    )


def cifar10_fastgen(method: str = "ect", *, teacher: str | None = None, data: str | None = None) -> TrainConfig:
    """CIFAR-10 as NVIDIA's FastGen runs it (v0.1.0: fastgen/configs/methods and configs/experiments/EDM), from EDM's published DDPM++.

    ect: what FastGen calls CM: a pair closed by halves every 6,400 kimg until 1 - r / t = 0.001 n(t), which is also the first stage of tcm
    (Lee et al. 2024, whose stages are twice as long). tcm: from that run, given as --init. sct, scd: in the c_noise of EDM's network
    (sct: --init, scd: --teacher); their levels reach 800, and so do these, which have no upper end. Three averages, the first the model's.
    """
    fastgen = {"steps": 350_000, "batch": 512, "ema_decays": (0.9999, 0.99995, 0.9996), "ema_halflife_kimg": (), "flip": False}
    continuous = {**fastgen, "c_noise": "ln sigma / 4", "two_step": 0.821}
    runs = {
        "ect": replace(_ECT, **fastgen, objective=replace(_ECT.objective, s1=28, ect_limit=1000.0)),
        "scd": replace(_SCD, **{**continuous, "steps": 500_000}),
        "sct": replace(_SCT, **continuous),
        "tcm": replace(_TCM, ema_decays=fastgen["ema_decays"]),
    }
    return published("cifar10-fastgen", method, runs, teacher=teacher, data=data)
