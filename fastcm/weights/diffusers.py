"""Folders of diffusers: pipelines of a UNet2DModel and a scheduler, read without diffusers; ConsistencyModelPipeline's also written."""

from pathlib import Path

from torch import nn

from fastcm.consistency.denoiser import Denoiser, Preconditioning
from fastcm.errors import InputError
from fastcm.weights.diffusers_scheduler import C_NOISE, CONSISTENCY, VARIANCE_EXPLODING, named_chain, read_scheduler
from fastcm.weights.diffusers_unet import WEIGHTS_STEM, WRITTEN_FOR, read_unet, to_config, to_state
from fastcm.weights.foreign_file import refuse
from fastcm.weights.model_folder import read_json, write_json, write_safetensors
from fastcm.weights.outputs import complete_folder

INDEX_NAME, CONFIG_NAME, SCHEDULER_NAME = "model_index.json", "unet/config.json", "scheduler/scheduler_config.json"
WEIGHTS_NAME = f"unet/{WEIGHTS_STEM}.safetensors"
# Pipelines by the form of consistency function or diffusion model that they run; None: any chain of betas.
PIPELINES = {
    "ConsistencyModelPipeline": "boundary",
    "ScoreSdeVePipeline": "ve",
    "DDPMPipeline": None,
    "DDIMPipeline": None,
    "PNDMPipeline": None,
}
# Parts of pipelines that fastcm does not run.
OTHER_PARTS = {"text_encoder": "text-conditional", "tokenizer": "text-conditional", "vae": "of latents", "vqvae": "of latents"}


def read_diffusers(path: str | Path, *, prediction: str | None = None, betas: str | None = None) -> tuple[nn.Module, Preconditioning, dict]:
    """Returns (network with fp32 weights on the CPU, preconditioning, info) of a pipeline folder, or of its `unet` folder alone.

    A consistency model's network is in the boundary form, a diffusion model's in that of its scheduler. prediction, betas: as of
    `diffusers_scheduler.named_chain`, for a folder without a scheduler. Raises InputError naming file and reason.
    """
    path = Path(path)
    pipeline = _pipeline(path / INDEX_NAME) if (path / INDEX_NAME).is_file() else None
    # Training scripts keep the averaged weights beside the last ones; what a pipeline holds is its unet.
    names = ("unet", "unet_ema") if pipeline else ("unet_ema", "unet")
    unet = next((path / name for name in names if (path / name).is_dir()), path)
    places = [path / SCHEDULER_NAME, path / Path(SCHEDULER_NAME).name, *([path.parent / SCHEDULER_NAME] if unet == path else [])]
    scheduler = next((place for place in places if place.is_file()), None)
    if scheduler is None:
        preconditioning, facts = named_chain(prediction, betas, source=path), {}
    elif prediction is not None or betas is not None:
        option = "--prediction" if prediction is not None else "--betas"
        raise InputError(f"an option of models without a scheduler in {option}: {prediction or betas}. Leave it out: {scheduler} says so.")
    else:
        preconditioning, facts = read_scheduler(scheduler)
    _check_pair(pipeline, preconditioning, path if scheduler is None else scheduler)
    network, left_out = read_unet(unet, unit_images=preconditioning.base == "ve", may_vary=preconditioning.betas is not None)
    fourier = getattr(network.config, "embedding", "positional") == "fourier"
    if fourier != (preconditioning.base == "ve"):
        kind = "fourier" if fourier else "positional"
        remedy = f"A {VARIANCE_EXPLODING} belongs to a fourier embedding, all others to a positional one."
        refuse(unet / "config.json", expected="a network of its scheduler", reason=f"time_embedding_type is {kind}", remedy=remedy)
    config = network.config
    parts = [f"its {unet.name}"] * (unet.name == "unet_ema" and unet != path) + [f"without {left_out}"] * bool(left_out)
    if preconditioning.betas is not None and preconditioning.betas.zero_snr:
        parts.append("without its last step, of infinite noise")
    info = {
        "resolution": config.resolution,
        "channels": config.in_channels,
        "classes": [str(number) for number in range(config.num_classes)] if config.num_classes else None,
        **facts,
        "source": ", ".join([f"diffusers folder {path.name}", *parts]),
    }
    return network.eval().requires_grad_(False), preconditioning, info


def _pipeline(index: Path) -> str:
    """The class of a pipeline that fastcm runs. Raises InputError with the reason why it does not run another."""
    content = read_json(index)
    name = content.get("_class_name", "ConsistencyModelPipeline")
    if not isinstance(name, str) or name not in PIPELINES:
        kinds = dict.fromkeys(kind for part, kind in OTHER_PARTS.items() if content.get(part) not in (None, [None, None]))
        reason = f"a {name}" + (f", which is {' and '.join(kinds)}" if kinds else "")
        refuse(index, expected="a pipeline of a pixel model", reason=reason, remedy=f"Pipelines that are read: {', '.join(PIPELINES)}.")
    return name


def _check_pair(pipeline: str | None, preconditioning: Preconditioning, source: Path) -> None:
    """Refuses a scheduler that belongs to another pipeline."""
    if pipeline is None:
        return
    form = PIPELINES[pipeline]
    fits = preconditioning.betas is not None if form is None else preconditioning.form == form
    if not fits:
        wanted = {"boundary": f"a {CONSISTENCY}", "ve": f"a {VARIANCE_EXPLODING}", None: "a scheduler of betas, as DDPMScheduler"}[form]
        name = read_json(source).get("_class_name") if source.is_file() else preconditioning.form
        refuse(source, expected=f"the scheduler of a {pipeline}", reason=f"a {name}", remedy=f"It has to be {wanted}.")


def write_diffusers(path: str | Path, denoiser: Denoiser, info: dict) -> None:
    """Writes a folder that `diffusers.ConsistencyModelPipeline.from_pretrained` loads. Raises InputError for what that cannot hold.

    info: "discretization_steps" sets the grid that diffusers' integer timesteps index (40 where absent).
    """
    path, network, preconditioning = Path(path), denoiser.network, denoiser.preconditioning
    unet_config = to_config(network)
    if preconditioning.form != "boundary":
        remedy = "Its network predicts otherwise; convert --to fastcm, or export --onnx, which hold every form."
        kind = f"{preconditioning.form}. ConsistencyModelPipeline has the boundary form only"
        raise InputError(f"no diffusers form in noise.form: {kind}. {remedy}")
    if preconditioning.c_noise != C_NOISE:
        raise InputError(f"no diffusers form in noise.c_noise: {preconditioning.c_noise}. {CONSISTENCY} has {C_NOISE} only.")
    scheduler = {
        "_class_name": CONSISTENCY,
        "_diffusers_version": WRITTEN_FOR,
        "clip_denoised": True,
        "num_train_timesteps": int(info.get("discretization_steps", 40)),
        "rho": preconditioning.rho,
        "s_noise": 1.0,
        "sigma_data": preconditioning.sigma_data,
        "sigma_max": preconditioning.sigma_max,
        "sigma_min": preconditioning.sigma_min,
    }
    parts = {"scheduler": ["diffusers", CONSISTENCY], "unet": ["diffusers", "UNet2DModel"]}
    with complete_folder(path) as new:
        for name in parts:
            (new / name).mkdir()
        write_safetensors(new / WEIGHTS_NAME, to_state(network))
        write_json(new / CONFIG_NAME, unet_config)
        write_json(new / SCHEDULER_NAME, scheduler)
        write_json(new / INDEX_NAME, {"_class_name": "ConsistencyModelPipeline", "_diffusers_version": WRITTEN_FOR, **parts})
