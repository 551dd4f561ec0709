"""UNet2DModel's configurations and state dicts, of networks that are ADM's and of all others, without diffusers."""

import re
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from fastcm import networks
from fastcm.errors import InputError, shown
from fastcm.networks.unet2d import DOWN_BLOCKS, UP_BLOCKS
from fastcm.weights.fields import COUNT, COUNTS, NEEDED, NUMBER, TEXTS, field
from fastcm.weights.foreign_file import refuse, refuse_keys, require_plain, require_untold
from fastcm.weights.model_folder import fill, read_json
from fastcm.weights.state_dict_file import is_index, network_state, read_state_dict

EXPECTED = "a UNet2DModel"
WRITTEN_FOR = "0.18.0"  # the first diffusers with ConsistencyModelPipeline and every option that is written
VARIANCE = "the variance that it predicts"
WEIGHTS_STEM = "diffusion_pytorch_model"
MARKER = "conv_in.weight"  # the key that every UNet2DModel has
# Why a model of another class is refused.
OTHER_CLASSES = (("Condition", "text-conditional"), ("3D", "of three dimensions"), ("1D", "of one dimension"), ("VQ", "of latents"))
DOWN_TYPES = {True: "ResnetDownsampleBlock2D", False: "DownBlock2D"}  # levels without attention, by resblock_updown
UP_TYPES = {True: "ResnetUpsampleBlock2D", False: "UpBlock2D"}
# ADM's options where UNet2DModel has others; the value is diffusers' default but for `norm_eps`.
ADM = {
    "middle": True,
    "middle_attention": True,
    "middle_scale": 1.0,
    "norm_eps": 1e-5,
    "downsample_padding": 1,
    "embedding": "positional",
    "freq_shift": 0,
    "cosines_first": True,
    "numbered_classes": False,
    "input_gain": 1.0,
    "input_shift": 0.0,
}


def read_unet(folder: Path, *, unit_images: bool = False, may_vary: bool = False) -> tuple[nn.Module, str]:
    """(network with fp32 weights on the CPU, what was left out of it) of a unet folder: an ADM network where it is one, else a UNet2D.

    unit_images: it was trained on pixels from 0 to 1. may_vary: twice as many channels out as in are an image and its variance (Nichol and
    Dhariwal 2021), of which the image is kept. Raises InputError naming file and reason.
    """
    config = read_config(folder / "config.json", unit_images=unit_images)
    weights = _weights_file(folder)
    state, _ = network_state(read_state_dict(weights, expected="weights of a UNet2DModel"), MARKER)
    state = {OLD_NAMES.sub(lambda found: f"{found[1]}.{OLD_ATTENTION[found[2]]}.", name): value for name, value in state.items()}
    try:
        adm = as_adm(config)
        with torch.device("meta"):
            network = networks.UNet2D(config) if adm is None else networks.UNet(adm)
    except InputError as error:
        raise InputError(f"not {EXPECTED} in {folder / 'config.json'}: {error}") from None
    left_out = ""
    if may_vary and network.config.out_channels == 2 * network.config.in_channels:
        left_out, channels = VARIANCE, network.config.in_channels
        state = {name: value[:channels] if name.startswith("conv_out.") else value for name, value in state.items()}
        with torch.device("meta"):
            network = type(network)(replace(network.config, out_channels=channels))
    fill(network, _from_diffusers(state, network, weights), weights)
    return network, left_out


