"""A pickle reader that can only make data: tensors, containers and inert records. Nothing that a file names is imported or called.

Every global must be in the exact list below, and each stands for a replacement of ours. Classes that pickles carry source code for
(`torch_utils.persistence`) become records of their class name and state; the source is dropped. Storages are pickles of their own inside
the pickle: they go through torch's weights-only reader, never through `torch.storage._load_from_bytes`, which would run anything.
"""

import io
import pickle
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastcm.weights.foreign_file import check_file, refuse


class Record:
    """What is left of a persistent object or a module: the name of its class and its attributes."""

    class_name = ""

    def __init__(self, class_name: str | None = None, state: Any = None):
        self.class_name = type(self).class_name if class_name is None else class_name
        self.state: dict[str, Any] = state if isinstance(state, dict) else {}

    def __setstate__(self, state):
        Record.__init__(self, None, state)

    def children(self) -> dict[str, "Record"]:
        """Submodules by name."""
        modules = self.state.get("_modules")
        return {name: child for name, child in modules.items() if isinstance(child, Record)} if isinstance(modules, dict) else {}

    def tensors(self) -> dict[str, Tensor]:
        """The state dict: parameters, then buffers, of this module and those below it."""
        found: dict[str, Tensor] = {}
        self._collect(found, "", set())
        return found

    def _collect(self, found: dict[str, Tensor], prefix: str, seen: set[int]) -> None:
        if id(self) in seen:  # a hostile file can put a module inside itself
            return
        seen.add(id(self))
        for kind in ("_parameters", "_buffers"):
            named = self.state.get(kind)
            if isinstance(named, dict):
                found |= {f"{prefix}{name}": value for name, value in named.items() if isinstance(value, Tensor)}
        for name, child in self.children().items():
            child._collect(found, f"{prefix}{name}.", seen)


class _Dtype:
    """A numpy dtype of a scalar: code such as "f8", byte order set afterwards."""

    def __init__(self, code, *_):
        self.code, self.order = str(code), "<"

    def __setstate__(self, state):
        self.order = state[1] if state[1] in ("<", ">") else "<"


def load(path: str | Path, *, expected: str) -> Any:
    """Reads a pickle file. Raises InputError naming file and reason, and the global that is not allowed where there is one.

    expected: what the file should be, for the message, e.g. "an EDM network (.pkl)".
    """
    path = Path(path)
    check_file(path, expected=expected)
    with open(path, "rb") as file:
        return _load(_Unpickler(file), path, expected)


def load_arrays(content: bytes, path: str | Path, *, expected: str) -> Any:
    """Reads a pickle of containers, numbers, text and numpy arrays of uint8, as CIFAR's batches are; text of Python 2 becomes Latin-1.

    path: where `content` comes from, for the message. Raises InputError as `load` does.
    """
    return _load(_ArrayUnpickler(io.BytesIO(content)), Path(path), expected)


def _load(unpickler: "_Unpickler", path: Path, expected: str) -> Any:
    try:
        return unpickler.load()
    except _NotAllowedError as error:
        refuse(path, expected=expected, reason=f"it asks for {error}, which is not in the list of harmless names; nothing was run")
    except (Exception, RecursionError) as error:  # a damaged stream can raise anything
        line = (str(error).strip() or "end of file").splitlines()[0]
        refuse(path, expected=expected, reason=f"damaged or cut short ({line})")


class _NotAllowedError(Exception):
    pass


class _Unpickler(pickle.Unpickler):
    def __init__(self, file, **encoding):
        super().__init__(file, **encoding)
        # Classes of this load only: a hostile file can set attributes on a class that it was given.
        easy_dict = type("EasyDict", (dict,), {})
        containers = {name: type(name, (Record,), {"class_name": name}) for name in ("ModuleDict", "ModuleList", "Sequential")}
        self._globals = {
            "collections.OrderedDict": OrderedDict,
            "builtins.set": set,
            "dnnlib.util.EasyDict": easy_dict,
            "torch_utils.persistence._reconstruct_persistent_obj": self._persistent_object,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_parameter": self._parameter,
            "torch.storage._load_from_bytes": self._storage,
            "numpy.dtype": _Dtype,
            "numpy.core.multiarray.scalar": self._scalar,
            "numpy._core.multiarray.scalar": self._scalar,
            **{f"torch.nn.modules.container.{name}": container for name, container in containers.items()},
        }

    def find_class(self, module, name):
        full_name = f"{module}.{name}"
        if full_name not in self._globals:
            raise _NotAllowedError(full_name)
        return self._globals[full_name]

    def persistent_load(self, pid):
        raise _NotAllowedError("a persistent id")

    # The replacements are bound methods, whose attributes a file cannot set.

    def _persistent_object(self, meta):
        return Record(str(meta["class_name"]), meta["state"])

    def _storage(self, payload) -> Tensor:
        """The whole storage as a flat tensor on the CPU."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                storage = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
                flat = self._flat(storage)
        except pickle.UnpicklingError as error:
            raise _NotAllowedError(f"something else than a tensor inside a storage ({_global_of(error)})") from None
        if flat is None:
            raise _NotAllowedError(f"a {type(storage).__name__} where a storage belongs")
        return flat

    def _flat(self, storage) -> Tensor | None:
        if isinstance(storage, torch.storage.TypedStorage):
            return torch.empty(0, dtype=storage.dtype).set_(storage.untyped())
        return torch.empty(0, dtype=torch.uint8).set_(storage) if isinstance(storage, torch.UntypedStorage) else None

    def _tensor(self, storage, offset, size, stride, *_) -> Tensor:
        if not isinstance(storage, Tensor):
            raise ValueError("a tensor without a storage")
        return storage.as_strided(size, stride, offset)  # refuses to look outside the storage

    def _parameter(self, data, *_) -> Tensor:
        return data

    def _scalar(self, dtype, data) -> float | int | bool:
        if not isinstance(dtype, _Dtype) or dtype.code not in ("f2", "f4", "f8", "i4", "i8", "u4", "u8", "b1"):
            raise ValueError("a numpy scalar that is not a number")
        return np.frombuffer(data, dtype=dtype.order + dtype.code, count=1)[0].item()


class _ArrayUnpickler(_Unpickler):
    def __init__(self, file):
        super().__init__(file, encoding="latin1")
        array = type("Array", (_Array,), {})
        self._globals = {
            "numpy.core.multiarray._reconstruct": array.empty,
            "numpy._core.multiarray._reconstruct": array.empty,
            "numpy.ndarray": array,
            "numpy.dtype": _Dtype,
            "_codecs.encode": self._encode,
        }

    def _encode(self, text, encoding) -> bytes:
        if encoding != "latin1":
            raise ValueError(f"text encoded as {encoding}")
        return text.encode("latin1")


class _Array:
    """A numpy array of uint8 in a pickle: empty at first, filled by its state. `values` is the array."""

    values: np.ndarray | None = None

    @classmethod
    def empty(cls, *_):
        return cls()

    def __setstate__(self, state):
        _, shape, dtype, fortran, data = state
        if not isinstance(dtype, _Dtype) or dtype.code != "u1" or fortran:
            raise ValueError("an array of other than uint8 in C order")
        self.values = np.frombuffer(data.encode("latin1") if isinstance(data, str) else data, np.uint8).reshape(shape)


def _global_of(error: Exception) -> str:
    words = str(error).split("GLOBAL ")
    return words[1].split()[0] if len(words) > 1 else "not readable"
