"""Network pickles of EDM, EDM2 and of Consistency Models Made Easy (ECT): their U-Nets inside any of their preconditionings."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastcm import networks
from fastcm.consistency.betas import Betas
from fastcm.consistency.denoiser import STEPS, Preconditioning
from fastcm.errors import InputError
from fastcm.networks.resample import fir_filter
from fastcm.weights import safe_unpickle
from fastcm.weights.edm2 import edm2_unet_of
from fastcm.weights.foreign_file import refuse, refuse_keys, require_plain
from fastcm.weights.model_folder import fill
from fastcm.weights.safe_unpickle import Record

EXPECTED = "an EDM network (.pkl)"
# "Precond" is EDM2's.
FORMS = {
    "EDMPrecond": "edm",
    "Precond": "edm",
    "ECMPrecond": "boundary",
    "VPPrecond": "epsilon",
    "VEPrecond": "ve",
    "iDDPMPrecond": "epsilon",
}
COSINE = (0.001, 0.008)  # C_1 and C_2 of iDDPMPrecond, which are squaredcos_cap_v2's own
SIGMA_MIN, SIGMA_MAX = 0.002, 80.0  # EDM's sampling range, where the file says 0 and infinity
# SongUNet's and DhariwalUNet's options, with the defaults that apply where a file leaves them out: (our name, default).
SHARED = {"in_channels": ("in_channels", 3), "out_channels": ("out_channels", 3)}
SONG = {
    **SHARED,
    "augment_dim": ("augment_channels", 0),
    "model_channels": ("channels", 128),
    "channel_mult": ("channel_mult", (1, 2, 2, 2)),
    "channel_mult_emb": ("channel_mult_emb", 4),
    "num_blocks": ("blocks", 4),
    "attn_resolutions": ("attention_resolutions", (16,)),
    "dropout": ("dropout", 0.1),
    "embedding_type": ("embedding", "positional"),
    "channel_mult_noise": ("channel_mult_noise", 1),
    "encoder_type": ("encoder", "standard"),
    "decoder_type": ("decoder", "standard"),
    "resample_filter": ("resample_filter", (1, 1)),
    "label_dim": ("num_classes", 0),
}
ADM = {
    **SHARED,
    "model_channels": ("channels", 192),
    "channel_mult": ("channel_mult", (1, 2, 3, 4)),
    "num_blocks": ("blocks", 3),
    "attn_resolutions": ("attention_resolutions", (32, 16, 8)),
    "dropout": ("dropout", 0.1),
    "label_dim": ("num_classes", 0),
}
IGNORED = ("img_resolution", "label_dropout", "use_fp16")


def read_edm(path: str | Path) -> tuple[nn.Module, Preconditioning, dict]:
    """Returns (network with fp32 weights on the CPU, preconditioning, info) of a pickle, none of whose code is run.

    An EDMPrecond and EDM2's Precond, whose log-variance is left out, give the edm form, an ECMPrecond the boundary form, VPPrecond,
    VEPrecond and iDDPMPrecond those of Karras et al. 2022, Table 1; of an iDDPM's variance nothing is kept.
    Raises InputError naming file and reason.
    """
    path = Path(path)
    content = safe_unpickle.load(path, expected=EXPECTED)
    record = content.get("ema", content.get("net")) if isinstance(content, dict) else content
    if not isinstance(record, Record):
        keys = ", ".join(map(str, list(content)[:3])) if isinstance(content, dict) else type(content).__name__
        refuse(path, expected=EXPECTED, reason=f"it holds {keys or 'nothing'} and no network under 'ema'")
    model = record.children().get("unet" if record.class_name == "Precond" else "model")
    if record.class_name not in FORMS or model is None:
        refuse(path, expected=EXPECTED, reason=f"a {record.class_name}; {' and '.join(FORMS)} are read")
    network = _network(model, record, path)
    try:
        preconditioning = _preconditioning(record)
    except (TypeError, ValueError) as error:
        refuse(path, expected=EXPECTED, reason=error)
    config = network.config
    info = {
        "resolution": config.resolution,
        "channels": config.in_channels,
        "classes": [str(number) for number in range(config.num_classes)] if config.num_classes else None,
        "source": f"EDM pickle {path.name} ({record.class_name} of {model.class_name})",
        "licence": "of the pickle's publisher; NVIDIA's EDM models are CC BY-NC-SA 4.0",
    }
    return network.eval().requires_grad_(False), preconditioning, info


def _preconditioning(record: Record) -> Preconditioning:
    def number(name: str, default: float) -> float:
        return float(record.state.get(name, default))

    sigma_min, sigma_max = number("sigma_min", 0), number("sigma_max", math.inf)
    betas, c_noise = None, "ln(sigma / 2)" if record.class_name == "VEPrecond" else "ln sigma / 4"
    if record.class_name == "VPPrecond":
        low = number("beta_min", 0.1)
        betas, c_noise = Betas(schedule="continuous", start=low, end=low + number("beta_d", 19.9), steps=int(number("M", 1000))), STEPS[0]
    elif record.class_name == "iDDPMPrecond":
        found = number("C_1", COSINE[0]), number("C_2", COSINE[1])
        if found != COSINE:
            raise ValueError(f"C_1 and C_2 are {found[0]:g} and {found[1]:g}, not {COSINE[0]:g} and {COSINE[1]:g}")
        betas, c_noise = Betas(schedule="squaredcos_cap_v2", steps=int(number("M", 1000))), STEPS[1]
    low, high = (SIGMA_MIN, SIGMA_MAX) if betas is None else betas.sigma_range
    return Preconditioning(
        form=FORMS[record.class_name],
        sigma_data=number("sigma_data", 0.5),
        sigma_min=sigma_min if sigma_min > 0 else low,
        sigma_max=high if not math.isfinite(sigma_max) else sigma_max if betas is None else min(sigma_max, high),
        c_noise=c_noise,
        betas=betas,
    )


def _network(model: Record, record: Record, path: Path) -> nn.Module:
    builders = {"SongUNet": _song, "DhariwalUNet": _adm, "UNet": _edm2}
    if model.class_name not in builders:
        refuse(path, expected=EXPECTED, reason=f"a {model.class_name}; {' and '.join(builders)} are read")
    options = model.state.get("_init_kwargs")
    if not isinstance(options, dict):
        refuse(path, expected=EXPECTED, reason=f"the arguments of its {model.class_name} were not recorded")
    try:
        state = model.tensors()
        if record.class_name == "iDDPMPrecond":
            options, state = _without_variance(options, state)
        network, state = builders[model.class_name](options, record.state.get("img_resolution"), state)
    except InputError as error:
        refuse(path, expected=EXPECTED, reason=error)
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        refuse(path, expected=EXPECTED, reason=f"its tensors do not form a {model.class_name} ({error})")
    unknown = [name for name in state if name not in network.state_dict()]
    if unknown:
        refuse_keys(path, expected=EXPECTED, keys=unknown, remedy=f"They do not belong to its {model.class_name}.")
    fill(network, {name: value.float() for name, value in state.items()}, path)
    return network


def _without_variance(options: dict, state: dict[str, Tensor]) -> tuple[dict, dict[str, Tensor]]:
    """Arguments and tensors of the network without its second half of channels, which iDDPM learns a variance in."""
    given, wanted = options.get("out_channels"), options.get("in_channels")
    if given == wanted:
        return options, state
    if not isinstance(given, int) or not isinstance(wanted, int) or given != 2 * wanted:
        raise ValueError(f"{given} channels out of {wanted}")
    last = [name for name in state if name.startswith("out_conv.") or ("_aux_conv." in name and len(state[name]) == given)]
    return {**options, "out_channels": wanted}, {**state, **{name: state[name][:wanted] for name in last}}


def _options(given: dict, resolution: Any, known: dict[str, tuple[str, Any]]) -> dict:
    """Our configuration's fields from the recorded arguments. Raises ValueError for an argument that the paper's network lacks."""
    unknown = [name for name in given if name not in known and name not in IGNORED]
    if unknown:
        raise ValueError(f"unknown argument {unknown[0]}")
    options = {ours: given.get(theirs, default) for theirs, (ours, default) in known.items()}
    for name in ("num_classes", "augment_channels"):
        if name in options:
            options[name] = options[name] or None
    return {"resolution": resolution, **options}


def _song(given: dict, resolution: Any, state: dict[str, Tensor]) -> tuple[nn.Module, dict[str, Tensor]]:
    with torch.device("meta"):
        network = networks.SongUNet(networks.SongUNetConfig(**_options(given, resolution, SONG)))
    require_plain(network.config, "EDM")
    expected, fir = network.state_dict(), fir_filter(network.config.resample_filter)
    ours = {}
    for name, value in state.items():
        if name.endswith("resample_filter") and name not in expected:
            _check_filter(name, value, fir)  # of two equal taps: a mean of pixels, which needs no filter
        else:
            ours[name] = qkv_parts_first(value) if ".qkv." in name else value
    return network, ours


def _adm(given: dict, resolution: Any, state: dict[str, Tensor]) -> tuple[nn.Module, dict[str, Tensor]]:
    if given.get("augment_dim"):
        given = {name: value for name, value in given.items() if name != "augment_dim"}
        state = {name: value for name, value in state.items() if not name.startswith("map_augment.")}
    if given.get("channel_mult_emb", 4) != 4:
        raise ValueError(f"channel_mult_emb {given['channel_mult_emb']}")
    given = {name: value for name, value in given.items() if name not in ("channel_mult_emb", "augment_dim")}
    config = networks.UNetConfig(**_options(given, resolution, ADM))
    require_plain(config, "EDM")
    if min(config.widths) < 128:
        raise ValueError(f"{min(config.widths)} channels; below 128 its group norms differ from ADM's")
    names, box, ours = adm_names(config), fir_filter((1, 1)), {}
    for name, value in state.items():
        layer, _, kind = name.rpartition(".")
        if kind == "resample_filter":
            _check_filter(name, value, box)
        elif layer == "map_label":
            ours["label_emb.weight"] = value.T
        else:
            ours[f"{names[layer]}.{kind}"] = qkv_parts_first(value) if layer.endswith(".qkv") else value
    with torch.device("meta"):
        return networks.UNet(config), ours


def _edm2(given: dict, resolution: Any, state: dict[str, Tensor]) -> tuple[nn.Module, dict[str, Tensor]]:
    network, state = edm2_unet_of(given, resolution, state)
    return network, {name: qkv_parts_first(value) if ".attn_qkv." in name else value for name, value in state.items()}


def qkv_parts_first(value: Tensor) -> Tensor:
    """EDM's order of the 3C channels, (heads, d, 3), to (3, heads, d)."""
    return value.view(-1, 3, *value.shape[1:]).transpose(0, 1).reshape(value.shape)


