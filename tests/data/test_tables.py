"""Parquet files and folders of save_to_disk, written by `datasets` and `pyarrow`: columns, classes, splits, and what is refused."""

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet
from random_pictures import png, random_pixels

from fastcm.data import streaming
from fastcm.data.dataset import open_dataset
from fastcm.errors import InputError

PIXELS, LABELS = random_pixels(6, 8, 8, 3), [1, 0, 2, 0, 1, 2]
FILES = [{"bytes": png(pixels), "path": None} for pixels in PIXELS]


@pytest.fixture
def opened(tmp_path):
    return lambda source, **options: open_dataset(source, cache_dir=tmp_path / "cache", progress=False, **options)


@pytest.fixture(scope="module")
def animals():
    import datasets  # seconds, that only a worker that asks should spend

    datasets.disable_progress_bars()
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog", "eel"])})
    return datasets.Dataset.from_dict({"img": [Image.fromarray(pixels) for pixels in PIXELS], "label": LABELS}, features=features)


def nchw(pixels):
    return np.asarray(pixels).transpose(0, 3, 1, 2)


def table(path, **columns):
    """A parquet file written by pyarrow alone, without the features of `datasets`."""
    parquet.write_table(pa.table(columns), path)
    return path


def test_parquet_of_datasets(tmp_path, opened, animals):
    """The Image and ClassLabel features are found; opened again without a copy, and as the same pictures from an array."""
    animals.to_parquet(tmp_path / "animals.parquet")
    dataset = opened(tmp_path / "animals.parquet")
    np.testing.assert_array_equal(dataset.images, nchw(PIXELS))
    assert dataset.labels.tolist() == LABELS and dataset.class_names == ("cat", "dog", "eel") and dataset.name == "animals"
    assert not list((tmp_path / "cache").glob("pack-*")), "the copied files go once they are decoded"
    assert opened(tmp_path / "animals.parquet").fingerprint == dataset.fingerprint
    assert not list((tmp_path / "cache").glob("pack-*"))
    assert opened(tmp_path / "animals.parquet", resolution=4, channels=1).images.shape == (6, 1, 4, 4)


def test_folders_of_parquet(tmp_path, opened, animals):
    """Shards in order; with the hub's names and layout the split train."""
    (tmp_path / "set" / "data").mkdir(parents=True)
    for number, rows in enumerate(([0, 1, 2], [3, 4])):
        animals.select(rows).to_parquet(tmp_path / "set" / "data" / f"train-0000{number}-of-00002.parquet")
    animals.select([5]).to_parquet(tmp_path / "set" / "data" / "test-00000-of-00001.parquet")
    np.testing.assert_array_equal(opened(tmp_path / "set").images, nchw(PIXELS[:5]))
    np.testing.assert_array_equal(opened(str(tmp_path / "set" / "data" / "t*.parquet")).images, nchw(PIXELS[[5, 0, 1, 2, 3, 4]]))
    for path in (tmp_path / "set" / "data").glob("train*"):
        path.rename(path.with_name(path.name.replace("train", "validation")))
    with pytest.raises(InputError, match=r"several tables in --data: .*data \(test, validation\)\. Name the files"):
        opened(tmp_path / "set")
    table(tmp_path / "set" / "data" / "train-0.parquet", image=[png(PIXELS[0])])
    table(tmp_path / "set" / "data" / "train-1.parquet", picture=[png(PIXELS[0])])
    with pytest.raises(InputError, match=r"another table in --data: .*train-1\.parquet than in train-0\.parquet: picture"):
        opened(tmp_path / "set")


def test_folders_of_save_to_disk(tmp_path, opened, animals):
    import datasets

    animals.save_to_disk(tmp_path / "one")
    whole = opened(tmp_path / "one")
    np.testing.assert_array_equal(whole.images, nchw(PIXELS))
    assert whole.class_names == ("cat", "dog", "eel")
    splits = {"train": animals.shuffle(seed=3).select(range(4)), "test": animals}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "two")
    np.testing.assert_array_equal(opened(tmp_path / "two").images, nchw([np.asarray(row["img"]) for row in splits["train"]]))
    assert opened(tmp_path / "two" / "test").fingerprint == whole.fingerprint
    datasets.DatasetDict({"a": animals, "b": animals}).save_to_disk(tmp_path / "three")
    with pytest.raises(InputError, match=r"no split train in --data: .*three \(it has a, b\)\. Name one"):
        opened(tmp_path / "three")


def test_columns_by_name(tmp_path, opened):
    """Plain tables: files as bytes, whole numbers or names as classes; two columns of pictures ask for one."""
    columns = {"a": FILES, "b": FILES[::-1], "species": ["dog", "cat", "eel", "cat", "dog", "eel"], "number": LABELS}
    path = table(tmp_path / "x.parquet", **columns)
    with pytest.raises(InputError, match=r"several columns of pictures in --data: .*: a \(dict\), b \(dict\).*--image-column"):
        opened(path)
    named = opened(path, image_column="b", label_column="species")
    np.testing.assert_array_equal(named.images, nchw(PIXELS[::-1]))
    assert named.class_names == ("cat", "dog", "eel") and named.labels.tolist() == LABELS
    numbered = opened(path, image_column="a", label_column="number")
    assert numbered.class_names == ("0", "1", "2") and numbered.labels.tolist() == LABELS
    assert opened(path, image_column="a").labels is None
    assert opened(table(tmp_path / "y.parquet", x=[file["bytes"] for file in FILES])).fingerprint == opened(PIXELS).fingerprint


