"""Where LPIPS' two sets of weights lie on this machine: VGG16's convolutions and the weights of its taps. Nothing is downloaded.

The trunk is torchvision's `vgg16-397923af.pth`: a state dict with `features.{0,2,5,..,28}.{weight,bias}` and the classifier, which is not
read. Its name ends with the first eight digits of its sha256, which are checked, as those of any file named so.
The taps' weights come with the lpips package (0.1.4) as `lpips/weights/v0.1/vgg.pth`, 7 KB: `lin0.model.1.weight` .. `lin4.model.1.weight`,
[1, channels, 1, 1]. The package is found, not imported, for it imports torchvision.
"""

import hashlib
import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path

import torch.hub
from torch import Tensor

from fastcm.consistency.lpips import LPIPS, feature_weights
from fastcm.errors import InputError
from fastcm.weights.foreign_file import refuse
from fastcm.weights.state_dict_file import read_state_dict

TRUNK_NAME, LINEAR_NAME = "vgg16-397923af.pth", "vgg.pth"
TRUNK, LINEAR = f"a VGG16 trunk ({TRUNK_NAME})", "weights of LPIPS' taps"
LINEAR_KEYS = tuple(f"lin{tap}.model.1.weight" for tap in range(5))
TAP_CHANNELS = (64, 128, 256, 512, 512)
CHANNELS = (3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)  # the images', then each convolution's output
ANOTHER_DISTANCE = "take another distance, e.g. --set objective.distance=pseudo_huber"


def load_lpips(weights: str | Path | None = None, *, pooling: str = "average", resize: bool = True) -> LPIPS:
    """The perceptual distance, frozen, fp32 on the CPU. See `LPIPS` for pooling and resize.

    weights: a .pth, .pt or .safetensors file of the trunk, from --lpips-weights; None takes torchvision's download of earlier, in torch
    hub's folder. The taps' weights are taken from the first that has them: the same file, a `vgg.pth` beside it, the installed lpips
    package. Raises InputError, within a second and without network, where either is absent, damaged or another network's.
    """
    path = _trunk_path(weights)
    _check_sha256(path)
    state = read_state_dict(path, expected=TRUNK)
    return LPIPS(_checked_trunk(state, path), _linear_weights(state, path), pooling=pooling, resize=resize)


def _trunk_path(weights: str | Path | None) -> Path:
    path = Path(torch.hub.get_dir(), "checkpoints", TRUNK_NAME) if weights is None else Path(weights)
    if path.is_file():
        return path
    looked = f"{path.name} is not in {path.parent}" if weights is None else f"{path} is not a file"
    raise InputError(
        f"no VGG16 weights for LPIPS in --lpips-weights: {looked}. Give --lpips-weights FILE with torchvision's {TRUNK_NAME} "
        f"(its sha256 begins with {_digits(TRUNK_NAME)}), or {ANOTHER_DISTANCE}."
    )


def _digits(name: str) -> str | None:
    found = re.search(r"-([0-9a-f]{8})\.", name)
    return found[1] if found else None


def _check_sha256(path: Path) -> None:
    expected = _digits(path.name)
    if expected is None:
        return
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()[: len(expected)]
    if found != expected:
        raise InputError(f"damaged weights in {path}: its sha256 begins with {found}, not {expected}. Download the file again.")


def _checked_trunk(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The convolutions' tensors, after a look at every shape."""
    try:
        weights = feature_weights(state)
    except KeyError as error:
        refuse(path, expected=TRUNK, reason=f"no {error.args[0]} in it; torchvision's names are read")
    tensors = iter(weights.items())
    for width_in, width_out in zip(CHANNELS, CHANNELS[1:], strict=False):
        for shape in ((width_out, width_in, 3, 3), (width_out,)):
            name, tensor = next(tensors)
            if tensor.shape != shape:
                refuse(path, expected=TRUNK, reason=f"{name} is {list(tensor.shape)}, VGG16's is {list(shape)}")
    return weights


def _linear_weights(state: Mapping[str, Tensor], path: Path) -> list[Tensor]:
    if LINEAR_KEYS[0] not in state:
        path = _linear_path(beside=path)
        state = read_state_dict(path, expected=LINEAR)
    for name, channels in zip(LINEAR_KEYS, TAP_CHANNELS, strict=True):
        if name not in state or state[name].numel() != channels:
            found = list(state[name].shape) if name in state else "absent"
            refuse(path, expected=LINEAR, reason=f"{name} is {found}, of VGG16 it is [1, {channels}, 1, 1]")
    return [state[name] for name in LINEAR_KEYS]


def _linear_path(*, beside: Path) -> Path:
    package = importlib.util.find_spec("lpips")
    folders = package.submodule_search_locations or [] if package else []
    choices = [beside.with_name(LINEAR_NAME), *(Path(folder, "weights", "v0.1", LINEAR_NAME) for folder in folders)]
    for choice in choices:
        if choice.is_file():
            return choice
    raise InputError(
        f"no weights of LPIPS' taps beside --lpips-weights: {choices[0]} is not a file, and no lpips package has them. "
        f"Run `pip install lpips`, put its weights/v0.1/{LINEAR_NAME} there, or {ANOTHER_DISTANCE}."
    )
