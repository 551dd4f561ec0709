"""Which device a word means, and why a GPU that may be there is not used."""

import logging
import os
import warnings

import torch

from fastcm.errors import InputError, nearest

log = logging.getLogger("fastcm")
_told: set[str] = set()


def choose_device(device: str | torch.device) -> torch.device:
    """ "auto" is CUDA where there is one, else the CPU, with one line where a driver is there that torch cannot use.

    Raises InputError for a word that is no device, for CUDA where torch sees none, with the reason, and for a number beyond the last GPU.
    """
    if device == "auto":
        absent = why_no_cuda()
        if absent is not None and absent.startswith("the driver") and absent not in _told:
            _told.add(absent)
            log.warning(f"the GPU is not used: {absent} Running on the CPU.")
        return torch.device("cuda" if absent is None else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        hint = nearest(str(device), ("auto", "cpu", "cuda"))
        raise InputError(f"unknown device in --device: {device}. Use auto, cpu, cuda or cuda:N.{hint}") from None
    if chosen.type == "cuda":
        if (absent := why_no_cuda()) is not None:
            raise InputError(f"no CUDA device for --device: {device}. {absent[0].upper()}{absent[1:]} Or use --device cpu.")
        count = torch.cuda.device_count()
        if chosen.index is not None and chosen.index >= count:
            seen = f"CUDA_VISIBLE_DEVICES={visible} leaves" if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) else "This machine has"
            raise InputError(f"no such GPU in --device: {device}. {seen} {count}, counted from 0: use cuda:{count - 1} at most.")
    return chosen


def why_no_cuda() -> str | None:
    """None where torch sees a CUDA device, else why not and what to do, in a sentence or two."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            return None
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA. Install a CUDA build of torch."
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return f"CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']} hides every GPU. Unset it."
    built = f"torch {torch.__version__} (CUDA {torch.version.cuda})"
    text = " ".join(str(warning.message) for warning in caught)
    if "driver" in text and "too old" in text:
        return f"the driver is too old for {built}. Update the driver, or install an older torch."
    return f"{built} finds no GPU. See what nvidia-smi says."