def read_config(path: Path, *, unit_images: bool = False) -> networks.UNet2DConfig:
    """The options of a UNet2DModel's config.json. Raises InputError naming the first that is malformed or that cannot be followed."""
    config = read_json(path)
    name = config.get("_class_name", "UNet2DModel")
    if name != "UNet2DModel":
        kind = next((f", which is {kind}" for word, kind in OTHER_CLASSES if word in str(name)), "")
        refuse(path, expected=EXPECTED, reason=f"a {name}{kind}", remedy="Unconditional and class-conditional models of pixels are read.")

    def option(name: str, kind: str, default=NEEDED, *, null: bool = False):
        return field(config, name, kind, path, default=default, null=null)

    def choice(name: str, default, choices: dict):
        value = config.get(name, default)
        if not isinstance(value, (str, int, float, type(None))) or value not in choices:
            refuse(path, expected=EXPECTED, reason=f"{name} is {shown(value)}, not {' or '.join(shown(known) for known in choices)}")
        return choices[value]

    down, up = ([kind.removeprefix("UNetRes") for kind in option(f"{way}_block_types", TEXTS)] for way in ("down", "up"))
    for kinds, known in ((down, DOWN_BLOCKS), (up, UP_BLOCKS)):
        if unknown := [kind for kind in kinds if kind not in known]:
            reason = f"a block {unknown[0]}{', which is text-conditional' if 'CrossAttn' in unknown[0] else ''}"
            refuse(path, expected=EXPECTED, reason=reason, remedy=f"Blocks that are read: {', '.join(known)}.")
    widths = option("block_out_channels", COUNTS)
    if not len(widths) == len(down) == len(up):
        refuse(path, expected=EXPECTED, reason=f"{len(widths)} block_out_channels for {len(down)} down_block_types and {len(up)} up")
    choice("act_fn", "silu", {"silu": True, "swish": True})
    centred = choice("center_input_sample", False, {False: False, True: True})
    classes = choice("class_embed_type", None, {None: "table", "timestep": "numbers"})
    num_classes = option("num_class_embeds", COUNT, None, null=True)
    if classes == "numbers" and num_classes is None:
        refuse(
            path, expected=EXPECTED, reason="class_embed_type timestep without num_class_embeds", remedy="Write the number of classes in."
        )
    options = {
        "resolution": _sample_size(config, path),
        "in_channels": option("in_channels", COUNT, 3),
        "out_channels": option("out_channels", COUNT, 3),
        "widths": tuple(widths),
        "blocks": option("layers_per_block", COUNT, 2),
        "down_blocks": tuple(down),
        "up_blocks": tuple(up),
        "middle": choice("mid_block_type", "UNetMidBlock2D", {"UNetMidBlock2D": True, None: False}),
        "middle_attention": choice("add_attention", True, {True: True, False: False}),
        "middle_scale": float(option("mid_block_scale_factor", NUMBER, 1)),
        "middle_groups": option("attn_norm_num_groups", COUNT, None, null=True),
        "head_channels": option("attention_head_dim", COUNT, 8, null=True),
        "norm_groups": option("norm_num_groups", COUNT, 32, null=any("Skip" in kind for kind in down)),
        "norm_eps": option("norm_eps", NUMBER, 1e-5),
        "scale_shift_norm": choice("resnet_time_scale_shift", "default", {"default": False, "scale_shift": True}),
        "resnet_downsample": choice("downsample_type", "conv", {"conv": False, "resnet": True}),
        "resnet_upsample": choice("upsample_type", "conv", {"conv": False, "resnet": True}),
        "downsample_padding": choice("downsample_padding", 1, {0: 0, 1: 1}),
        "embedding": choice("time_embedding_type", "positional", {"positional": "positional", "fourier": "fourier"}),
        "freq_shift": choice("freq_shift", 0, {0: 0, 1: 1}),
        "cosines_first": choice("flip_sin_to_cos", True, {True: True, False: False}),
        "emb_channels": option("time_embedding_dim", COUNT, None, null=True),
        "num_classes": num_classes,
        "numbered_classes": classes == "numbers",
        "dropout": option("dropout", NUMBER, 0.0),
        "input_gain": 2.0 if centred else 1.0,
        "input_shift": -1.0 if centred else 0.0,
    }
    if unit_images:  # u = (x + 1) / 2 goes in
        options |= {"input_gain": options["input_gain"] / 2, "input_shift": options["input_shift"] + options["input_gain"] / 2}
    try:
        return networks.UNet2DConfig(**options)
    except InputError as error:
        raise InputError(f"not {EXPECTED} in {path}: {error}") from None


