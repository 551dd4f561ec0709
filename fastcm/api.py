"""The calls that users make from Python: load a model of any kind as a generator, and bring a picture to its size."""

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from torch import nn

from fastcm.consistency.denoiser import Denoiser, check_channels
from fastcm.errors import InputError, RunError, check_given, nearest
from fastcm.generation.compiled import chosen_compile
from fastcm.generation.generator import Generator
from fastcm.weights import hub
from fastcm.weights.model_folder import check_path, is_model_folder, load_model, read_json

RUN_FORMAT = "fastcm-run"
CHAIN_OPTIONS = ("prediction", "betas")
PROVIDERS = ("auto", "cpu", "cuda", "tensorrt", "tensorrt-rtx")
STATE_DICTS = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")  # a trainer's file, in OpenAI's names
PROGRAMS = {".onnx": "onnx", ".pt2": "aot", ".plan": "plan", ".engine": "plan"}
FILE_KINDS = {**PROGRAMS, **dict.fromkeys(STATE_DICTS, "openai"), ".pkl": "edm"}
EXPORTED = frozenset(PROGRAMS.values())
ENGINE_DEVICES = {"auto", "cuda", "tensorrt", "tensorrt-rtx"}
BUILT_IN = Path(__file__).parent / "data" / "builtin" / "models"
MODEL_KINDS = (
    f"a run folder, a model folder, a diffusers folder, an OpenAI {', '.join(STATE_DICTS)}, an EDM .pkl, "
    "an exported .onnx, .pt2 or .plan, a built-in name (mnist), or a model on the hub (hf:owner/name)"
)


def resolve_model(model: str | Path) -> tuple[str, Path]:
    """Returns (kind, path) of MODEL: "folder", "diffusers", "openai", "edm" or one of EXPORTED; a run folder stands for its model/.

    Where no such path exists, a built-in name stands for the model that is shipped under it, other names for models on the hub.
    """
    check_given("MODEL", model)
    path = Path(model)
    check_path(path, "MODEL")
    if not path.exists():
        path = _elsewhere(str(model))
    if path.is_dir():
        return _resolve_folder(path)
    suffix = path.suffix.lower()
    if suffix not in FILE_KINDS:
        raise InputError(f"unknown kind of file in MODEL: {path}. Give {MODEL_KINDS}.")
    return FILE_KINDS[suffix], path


def _elsewhere(model: str) -> Path:
    """What a MODEL that is no path here stands for: a shipped model, or one on the hub, fetched. Raises InputError, RunError."""
    if model in built_in_models():
        return BUILT_IN / model
    found = hub.hub_id(model)
    is_bare = not model.startswith(hub.PREFIX)
    if found is None or (is_bare and find_spec("huggingface_hub") is None):
        more = "" if found is None else " A model on the hub needs pip install 'fastcm[hub]'."
        raise InputError(f"no such file or folder in MODEL: {model}. Give {MODEL_KINDS}.{more}{nearest(model, built_in_models())}")
    try:
        return hub.fetch(found)
    except (InputError, RunError) as error:
        if not is_bare:
            raise
        raise type(error)(f"{error} There is no file or folder {model} here either.") from error


def built_in_models() -> list[str]:
    """The names of the models that are shipped."""
    return sorted(path.name for path in BUILT_IN.iterdir())


def is_built_in(model: str | Path) -> bool:
    """Whether MODEL means a shipped model: one of their names, where no such path exists."""
    return str(model) in built_in_models() and not Path(model).exists()


def _resolve_folder(path: Path) -> tuple[str, Path]:
    if any((path / name).is_file() for name in ("model_index.json", "unet/config.json", "unet_ema/config.json")):
        return "diffusers", path
    if is_model_folder(path):
        return ("diffusers" if "_class_name" in read_json(path / "config.json") else "folder"), path
    if is_model_folder(path / "model"):
        return "folder", path / "model"
    config = path / "config.json"
    if config.is_file():
        content = read_json(config)
        if content.get("format") == RUN_FORMAT:
            raise InputError(f"no model yet in {path}: the run has not written model/. Let it train longer.")
        if "_class_name" in content:
            return "diffusers", path
        raise InputError(f"missing file: {path / 'model.safetensors'}. Give {MODEL_KINDS}.")
    raise InputError(f"no model in MODEL: {path} (no config.json). Give {MODEL_KINDS}.")


def load_denoiser(model: str | Path, *, network: nn.Module | None = None, **options) -> tuple[Denoiser, dict]:
    """Returns (denoiser with fp32 weights on the CPU, config) of any MODEL but an exported file. No code of the file is executed.

    options: of `weights.openai.read_openai`, for a state dict alone, or of `weights.diffusers.read_diffusers`, for a folder without a
    scheduler.
    """
    kind, path = resolve_model(model)
    for option in options:
        if kind != "openai" and not (kind == "diffusers" and option in CHAIN_OPTIONS):
            shown = f"--{option.replace('_', '-')}: {model}"
            raise InputError(f"an option for files that say less in {shown}. Leave it out: this model says so itself.")
    if kind == "folder":
        return load_model(path, network=network)
    if kind in EXPORTED:
        raise InputError(f"an exported graph in MODEL: {path}. Its weights cannot be taken out; give the folder it was exported from.")
    if kind == "openai":
        from fastcm.weights.openai import read_openai as read
    elif kind == "edm":
        from fastcm.weights.edm import read_edm as read
    else:
        from fastcm.weights.diffusers import read_diffusers as read
    network, preconditioning, info = read(path, **options)
    check_channels(network, path)
    return Denoiser(network, preconditioning), info


