"""Writes pickles laid out as NVIDIA's EDM publishes them, without its code: its module names exist only while a file is written."""

import pickle
import sys
import types
from pathlib import Path

import numpy as np
import torch

SOURCE = "raise SystemExit('the source inside the pickle was run')\n"
VERSION = 6  # of the persistence format


def _reconstruct_persistent_obj(meta):
    raise AssertionError("only its name is ever pickled")


class Persistent(torch.nn.Module):
    """Pickles as torch_utils.persistence does: class name, source code and state. With `plain`, as an ordinary ModuleDict."""

    def __init__(self, class_name: str, **attributes):
        super().__init__()
        self.__dict__.update(attributes)
        self.class_name = class_name

    def __reduce__(self):
        state = {name: value for name, value in self.__dict__.items() if name != "class_name"}
        meta = {"type": "class", "version": VERSION, "module_src": SOURCE, "class_name": self.class_name, "state": state}
        return _reconstruct_persistent_obj, (meta,), None


class EasyDict(dict):
    pass


_reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
EasyDict.__module__, EasyDict.__qualname__ = "dnnlib.util", "EasyDict"


def module_tree(class_name: str, state: dict[str, torch.Tensor], **attributes) -> Persistent:
    """Modules that hold `state` under its dotted names; enc and dec are ModuleDicts, resample filters and freqs are buffers."""
    root = Persistent(class_name, **attributes)
    for name, value in state.items():
        module = root
        *path, leaf = name.split(".")
        for part in path:
            if part not in module._modules:
                # EDM's blocks hold sqrt(0.5) as a numpy scalar.
                child = torch.nn.ModuleDict() if part in ("enc", "dec") else Persistent("UNetBlock", skip_scale=np.sqrt(0.5), num_heads=1)
                module._modules[part] = child
            module = module._modules[part]
        if leaf in ("resample_filter", "freqs", "phases"):
            module.register_buffer(leaf, value)
        else:
            module._parameters[leaf] = torch.nn.Parameter(value)
    return root


def write_pickle(path: Path, content, *, protocol: int = 4) -> None:
    """Pickles `content` with torch_utils.persistence and dnnlib.util importable for the moment."""
    fakes = {name: types.ModuleType(name) for name in ("torch_utils", "torch_utils.persistence", "dnnlib", "dnnlib.util")}
    fakes["torch_utils.persistence"]._reconstruct_persistent_obj = _reconstruct_persistent_obj
    fakes["dnnlib.util"].EasyDict = EasyDict
    sys.modules.update(fakes)
    try:
        path.write_bytes(pickle.dumps(content, protocol=protocol))
    finally:
        for name in fakes:
            del sys.modules[name]


def edm_content(precond: str, model: str, state: dict[str, torch.Tensor], init_kwargs: dict, **attributes) -> dict:
    """What EDM's training loop saves: the network under "ema", beside a loss, an augmentation pipe and the data set's arguments."""
    size = {"img_resolution": 8, "img_channels": 3, "label_dim": init_kwargs.get("label_dim", 0)}
    arguments = EasyDict(img_resolution=8, in_channels=3, out_channels=3, **init_kwargs)
    inner = module_tree(model, state, _init_args=(), _init_kwargs=arguments, label_dropout=0)
    outer = Persistent(precond, **{"sigma_min": 0, "sigma_max": float("inf"), "sigma_data": 0.5, "use_fp16": False, **size, **attributes})
    outer._modules["model"] = inner
    pipe = Persistent("AugmentPipe", p=0.12, xflip=1e8)
    pipe.register_buffer("Hz_geom", torch.ones(4))
    loss = Persistent("EDMLoss", P_mean=-1.2, P_std=1.2)
    return {"ema": outer, "loss_fn": loss, "augment_pipe": pipe, "dataset_kwargs": {"path": "cifar10.zip", "use_labels": True}}


def edm2_content(state: dict[str, torch.Tensor], init_kwargs: dict, **attributes) -> dict:
    """What EDM2 publishes: an EasyDict of the network under "ema", in fp16, and an encoder without weights."""
    size = {"img_resolution": 8, "img_channels": 3, "label_dim": init_kwargs.get("label_dim", 0)}
    outer = Persistent("Precond", **{"sigma_data": 0.5, "use_fp16": True, **size, **attributes})
    outer._modules["unet"] = module_tree("UNet", state, _init_args=(), _init_kwargs={**size, **init_kwargs}, label_balance=0.5)
    outer._modules["logvar_fourier"] = module_tree("MPFourier", {"freqs": torch.ones(8), "phases": torch.ones(8)})
    outer._modules["logvar_linear"] = module_tree("MPConv", {"weight": torch.ones(1, 8)}, out_channels=1)
    return EasyDict(ema=outer.half(), encoder=Persistent("StandardRGBEncoder"), dataset_kwargs=EasyDict(path="img64.zip", use_labels=True))
