"""Every kind of source trains: the command, a few steps of a tiny network, and a model that knows its classes and data."""

import json

import numpy as np
import pytest
from PIL import Image
from random_pictures import cifar_files, random_pixels, write_cifar, write_folder, write_idx, write_shards, write_tar, write_zip
from training_runs import undrawn

import fastcm
from fastcm.cli import main
from fastcm.data import streaming

TINY = "--batch 4 --duration 16img --device cpu --precision fp32 --compile off --checkpoint-every 1h".split()
TINY += [
    word
    for setting in ("channels=4", "head_channels=4", "channel_mult=[1]", "blocks=1", "attention_resolutions=[]")
    for word in ("--set", f"network.{setting}")
]


@pytest.fixture(autouse=True)
def ends_undrawn():
    with undrawn():
        yield


def pictures_folder(root):
    write_folder(root / "süße tiere", [(12, 10)] * 4, classes=("ein hund", "katze"))
    return root / "süße tiere"


def prefix_folder(root):
    for number, name in enumerate(("cat", "dog")):
        write_folder(root / "w", [(8, 8)] * 3, seed=10 * number)
        for path in (root / "w").glob("[0-9].png"):
            path.rename(path.with_name(f"{name}_{path.name}"))
    return root / "w"


def labelled_folder(root):
    write_folder(root / "set", [(8, 8)] * 6)
    (root / "set" / "labels.csv").write_text("file,label\n" + "".join(f"{i}.png,{i % 3}\n" for i in range(6)))
    return root / "set"


def edm_zip(root):
    write_folder(root / "z", [(8, 8)] * 5)
    files = {f"00000/img{i:08d}.png": (root / "z" / f"{i}.png").read_bytes() for i in range(5)}
    labels = {"labels": [[name, i % 2] for i, name in enumerate(files)]}
    return write_zip(root / "edm set.zip", {**files, "dataset.json": json.dumps(labels).encode()})


def shards(root):
    write_shards(root, random_pixels(6, 8, 8, 3), [0, 1, 2] * 2, per_shard=2)
    return root / "train-{000000..000002}.tar"


def cifar_folder(root):
    write_cifar(root / "cifar-10-batches-py", per_batch=3)
    return root


def cifar_archive(root):
    return write_tar(root / "cifar-10-python.tar.gz", {f"cifar-10-batches-py/{k}": v for k, v in cifar_files(3)[0].items()}, mode="w:gz")


def npz(root):
    np.savez(root / "set.npz", random_pixels(6, 8, 8), np.arange(6) % 2)
    return root / "set.npz"


def mnist_folder(root):
    write_idx(root / "train-images-idx3-ubyte.gz", random_pixels(6, 8, 8))
    write_idx(root / "train-labels-idx1-ubyte.gz", np.arange(6, dtype=np.uint8) % 2)
    return root


def npy_pair(root):
    np.save(root / "images.npy", random_pixels(6, 8, 8, 3))
    np.save(root / "labels.npy", np.arange(6) % 3)
    return root / "images.npy"


def svhn(root):
    from scipy import io

    io.savemat(root / "train_32x32.mat", {"X": random_pixels(32, 32, 3, 10), "y": np.arange(1, 11, dtype=np.uint8)[:, None]})
    return root / "train_32x32.mat"


def animals():
    import datasets

    datasets.disable_progress_bars()
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    pictures = [Image.fromarray(pixels) for pixels in random_pixels(6, 8, 8, 3)]
    return datasets.Dataset.from_dict({"img": pictures, "label": [0, 1] * 3}, features=features)


def parquet_file(root):
    animals().to_parquet(root / "animals.parquet")
    return root / "animals.parquet"


def saved_to_disk(root):
    animals().save_to_disk(root / "animals")
    return root / "animals"


CIFAR = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@pytest.mark.parametrize(
    ("make", "classes"),
    [
        (pictures_folder, ["ein hund", "katze"]),
        (edm_zip, ["0", "1"]),
        (shards, ["0", "1", "2"]),
        (npz, ["0", "1"]),
        *(
            pytest.param(make, classes, marks=pytest.mark.slow)
            for make, classes in (
                (parquet_file, ["cat", "dog"]),
                (saved_to_disk, ["cat", "dog"]),
                (mnist_folder, ["0", "1"]),
                (npy_pair, ["0", "1", "2"]),
                (svhn, [str(digit) for digit in range(10)]),
                (prefix_folder, ["cat", "dog"]),
                (labelled_folder, ["0", "1", "2"]),
                (cifar_folder, CIFAR),
                (cifar_archive, CIFAR),
            )
        ),
    ],
)
def test_source_trains(tmp_path, make, classes, capsys):
    source, out = make(tmp_path), tmp_path / "run"
    assert main(["train", "--data", str(source), "--resolution", "8", "--out", str(out), *TINY]) == 0
    assert f"{len(classes)} classes" in capsys.readouterr().out
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines() if '"loss"' in line]
    assert rows[-1]["nimg"] == 16 and 0 < rows[-1]["loss"] < 1e4 and rows[-1]["skipped"] == 0
    config = json.loads((out / "model" / "config.json").read_text())
    assert config["classes"] == classes and config["training"]["data"] == str(source)
    generator = fastcm.load(out, device="cpu")
    assert generator(seeds=[0], labels=len(classes) - 1).shape == (1, 8, 8, 1 if make in (npz, mnist_folder) else 3)


