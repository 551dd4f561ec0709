"""What the tests of `fastcm evaluate` share: a model folder with random weights, a quick judge of the digits, a call of the command."""

from functools import cache

import pytest
import torch

from fastcm import cli, evaluation
from fastcm.consistency.denoiser import Denoiser, Preconditioning
from fastcm.data.dataset import open_dataset
from fastcm.evaluation import features, halves, train_judge
from fastcm.networks.unet import UNet, UNetConfig
from fastcm.weights.model_folder import save_model


@cache
def quick_judge():
    """A judge of the digits that learned for a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "STEPS", (40, 40))
        dataset = open_dataset("digits")
        return train_judge(dataset.images, dataset.labels)


@pytest.fixture(name="quick")
def judged_quickly(monkeypatch):
    """What evaluates takes that judge and few splits. Import `judged_quickly` and take `quick`."""
    judge = quick_judge()
    monkeypatch.setattr(evaluation, "train_judge", lambda images, labels, *, seed, cache, held_out: judge)
    monkeypatch.setattr(halves, "SPLITS", 5)


def model_folder(path, *, method="ict", num_classes=10, channels=1, **training):
    """A digits-sized model with random weights, its output layer included."""
    torch.manual_seed(0)
    network = UNet(
        UNetConfig(
            resolution=8,
            in_channels=channels,
            out_channels=channels,
            channels=8,
            channel_mult=(1, 2),
            blocks=1,
            attention_resolutions=(4,),
            head_channels=8,
            num_classes=num_classes,
        )
    )
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    classes = [str(number) for number in range(num_classes)] if num_classes else None
    form = "edm" if method == "edm" else "boundary"
    info = {"classes": classes, "resolution": 8, "channels": channels, "training": {"method": method, **training}, "sampling": {}}
    save_model(path, Denoiser(network, Preconditioning(form=form)), info)
    return path


def run(capsys, *argv):
    code = cli.main(["evaluate", *map(str, argv)])
    out, err = capsys.readouterr()
    return code, out, err
