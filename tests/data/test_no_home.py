"""A user without HOME or account, and a cache that cannot be written."""

import numpy as np
import pytest
from random_pictures import random_pixels, write_folder

from fastcm.cli import main
from fastcm.data import image_cache
from fastcm.data.dataset import open_dataset
from fastcm.errors import InputError


@pytest.fixture
def no_home(monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("FASTCM_CACHE", raising=False)
    monkeypatch.setattr(image_cache.Path, "home", home)


def test_built_in_sets_and_arrays_need_no_cache(no_home):
    assert len(open_dataset("digits")) == 1797 and len(open_dataset(random_pixels(3, 8, 8))) == 3


def test_what_needs_one_names_the_variable(no_home, tmp_path):
    write_folder(tmp_path / "set", [(8, 8)])
    with pytest.raises(InputError, match=r"no home folder for the image cache: HOME is not set\. Set FASTCM_CACHE to a folder"):
        open_dataset(tmp_path / "set")


def test_evaluation_works_without_a_cache(no_home, tmp_path, monkeypatch, capsys):
    assert image_cache.optional_folder("evaluation") is None
    monkeypatch.setenv("FASTCM_CACHE", str(tmp_path / "file"))
    (tmp_path / "file").write_text("")
    assert image_cache.optional_folder("evaluation") is None
    monkeypatch.delenv("FASTCM_CACHE")
    digits = open_dataset("digits")
    np.savez(tmp_path / "x.npz", digits.images[:40].transpose(0, 2, 3, 1), digits.labels[:40])
    monkeypatch.setattr("fastcm.evaluation.features.STEPS", (1, 1))
    monkeypatch.setattr("fastcm.evaluation.features.EPOCHS", 0)
    assert main(["evaluate", str(tmp_path / "x.npz"), "--data", "digits", "--metrics", "accuracy"]) == 0
