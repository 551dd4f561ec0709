"""What `fastcm train` says of the data, and refuses, before it trains."""

import numpy as np
import pytest
from random_pictures import random_pixels, write_folder

from fastcm.cli import main

SMALL = ("--dry-run", "--set", "network.channels=8", "--set", "network.head_channels=8")


@pytest.fixture
def plan(tmp_path, monkeypatch, capsys):
    """(exit code, stdout, stderr) of a dry run on `source`."""
    monkeypatch.setenv("FASTCM_CACHE", str(tmp_path / "cache"))

    def run(source, *options):
        code = main(["train", "--data", str(source), "--out", str(tmp_path / "run"), *SMALL, *map(str, options)])
        return code, *capsys.readouterr()

    return run


def test_the_plan_counts_pictures_by_class(tmp_path, plan):
    write_folder(tmp_path / "set", [(8, 8)] * 2, classes=("cat", "big, dog"))
    (tmp_path / "set" / "notes.txt").write_text("")
    _, told, _ = plan(tmp_path / "set")
    assert "4 pictures, 3x8x8, 2 classes\n" in told
    assert '         classes by sub-folder\n         passed over: 1 .txt\n         "big, dog" 2, cat 2\n' in told


def test_the_plan_names_classes_without_pictures(tmp_path, plan):
    np.savez(tmp_path / "x.npz", random_pixels(6, 8, 8), np.array([0, 3, 3, 0, 0, 5]))
    _, told, _ = plan(tmp_path / "x.npz")
    assert "6 classes\n         0 3, 3 2, 5 1\n         no picture of 3 classes: 1, 2, 4\n" in told
    np.savez(tmp_path / "y.npz", random_pixels(26, 8, 8), np.r_[np.arange(13), np.full(13, 4)])
    assert "13 classes\n         1 to 14 pictures a class\n" in plan(tmp_path / "y.npz")[1]
