"""What a set shows as its classes and what it passes over: nothing vanishes without a word, and numbers stay numbers."""

import tarfile
import zipfile

import numpy as np
import pytest
from random_pictures import png, random_pixels, write_folder, write_tar, write_zip

from fastcm.data.dataset import open_dataset
from fastcm.errors import InputError

PIXELS = random_pixels(6, 8, 8, 3)
PNGS = [png(pixels) for pixels in PIXELS]


@pytest.fixture
def opened(tmp_path):
    return lambda source, **options: open_dataset(source, cache_dir=tmp_path / "cache", progress=False, **options)


def write_flat(root, names):
    root.mkdir()
    for name, content in zip(names, PNGS, strict=False):
        (root / name).write_bytes(content)
    return root


def test_classes_that_are_numbers_are_in_the_order_of_their_values(tmp_path, opened):
    write_folder(tmp_path / "set", [(8, 8)], classes=[str(number) for number in range(1, 13)])
    dataset = opened(tmp_path / "set")
    assert dataset.class_names == tuple(str(number) for number in range(1, 13)) and not dataset.has_numbers
    assert opened(tmp_path / "set", classes=dataset.class_names[::-1]).labels.tolist() == (11 - dataset.labels).tolist()


def test_labels_that_are_numbers_are_places_and_names_are_names(opened):
    """A model's classes may have numbers for names: a label 1 of an array is its second class, not the one called 1."""
    numbers = opened((PIXELS, [0, 1, 2, 0, 1, 2]), classes=("1", "2", "3"))
    assert numbers.labels.tolist() == [0, 1, 2, 0, 1, 2] and numbers.class_names == ("1", "2", "3")
    with pytest.raises(InputError, match=r"label out of range in --data: array: 2 in row 2\. 2 classes are expected"):
        opened((PIXELS, [0, 1, 2, 0, 1, 2]), classes=("x", "y"))


def test_a_name_that_the_model_does_not_have(tmp_path, opened):
    write_folder(tmp_path / "set", [(8, 8)], classes=("cat", "cow"))
    assert opened(tmp_path / "set", classes=("dog", "cow", "cat")).labels.tolist() == [2, 1]
    with pytest.raises(InputError, match=r"unknown class in --data: set: cow\. Expected crow, cat\. Did you mean 'crow'\?"):
        opened(tmp_path / "set", classes=("crow", "cat"))


@pytest.mark.parametrize(
    ("names", "note"),
    [
        (["IMG_1.png", "IMG_2.png", "DSC_1.png", "DSC_2.png"], "no classes: DSC_ is a camera's name"),
        (["20200101_1.png", "20200101_2.png", "20210101_1.png", "20210101_2.png"], "no classes: 20200101_ is a camera's name"),
        (["cat_1.png", "cat_2.png", "dog_1.png"], "no classes: one picture alone begins with dog_"),
    ],
)
def test_beginnings_that_are_no_classes_are_named(tmp_path, opened, names, note):
    dataset = opened(write_flat(tmp_path / "set", names))
    assert dataset.labels is None and dataset.notes == (note,)


def test_parts_of_a_set_are_no_classes(tmp_path, opened):
    write_folder(tmp_path / "set" / "train", [(8, 8)], classes=("cat", "dog"))
    assert opened(tmp_path / "set").class_names == ("cat", "dog"), "one part alone stands for the set"
    write_folder(tmp_path / "set" / "Val", [(8, 8)], classes=("cat", "dog"))
    with pytest.raises(InputError, match=r"parts of a set, not classes, in --data: .*set \(Val, train\)\. Give one of them, as .*set/Val,"):
        opened(tmp_path / "set")
    write_folder(tmp_path / "set" / "car", [(8, 8)])
    assert opened(tmp_path / "set").class_names == ("Val", "car", "train"), "beside others they are classes"