def test_pictures_by_their_path(tmp_path, opened):
    """A column that holds paths in place of bytes; a hostile path is no picture."""
    (tmp_path / "a.png").write_bytes(png(PIXELS[0]))
    path = table(tmp_path / "x.parquet", image=[{"bytes": None, "path": str(tmp_path / "a.png")}, FILES[1]])
    np.testing.assert_array_equal(opened(path).images, nchw(PIXELS[:2]))
    path = table(tmp_path / "x.parquet", image=[FILES[0], {"bytes": None, "path": "/dev/zero"}])
    with pytest.raises(InputError, match=r"unreadable picture in --data: .*x\.parquet:row 1 \(the file is empty"):
        opened(path)


def test_bad_pictures_and_streaming(tmp_path, opened, monkeypatch):
    """The rules of every other source: the row is named, skipped by the option, and streamed where no cache fits."""
    rows = [*FILES * 20, {"bytes": b"no picture", "path": None}]
    path = table(tmp_path / "x.parquet", image=rows)
    with pytest.raises(InputError, match=r"unreadable picture in --data: .*x\.parquet:row 120 \(not a picture"):
        opened(path)
    skipped = opened(path, bad_images="skip")
    assert len(skipped) == 120 and skipped.skipped == 1
    monkeypatch.setattr("fastcm.data.image_cache.has_room", lambda folder, size: False)
    monkeypatch.setattr(streaming, "cores", lambda: 0)
    path = table(tmp_path / "y.parquet", image=FILES)
    for _ in range(2):
        streamed = opened(path)
        assert isinstance(streamed.images, streaming.StreamedImages)
        np.testing.assert_array_equal(streamed.images[:], nchw(PIXELS))


def broken(path):
    path.write_bytes(path.read_bytes()[:-20])
    return path


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"img": FILES, "label": LABELS}, {}, r"labels without names in --data: .*: column label is int64, no Class.* --label-column"),
        ({"name": ["a"], "size": [1]}, {}, r"no column of pictures in --data: .*: name \(string\), size \(int64\)\. Name one by --image"),
        ({"img": FILES, "n": LABELS}, {"image_column": "n"}, r"not pictures in --image-column: n is int64\. .* has img \(dict\)"),
        ({"img": FILES, "x": [0.5] * 6}, {"label_column": "x"}, r"not classes in --label-column: x is float64"),
        ({"img": FILES}, {"image_column": "imag"}, r"no such column in --image-column: imag\. .* has img"),
        ({"img": FILES, "n": [0, 1, None, 1, 1, 1]}, {"label_column": "n"}, r"no label in column n of --data: .*: row 2"),
        ({"img": FILES, "n": [0, 1, -1, 1, 1, 1]}, {"label_column": "n"}, r"negative label in column n of --data: .*: -1 in row 2"),
    ],
)
def test_tables_that_are_refused(tmp_path, opened, columns, options, message):
    with pytest.raises(InputError, match=message) as caught:
        opened(table(tmp_path / "x.parquet", **columns), **options)
    assert "\n" not in str(caught.value) and not list((tmp_path / "cache").glob("*-*-*"))


def test_damaged_and_empty_tables(tmp_path, opened, animals):
    with pytest.raises(InputError, match=r"no picture in --data: .*x\.parquet \(0 rows\)"):
        opened(table(tmp_path / "x.parquet", img=pa.array([], pa.binary())))
    with pytest.raises(InputError, match=r"unreadable parquet file in --data: .*x\.parquet \(.*\)\. Copy it again"):
        opened(broken(table(tmp_path / "x.parquet", img=FILES)))
    animals.save_to_disk(tmp_path / "disk")
    (tmp_path / "disk" / "state.json").write_text("{}")
    with pytest.raises(InputError, match=r"unreadable data set in --data: .*disk"):
        opened(tmp_path / "disk")
    np.save(tmp_path / "x.npy", PIXELS)
    for source in (tmp_path / "x.npy", "digits", PIXELS):
        with pytest.raises(InputError, match="a column of a source without columns in --image-column"):
            opened(source, image_column="img")


def test_two_columns_of_classes(tmp_path, opened):
    """As in CIFAR-100; `none` trains without classes."""
    import datasets

    features = datasets.Features(
        {"img": datasets.Image(), **{name: datasets.ClassLabel(names=["a", "b", "c"]) for name in ("fine", "rough")}}
    )
    columns = {"img": FILES, "fine": LABELS, "rough": LABELS[::-1]}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(InputError, match=r"several columns of classes in --data: .*: fine, rough\. Name one by --label-column"):
        opened(tmp_path / "x.parquet")
    assert opened(tmp_path / "x.parquet", label_column="rough").labels.tolist() == LABELS[::-1]
    assert opened(tmp_path / "x.parquet", label_column="none").labels is None
