"""Files that hold named tensors: `.pt`, `.pth`, `.ckpt` and `.bin` through torch's weights-only reader, or `.safetensors`."""

import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcm.weights.fields import SECTION, TEXT, field
from fastcm.weights.foreign_file import check_file, refuse
from fastcm.weights.model_folder import read_json, read_safetensors

# Names that torch puts inside a state dict's keys where it wraps a module: compiled, sharded, recomputed.
INFIXES = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
AVERAGE = re.compile(r"(^|[._])(ema|averaged?)([._]|$)", re.IGNORECASE)  # in the name of a part: weights to draw with
MOST_DICTS = 10_000  # a file of more is not a checkpoint
# What trainers save beside the weights: nothing of it is imported or called, it becomes a `Nothing`.
PASSED_OVER = (
    "argparse.Namespace",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata",
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    "omegaconf.nodes.AnyNode",
    "pathlib.PosixPath",
    "pathlib._local.PosixPath",
    "typing.Any",
)


class Nothing:
    """Stands for an object that is not a tensor; takes any arguments and state, and keeps none."""

    def __new__(cls, *_args, **_options):
        return super().__new__(cls)

    def __setstate__(self, state):
        pass


def is_index(path: Path) -> bool:
    """Whether the file names the parts of a state dict: `x.safetensors.index.json`, of a variant `x.safetensors.index.fp16.json`."""
    return re.search(r"\.index(\.\w+)?\.json$", path.name) is not None


def read_state_dict(path: Path, *, expected: str) -> dict[str, Tensor]:
    """Named tensors on the CPU, read without running code; those of dicts inside dicts under dotted names. expected: see `check_file`.

    An index (`is_index`) stands for the files that it names. Raises InputError naming file and reason.
    """
    check_file(path, expected=expected)
    if is_index(path):
        return _read_parts(path, expected)
    if path.suffix.lower() == ".safetensors":
        return read_safetensors(path)
    content = _read_pickle(path, expected)
    state, optimizer = _named_tensors(content)
    if not state:
        if optimizer:
            refuse(path, expected=expected, reason="the state of an optimizer", remedy="Give the file of the model's weights.")
        keys = ", ".join(map(str, list(content)[:3])) if isinstance(content, dict) else type(content).__name__
        refuse(path, expected=expected, reason=f"it holds {keys or 'nothing'} instead of named tensors")
    return state


def network_state(state: dict[str, Tensor], marker: str) -> tuple[dict[str, Tensor], str]:
    """(the state dict of one network, what stood before its keys), from all named tensors of a file.

    marker: a key that every such network has. Whatever stands before it, as in "ema.module.<marker>", goes from all keys; of several
    networks an average is taken, else the first. Without a marker in the file: (state, "").
    """
    state = {INFIXES.sub("", name): value for name, value in state.items()}
    prefixes = [name.removesuffix(marker) for name in state if name == marker or name.endswith(f".{marker}")]
    if not prefixes:
        return state, ""
    prefix = next((prefix for prefix in prefixes if AVERAGE.search(prefix)), prefixes[0])
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)} if prefix else state, prefix


def _named_tensors(content: Any) -> tuple[dict[str, Tensor], bool]:
    """(the tensors of dicts inside dicts, whether one of the dicts is an optimizer's state, which is left out)."""
    state: dict[str, Tensor] = {}
    dicts, seen, optimizer = [("", content)], set(), False
    while dicts and len(seen) < MOST_DICTS:
        prefix, part = dicts.pop(0)
        if isinstance(part, Tensor) and prefix:
            state[prefix.removesuffix(".")] = part
        elif isinstance(part, dict) and id(part) not in seen:
            seen.add(id(part))
            if part.keys() >= {"state", "param_groups"}:
                optimizer = True
            else:
                dicts += [(f"{prefix}{name}.", value) for name, value in part.items() if isinstance(name, str)]
    return state, optimizer


def _read_parts(index: Path, expected: str) -> dict[str, Tensor]:
    """The tensors of all files that an index names, which stand beside it."""
    names = field(read_json(index), "weight_map", SECTION, index)
    state: dict[str, Tensor] = {}
    for name in dict.fromkeys(field(names, key, TEXT, index) for key in names):
        if Path(name).name != name or is_index(Path(name)):
            refuse(index, expected=expected, reason=f"it names {name}, which is no file beside it")
        state |= read_state_dict(index.with_name(name), expected="a part of the weights")
    return state


def _read_pickle(path: Path, expected: str) -> Any:
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([(Nothing, name) for name in PASSED_OVER]):
            warnings.simplefilter("ignore")  # on odd pickle protocols; what matters is refused below
            return torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|global|function) [`']?([\w.]+)", str(error))
        reason = f"it holds {found[1]}, which is not a tensor, and was not run" if found else "a pickle of something else than tensors"
        refuse(path, expected=expected, reason=reason)
    except (EOFError, OSError, RuntimeError, ValueError, KeyError, IndexError, AttributeError, TypeError, MemoryError) as error:
        line = (str(error).strip() or "end of file").splitlines()[0]
        refuse(path, expected=expected, reason=f"damaged or cut short ({line})")


def _is_zip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"
