"""State dicts of ADM U-Nets in OpenAI's names: consistency_models' own, and the diffusion models of guided-diffusion and iDDPM."""

import io
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from fastcm import networks
from fastcm.consistency.denoiser import Denoiser, Preconditioning
from fastcm.errors import InputError
from fastcm.weights.diffusers_scheduler import NAMED_CHAINS, named_chain
from fastcm.weights.diffusers_unet import VARIANCE
from fastcm.weights.foreign_file import refuse, refuse_keys, require_plain
from fastcm.weights.model_folder import fill
from fastcm.weights.outputs import complete_or_absent
from fastcm.weights.state_dict_file import network_state, read_state_dict

EXPECTED = "an OpenAI checkpoint (.pt)"
MARKER = "time_embed.0.weight"  # the key that every ADM U-Net has
ASK_FOR_BETAS = f"Give fastcm convert --betas ({', '.join(NAMED_CHAINS)}, as cosine or cosine:4000)."
NORM_GROUPS = 32  # fixed in OpenAI's network
# Image size by channel multipliers: the defaults of OpenAI's model options. No weight depends on the size.
IMAGE_SIZES = {(1, 2, 2, 2): 32, (1, 2, 3, 4): 64, (1, 1, 2, 3, 4): 128, (1, 1, 2, 2, 4, 4): 256, (0.5, 1, 1, 2, 2, 4, 4): 512}
# Second noise level of the published two-step samplers, by how the files are named (launch.sh of the repository).
TWO_STEP_SIGMAS = {
    "cd_imagenet64": 1.382,
    "ct_imagenet64": 1.913,
    "cd_bedroom256_lpips": 4.366,
    "cd_bedroom256_l2": 3.520,
    "ct_bedroom256": 3.991,
    "ct_cat256": 5.249,
}


# Published diffusion models by how their files are named: their chain and what no key shows of their attention (by their READMEs).
CHAINS = {
    "64x64_diffusion": {"betas": "cosine", "new_attention_order": True},
    "128x128_diffusion": {"betas": "linear"},
    "256x256_diffusion": {"betas": "linear"},
    "512x512_diffusion": {"betas": "linear"},
    "lsun_bedroom": {"betas": "linear"},
    "lsun_cat": {"betas": "linear"},
    "lsun_horse": {"betas": "linear"},
    "imagenet64_uncond": {"betas": "cosine:4000", "heads": 4},
    "cifar10_uncond": {"betas": "cosine:4000", "heads": 4},
    "lsun_uncond": {"betas": "linear", "heads": 1},
}
CHAIN_STEPS = 1000  # what a chain of another length tells its network


def read_openai(
    path: str | Path,
    *,
    image_size: int | None = None,
    head_channels: int = 64,
    heads: int | None = None,
    form: str | None = None,
    prediction: str | None = None,
    betas: str | None = None,
    new_attention_order: bool | None = None,
) -> tuple[nn.Module, Preconditioning, dict]:
    """Returns (network with fp32 weights on the CPU, preconditioning, info) of an ADM U-Net's state dict, read without running code.

    path: as `read_state_dict` reads it, with whatever trainers put around it; an average is preferred (`network_state`). The architecture
    follows from keys and shapes. image_size: needed for channel multipliers outside IMAGE_SIZES. head_channels, or heads: no key shows
    them; every published consistency model has 64 channels. form: "edm" or "boundary"; by default "edm" for files named edm_*, "boundary"
    for all others but diffusion models.

    Diffusion models, which attend by one-dimensional convolutions or give a variance beside the image, follow a chain: betas names it as
    `diffusers_scheduler.named_chain` does, where the file's name does not (CHAINS), prediction what they predict (epsilon).
    new_attention_order: queries of all heads, then keys, then values, in place of one head after the other. The variance is left out.
    Raises InputError naming file and reason.
    """
    path = Path(path)
    state, part = network_state(read_state_dict(path, expected=EXPECTED), MARKER)
    known = next((facts for name, facts in CHAINS.items() if path.name.startswith(name)), {})
    state, found = _diffusion_state(state)
    is_chain = form is None and (found is not None or prediction is not None or betas is not None)
    if is_chain:
        heads, betas = heads or known.get("heads"), betas or known.get("betas")
        if betas is None:
            raise InputError(f"a diffusion model without its chain in {path}: {found or prediction}. {ASK_FOR_BETAS}")
    try:
        config = infer_config(state, path, image_size=image_size, head_channels=head_channels, heads=heads)
    except (KeyError, IndexError) as error:
        refuse(path, expected="an ADM U-Net", reason=f"its keys do not form one ({error})")
    with torch.device("meta"):
        network = networks.UNet(config)
    if is_chain:
        new_order = new_attention_order if new_attention_order is not None else known.get("new_attention_order", found is None)
        state = state if new_order else _heads_last(state, config)
        preconditioning = named_chain(prediction or "epsilon", betas, source=path, scale_to=CHAIN_STEPS)
    else:
        preconditioning = Preconditioning(form=form or form_of(path), c_noise="250 ln sigma")
    fill(network, {name: value.float() for name, value in state.items()}, path)
    classes = [str(index) for index in range(config.num_classes)] if config.num_classes else None
    info = {
        "resolution": config.resolution,
        "channels": config.in_channels,
        "classes": classes,
        "source": f"OpenAI checkpoint {path.name}{part and f', its {part}'}{', without ' + VARIANCE if found == VARIANCE else ''}",
    }
    two_step = next((sigma for name, sigma in TWO_STEP_SIGMAS.items() if path.name.startswith(name)), None)
    if two_step is not None:
        info["sampling"] = {"2": [preconditioning.sigma_max, two_step]}
    return network.eval().requires_grad_(False), preconditioning, info


