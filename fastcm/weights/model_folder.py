"""fastcm's own format: a folder with `config.json` (everything but the weights) and `model.safetensors` (fp32, contiguous). No pickle."""

import dataclasses
import errno
import json
import os
import re
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from fastcm import networks
from fastcm.consistency.denoiser import Denoiser, Preconditioning, check_channels
from fastcm.errors import InputError
from fastcm.weights.fields import SECTION, TEXT, check_model_fields, field
from fastcm.weights.model_card import model_card
from fastcm.weights.outputs import complete_folder, complete_or_absent

FORMAT, VERSION = "fastcm-model", 1
CONFIG_NAME, WEIGHTS_NAME, CARD_NAME = "config.json", "model.safetensors", "README.md"
CUSTOM = "custom"


def is_model_folder(path: Path) -> bool:
    return (path / CONFIG_NAME).is_file() and (path / WEIGHTS_NAME).is_file()


def write_json(path: Path, content: dict) -> None:
    """Writes JSON through a temporary name, so that the file is complete or absent, and flushed to disk."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, content: str) -> None:
    """Writes UTF-8 as `write_json` does. Bytes of a path that are not UTF-8 become escapes, in JSON's own form, which reads them back."""
    with complete_or_absent(path, parents=False) as temporary:
        temporary.write_text(content, encoding="utf-8", errors="backslashreplace")


def check_path(path: str | Path, where: str) -> None:
    """InputError for a path with bytes that are not UTF-8: libraries that read and write weights take none."""
    try:
        os.fsencode(path).decode()  # the bytes on disk, whatever the locale makes of them
    except UnicodeDecodeError:
        raise InputError(f"a path that is not UTF-8 in {where}: {str(path)!r}. Rename the folder or file.") from None


def read_json(path: Path) -> dict:
    """Reads a JSON object; one line names the file where it is missing or broken."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"missing file: {path}. Give the folder of a fastcm model or run.") from None
    except (ValueError, RecursionError) as error:  # a number of too many digits is a ValueError, of JSON or of UTF-8 as well
        raise InputError(f"broken JSON in {path}: {error}. Restore the file from a copy.") from None
    if not isinstance(content, dict):
        raise InputError(f"broken JSON in {path}: {type(content).__name__} at the top. An object is expected.")
    return content


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Reads a safetensors file, memory-mapped; one line names the file and what is wrong with it."""
    try:
        return safetensors.torch.load_file(path)
    except FileNotFoundError:
        raise InputError(f"missing file: {path}. Give the folder of a fastcm model or run.") from None
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        head = path.read_bytes()[:64] if path.is_file() else b""
        kind = (
            "a Git LFS pointer (run git lfs pull)"
            if head.startswith(b"version https://git-lfs")
            else f"not a complete safetensors file ({error})"
        )
        raise InputError(f"unreadable weights in {path}: {kind}. Copy or download the file again.") from None


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes fp32-as-given contiguous clones, flushed to disk before the file gets its name."""
    check_path(path, "a file of weights")
    with complete_or_absent(path, parents=False) as temporary:
        try:
            safetensors.torch.save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, temporary)
        except safetensors.SafetensorError as error:  # the system's own number, as for any other file, where the text has it
            number = re.search(r"os error (\d+)", str(error))
            code = int(number[1]) if number else errno.EIO
            raise OSError(code, os.strerror(code) if number else str(error), str(path)) from error


def network_config(network: nn.Module) -> dict:
    """What is needed to build the network again: its kind and options, or the name of a user's own class."""
    if getattr(network, "kind", None) in networks.KINDS:
        return {"kind": network.kind, **dataclasses.asdict(network.config)}
    return {"kind": CUSTOM, "class": f"{type(network).__module__}.{type(network).__qualname__}"}


def save_model(folder: Path, denoiser: Denoiser, info: dict, *, state: dict[str, Tensor] | None = None) -> None:
    """Writes a model folder. info: classes, resolution, channels, training, sampling, licence (any may be absent).
    state: the network's state dict where it is not the module's own (an average)."""
    write_model(folder, model_config(denoiser, info), state if state is not None else denoiser.network.state_dict())


def write_model(folder: Path, config: dict, state: dict[str, Tensor]) -> None:
    """Writes a model folder of config.json's content and a state dict."""
    with complete_folder(folder) as new:
        write_safetensors(new / WEIGHTS_NAME, {name: t.float() if t.is_floating_point() else t for name, t in state.items()})
        write_text(new / CARD_NAME, model_card(config))
        write_json(new / CONFIG_NAME, config)


def model_config(denoiser: Denoiser, info: dict) -> dict:
    """The content of config.json: format, network and preconditioning, then `info` without those keys."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "network": network_config(denoiser.network),
        "preconditioning": dataclasses.asdict(denoiser.preconditioning),
        **{key: value for key, value in info.items() if key not in ("format", "version", "network", "preconditioning")},
    }


def load_model(folder: Path, *, network: nn.Module | None = None) -> tuple[Denoiser, dict]:
    """Returns (denoiser in eval mode with fp32 weights on the CPU, the content of config.json).

    network: the module to fill, needed where the model was trained with a class of the user's own.
    """
    config = read_json(folder / CONFIG_NAME)
    if config.get("format") != FORMAT:
        raise InputError(f"unknown format in {folder / CONFIG_NAME}: {config.get('format')}. Expected {FORMAT}.")
    if config.get("version") != VERSION:
        raise InputError(
            f"unknown version in {folder / CONFIG_NAME}: {config.get('version')}. This fastcm reads version {VERSION}; upgrade it."
        )
    scalings, options = (dict(field(config, name, SECTION, folder / CONFIG_NAME)) for name in ("preconditioning", "network"))
    kind = field(options, "kind", TEXT, folder / CONFIG_NAME)
    options.pop("kind")
    if network is None and kind == CUSTOM:
        raise InputError(f"a network of your own in {folder}: {options.get('class')}. Call fastcm.load(..., network=that_module).")
    try:
        preconditioning = Preconditioning(**scalings)
        if network is None:
            with torch.device("meta"):
                network = networks.build(kind, options)
    except (TypeError, InputError) as error:  # TypeError: a name that Preconditioning does not have
        raise InputError(f"broken config in {folder / CONFIG_NAME}: {error}") from None
    check_channels(network, folder / CONFIG_NAME)
    check_model_fields(config, folder / CONFIG_NAME, network=network)
    fill(network, read_safetensors(folder / WEIGHTS_NAME), folder / WEIGHTS_NAME)
    return Denoiser(network.eval().requires_grad_(False), preconditioning), config


def fill(network: nn.Module, state: dict[str, Tensor], source: Path) -> None:
    """Puts `state` into the network without a second copy; names up to three keys that do not fit."""
    expected = network.state_dict()
    wrong = [f"{k} (missing)" for k in expected if k not in state] + [f"{k} (unexpected)" for k in state if k not in expected]
    wrong += [
        f"{k} {list(state[k].shape)} for {list(expected[k].shape)}" for k in expected if k in state and state[k].shape != expected[k].shape
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise InputError(
            f"weights of another architecture in {source}: {', '.join(wrong[:3])}{more}. Check that config and weights belong together."
        )
    network.load_state_dict(state, assign=True)
