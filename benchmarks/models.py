"""The networks that are measured: sizes from 0.1 to 526 million weights, all weights random, none zero."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fastcm import networks, presets
from fastcm.consistency.denoiser import Denoiser, Preconditioning


@dataclass(frozen=True)
class Model:
    """A network by name, with the batches that are measured where none are asked for. in_onnx, compiled_on_cpu: whether it is exported
    by default, and compiled on a CPU."""

    name: str
    kind: str
    options: dict[str, Any]
    cpu_batches: tuple[int, ...] = ()  # empty: too slow on a CPU to be measured unasked
    cuda_batches: tuple[int, ...] = (1, 4, 16, 64)
    train_batches: dict[str, tuple[int, ...]] = field(default_factory=dict)  # by device type
    in_onnx: bool = True
    compiled_on_cpu: bool = False
    precision: str = "auto"  # that its preset trains in

    @property
    def resolution(self) -> int:
        return self.options["resolution"]

    @property
    def channels(self) -> int:
        return self.options.get("in_channels", 3)

    @property
    def classes(self) -> int | None:
        return self.options.get("num_classes")

    @property
    def in_diffusers(self) -> bool:
        """Whether UNet2DModel has such a network."""
        return self.kind == "adm" and self.options.get("patch", 1) == 1

    @property
    def preconditioning(self) -> Preconditioning:
        return Preconditioning(c_noise="250 ln sigma" if self.kind == "adm" else "ln sigma / 4")

    @property
    def info(self) -> dict[str, Any]:
        """What a model folder of it would say."""
        classes = [str(number) for number in range(self.classes)] if self.classes else None
        return {"resolution": self.resolution, "channels": self.channels, "classes": classes}

    def meta(self) -> nn.Module:
        """The network without its weights: shapes alone."""
        with torch.device("meta"):
            return networks.build(self.kind, self.options).eval()

    def network(self) -> nn.Module:
        """A new network on the CPU, the same in every call and process."""
        with torch.random.fork_rng(devices=[]):
            return randomise(networks.build(self.kind, self.options))

    def denoiser(self) -> Denoiser:
        return Denoiser(self.network().eval().requires_grad_(False), self.preconditioning)


@torch.no_grad()
def randomise(network: nn.Module) -> nn.Module:
    """Every weight random: behind a last layer of zeros all networks are equal and products are faster.

    Matrices and convolutions keep the variance of their input, norms scale by about one: activations stay near one in any depth.
    """
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, (parameter.numel() / parameter.shape[0]) ** -0.5, generator=generator)
        else:
            parameter.normal_(1 if name.endswith("weight") else 0, 0.1, generator=generator)
    return network


def _of_preset(name: str) -> Model:
    preset, training = presets.preset(name, method=None), {"cpu": (64, 128), "cuda": (64, 512)}
    options = dict(preset.network)
    kind = options.pop("kind")
    return Model(name, kind, options, (1, 4, 16, 64), train_batches=training, compiled_on_cpu=True, precision=preset.precision)


MODELS = {
    model.name: model
    for model in (
        _of_preset("digits"),
        _of_preset("mnist"),
        # 8.0 M weights, for colour pictures on a CPU.
        Model(
            "colour32",
            "adm",
            {"resolution": 32, "channels": 64, "channel_mult": (1, 2, 2), "blocks": 2, "attention_resolutions": (16, 8), "num_classes": 10},
            (1, 4, 16),
            train_batches={"cpu": (8,), "cuda": (128, 512)},
            compiled_on_cpu=True,
        ),
        # EDM's DDPM++ for CIFAR-10 (Karras et al. 2022, Table 7), 55.7 M.
        Model("cifar10", "song", {"resolution": 32}, (1, 4), train_batches={"cpu": (2,), "cuda": (128, 512)}),
        # The published consistency models: ImageNet 64x64, 295.9 M, and LSUN 256x256, 526.3 M (Song et al. 2023, Table 3).
        Model("imagenet64", "adm", {"resolution": 64, "num_classes": 1000}, train_batches={"cpu": (1,), "cuda": (32, 128)}, in_onnx=False),
        Model(
            "lsun256",
            "adm",
            {"resolution": 256, "channels": 256, "channel_mult": (1, 1, 2, 2, 4, 4), "blocks": 2, "scale_shift_norm": False},
            cuda_batches=(1, 4),
            train_batches={"cuda": (4,)},
            in_onnx=False,
        ),
    )
}


def parameters(model: Model) -> int:
    """The number of weights; none is allocated."""
    return networks.parameter_count({"kind": model.kind, **model.options})


def forward_flops(model: Model) -> int:
    """Floating-point operations of one image through the network, a multiply-add counted as two; nothing is computed."""
    from torch.utils.flop_counter import FlopCounterMode

    network = model.meta()
    with torch.device("meta"), torch.no_grad():
        x, c_noise = torch.empty(1, model.channels, model.resolution, model.resolution), torch.empty(1)
        labels = torch.empty(1, dtype=torch.int64) if model.classes else None
        with FlopCounterMode(display=False) as counter:
            network(x, c_noise, labels)
    return counter.get_total_flops()
