"""LPIPS: the perceptual distance of two images by VGG16 features (Zhang et al. 2018, 1801.03924, equation 1), from given weights."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Places of the 3x3 convolutions in torchvision's `features`, stage by stage. A ReLU follows each, a halving pool each stage but the last;
# the taps are the last ReLU of each stage: relu1_2, relu2_2, relu3_3, relu4_3, relu5_3.
STAGES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
# ImageNet's mean and deviation per channel, moved from [0, 1] to [-1, 1].
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
EPS = 1e-10  # beside the norm of a pixel's features
TRUNK_SIDE, LARGE_SIDE = 224, 256
POOLINGS = ("average", "max")


class LPIPS(nn.Module):
    """d(x, y) [B]: squared differences of unit-normalised features, weighted by channel, averaged over pixels, summed over five taps.

    trunk: the state dict of torchvision's VGG16 (`features.0.weight`, ..), or of its `features` alone with or without that prefix; the
    classifier is not read. The widths follow from the tensors. linear: five tensors of as many elements as the taps have channels, in
    any shape: lpips' `lin0.model.1.weight` .. `lin4.model.1.weight`, each [1, channels, 1, 1].

    pooling: "average" in place of VGG's max pooling is what the published consistency models were trained with (their code asks piq for
    `replace_pooling`); "max" is the metric that the lpips package computes. resize: bilinear to 224x224 where the width is below 256, as
    in that code; the lpips package never resizes. All weights are frozen; fp32, or double by `.double()`.
    """

    def __init__(self, trunk: Mapping[str, Tensor], linear: Sequence[Tensor], *, pooling: str = "average", resize: bool = True):
        super().__init__()
        if pooling not in POOLINGS:
            raise ValueError(f"pooling: {pooling}. Use one of {', '.join(POOLINGS)}.")
        if len(linear) != len(STAGES):
            raise ValueError(f"linear: {len(linear)} tensors. Give one for each of the {len(STAGES)} taps.")
        self.pooling, self.resize = pooling, resize
        weights = feature_weights(trunk)
        self.features = nn.ModuleDict()
        for index in (index for stage in STAGES for index in stage):
            width_out, width_in = weights[f"{index}.weight"].shape[:2]
            self.features[str(index)] = nn.Conv2d(width_in, width_out, 3, padding=1, device="meta")
        # Assigned, not copied into: tensors without memory, of an estimate, take no values.
        self.features.load_state_dict({name: weight.to("cpu", copy=True) for name, weight in weights.items()}, assign=True)
        for tap, weight in enumerate(linear):
            self.register_buffer(f"linear_{tap}", weight.detach().float().flatten().clone())
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distances [B] of x and y, [B, C, H, W] in [-1, 1] with C = 3, or 1 for grey; the gradient reaches both.

        Without resizing both sides must be at least 16. Raises ValueError for other channel counts or unequal shapes.
        """
        if x.shape != y.shape:
            raise ValueError(f"x and y: {tuple(x.shape)} and {tuple(y.shape)}. Give images of one shape.")
        total = x.new_zeros(x.shape[0])
        for tap, (a, b) in enumerate(zip(self.taps(x), self.taps(y), strict=True)):
            total = total + (unit_length(a) - unit_length(b)).square().mean((2, 3)) @ getattr(self, f"linear_{tap}")
        return total

    def taps(self, images: Tensor) -> list[Tensor]:
        """The five feature maps [B, channels, H / 2^k, W / 2^k] of images [B, 3 or 1, H, W] in [-1, 1]."""
        if images.shape[1] not in (1, 3):
            raise ValueError(f"images: {images.shape[1]} channels. LPIPS compares images of 3 channels, or of 1.")
        if self.resize and images.shape[3] < LARGE_SIDE:
            images = F.interpolate(images, size=(TRUNK_SIDE, TRUNK_SIDE), mode="bilinear", align_corners=False)
        pool = F.avg_pool2d if self.pooling == "average" else F.max_pool2d
        x, taps = (images - self.shift) / self.scale, []  # grey becomes three channels by broadcasting
        for stage in STAGES:
            if taps:
                x = pool(x, 2)
            for index in stage:
                x = F.relu(self.features[str(index)](x), inplace=True)
            taps.append(x)
        return taps


def feature_weights(trunk: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The convolutions' tensors by torchvision's places (`0.weight`, `0.bias`, `2.weight`, ..), fp32. Raises KeyError for a missing one."""
    names = [f"{index}.{kind}" for stage in STAGES for index in stage for kind in ("weight", "bias")]
    prefix = "features." if f"features.{names[0]}" in trunk else ""
    return {name: trunk[prefix + name].detach().float() for name in names}


def unit_length(features: Tensor) -> Tensor:
    """Features [B, C, ...] over their norm along the channels. Where none fires they stay 0, and so does their gradient: vector_norm
    sees to it."""
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + EPS)