def write_openai(path: str | Path, denoiser: Denoiser, info: dict) -> None:
    """Writes the network's state dict, fp32, as OpenAI's code loads it. Raises InputError for a network that is not theirs."""
    network = denoiser.network
    if getattr(network, "kind", None) != "adm":
        kind = getattr(network, "kind", type(network).__name__)
        raise InputError(f"no OpenAI form in network.kind: {kind}. Only adm networks have one; convert --to fastcm instead.")
    require_plain(network.config, "OpenAI")
    if network.config.groups != NORM_GROUPS:
        groups = network.config.groups
        raise InputError(
            f"no OpenAI form in network.norm_groups: {groups}. OpenAI's network has {NORM_GROUPS}; convert --to diffusers instead."
        )
    if denoiser.preconditioning.c_noise != "250 ln sigma":
        raise InputError(f"no OpenAI form in noise.c_noise: {denoiser.preconditioning.c_noise}. OpenAI's code uses 250 ln sigma.")
    path, form = Path(path), denoiser.preconditioning.form
    if form != form_of(path):
        rule = "begin its name with edm_" if form == "edm" else "let its name not begin with edm_"
        raise InputError(
            f"the name of an {form_of(path)} model in {path}: it has the {form} form. Please {rule}: nothing else in the file says it."
        )
    state = {name: value.detach().float().cpu().contiguous().clone() for name, value in network.state_dict().items()}
    content = io.BytesIO()  # torch's own writing to a full disk ends in words that name neither
    torch.save(state, content)
    with complete_or_absent(path) as temporary:
        temporary.write_bytes(content.getbuffer())


def form_of(path: Path) -> str:
    """The preconditioning form by OpenAI's naming: "edm" for edm_*, else "boundary"."""
    return "edm" if path.name.startswith("edm_") else "boundary"


def _diffusion_state(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], str | None]:
    """(the state dict of a consistency_models network, what shows that it is a diffusion model's or None): the image's half of the
    output alone, and attention by two-dimensional convolutions."""
    found, state = None, dict(state)
    for name, value in state.items():
        if name.endswith((".qkv.weight", ".proj_out.weight")) and value.ndim == 3:
            state[name], found = value[..., None], "one-dimensional attention"
    first, last = state.get("input_blocks.0.0.weight"), state.get("out.2.weight")
    if first is not None and last is not None and first.ndim == 4 and len(last) == 2 * first.shape[1]:
        state |= {name: state[name][: first.shape[1]] for name in ("out.2.weight", "out.2.bias") if name in state}
        found = VARIANCE
    return state, found


