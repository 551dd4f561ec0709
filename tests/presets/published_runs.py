"""What the presets are held against: every constant of the published runs, copied from papers and published code."""

D = 0.9999432189950708
ADAM, RADAM = "adamw", "radam"
B2 = (0.9, 0.99)
DEFAULTS = {  # what a row of PUBLISHED leaves out
    "optimizer": RADAM,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "warmup_kimg": 0,
    "rampup": None,
    "dropout": 0.0,
    "dropout_resolution": None,
    "flip": True,
    "precision": "fp32",
    "decay_steps": None,
    "widths": (),
}
L2_CD = {"distance": "l2", "loss_weight": "uniform", "pairs": "uniform", "solver": "heun"}
CD = {**L2_CD, "distance": "lpips"}
CD_CIFAR = {**CD, "curriculum": "fixed", "s0": 18, "s1": 18, "mu_schedule": "zero"}
CD_LARGE = {**CD, "curriculum": "fixed", "s0": 40, "s1": 40, "mu_schedule": "fixed", "mu0": 0.95}
CD_LARGE_L2 = {**CD_LARGE, "distance": "l2"}


def ct(s1, mu0, mu_schedule):
    return {
        "distance": "lpips",
        "loss_weight": "uniform",
        "pairs": "uniform",
        "curriculum": "progressive",
        "s0": 2,
        "s1": s1,
        "mu0": mu0,
        "mu_schedule": mu_schedule,
    }


