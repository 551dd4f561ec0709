"""Words for devices, and the one line where a GPU cannot be used."""

import logging
import warnings

import pytest
import torch

from fastcm.errors import InputError
from fastcm.generation import devices
from fastcm.generation.devices import choose_device

OLD_DRIVER = "CUDA initialization: The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver"

ABSENT = "no CUDA device for --device: "


@pytest.fixture
def machine(monkeypatch):
    """A machine with so many GPUs, a torch for this CUDA, and what torch warns of."""

    def make(*, gpus=0, cuda="13.0", warning=None, visible=None):
        def is_available():
            if warning:
                warnings.warn(warning, stacklevel=2)
            return gpus > 0

        monkeypatch.setattr(torch.cuda, "is_available", is_available)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        monkeypatch.setattr(devices, "_told", set())

    return make


def test_devices_by_word(machine):
    machine(gpus=2)
    assert [str(choose_device(word)) for word in ("auto", "cpu", "cuda", "cuda:1")] == ["cuda", "cpu", "cuda", "cuda:1"]
    machine()
    assert str(choose_device("auto")) == "cpu"


@pytest.mark.parametrize(
    ("word", "facts", "line"),
    [
        ("gpu", {}, "unknown device in --device: gpu. Use auto, cpu, cuda or cuda:N."),
        ("cuda", {"cuda": None}, f"{ABSENT}cuda. Torch {torch.__version__} is built without CUDA. Install a CUDA build of torch."),
        ("cuda", {"warning": OLD_DRIVER}, f"{ABSENT}cuda. The driver is too old for torch {torch.__version__} (CUDA 13.0). Update"),
        ("cuda", {"visible": ""}, f"{ABSENT}cuda. CUDA_VISIBLE_DEVICES= hides every GPU. Unset it."),
        ("cuda:0", {}, f"{ABSENT}cuda:0. Torch {torch.__version__} (CUDA 13.0) finds no GPU. See what nvidia-smi says."),
        ("cuda:2", {"gpus": 2}, "no such GPU in --device: cuda:2. This machine has 2, counted from 0: use cuda:1 at most."),
        (
            "cuda:1",
            {"gpus": 1, "visible": "3"},
            "no such GPU in --device: cuda:1. CUDA_VISIBLE_DEVICES=3 leaves 1, counted from 0: use cuda:0",
        ),
    ],
)
def test_why_not_in_one_line(machine, word, facts, line):
    machine(**facts)
    with pytest.raises(InputError) as error:
        choose_device(word)
    assert str(error.value).startswith(line) and "\n" not in str(error.value)


def test_a_driver_that_is_too_old_is_said_once(machine, caplog):
    machine(warning=OLD_DRIVER)
    with caplog.at_level(logging.WARNING, "fastcm"), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [str(choose_device("auto")) for _ in range(2)] == ["cpu", "cpu"]
    (record,) = caplog.records
    assert record.getMessage().startswith("the GPU is not used: the driver is too old for torch")
    assert record.getMessage().endswith("Running on the CPU.")