def as_adm(config: networks.UNet2DConfig) -> networks.UNetConfig | None:
    """The same network as an ADM one, or None where it is not."""
    widths, styles = config.widths, {config.resnet_downsample, config.resnet_upsample}
    attends = [kind == "AttnDownBlock2D" for kind in config.down_blocks]
    resblock_updown = styles == {True}
    down = tuple("AttnDownBlock2D" if attend else DOWN_TYPES[resblock_updown] for attend in attends)
    up = tuple("AttnUpBlock2D" if attend else UP_TYPES[resblock_updown] for attend in reversed(attends))
    if any(getattr(config, name) != value for name, value in ADM.items()) or config.norm_groups is None:
        return None
    if (len(widths) > 1 and len(styles) == 2) or (config.down_blocks, config.up_blocks) != (down, up):
        return None
    if config.middle_groups not in (None, config.norm_groups) or config.emb_width != 4 * widths[0]:
        return None
    if config.scale_shift_norm and config.middle_groups is None:  # no norm before the middle's attention
        return None
    adm = networks.UNetConfig(
        resolution=config.resolution,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        channels=widths[0],
        channel_mult=tuple(width // widths[0] if width % widths[0] == 0 else width / widths[0] for width in widths),
        blocks=config.blocks,
        attention_resolutions=tuple(config.resolution >> level for level in range(len(widths)) if attends[level]),
        **({"num_heads": 1} if config.head_channels is None else {"head_channels": config.head_channels}),
        dropout=config.dropout,
        num_classes=config.num_classes,
        scale_shift_norm=config.scale_shift_norm,
        resblock_updown=resblock_updown,
        norm_groups=config.norm_groups,
    )
    require_plain(adm, "diffusers")
    return adm


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
    """The UNet2DModel configuration of an ADM or UNet2D network. Raises InputError naming the option that diffusers has no word for."""
    kind = getattr(network, "kind", type(network).__name__)
    if kind == "unet2d":
        return _unet2d_to_config(network.config)
    if kind != "adm":
        raise InputError(f"no diffusers form in network.kind: {kind}. adm and unet2d networks have one; convert --to fastcm instead.")
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
        **ADM_WORDS,
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


def _unet2d_to_config(config: networks.UNet2DConfig) -> dict:
    require_untold(config, "diffusers")
    affine = (config.input_gain, config.input_shift)
    if affine not in ((1.0, 0.0), (2.0, -1.0)):
        raise InputError(f"no diffusers form in network.input_gain: {config.input_gain}. UNet2DModel works on pixels from -1 to 1.")
    words = {
        "sample_size": config.resolution,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "center_input_sample": affine == (2.0, -1.0),
        "time_embedding_type": config.embedding,
        "time_embedding_dim": config.emb_channels,
        "freq_shift": config.freq_shift,
        "flip_sin_to_cos": config.cosines_first,
        "down_block_types": list(config.down_blocks),
        "mid_block_type": "UNetMidBlock2D" if config.middle else None,
        "up_block_types": list(config.up_blocks),
        "block_out_channels": list(config.widths),
        "layers_per_block": config.blocks,
        "mid_block_scale_factor": config.middle_scale,
        "downsample_padding": config.downsample_padding,
        "downsample_type": "resnet" if config.resnet_downsample else "conv",
        "upsample_type": "resnet" if config.resnet_upsample else "conv",
        "dropout": config.dropout,
        "act_fn": "silu",
        "attention_head_dim": config.head_channels,
        "norm_num_groups": config.norm_groups,
        "attn_norm_num_groups": config.middle_groups,
        "norm_eps": config.norm_eps,
        "resnet_time_scale_shift": "scale_shift" if config.scale_shift_norm else "default",
        "add_attention": config.middle_attention,
        "class_embed_type": "timestep" if config.numbered_classes else None,
        "num_class_embeds": config.num_classes,
    }
    return {"_class_name": "UNet2DModel", "_diffusers_version": WRITTEN_FOR, **words}


# What a UNet2DModel says where ADM's network has no choice.
ADM_WORDS = {
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "mid_block_type": "UNetMidBlock2D",
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "act_fn": "silu",
    "norm_eps": 1e-5,
    "add_attention": True,
    "class_embed_type": None,
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


INSIDE = re.compile(r"(.+)\.(in_layers\.[02]|emb_layers\.1|out_layers\.[03]|skip_connection|norm|qkv|proj_out|op|conv)")


def their_name(name: str, blocks: dict[str, str] | None) -> str:
    """diffusers' name of a layer (a key without .weight or .bias); of qkv, the attention block's.

    blocks: `block_names` of an ADM network; None for a UNet2D, whose blocks have diffusers' names.
    """
    if blocks is not None and name in ENDS:
        return ENDS[name]
    found = INSIDE.fullmatch(name)
    if found is None:
        return name
    block, layer = found.groups()
    block = block if blocks is None else blocks[block]
    return block if layer == "qkv" else f"{block}.{LAYERS[layer]}"


def _blocks_of(network: nn.Module) -> dict[str, str] | None:
    return block_names(network.config) if network.kind == "adm" else None


def _their_keys(key: str, blocks: dict[str, str] | None) -> list[str]:
    """diffusers' keys of one of ours: three for qkv; Fourier frequencies are a weight there."""
    if key == "time_proj.freqs":
        return ["time_proj.weight"]
    name, _, kind = key.rpartition(".")
    theirs = their_name(name, blocks)
    return [f"{theirs}.{part}.{kind}" for part in QKV] if name.endswith(".qkv") else [f"{theirs}.{kind}"]


def to_state(network: nn.Module) -> dict[str, Tensor]:
    """The state dict under diffusers' names: qkv in three, attention's 1x1 convolutions as matrices."""
    blocks, state = _blocks_of(network), {}
    for key, value in network.state_dict().items():
        keys, value = _their_keys(key, blocks), value.float()
        if key.endswith((".qkv.weight", ".proj_out.weight")):
            value = value.flatten(1)
        state |= dict(zip(keys, value.chunk(len(keys)), strict=True))
    return state


def _from_diffusers(state: dict[str, Tensor], network: nn.Module, source: Path) -> dict[str, Tensor]:
    """The state dict under the names of `network`. What it lacks and what is left over is refused."""
    blocks, ours, rest = _blocks_of(network), {}, dict(state)
    for key, like in network.state_dict().items():
        wanted = _their_keys(key, blocks)
        parts = [rest.pop(name).float() for name in wanted if name in rest]
        if len(parts) != len(wanted):
            refuse_keys(source, expected=EXPECTED, keys=[f"{k} (missing)" for k in wanted], remedy="Check its config.json.")
        value = parts[0] if len(parts) == 1 else torch.cat(parts)
        ours[key] = value.flatten(1)[..., None, None] if key.endswith((".qkv.weight", ".proj_out.weight")) and value.ndim > 1 else value
        if ours[key].ndim != like.ndim:
            ours[key] = value
    if rest:
        refuse_keys(source, expected=EXPECTED, keys=list(rest), remedy="Check its config.json.")
    return ours


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
