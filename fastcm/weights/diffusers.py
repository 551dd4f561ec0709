"""Folders of diffusers' ConsistencyModelPipeline: `model_index.json`, `unet/` and `scheduler/`, read and written without diffusers."""

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from fastcm import networks
from fastcm.consistency.denoiser import Denoiser, Preconditioning
from fastcm.errors import InputError, shown
from fastcm.weights.fields import COUNT, COUNTS, NEEDED, NUMBER, TEXT, TEXTS, field
from fastcm.weights.foreign_file import refuse, refuse_keys, require_plain
from fastcm.weights.model_folder import fill, read_json, write_json, write_safetensors
from fastcm.weights.state_dict_file import is_index, network_state, read_state_dict

EXPECTED = "a diffusers ConsistencyModelPipeline"
C_NOISE = "250 ln sigma"
SCHEDULER = "CMStochasticIterativeScheduler"
INDEX_NAME, CONFIG_NAME, SCHEDULER_NAME = "model_index.json", "unet/config.json", "scheduler/scheduler_config.json"
WEIGHTS_NAME = "unet/diffusion_pytorch_model.safetensors"
WEIGHTS_STEM = "diffusion_pytorch_model"
MARKER = "conv_in.weight"  # the key that every UNet2DModel has
WRITTEN_FOR = "0.18.0"  # the first diffusers with this pipeline and every option that is written
DOWN_TYPES = {True: "ResnetDownsampleBlock2D", False: "DownBlock2D"}  # levels without attention, by resblock_updown
UP_TYPES = {True: "ResnetUpsampleBlock2D", False: "UpBlock2D"}
# What UNet2DModel must say where fastcm's network has no choice; the first value is diffusers' default.
FIXED = {
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "freq_shift": (0,),
    "flip_sin_to_cos": (True,),
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1,),
    "downsample_padding": (1,),
    "act_fn": ("silu", "swish"),
    "norm_eps": (1e-5,),
    "add_attention": (True,),
    "class_embed_type": (None,),
}


def read_diffusers(path: str | Path) -> tuple[nn.Module, Preconditioning, dict]:
    """Returns (network with fp32 weights on the CPU, preconditioning, info) of a pipeline folder, or of its `unet` folder alone.

    Raises InputError naming file and reason.
    """
    path = Path(path)
    is_pipeline = (path / INDEX_NAME).is_file()
    if is_pipeline:
        _check_class(path / INDEX_NAME, "ConsistencyModelPipeline", expected=EXPECTED)
    # Training scripts keep the averaged weights beside the last ones; what a pipeline holds is its unet.
    names = ("unet", "unet_ema") if is_pipeline else ("unet_ema", "unet")
    unet = next((path / name for name in names if (path / name).is_dir()), path)
    scheduler = path / SCHEDULER_NAME if unet != path else path.parent / SCHEDULER_NAME
    preconditioning, steps = _read_scheduler(scheduler) if scheduler.is_file() or is_pipeline else (Preconditioning(c_noise=C_NOISE), 40)
    config = read_config(unet / "config.json")
    weights = _weights_file(unet)
    state, _ = network_state(read_state_dict(weights, expected="weights of a UNet2DModel"), MARKER)
    with torch.device("meta"):
        network = networks.UNet(config)
    fill(network, _from_diffusers(state, config, weights), weights)
    classes = [str(number) for number in range(config.num_classes)] if config.num_classes else None
    info = {
        "resolution": config.resolution,
        "channels": config.in_channels,
        "classes": classes,
        "discretization_steps": steps,
        "source": f"diffusers folder {path.name}" + (f", its {unet.name}" if unet.name == "unet_ema" and unet != path else ""),
    }
    return network.eval().requires_grad_(False), preconditioning, info


def _read_scheduler(path: Path) -> tuple[Preconditioning, int]:
    """(preconditioning, levels of the grid that integer timesteps index) of a scheduler's configuration."""
    settings = _check_class(path, SCHEDULER, expected=f"a {SCHEDULER}")
    sigmas = {
        name: float(field(settings, name, NUMBER, path)) for name in ("sigma_min", "sigma_max", "sigma_data", "rho") if name in settings
    }
    try:
        return Preconditioning(form="boundary", c_noise=C_NOISE, **sigmas), field(settings, "num_train_timesteps", COUNT, path, default=40)
    except InputError as error:
        raise InputError(f"{error} It stands in {path}.") from None