def _heads_last(state: dict[str, Tensor], config: networks.UNetConfig) -> dict[str, Tensor]:
    """The 3C channels of qkv from (heads, 3, d), as guided-diffusion has them, to (3, heads, d)."""

    def parts_first(value: Tensor) -> Tensor:
        heads = config.heads(len(value) // 3)
        return value.view(heads, 3, -1, *value.shape[1:]).transpose(0, 1).reshape(value.shape)

    return {name: parts_first(value) if ".qkv." in name else value for name, value in state.items()}


def infer_config(
    state: dict[str, Tensor], path: Path, *, image_size: int | None = None, head_channels: int = 64, heads: int | None = None
) -> networks.UNetConfig:
    """The options of the ADM network whose state dict this is, from keys and shapes. `path` names the file in errors."""
    needed = (MARKER, "input_blocks.0.0.weight", "out.2.weight", "output_blocks.0.0.in_layers.2.weight")
    if not all(name in state for name in needed):
        known = re.compile(r"(time_embed|label_emb|input_blocks|middle_block|output_blocks|out)\.")
        keys = [name for name in state if not known.match(name)] or list(state)
        remedy = "Only OpenAI's consistency_models networks are read from single files."
        if "conv_in.weight" in keys:
            remedy = "These are diffusers' names: give the folder that holds the file and its config.json."
        refuse_keys(path, expected="an ADM U-Net", keys=keys, remedy=remedy)
    channels = state["time_embed.0.weight"].shape[1]
    levels = _levels(state)
    mult = tuple(_plain(state[f"{prefix}.0.out_layers.3.weight"].shape[0] / channels) for prefix, _ in levels)
    size = image_size or IMAGE_SIZES.get(mult)
    if size is None:
        raise InputError(f"unknown image size in {path}: channel multipliers {', '.join(map(str, mult))}. Give --image-size N.")
    up = _first_up(state)
    resblock_updown = len(levels) == 1 or (up is not None and f"{up}.in_layers.0.weight" in state)
    conv_resample = resblock_updown or any(re.fullmatch(r"input_blocks\.\d+\.0\.op\.weight", name) for name in state)
    block = "input_blocks.1.0"
    config = networks.UNetConfig(
        resolution=size,
        in_channels=state["input_blocks.0.0.weight"].shape[1],
        out_channels=state["out.2.weight"].shape[0],
        channels=channels,
        channel_mult=mult,
        blocks=_blocks(state),
        attention_resolutions=tuple(size >> level for level, (_, attends) in enumerate(levels) if attends),
        head_channels=head_channels,
        num_heads=heads,
        num_classes=state["label_emb.weight"].shape[0] if "label_emb.weight" in state else None,
        scale_shift_norm=state[f"{block}.emb_layers.1.weight"].shape[0] == 2 * state[f"{block}.out_layers.3.weight"].shape[0],
        resblock_updown=resblock_updown,
        conv_resample=conv_resample,
        norm_groups=NORM_GROUPS,
    )
    require_plain(config, "OpenAI")
    return config


def _plain(mult: float) -> float:
    return int(mult) if mult == int(mult) else mult


def _count(state: dict[str, Tensor], part: str) -> int:
    """How many blocks `part` has, those without weights included."""
    return 1 + max(int(found[1]) for name in state if (found := re.match(rf"{part}\.(\d+)\.", name)))


def _first_up(state: dict[str, Tensor]) -> str | None:
    """The layer that ends the lowest level on the way up: the first, by order, that is neither the block's residual layer nor attention."""
    for index in range(_count(state, "output_blocks")):
        for place in (1, 2):
            prefix = f"output_blocks.{index}.{place}"
            if f"{prefix}.in_layers.0.weight" in state or f"{prefix}.conv.weight" in state:
                return prefix
    return None


def _blocks(state: dict[str, Tensor]) -> int:
    """Residual blocks per level on the way down."""
    up = _first_up(state)
    if up is not None:
        return int(up.split(".")[1])
    total = _count(state, "input_blocks")
    # Resampling without weights leaves a gap in the numbers; one level only leaves none.
    gap = next((index for index in range(1, total) if f"input_blocks.{index}.0.in_layers.0.weight" not in state), total)
    return gap - 1


def _levels(state: dict[str, Tensor]) -> list[tuple[str, bool]]:
    """(prefix of its last input block, whether that attends) for each level, from full resolution down."""
    step = _blocks(state) + 1
    prefixes = [f"input_blocks.{index}" for index in range(step - 1, _count(state, "input_blocks"), step)]
    return [(prefix, f"{prefix}.1.norm.weight" in state) for prefix in prefixes]
