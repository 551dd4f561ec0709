"""EDM2's network inside its pickles: the options of its U-Net, and its tensors under our names."""

from typing import Any

import torch
from torch import Tensor, nn

from fastcm import networks
from fastcm.networks import edm2_unet
from fastcm.weights.foreign_file import require_plain

# The U-Net's options with the defaults that apply where a file leaves them out: (our name, default).
OPTIONS = {
    "img_channels": ("in_channels", 3),
    "label_dim": ("num_classes", 0),
    "model_channels": ("channels", 192),
    "channel_mult": ("channel_mult", (1, 2, 3, 4)),
    "num_blocks": ("blocks", 3),
    "attn_resolutions": ("attention_resolutions", (16, 8)),
    "channels_per_head": ("head_channels", 64),
    "dropout": ("dropout", 0.0),
    "dropout_res": ("dropout_resolution", None),  # of ECT's copy
}
# What the published networks have in common, and ours has built in.
BUILT_IN = {
    "channel_mult_noise": None,
    "channel_mult_emb": None,
    "label_balance": edm2_unet.LABEL_BALANCE,
    "concat_balance": edm2_unet.SKIP_BALANCE,
    "res_balance": edm2_unet.RESIDUAL_BALANCE,
    "attn_balance": edm2_unet.ATTENTION_BALANCE,
    "clip_act": edm2_unet.CLIP,
    "resample_filter": [1, 1],
}
RENAMED = {"emb_gain": "emb_linear.gain", "out_gain": "out_conv.gain"}


def edm2_unet_of(given: dict, resolution: Any, state: dict[str, Tensor]) -> tuple[nn.Module, dict[str, Tensor]]:
    """(network on the meta device, the tensors under its names) from the recorded arguments and tensors of a file; the channels of attn_qkv
    stay in EDM's order. Raises ValueError for an argument that the published networks lack."""
    options = {"resolution": resolution}
    for name, value in given.items():
        if name in BUILT_IN and value != BUILT_IN[name]:
            raise ValueError(f"{name} {value}, not {BUILT_IN[name]}")
        if name not in OPTIONS and name not in BUILT_IN and name != "img_resolution":
            raise ValueError(f"unknown argument {name}")
    options |= {ours: given.get(theirs, default) for theirs, (ours, default) in OPTIONS.items()}
    options |= {"num_classes": options["num_classes"] or None, "out_channels": options["in_channels"]}
    with torch.device("meta"):
        network = networks.EDM2UNet(networks.EDM2UNetConfig(**options))
    require_plain(network.config, "EDM2")
    return network, {our_name(name): value for name, value in state.items()}


def our_name(name: str) -> str:
    path, _, leaf = name.rpartition(".")
    return f"{path}.{RENAMED.get(leaf, leaf)}".lstrip(".")