def _check_filter(name: str, value: Tensor, expected: Tensor) -> None:
    if value.shape != expected.shape or not torch.allclose(value.float(), expected, atol=1e-6):
        raise ValueError(f"{name} is not the filter that its arguments name")


RESIDUAL = {"norm0": "in_layers.0", "conv0": "in_layers.2", "affine": "emb_layers.1", "norm1": "out_layers.0", "conv1": "out_layers.3"}
ATTENTION = {"norm2": "norm", "qkv": "qkv", "proj": "proj_out"}


def adm_names(config: networks.UNetConfig) -> dict[str, str]:
    """Our name of each layer of a DhariwalUNet: "enc.64x64_block0.conv0" -> "input_blocks.1.0.in_layers.2"."""
    names = {"map_layer0": "time_embed.0", "map_layer1": "time_embed.2", "out_norm": "out.0", "out_conv": "out.2"}

    def block(theirs: str, ours: str, place: int):
        names.update({f"{theirs}.{layer}": f"{ours}.{place}.{name}" for layer, name in (*RESIDUAL.items(), ("skip", "skip_connection"))})
        names.update({f"{theirs}.{layer}": f"{ours}.{place + 1}.{name}" for layer, name in ATTENTION.items()})

    levels, index = range(len(config.widths)), 1
    size = [f"{config.resolution >> level}x{config.resolution >> level}" for level in levels]
    names[f"enc.{size[0]}_conv"] = "input_blocks.0.0"
    for level in levels:
        for theirs in [f"enc.{size[level]}_down"] * (level > 0) + [f"enc.{size[level]}_block{i}" for i in range(config.blocks)]:
            block(theirs, f"input_blocks.{index}", 0)
            index += 1
    block(f"dec.{size[-1]}_in0", "middle_block", 0)
    block(f"dec.{size[-1]}_in1", "middle_block", 2)
    index = 0
    for level in reversed(levels):
        for i in range(config.blocks + 1):
            block(f"dec.{size[level]}_block{i}", f"output_blocks.{index}", 0)
            index += 1
        if level > 0:  # ADM ends a level's last block with the way up, EDM begins the next level with it
            attends = config.resolution >> level in config.attention_resolutions
            block(f"dec.{size[level - 1]}_up", f"output_blocks.{index - 1}", 2 if attends else 1)
    return names
