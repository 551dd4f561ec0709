"""Files that hold named tensors and nothing else: `.pt` and `.pth` through torch's weights-only reader, or `.safetensors`."""

import pickle
import re
import warnings
from pathlib import Path

import torch
from torch import Tensor

from fastcm.weights.foreign_file import check_file, refuse
from fastcm.weights.model_folder import read_safetensors


def read_state_dict(path: Path, *, expected: str) -> dict[str, Tensor]:
    """Named tensors on the CPU, read without running code. Raises InputError naming file and reason. expected: see `check_file`."""
    check_file(path, expected=expected)
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on odd pickle protocols; what matters is refused below
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|global|function) [`']?([\w.]+)", str(error))
        reason = f"it holds {found[1]}, which is not a tensor, and was not run" if found else "a pickle of something else than tensors"
        refuse(path, expected=expected, reason=reason)
    except (EOFError, OSError, RuntimeError, ValueError, KeyError, IndexError, AttributeError, TypeError, MemoryError) as error:
        line = (str(error).strip() or "end of file").splitlines()[0]
        refuse(path, expected=expected, reason=f"damaged or cut short ({line})")
    if not isinstance(state, dict) or not state or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        keys = ", ".join(map(str, list(state)[:3])) if isinstance(state, dict) else type(state).__name__
        refuse(path, expected=expected, reason=f"it holds {keys or 'nothing'} instead of named tensors")
    return state


def _is_zip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"
