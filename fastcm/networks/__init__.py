"""Networks F(x, c_noise, labels): plain modules that never see sigma.

Owns the U-Nets and their parts: patches, resampling, dropout by position, the forward pass for drawing alone.
In: a kind and its options, then [B, C, H, W] inputs, c_noise [B] and class numbers. Out: a tensor of the input's height and width; `build`
makes a network, and refuses an option by its name. Knows kernels; no noise level, file or optimizer.
"""

import torch
from torch import nn

from fastcm.errors import InputError, nearest
from fastcm.networks.edm2_unet import EDM2UNet, EDM2UNetConfig
from fastcm.networks.song_unet import SongUNet, SongUNetConfig
from fastcm.networks.unet import UNet, UNetConfig
from fastcm.networks.unet2d import UNet2D, UNet2DConfig

KINDS = {
    "adm": (UNetConfig, UNet),
    "song": (SongUNetConfig, SongUNet),
    "edm2": (EDM2UNetConfig, EDM2UNet),
    "unet2d": (UNet2DConfig, UNet2D),
}


def build(kind: str, options: dict) -> nn.Module:
    """The network of `kind` (a key of KINDS) with `options`, the fields of its configuration. Raises InputError naming the field."""
    if kind not in KINDS:
        raise InputError(f"unknown network in network.kind: {kind!r}. Choose one of {', '.join(KINDS)}.{nearest(kind, KINDS)}")
    config_class, network_class = KINDS[kind]
    fields = config_class.__dataclass_fields__
    for name in options:
        if name not in fields:
            remedy = nearest(name, fields) or f" The {kind} network has {', '.join(fields)}."
            raise InputError(f"unknown option in network.{name}: {options[name]!r}.{remedy}")
    try:
        return network_class(config_class(**options))
    except InputError:
        raise
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:  # text for a number, a size that no tensor has
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise InputError(f"network that cannot be built in network: {options} ({reason}). Correct its values.") from error


def parameter_count(settings: dict) -> int:
    """The number of weights of a network with these settings ("kind" and options), without allocating them."""
    options = dict(settings)
    with torch.device("meta"):
        network = build(options.pop("kind"), options)
    return sum(parameter.numel() for parameter in network.parameters())