def load(
    model: str | Path,
    *,
    device: str = "auto",
    precision: str = "auto",
    provider: str = "auto",
    compile: str = "auto",
    trust: bool = False,
    network: nn.Module | None = None,
):
    """Returns a generator: generator(seeds, labels=None, *, steps=None, sigmas=None, output="uint8") -> images.

    model: a run folder, model folder, diffusers folder, OpenAI .pt, EDM .pkl, exported .onnx, .pt2 or .plan; no pickle is executed.
    device: "auto", "cpu", "cuda" or "cuda:N"; precision: "auto" (bf16 on CUDA, else fp32), "fp32", "bf16" or "fp16"; both for torch.
    provider: "auto", "cpu", "cuda", "tensorrt" or "tensorrt-rtx": what ONNX Runtime runs an .onnx file on; an error where it is not there.
    compile: "on" runs torch.compile on each noise level at its first use (`generator.warm()`); "auto" and "off" do not.
    trust: load a .pt2 or .plan, which are programs: that runs their code.
    network: the module to fill where the model has a class of the user's own.
    """
    if provider not in PROVIDERS:
        raise InputError(f"unknown value in --provider: {provider}. Use one of {', '.join(PROVIDERS)}.{nearest(str(provider), PROVIDERS)}")
    kind, path = resolve_model(model)
    if chosen_compile(compile) and kind in EXPORTED:
        raise InputError(f"torch.compile for an exported file in --compile: {path}. Leave --compile out.")
    if kind == "onnx":
        from fastcm.generation.onnx_generator import OnnxGenerator

        return OnnxGenerator(path, provider=_onnx_provider(provider, device))
    if kind == "aot":
        return _package(path, trust=trust, elsewhere={provider, str(device).partition(":")[0]} - {"auto", "cpu"})
    if kind == "plan":
        return _engine(path, trust=trust, elsewhere={provider, str(device).partition(":")[0]} - ENGINE_DEVICES)
    if provider != "auto":
        if provider.startswith("tensorrt"):
            raise InputError(f"provider {provider} for a torch model in --provider: {path}. Export it first: fastcm export {path} --onnx.")
        device = provider if device == "auto" else device
    denoiser, info = load_denoiser(model, network=network)
    return Generator(denoiser, info, device=device, precision=precision, compile=compile)


def _package(path: Path, *, trust: bool, elsewhere: set[str]):
    """The generator of a .pt2. elsewhere: devices asked for that it was not compiled for."""
    _check_trust(path, trust)
    if elsewhere:
        raise InputError(f"a program for CPUs in MODEL: {path}. Leave out --device and --provider: {', '.join(sorted(elsewhere))}.")
    from fastcm.generation.aot_generator import AotGenerator

    return AotGenerator(path)


def _engine(path: Path, *, trust: bool, elsewhere: set[str]):
    """The generator of a .plan. elsewhere: devices asked for that it was not built for."""
    _check_trust(path, trust)
    if elsewhere:
        raise InputError(f"an engine for CUDA in MODEL: {path}. Leave out --device and --provider: {', '.join(sorted(elsewhere))}.")
    from fastcm.generation.plan_generator import PlanGenerator

    return PlanGenerator(path)


def _check_trust(path: Path, trust: bool) -> None:
    if not trust:
        raise InputError(f"a program in MODEL: {path}. Loading it runs its code: give --trust (Python: trust=True) if you trust it.")


def _onnx_provider(provider: str, device: str) -> str:
    """The provider for an .onnx file; --device cpu or cuda names it too."""
    if provider == "auto" and str(device).partition(":")[0] in ("cpu", "cuda"):
        return str(device).partition(":")[0]
    return provider


def picture(source, *, resolution: int, channels: int = 3, name: str = "source") -> np.ndarray:
    """A picture of any size as uint8 [resolution, resolution, channels], by the rule for training pictures.

    That is (data/decoding.py): halved with a box filter while its short side is at least twice the resolution, then its short
    side resized to the resolution (bicubic), and the centre square cut out; transparency is laid over white. channels: 1 (grey),
    3 (RGB) or 4 (RGBA, which keeps the transparency).

    source: a file, a PIL image or an array uint8 [H, W] or [H, W, C]. name: what an error calls it. Raises InputError.
    """
    from PIL import Image, ImageOps

    from fastcm.data.decoding import BadImageError, decode, eight_bits, to_pixels

    try:
        if isinstance(source, (str, Path)):
            check_given(name, source)
            if not Path(source).is_file():
                raise InputError(f"no such file in {name}: {source}. Give a picture.")
            return decode(Path(source), resolution=resolution, channels=channels).transpose(1, 2, 0)
        if isinstance(source, np.ndarray):
            if source.dtype != np.uint8 or source.ndim not in (2, 3):
                raise InputError(f"wrong form of array in {name}: {source.dtype} {source.shape}. Give uint8 [H, W] or [H, W, C].")
            source = Image.fromarray(source[..., 0] if source.shape[2:] == (1,) else source)
        return to_pixels(eight_bits(ImageOps.exif_transpose(source), channels=channels), resolution=resolution).transpose(1, 2, 0)
    except BadImageError as error:
        raise InputError(f"unreadable picture in {name}: {source}: {error}. Save it again.") from None


def is_run_folder(path: Path) -> bool:
    """True for a folder whose config.json says so; never raises."""
    try:
        return json.loads((path / "config.json").read_text(encoding="utf-8")).get("format") == RUN_FORMAT
    except (OSError, ValueError, AttributeError):
        return False