def write_diffusers(path: str | Path, denoiser: Denoiser, info: dict) -> None:
    """Writes a folder that `diffusers.ConsistencyModelPipeline.from_pretrained` loads. Raises InputError for what that cannot hold.

    info: "discretization_steps" sets the grid that diffusers' integer timesteps index (40 where absent).
    """
    path, network, preconditioning = Path(path), denoiser.network, denoiser.preconditioning
    unet_config = to_config(network)
    if preconditioning.form != "boundary":
        raise InputError(f"no diffusers form in noise.form: {preconditioning.form}. ConsistencyModelPipeline has the boundary form only.")
    if preconditioning.c_noise != C_NOISE:
        raise InputError(f"no diffusers form in noise.c_noise: {preconditioning.c_noise}. {SCHEDULER} has {C_NOISE} only.")
    scheduler = {
        "_class_name": SCHEDULER,
        "_diffusers_version": WRITTEN_FOR,
        "clip_denoised": True,
        "num_train_timesteps": int(info.get("discretization_steps", 40)),
        "rho": preconditioning.rho,
        "s_noise": 1.0,
        "sigma_data": preconditioning.sigma_data,
        "sigma_max": preconditioning.sigma_max,
        "sigma_min": preconditioning.sigma_min,
    }
    for name in ("unet", "scheduler"):
        (path / name).mkdir(parents=True, exist_ok=True)
    write_safetensors(path / WEIGHTS_NAME, to_state(network))
    write_json(path / CONFIG_NAME, unet_config)
    write_json(path / SCHEDULER_NAME, scheduler)
    parts = {"scheduler": ["diffusers", SCHEDULER], "unet": ["diffusers", "UNet2DModel"]}
    write_json(path / INDEX_NAME, {"_class_name": "ConsistencyModelPipeline", "_diffusers_version": WRITTEN_FOR, **parts})


