"""Data sets on the hub: configurations, splits, columns, offline, and what is refused, against a hub on the loopback."""

import numpy as np
import pytest
from hub_server import TOKEN, connected, offline
from PIL import Image
from random_pictures import random_pixels

from fastcm.data.dataset import open_dataset
from fastcm.errors import InputError, RunError

pytestmark = pytest.mark.slow
PIXELS = random_pixels(6, 8, 8, 3)
CONFIG = "- config_name: {0}\n  data_files:\n  - split: train\n    path: {0}/t.parquet\n"
CONFIGS = f"---\nconfigs:\n{CONFIG.format('big')}{CONFIG.format('small')}---\n"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A repository as `push_to_hub` of `datasets` writes it."""
    import datasets  # seconds, that only a worker that asks should spend

    datasets.disable_progress_bars()
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    made = datasets.Dataset.from_dict({"img": [Image.fromarray(pixels) for pixels in PIXELS], "label": [0, 1] * 3}, features=features)
    path, content = tmp_path_factory.mktemp("parquet") / "x.parquet", {"README.md": b"# Animals\n"}
    for name, rows in (("train-00000-of-00002", [0, 1, 2]), ("train-00001-of-00002", [3]), ("test-00000-of-00001", [4, 5])):
        made.select(rows).to_parquet(path)
        content[f"data/{name}.parquet"] = path.read_bytes()
    return content


@pytest.fixture
def server(tmp_path, monkeypatch):
    import datasets

    with connected(monkeypatch, tmp_path) as started:
        for name, value in {"HF_ENDPOINT": started.url, "HF_HUB_OFFLINE": False, "HF_DATASETS_CACHE": tmp_path / "datasets"}.items():
            monkeypatch.setattr(datasets.config, name, value)
        yield started


@pytest.fixture
def opened(tmp_path):
    return lambda source, **options: open_dataset(source, cache_dir=tmp_path / "cache", progress=False, **options)


def test_splits_configurations_and_offline(server, files, opened, monkeypatch):
    server.add("a/animals", files, kind="datasets")
    dataset = opened("hf:a/animals")
    np.testing.assert_array_equal(dataset.images, PIXELS[:4].transpose(0, 3, 1, 2))
    assert dataset.class_names == ("cat", "dog") and dataset.name == "animals"
    assert len(opened("hf:a/animals:test")) == len(opened("hf:a/animals@main:default:test", label_column="none")) == 2
    assert len(opened("hf:a/animals:train[:3]", resolution=4)) == 3
    parquet = files["data/test-00000-of-00001.parquet"]
    server.add("a/two", {"README.md": CONFIGS.encode(), "big/t.parquet": parquet, "small/t.parquet": parquet}, kind="datasets")
    assert len(opened("hf:a/two:small")) == 2
    with pytest.raises(InputError, match=r"several configurations in --data: hf:a/two \(big, small\)\. Name one, as hf:a/two:big"):
        opened("hf:a/two")
    with pytest.raises(InputError, match=r"no such configuration in --data: hf:a/two:smal: smal\. .* Did you mean 'small'"):
        opened("hf:a/two:smal")
    offline(monkeypatch)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    server.asked.clear()
    assert opened("hf:a/animals").fingerprint == dataset.fingerprint and not server.asked
    with pytest.raises(InputError, match="not in the hub's cache, and HF_HUB_OFFLINE is set, in --data: hf:a/other"):
        opened("hf:a/other")


def test_a_private_data_set(server, files, opened, monkeypatch):
    server.add("a/animals", files, kind="datasets", private=True)
    with pytest.raises(InputError, match="no such data set in --data: hf:a/animals.*needs hf auth login"):
        opened("hf:a/animals")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert len(opened("hf:a/animals")) == 4 and not server.leaked


@pytest.mark.parametrize(
    ("options", "source", "message"),
    [
        ({}, "hf:a/animals:valid", r"no such split valid in --data: .* \(it has train, test\)\. Name one"),
        ({}, "hf:a/absent", "no such data set in --data: hf:a/absent"),
        ({}, "hf:animals", "not a name on the hub: hf:animals"),
        ({}, "hf:a/animals:a:b:c", "not a data set on the hub in --data"),
        ({"gated": True}, "hf:a/animals", "a gated data set in --data: hf:a/animals. Accept its terms"),
        ({"fault": 429}, "hf:a/animals", "too many requests to the hub for --data: hf:a/animals"),
        ({"files": {"README.md": b"x"}}, "hf:a/animals", "not a data set that can be read in --data: hf:a/animals"),
        ({"files": {"README.md": b"x", "t.csv": b"a,b\n1,2\n"}}, "hf:a/animals", r"no column of pictures in .*: a \(int64\)"),
    ],
)
def test_data_sets_that_are_refused(server, files, opened, tmp_path, options, source, message):
    server.add("a/animals", options.get("files", files), kind="datasets", **{k: v for k, v in options.items() if k != "files"})
    with pytest.raises(RunError if options.get("fault") else InputError, match=message) as caught:
        opened(source)
    assert "\n" not in str(caught.value) and not (tmp_path / "cache").exists()


def test_train_from_the_hub(server, files, tmp_path, capsys):
    """From the command line, to a model that knows its classes and data."""
    from test_train_sources import TINY

    import fastcm
    from fastcm.cli import main

    server.add("a/animals", files, kind="datasets")
    assert main(["train", "--data", "hf:a/animals", "--out", str(tmp_path / "run"), *TINY]) == 0
    assert "data     hf:a/animals: 4 pictures, 3x8x8, 2 classes" in capsys.readouterr().out
    generator = fastcm.load(tmp_path / "run", device="cpu")
    assert generator.classes == ["cat", "dog"] and generator.info["training"]["data"] == "hf:a/animals"