ICT = {
    "distance": "pseudo_huber",
    "huber_c": None,
    "loss_weight": "1/gap",
    "pairs": "log-normal",
    "P_mean": -1.1,
    "P_std": 2.0,
    "curriculum": "doubling",
    "s0": 10,
    "s1": 1280,
    "mu_schedule": "zero",
}
ECT = {
    "distance": "pseudo_huber",
    "huber_c": 0.0,
    "loss_weight": "1/gap",
    "pairs": "ect",
    "P_mean": -1.1,
    "P_std": 2.0,
    "curriculum": "stages",
    "s0": 1,
    "s1": 8,
    "mu_schedule": "zero",
    "ect_q": 2.0,
    "ect_k": 8.0,
    "ect_b": 1.0,
}
ECT_LARGE = {**ECT, "huber_c": 0.06, "loss_weight": "karras", "P_mean": -0.8, "P_std": 1.6, "s1": 4, "ect_q": 4.0}
# 1 - r / t = 0.001 n(t) throughout: 1,000 is the limit of the first stage's q^(stage + 1).
TCM = {**ECT, "P_mean": 0.0, "P_std": 0.2, "s1": 1, "ect_q": 1000.0, "tcm_nu": 0.01, "tcm_share": 0.25, "tcm_weight": 0.1}
THREE = (0.9999, 0.99995, 0.9996)
EDM = {"P_mean": -1.2, "P_std": 1.2}
MEAN_FLOW = {"P_mean": -2.0, "P_std": 2.0, "flow_share": 0.25, "weight_power": 0.75, "weight_c": 1e-3, "omega": 1.0, "velocity": "data"}
ADAM_MEAN_FLOW = {"optimizer": ADAM, "warmup_kimg": 10_240}
SCM = {"tangent": "jvp", "tangent_c": 0.1, "adaptive_weight": True, "P_mean": -1.0}
EDM2 = {"optimizer": ADAM, "betas": B2, "flip": False}
ECT_FASTGEN = {**ECT_LARGE, "s1": 48, "ect_limit": 256.0}
ECT_EDM2 = {**EDM2, "dropout_resolution": 16, "decay_steps": 2_000, "widths": (0.01, 0.05, 0.1)}
TCM_LARGE = {**TCM, "huber_c": 0.06, "loss_weight": "karras", "ect_q": 256.0}  # 1 / (1 - 0.9961)
TCM_EDM2 = {**ECT_EDM2, "decay_steps": 8_000, "precision": "fp16"}
# (preset, method): network, steps, batch, learning rate, averages (decay per step below 1, half-life in kimg above), loss, the rest.
PUBLISHED = {
    ("cifar10", "edm"): (
        "ddpm++",
        390_625,
        512,
        1e-3,
        (500,),
        EDM,
        {"optimizer": ADAM, "warmup_kimg": 10_000, "rampup": 0.05, "dropout": 0.13},
    ),
    ("cifar10", "cd"): ("ncsn++", 800_000, 512, 4e-4, (0.9999,), CD_CIFAR, {}),
    ("cifar10", "ct"): ("ncsn++", 800_000, 512, 4e-4, (0.9999,), ct(150, 0.9, "adaptive"), {}),
    ("cifar10", "ict"): ("ncsn++ .02", 400_000, 1024, 1e-4, (0.99993,), ICT, {"dropout": 0.3}),
    ("cifar10", "ect"): ("ddpm++", 200_000, 128, 1e-4, (0.9999,), ECT, {"dropout": 0.2, "flip": False}),
    ("cifar10", "scd"): ("ddpm++", 400_000, 512, 1e-4, (500,), {**SCM, "P_std": 1.4, "tangent_warmup_kimg": 5_120}, {"betas": B2}),
    ("cifar10", "sct"): (
        "ddpm++",
        400_000,
        512,
        1e-4,
        (500,),
        {**SCM, "P_std": 1.4, "tangent_warmup_kimg": 5_120},
        {"betas": B2, "dropout": 0.2},
    ),
    ("cifar10", "meanflow"): ("ddpm++ r", 800_000, 1024, 6e-4, (0.99995,), MEAN_FLOW, {**ADAM_MEAN_FLOW, "dropout": 0.2}),
    ("cifar10-code", "edm"): ("ncsn++", 400_000, 512, 1e-3, (500,), EDM, {"optimizer": ADAM, "warmup_kimg": 10_000, "dropout": 0.13}),
    ("cifar10-code", "cd"): ("ncsn++", 800_000, 512, 4e-4, (0.9999,), CD_CIFAR, {}),
    ("cifar10-code", "ct"): ("ncsn++", 800_000, 512, 4e-4, (0.9999,), ct(150, 0.9, "adaptive-code"), {}),
    ("cifar10-ict-deep", "ict"): ("ncsn++ .02 deep", 400_000, 1024, 1e-4, (0.99993,), ICT, {"dropout": 0.3}),
    ("cifar10-ect-hour", "ect"): ("ddpm++", 8_000, 128, 1e-4, (0.9993,), {**ECT, "ect_q": 256.0, "s1": 1}, {"dropout": 0.2, "flip": False}),
    ("cifar10", "tcm"): ("ddpm++", 300_000, 1024, 5e-5, (0.9999,), TCM, {"dropout": 0.2, "flip": False}),
    ("cifar10-fastgen", "ect"): (
        "ddpm++",
        350_000,
        512,
        1e-4,
        THREE,
        {**ECT, "s1": 28, "ect_limit": 1000.0},
        {"dropout": 0.2, "flip": False},
    ),
    ("cifar10-fastgen", "scd"): (
        "ddpm++",
        500_000,
        512,
        1e-4,
        THREE,
        {**SCM, "P_std": 1.4, "tangent_warmup_kimg": 5_120},
        {"betas": B2, "flip": False},
    ),
    ("cifar10-fastgen", "sct"): (
        "ddpm++",
        350_000,
        512,
        1e-4,
        THREE,
        {**SCM, "P_std": 1.4, "tangent_warmup_kimg": 5_120},
        {"betas": B2, "dropout": 0.2, "flip": False},
    ),
    ("cifar10-fastgen", "tcm"): ("ddpm++", 300_000, 1024, 5e-5, THREE, TCM, {"dropout": 0.2, "flip": False}),
    ("imagenet64", "edm"): (
        "imagenet64",
        2_500e6 / 4096,
        4096,
        1e-4,
        (50_000,),
        EDM,
        {"optimizer": ADAM, "warmup_kimg": 10_000, "rampup": 0.05, "dropout": 0.1, "precision": "fp16"},
    ),
    ("imagenet64", "cd"): ("imagenet64", 600_000, 2048, 8e-6, (D,), CD_LARGE, {"precision": "fp16"}),
    ("imagenet64", "ct"): ("imagenet64", 800_000, 2048, 8e-6, (D,), ct(200, 0.95, "adaptive"), {"precision": "fp16"}),
    ("imagenet64", "ect"): (
        "imagenet64",
        100_000,
        128,
        1e-4,
        (0.9999,),
        ECT_LARGE,
        {"optimizer": ADAM, "betas": B2, "dropout": 0.4, "dropout_resolution": 16, "flip": False},
    ),
    ("imagenet64", "scd"): (
        "imagenet64",
        400_000,
        2048,
        1e-4,
        (28_391,),
        {**SCM, "P_std": 1.6, "tangent_warmup_kimg": 20_480},
        {"optimizer": ADAM, "betas": B2, "eps": 1e-11, "flip": False, "precision": "fp16"},
    ),
    ("imagenet64", "sct"): (
        "imagenet64",
        400_000,
        2048,
        1e-4,
        (28_391,),
        {**SCM, "P_std": 1.6, "tangent_warmup_kimg": 20_480},
        {"optimizer": ADAM, "betas": B2, "eps": 1e-11, "flip": False, "precision": "fp16", "dropout": 0.45, "dropout_resolution": 16},
    ),
    ("imagenet64-edm2", "edm"): (
        "edm2-s",
        (1024 << 20) / 2048,
        2048,
        0.01,
        (),
        {"P_mean": -0.8, "P_std": 1.6, "adaptive_weight": True},
        {**EDM2, "warmup_kimg": 10_000, "decay_steps": 35_000, "widths": (0.05, 0.1), "precision": "fp16"},
    ),
    ("imagenet64-edm2", "ect"): (
        "edm2-s",
        100_000,
        128,
        1e-3,
        (0.9999,),
        ECT_LARGE,
        {**EDM2, "dropout": 0.4, "dropout_resolution": 16, "decay_steps": 2_000},
    ),
    ("imagenet64-edm2", "scd"): (
        "edm2-s",
        400_000,
        2048,
        1e-4,
        (),
        {**SCM, "P_std": 1.6, "tangent_warmup_kimg": 20_480},
        {**EDM2, "eps": 1e-11, "precision": "fp16", "decay_steps": 35_000, "widths": (0.05,)},
    ),
    ("imagenet64-edm2", "sct"): (
        "edm2-s",
        400_000,
        2048,
        1e-4,
        (),
        {**SCM, "P_std": 1.6, "tangent_warmup_kimg": 20_480},
        {**EDM2, "eps": 1e-11, "precision": "fp16", "dropout": 0.45, "dropout_resolution": 16, "decay_steps": 35_000, "widths": (0.05,)},
    ),
    ("imagenet64-edm2", "tcm"): ("edm2-s", 400_000, 1024, 5e-4, (), TCM_LARGE, {**TCM_EDM2, "dropout": 0.4, "widths": (0.05,)}),
    ("imagenet64-edm2-fastgen", "ect"): ("edm2-s", 150_000, 1024, 1e-3, (), ECT_FASTGEN, {**ECT_EDM2, "dropout": 0.4}),
    ("imagenet64-edm2-fastgen", "tcm"): ("edm2-s", 400_000, 1024, 5e-4, (), TCM_LARGE, {**TCM_EDM2, "dropout": 0.4}),
    ("imagenet64-edm2-xl-fastgen", "ect"): ("edm2-xl", 150_000, 1024, 7e-4, (), ECT_FASTGEN, {**ECT_EDM2, "dropout": 0.5}),
    ("imagenet64-edm2-xl-fastgen", "tcm"): ("edm2-xl", 400_000, 1024, 1e-4, (), TCM_LARGE, {**TCM_EDM2, "dropout": 0.5}),
    ("imagenet64-code", "edm"): ("imagenet64", 2_500e6 / 4096, 4096, 1e-4, (D, 0.9999, 0.999), EDM, {"dropout": 0.1, "precision": "fp16"}),
    ("imagenet64-code", "cd"): ("imagenet64", 600_000, 2048, 8e-6, (D, 0.9999, 0.999), CD_LARGE, {"precision": "fp16"}),
    ("imagenet64-code", "ct"): (
        "imagenet64",
        800_000,
        2048,
        1e-4,
        (D, 0.9999, 0.999),
        ct(200, 0.95, "adaptive-code"),
        {"precision": "fp16"},
    ),
    ("imagenet64-l2", "cd"): ("imagenet64", 600_000, 2048, 8e-6, (D,), CD_LARGE_L2, {"precision": "fp16"}),
    ("lsun256", "edm"): (
        "lsun256",
        600_000,
        2048,
        1e-4,
        (D,),
        EDM,
        {"optimizer": ADAM, "warmup_kimg": 10_000, "rampup": 0.05, "dropout": 0.1, "precision": "fp16"},
    ),
    ("lsun256", "cd"): ("lsun256", 600_000, 2048, 1e-5, (D,), CD_LARGE, {"precision": "fp16"}),
    ("lsun256", "ct"): ("lsun256", 1_000_000, 2048, 1e-5, (D,), ct(150, 0.95, "adaptive"), {"precision": "fp16"}),
    ("lsun256-code", "edm"): ("lsun256", 600_000, 256, 1e-4, (D, 0.9999, 0.999), EDM, {"dropout": 0.1, "precision": "fp16"}),
    ("lsun256-code", "cd"): ("lsun256", 600_000, 256, 1e-5, (D, 0.99994, 0.9999), CD_LARGE, {"precision": "fp16"}),
    ("lsun256-code", "ct"): ("lsun256", 1_000_000, 256, 5e-5, (D, 0.99994, 0.9999), ct(150, 0.95, "adaptive-code"), {"precision": "fp16"}),
    ("lsun256-l2", "cd"): ("lsun256", 600_000, 2048, 1e-5, (D,), CD_LARGE_L2, {"precision": "fp16"}),
}
SONG = {"channels": 128, "channel_mult": (2, 2, 2), "blocks": 4, "attention_resolutions": (16,), "encoder": "standard"}
NCSNPP = {
    **SONG,
    "embedding": "fourier",
    "fourier_scale": 16.0,
    "encoder": "residual",
    "channel_mult_noise": 2,
    "resample_filter": (1, 3, 3, 1),
}
NETWORKS = {  # kind, resolution, classes, weights, options
    "ddpm++": ("song", 32, None, 55_732_739, {**SONG, "embedding": "positional", "channel_mult_noise": 1, "resample_filter": (1, 1)}),
    "ddpm++ r": ("song", 32, None, 55_798_275, {**SONG, "embedding": "positional", "second_time": "gap"}),
    "ncsn++": ("song", 32, None, 56_395_523, NCSNPP),
    "ncsn++ .02": ("song", 32, None, 56_395_523, {**NCSNPP, "fourier_scale": 0.02}),
    "ncsn++ .02 deep": ("song", 32, None, 97_610_499, {**NCSNPP, "fourier_scale": 0.02, "blocks": 8}),
    "imagenet64": ("adm", 64, 1000, 295_899_267, {"channels": 192, "head_channels": 64, "scale_shift_norm": True, "resblock_updown": True}),
    "edm2-s": ("edm2", 64, 1000, 280_209_253, {"channels": 192, "head_channels": 64, "attention_resolutions": (16, 8), "blocks": 3}),
    "edm2-xl": ("edm2", 64, 1000, 1_119_276_709, {"channels": 384, "head_channels": 64, "attention_resolutions": (16, 8), "blocks": 3}),
    "lsun256": ("adm", 256, None, 526_304_771, {"channels": 256, "head_channels": 64, "scale_shift_norm": False, "resblock_updown": True}),
}