def read_config(path: Path) -> networks.UNetConfig:
    """The ADM options of a UNet2DModel's config.json. Raises InputError naming the first option that ADM does not have."""
    config = read_json(path)
    for name, allowed in FIXED.items():
        if config.get(name, allowed[0]) not in allowed:
            refuse(path, expected="an ADM U-Net", reason=f"{name} is {shown(config[name])}, not {shown(allowed[0])}")

    def option(name: str, kind: str, default=NEEDED, *, null: bool = False):
        return field(config, name, kind, path, default=default, null=null)

    widths, groups, resolution = option("block_out_channels", COUNTS), option("norm_num_groups", COUNT, 32), _sample_size(config, path)
    down, up = list(option("down_block_types", TEXTS)), list(option("up_block_types", TEXTS))
    styles = {option("downsample_type", TEXT, "conv"), option("upsample_type", TEXT, "conv")}
    resblock_updown = styles == {"resnet"}
    attends = [name == "AttnDownBlock2D" for name in down]
    expected_down = ["AttnDownBlock2D" if attend else DOWN_TYPES[resblock_updown] for attend in attends]
    expected_up = ["AttnUpBlock2D" if attend else UP_TYPES[resblock_updown] for attend in reversed(attends)]
    if len(widths) != len(down):
        refuse(path, expected="a UNet2DModel configuration", reason=f"{len(widths)} block_out_channels for {len(down)} down_block_types")
    if (len(widths) > 1 and styles not in ({"resnet"}, {"conv"})) or (down, up) != (expected_down, expected_up):
        refuse(path, expected="an ADM U-Net", reason=f"blocks {', '.join(down + up)} with {' and '.join(sorted(styles))} resampling")
    embedding = option("resnet_time_scale_shift", TEXT, "default")
    for name, value, usual in (
        ("attn_norm_num_groups", option("attn_norm_num_groups", COUNT, None, null=True), (None, groups)),
        ("time_embedding_dim", option("time_embedding_dim", COUNT, None, null=True), (None, 4 * widths[0])),
        ("resnet_time_scale_shift", embedding, ("default", "scale_shift")),
    ):
        if value not in usual:
            refuse(path, expected="an ADM U-Net", reason=f"{name} is {shown(value)}, ADM's is {shown(usual[1])}")
    head_channels = option("attention_head_dim", COUNT, 8, null=True)
    options = {
        "in_channels": option("in_channels", COUNT, 3),
        "out_channels": option("out_channels", COUNT, 3),
        "blocks": option("layers_per_block", COUNT, 2),
        **({"num_heads": 1} if head_channels is None else {"head_channels": head_channels}),
        "dropout": option("dropout", NUMBER, 0.0),
        "num_classes": option("num_class_embeds", COUNT, None, null=True),
    }
    try:
        made = networks.UNetConfig(
            resolution=resolution,
            channels=widths[0],
            channel_mult=tuple(width // widths[0] if width % widths[0] == 0 else width / widths[0] for width in widths),
            attention_resolutions=tuple(resolution >> level for level in range(len(widths)) if attends[level]),
            scale_shift_norm=embedding == "scale_shift",
            resblock_updown=resblock_updown,
            norm_groups=groups,
            **options,
        )
        require_plain(made, "diffusers")
        return made
    except InputError as error:
        raise InputError(f"not an ADM U-Net in {path}: {error}") from None


def _sample_size(config: dict, path: Path) -> int:
    """Pixels a side; diffusers writes one number or [height, width]."""
    size = config.get("sample_size")
    if not isinstance(size, list):
        return field(config, "sample_size", COUNT, path)
    sides = field(config, "sample_size", COUNTS, path)
    if len(sides) != 2 or sides[0] != sides[1]:
        raise InputError(f"oblong images in {path}: sample_size is {shown(size)}. Only square ones are made.")
    return sides[0]


def to_config(network: nn.Module) -> dict:
    """The UNet2DModel configuration of an ADM network. Raises InputError naming the option that diffusers has no word for."""
    if getattr(network, "kind", None) != "adm":
        kind = getattr(network, "kind", type(network).__name__)
        raise InputError(f"no diffusers form in network.kind: {kind}. Only adm networks have one; convert --to fastcm instead.")
    config, widths = network.config, network.config.widths
    require_plain(config, "diffusers")
    attends = [config.resolution >> level in config.attention_resolutions for level in range(len(widths))]
    attending = {width for width, attend in zip(widths, attends, strict=True) if attend} | {widths[-1]}  # the middle always attends
    head_widths = {width // config.heads(width) for width in attending}
    one_head = all(config.heads(width) == 1 for width in attending)
    if widths[0] != config.channels:
        raise InputError(f"no diffusers form in network.channel_mult: {list(config.channel_mult)}. The first factor must be 1.")
    if len(head_widths) != 1 and not one_head:
        raise InputError(f"no diffusers form in network.num_heads: {config.num_heads}. Attention needs one head width; set head_channels.")
    if not config.resblock_updown and not config.conv_resample:
        raise InputError("no diffusers form in network.conv_resample: False. Resampling needs weights there.")
    style = "resnet" if config.resblock_updown else "conv"
    return {
        "_class_name": "UNet2DModel",
        "_diffusers_version": WRITTEN_FOR,
        "sample_size": config.resolution,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        **{name: values[0] for name, values in FIXED.items()},
        "block_out_channels": list(widths),
        "layers_per_block": config.blocks,
        "down_block_types": ["AttnDownBlock2D" if attend else DOWN_TYPES[config.resblock_updown] for attend in attends],
        "up_block_types": ["AttnUpBlock2D" if attend else UP_TYPES[config.resblock_updown] for attend in reversed(attends)],
        "downsample_type": style,
        "upsample_type": style,
        "dropout": config.dropout,
        "attention_head_dim": head_widths.pop() if len(head_widths) == 1 else None,  # null: a layer's heads are one
        "norm_num_groups": config.groups,
        "attn_norm_num_groups": config.groups,
        "resnet_time_scale_shift": "scale_shift" if config.scale_shift_norm else "default",
        "num_class_embeds": config.num_classes,
    }


ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb": "class_embedding",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
LAYERS = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
    "norm": "group_norm",
    "proj_out": "to_out.0",
    "op": "conv",
    "conv": "conv",
}
QKV = ("to_q", "to_k", "to_v")
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # before diffusers 0.15
OLD_NAMES = re.compile(rf"(\.attentions\.\d+)\.({'|'.join(OLD_ATTENTION)})\.")


def block_names(config: networks.UNetConfig) -> dict[str, str]:
    """Where diffusers has each of ADM's layers: "input_blocks.5.1" -> "down_blocks.1.attentions.0"."""
    names, levels, index = {}, range(len(config.widths)), 1
    for level in levels:
        if level > 0:
            names[f"input_blocks.{index}.0"] = f"down_blocks.{level - 1}.downsamplers.0"
            index += 1
        for block in range(config.blocks):
            names[f"input_blocks.{index}.0"] = f"down_blocks.{level}.resnets.{block}"
            names[f"input_blocks.{index}.1"] = f"down_blocks.{level}.attentions.{block}"
            index += 1
    names |= {"middle_block.0": "mid_block.resnets.0", "middle_block.1": "mid_block.attentions.0", "middle_block.2": "mid_block.resnets.1"}
    index = 0
    for place, level in enumerate(reversed(levels)):
        attends = config.resolution >> level in config.attention_resolutions
        for block in range(config.blocks + 1):
            names[f"output_blocks.{index}.0"] = f"up_blocks.{place}.resnets.{block}"
            if attends:
                names[f"output_blocks.{index}.1"] = f"up_blocks.{place}.attentions.{block}"
            if level > 0 and block == config.blocks:
                names[f"output_blocks.{index}.{2 if attends else 1}"] = f"up_blocks.{place}.upsamplers.0"
            index += 1
    return names


def their_name(name: str, blocks: dict[str, str]) -> str:
    """diffusers' name of a layer (a key without .weight or .bias); of qkv, the attention block's."""
    if name in ENDS:
        return ENDS[name]
    block, layer = re.fullmatch(r"(middle_block\.\d+|\w+_blocks\.\d+\.\d+)\.(.+)", name).groups()
    return blocks[block] if layer == "qkv" else f"{blocks[block]}.{LAYERS[layer]}"


def to_state(network: nn.Module) -> dict[str, Tensor]:
    """The state dict under diffusers' names: qkv in three, attention's 1x1 convolutions as matrices."""
    blocks, state = block_names(network.config), {}
    for key, value in network.state_dict().items():
        name, _, kind = key.rpartition(".")
        theirs = their_name(name, blocks)
        value = value.float().flatten(1) if name.endswith(("qkv", "proj_out")) and kind == "weight" else value.float()
        if name.endswith("qkv"):
            state |= {f"{theirs}.{part}.{kind}": chunk for part, chunk in zip(QKV, value.chunk(3), strict=True)}
        else:
            state[f"{theirs}.{kind}"] = value
    return state


def _from_diffusers(state: dict[str, Tensor], config: networks.UNetConfig, source: Path) -> dict[str, Tensor]:
    """The state dict under our names. What it lacks is left out, for `fill` to name; what is left over is refused."""
    blocks, ours = block_names(config), {}
    rest = {OLD_NAMES.sub(lambda found: f"{found[1]}.{OLD_ATTENTION[found[2]]}.", name): value for name, value in state.items()}
    with torch.device("meta"):
        expected = networks.UNet(config).state_dict()
    for key, like in expected.items():
        name, _, kind = key.rpartition(".")
        theirs = their_name(name, blocks)
        wanted = [f"{theirs}.{part}.{kind}" for part in QKV] if name.endswith("qkv") else [f"{theirs}.{kind}"]
        parts = [rest.pop(wanted_key).float() for wanted_key in wanted if wanted_key in rest]
        if len(parts) != len(wanted):
            refuse_keys(source, expected="an ADM U-Net", keys=[f"{k} (missing)" for k in wanted], remedy="Check its config.json.")
        value = parts[0] if len(parts) == 1 else torch.cat(parts)
        ours[key] = value[..., None, None] if like.ndim == 4 and value.ndim == 2 else value
    if rest:
        refuse_keys(source, expected="an ADM U-Net", keys=list(rest), remedy="Check its config.json.")
    return ours


def _check_class(path: Path, name: str, *, expected: str) -> dict:
    content = read_json(path)
    if content.get("_class_name", name) != name:
        refuse(path, expected=expected, reason=f"a {content['_class_name']}")
    return content


def _weights_file(unet: Path) -> Path:
    """The weights of a unet folder: safetensors before .bin, one file before the index of parts, fp32 before a variant such as fp16."""
    files = sorted(file for file in unet.glob(f"{WEIGHTS_STEM}*") if not re.search(r"-\d+-of-\d+", file.name))
    for suffix in (".safetensors", ".bin"):
        plain = [unet / f"{WEIGHTS_STEM}{suffix}", unet / f"{WEIGHTS_STEM}{suffix}.index.json"]
        variants = [file for file in files if file.suffix == suffix or (suffix in file.name and is_index(file))]
        if found := next((file for file in plain if file in files), variants[0] if len(variants) == 1 else None):
            return found
    names = ", ".join(file.name for file in sorted(unet.glob(f"{WEIGHTS_STEM}*"))[:3]) or "no weights"
    raise InputError(f"no {WEIGHTS_STEM}.safetensors in {unet}: {names}. Download or save one file, or the index that names its parts.")