def test_a_model_of_transparent_pictures(tmp_path, capsys):
    """`--channels 4`: trained, drawn, edited and measured with their opacity."""
    source, out = tmp_path / "set", tmp_path / "run"
    for name in ("a", "b"):
        (source / name).mkdir(parents=True)
        for index in range(8):
            Image.fromarray(random_pixels(8, 8, 4, seed=index)).save(source / name / f"{index}.png")
    assert main(["train", "--data", str(source), "--channels", "4", "--out", str(out), *TINY]) == 0
    assert "4x8x8, 2 classes" in capsys.readouterr().out
    assert json.loads((out / "model" / "config.json").read_text())["channels"] == 4
    assert main(["sample", str(out), "--seeds", "0", "--device", "cpu", "--out", str(tmp_path / "drawn")]) == 0
    [drawn] = (tmp_path / "drawn").rglob("*.png")
    image = np.array(Image.open(drawn))
    assert image.shape == (8, 8, 4) and len(np.unique(image[..., 3])) > 1
    np.testing.assert_array_equal(image, fastcm.load(out, device="cpu")(0)[0])
    words = ["--image", str(source / "a" / "0.png"), "--box", "0,0,4,8", "--sigmas", "80", "--device", "cpu"]
    assert main(["edit", "inpaint", str(out), *words, "--out", str(tmp_path / "edited.png")]) == 0
    edited = np.array(Image.open(tmp_path / "edited.png"))
    np.testing.assert_array_equal(edited[:, 4:], random_pixels(8, 8, 4)[:, 4:])


@pytest.mark.slow
def test_transparent_pictures_are_measured_as_such(tmp_path):
    """`fastcm evaluate` of an RGBA model reads its data with their opacity."""
    for name in ("a", "b"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for index in range(8):
            Image.fromarray(random_pixels(8, 8, 4, seed=index)).save(tmp_path / "set" / name / f"{index}.png")
    assert main(["train", "--data", str(tmp_path / "set"), "--channels", "4", "--out", str(tmp_path / "run"), *TINY]) == 0
    words = ["--data", str(tmp_path / "set"), "--seeds", "0-15", "--metrics", "fd", "--features", "judge", "--steps", "1"]
    assert main(["evaluate", str(tmp_path / "run"), "--device", "cpu", *words]) == 0


def test_a_streamed_set_trains_as_a_cached_one(tmp_path, monkeypatch):
    """Equal losses to the bit, whether pictures come from the cache or are decoded in each batch."""
    monkeypatch.setattr(streaming, "cores", lambda: 0)
    source, weights = pictures_folder(tmp_path), []
    for streamed in (True, False):
        monkeypatch.setenv("FASTCM_CACHE", str(tmp_path / f"cache-{streamed}"))
        monkeypatch.setattr("fastcm.data.image_cache.has_room", lambda folder, size, room=not streamed: room)
        out = tmp_path / f"run-{streamed}"
        assert main(["train", "--data", str(source), "--resolution", "8", "--out", str(out), *TINY]) == 0
        assert bool(list((tmp_path / f"cache-{streamed}").glob("*/fields.npy"))) == streamed
        weights.append((out / "model" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_bad_pictures_by_option(tmp_path, capsys):
    write_folder(tmp_path / "set", [(8, 8)] * 120)
    (tmp_path / "set" / "7.png").write_text("no picture at all")
    command = ["train", "--data", str(tmp_path / "set"), "--out", str(tmp_path / "run"), *TINY]
    assert main(command) == 2
    assert "7.png (not a picture" in capsys.readouterr().err and not (tmp_path / "run").exists()
    assert main([*command, "--bad-images", "skip"]) == 0
    assert "119 pictures" in capsys.readouterr().out


def test_changed_data_is_noticed_on_resume(tmp_path, capsys):
    """The data set is part of a run: other pixels under the same path are refused, not trained on."""
    source, out = labelled_folder(tmp_path), tmp_path / "run"
    command = ["train", "--data", str(source), "--out", str(out), *TINY]
    assert main(command) == 0
    (source / "labels.csv").write_text("file,label\n" + "".join(f"{i}.png,{(i + 1) % 3}\n" for i in range(6)))
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "labels.csv changed since" in error and "other data than the run's in --data" in error


@pytest.mark.slow
def test_emoji_train(tmp_path):
    assert main(["train", "emoji32", "--out", str(tmp_path / "run"), *TINY]) == 0
    assert json.loads((tmp_path / "run" / "model" / "config.json").read_text())["classes"] is None


def test_classes_from_a_file_of_labels_elsewhere(tmp_path):
    """`--labels-file` gives the classes of pictures that have none beside them, and is part of the run."""
    from fastcm import runs

    pixels_of_all = np.random.default_rng(0).integers(0, 256, (6, 8, 8), dtype=np.uint8)
    (tmp_path / "pictures").mkdir()
    for index, pixels in enumerate(pixels_of_all):
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{index}.png")
    (tmp_path / "classes.csv").write_text("".join(f"{i}.png,{i % 3}\n" for i in range(6)))
    ready = runs.plan(data=str(tmp_path / "pictures"), changes={"labels_file": str(tmp_path / "classes.csv")})
    assert ready.dataset.labels.tolist() == [0, 1, 2, 0, 1, 2] and ready.config.labels_file.endswith("classes.csv")
    assert runs.plan(data=str(tmp_path / "pictures")).dataset.labels is None
