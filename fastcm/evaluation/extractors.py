"""Feature networks other than the judge: Inception from torch-fidelity, a module of the user's own, an ONNX file."""

import hashlib
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import nn

from fastcm.errors import InputError, reason_of

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d"  # its first digits, which torch.hub checks as well
INCEPTION_BATCH = 50  # images at 299x299 at once
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"


class Extractor(Protocol):
    """What makes features of images. name: what stands beside every figure. sha256: of the network. resize: what it does to the size."""

    name: str
    description: str
    sha256: str
    resize: str

    def extract(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Of uint8 [B, C, H, W]: features float64 [B, D], and class scores before the softmax [B, K] or None."""
        ...


class ModuleFeatures:
    """A user's module: fp32 [B, C, H, W] in [-1, 1] -> features [B, ...], or (features, class scores [B, K]). Run in eval mode."""

    resize = "none: the module gets the images as they are"

    def __init__(self, module: nn.Module, *, name: str, device: str | torch.device = "cpu"):
        self.module, self.name, self.device = module.to(device).eval(), name, torch.device(device)
        self.description = f"{type(module).__module__}.{type(module).__qualname__}"
        self.sha256 = module_sha256(module)

    @torch.inference_mode()
    def extract(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        x = torch.from_numpy(np.array(images)).to(self.device).float() / 127.5 - 1
        try:
            output = self.module(x)
        except Exception as error:
            reason = reason_of(error)
            shape = list(images.shape[1:])
            raise InputError(f"the feature network refuses the images in --features: {self.name}: {reason}. They are {shape}.") from error
        features, scores = output if isinstance(output, tuple) else (output, None)
        return checked(self.name, len(images), *(None if t is None else t.flatten(1).double().cpu().numpy() for t in (features, scores)))


class InceptionFeatures:
    """The Inception-v3 of published FID figures: 2,048 features and 1,008 class scores, by torch-fidelity, from a file on this machine."""

    name = "Inception"
    description = "Inception-v3 of 2015-12-05 by torch-fidelity, 2,048 features"
    resize = "to 299x299, bilinear as TensorFlow 1 did it, by torch-fidelity; grey repeated to three channels"

    def __init__(self, weights: Path | None = None, *, device: str | torch.device = "cpu"):
        path = Path(weights) if weights is not None else Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
        remedy = f"Download {INCEPTION_URL} (sha256 begins {INCEPTION_SHA256}) and pass --inception-weights FILE, or use --features judge"
        if not path.is_file():
            raise InputError(f"no Inception weights in --features inception: {path}. {remedy}.")
        self.sha256 = file_sha256(path)
        if not self.sha256.startswith(INCEPTION_SHA256):
            raise InputError(f"other Inception weights in {path}: sha256 {self.sha256[:16]}. {remedy}.")
        try:
            network = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
        except ImportError as error:
            cure = "pip install torch-fidelity, and the torchvision that belongs to this torch; or use --features judge"
            raise InputError(f"torch-fidelity does not import for --features inception: {error}. {cure}.") from None
        try:
            torch.load(path, map_location="cpu", weights_only=True)  # tensors alone: torch-fidelity itself would run what a pickle says
        except Exception as error:
            reason = reason_of(error)
            raise InputError(f"not a plain state dict in {path}: {reason}. {remedy}.") from None
        self.device = torch.device(device)
        self.network = network.FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
        ).to(self.device)

    @torch.inference_mode()
    def extract(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        if images.shape[1] not in (1, 3):
            raise InputError(f"images of {images.shape[1]} channels for --features inception. Use judge, or a network of yours.")
        parts = []
        for start in range(0, len(images), INCEPTION_BATCH):
            x = torch.from_numpy(np.array(images[start : start + INCEPTION_BATCH])).to(self.device)
            output = self.network(x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x)
            parts.append([values.double().cpu().numpy() for values in output])
        return checked(self.name, len(images), *(np.concatenate(part) for part in zip(*parts, strict=True)))


class OnnxFeatures:
    """An ONNX file with one input, float32 [batch, C, H, W] in [-1, 1], and outputs: features [batch, D], then perhaps class scores."""

    resize = "none: the graph gets the images as they are"

    def __init__(self, path: Path, *, provider: str = "cpu"):
        from fastcm.generation.onnx_session import open_session

        self.path, self.name = Path(path), Path(path).name
        if not self.path.is_file():
            raise InputError(f"no such file in --features: {path}. Give an .onnx whose output is [batch, features].")
        self.session, _ = open_session(self.path, provider)
        self.description, self.sha256 = f"the graph {self.name}", file_sha256(self.path)
        self.input, self.outputs = self.session.get_inputs()[0], [value.name for value in self.session.get_outputs()][:2]
        if len(self.session.get_inputs()) != 1 or len(self.input.shape) != 4 or self.input.type != "tensor(float)":
            raise InputError(f"not a feature network in --features: {path}. It needs one input, float32 [batch, C, H, W].")

    def extract(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        wanted = [size if isinstance(size, int) else None for size in self.input.shape]
        if any(size not in (None, given) for size, given in zip(wanted[1:], images.shape[1:], strict=True)):
            raise InputError(f"images of another shape for --features {self.name}: {list(images.shape[1:])}. It takes {wanted[1:]}.")
        parts, step = [], wanted[0] or len(images)
        for start in range(0, len(images), step):
            x = images[start : start + step].astype(np.float32) / 127.5 - 1
            filled = np.concatenate([x, np.zeros((step - len(x), *x.shape[1:]), np.float32)])
            parts.append([output[: len(x)] for output in self.session.run(self.outputs, {self.input.name: filled})])
        whole = [np.concatenate(part).reshape(len(images), -1).astype(np.float64) for part in zip(*parts, strict=True)]
        return checked(self.name, len(images), *whole)


def checked(name: str, count: int, features: np.ndarray, scores: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray | None]:
    """The output of a feature network; InputError where it is not one row per image, or not finite."""
    if features.ndim != 2 or len(features) != count:
        raise InputError(f"not one row of features per image in --features: {name}: {list(features.shape)} for {count}. Give [batch, D].")
    if not np.isfinite(features).all():
        bad = int((~np.isfinite(features).all(axis=1)).sum())
        raise InputError(f"non-finite features in --features: {name}: {bad} of {count} images. Check the network or the images.")
    return features, scores


def open_extractor(text: str, *, inception_weights: Path | None = None, device: str = "cpu") -> Extractor:
    """The extractor of `inception`, a file.onnx, or package.module:name, a module or a function without arguments that returns one."""
    if text == "inception":
        return InceptionFeatures(inception_weights, device=device)
    if text.lower().endswith(".onnx"):
        return OnnxFeatures(Path(text))
    module_name, colon, attribute = text.partition(":")
    if not (colon and attribute):
        raise InputError(f"unknown value in --features: {text}. Use judge, inception, a file.onnx or package.module:name.")
    try:
        found: nn.Module | Callable[[], nn.Module] = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise InputError(f"cannot import --features: {text} ({error}). Its folder must be on PYTHONPATH.") from None
    module = found if isinstance(found, nn.Module) else found()
    if not isinstance(module, nn.Module):
        raise InputError(f"not a torch module in --features: {text} gives {type(module).__name__}. Return an nn.Module.")
    return ModuleFeatures(module, name=text, device=device)


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def module_sha256(module: nn.Module) -> str:
    """sha256 over names, shapes and values of the state dict, in order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