def test_what_is_passed_over_is_said_by_ending(tmp_path, opened):
    root = tmp_path / "set"
    write_folder(root, [(8, 8)], classes=("cat", "dog"))
    for name in ("a.txt", "cat/b.TXT", "cat/c.heic", "README", ".DS_Store", "cat/labels.csv"):
        (root / name).write_bytes(b"")
    notes = ("classes by sub-folder", "passed over: 2 .txt, 1 .csv, 1 .heic, 1 hidden, 1 without ending")
    assert opened(root).notes == notes
    assert opened(root).notes == notes, "the second time it is not listed again"
    files = {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    assert opened(write_zip(tmp_path / "set.zip", files)).notes == notes


def test_what_classes_are_left_out_is_said(tmp_path, opened):
    write_folder(tmp_path / "set", [(8, 8)], classes=("cat", "dog"))
    dropped = opened(tmp_path / "set", classes=0)
    assert dropped.labels is None and dropped.notes[-1] == "no classes are asked for: the 2 of the data are left out"


def test_zip_with_backslashes_and_unflagged_names(tmp_path, opened):
    """As Windows' and macOS' own tools write them."""
    names = [name.encode() for name in ("set\\süß\\1.png", "set\\süß\\2.png", "set\\b\\1.png")]
    places = [f"{index}.png".rjust(len(name), "x") for index, name in enumerate(names)]
    path = write_zip(tmp_path / "x.zip", dict(zip(places, PNGS, strict=False)), compression=zipfile.ZIP_STORED)
    content = path.read_bytes()
    for place, name in zip(places, names, strict=True):
        content = content.replace(place.encode(), name)
    path.write_bytes(content)
    dataset = opened(path)
    assert dataset.class_names == ("b", "süß") and dataset.labels.tolist() == [0, 1, 1]


# Tar


def test_members_of_a_sample_need_not_be_neighbours(tmp_path, opened):
    """`tar cf a.tar *.png *.cls`; endings in any case, names with several dots, macOS' companions."""
    files = {"./a.1.png": PNGS[0], "./a.2.PNG": PNGS[1], "./B.png": PNGS[2], "./c.rgb.png": PNGS[3], "./._B.png": b"x", "./x.json": b"{}"}
    files |= {"./a.2.CLS": b"5", "./a.1.cls": b"4", "./b.cls": b"6", "./c.cls": b"7"}
    dataset = opened(write_tar(tmp_path / "x.tar", files))
    assert dataset.labels.tolist() == [4, 5, 6, 7] and dataset.has_numbers
    np.testing.assert_array_equal(dataset.images, PIXELS[:4].transpose(0, 3, 1, 2))
    assert dataset.notes == ("classes by .cls", "passed over: 1 .json, 1 hidden")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.png": PNGS[0], "a.cls": b"0", "b.cls": b"1"}, r"a label without a picture in --data: .*x\.tar: b\.cls\. Add its picture"),
        ({"a.x.png": PNGS[0], "a.y.png": PNGS[1], "a.cls": b"0"}, r"two pictures or labels of one key in --data: .*x\.tar: a\."),
        ({"a.x.png": PNGS[0], "a.x.seg.png": PNGS[1]}, r"two pictures or labels of one key in --data: .*x\.tar: a\.x\."),
        ({"a.png": PNGS[0], "A.cls": b"0", "a.cls": b"0"}, r"two pictures or labels of one key"),
    ],
)
def test_labels_that_belong_to_no_picture_or_to_two(tmp_path, opened, files, message):
    with pytest.raises(InputError, match=message):
        opened(write_tar(tmp_path / "x.tar", files))


def test_folders_in_a_tar_are_said_to_be_no_classes(tmp_path, opened):
    dataset = opened(write_tar(tmp_path / "x.tar", {"cat/1.png": PNGS[0], "dog/1.png": PNGS[1]}, form=tarfile.GNU_FORMAT))
    assert dataset.notes == ("no classes: folders inside tar shards are none, .cls files are",)


# Files of labels


def test_files_of_labels_name_pictures_in_any_case(tmp_path, opened):
    root = write_flat(tmp_path / "set", ["A.PNG", "b.png"])
    (root / "Labels.CSV").write_text("a.png,1\nB.png,0\n")
    dataset = opened(root)
    assert dataset.labels.tolist() == [1, 0] and dataset.notes == ("classes by Labels.CSV",)


# Names that are none


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (b"caf\xe9", r"a class name that is not UTF-8 in --data: .*set: 'caf\\udce9'\. Rename it"),
        (b"two\nlines", r"a class name with a control character in --data: .*set: 'two\\nlines'\. Rename it"),
        ("two\u2028lines".encode(), "a class name with a control character"),
    ],
)
def test_names_that_no_report_can_show_are_refused_at_opening(tmp_path, opened, name, message):
    for folder in (name, b"other"):
        path = tmp_path / "set" / folder.decode("utf-8", "surrogateescape")
        path.mkdir(parents=True)
        (path / "0.png").write_bytes(PNGS[0])
    with pytest.raises(InputError, match=message):
        opened(tmp_path / "set")


def test_more_classes_than_are_supported(tmp_path, opened, monkeypatch):
    write_folder(tmp_path / "set", [(8, 8)], classes=("a", "b", "c"))
    monkeypatch.setattr("fastcm.data.labels.MAX_CLASSES", 2)
    with pytest.raises(InputError, match=r"too many classes in --data: .*set: 3, by sub-folder\. At most 2 are supported"):
        opened(tmp_path / "set")


# Pictures that `fastcm sample` wrote


def test_the_classes_of_sampled_pictures(tmp_path, opened):
    root = write_flat(tmp_path / "drawn", ["seed-0-class-2.png", "seed--1-class-0.png", "seed-1-class-11.png"])
    dataset = opened(root)
    assert dataset.labels.tolist() == [0, 2, 11] and dataset.has_numbers and dataset.notes == ("classes by the names of fastcm sample",)


@pytest.mark.parametrize("folders", [False, True])
def test_cls_files_of_unpacked_shards_are_not_passed_over(tmp_path, opened, folders):
    """Folders of shards are no classes either; a labels.csv is, and packing as the line says reads them."""
    files = {
        f"{index // 3 if folders else '.'}/{index}{end}": content
        for index in range(6)
        for end, content in ((".png", PNGS[index]), (".cls", b"%d" % index))
    }
    for name, content in files.items():
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_bytes(content)
    with pytest.raises(InputError, match=r"labels as \.cls files in --data: .*set \(6 of them\)\. Pack it \(tar -cf x\.tar"):
        opened(tmp_path / "set")
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    with pytest.raises(InputError, match=r"labels as \.cls files in --data: .*set\.zip"):
        opened(tmp_path / "set.zip")
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.add(tmp_path / "set", arcname=".")
    assert sorted(opened(tmp_path / "x.tar").labels.tolist()) == list(range(6))
    rows = [f"{name.removeprefix('./')},0" for name in files if name.endswith(".png")]
    (tmp_path / "set" / "labels.csv").write_text("\n".join(["file,label", *rows]))
    assert opened(tmp_path / "set").labels.tolist() == [0] * 6
