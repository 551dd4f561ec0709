"""Labels from a CSV or JSON beside the pictures: every form, and the row of each fault."""

import numpy as np
import pytest
from random_pictures import write_folder

from fastcm.data.dataset import open_dataset
from fastcm.data.labels import from_file, numbered
from fastcm.errors import InputError

NAMES = ["a/1.png", "a/2.png", "b ü.png"]


@pytest.mark.parametrize(
    ("where", "text", "labels", "classes"),
    [
        ("x.csv", "b ü.png,0\na/1.png,2\na/2.png,1\n", [2, 1, 0], ("0", "1", "2")),
        ("x.csv", "file,label\nb ü.png,dog\na/1.png,cat\na/2.png,dog", [0, 1, 1], ("cat", "dog")),
        (
            "x.csv",
            '\ufeffid,label,file_name\r\n7,"big, dog","b ü.png"\r\n8,cat,a\\1.png\r\n9,cat,./a/2.png\r\n',
            [1, 1, 0],
            ("big, dog", "cat"),
        ),
        ("x.csv", "a/1.png,1\na/2.png,x\nb ü.png,1\n", [0, 1, 0], ("1", "x")),
        ("x.json", '{"labels": [["b ü.png", 0], ["a/1.png", 3], ["a/2.png", 3]]}', [3, 3, 0], ("0", "1", "2", "3")),
        ("x.json", '{"labels": null}', None, None),
        ("x.json", '{"a/1.png": "x", "b ü.png": "y", "a/2.png": "x"}', [0, 0, 1], ("x", "y")),
        ("x.json", '[["a/1.png", 1], ["a/2.png", 0], ["b ü.png", 1]]', [1, 0, 1], ("0", "1")),
        (
            "x.json",
            '[{"file": "a/1.png", "label": 1}, {"label": 0, "file": "a/2.png"}, {"name": "b ü.png", "class": 1}]',
            [1, 0, 1],
            ("0", "1"),
        ),
    ],
)
def test_forms(where, text, labels, classes):
    found = from_file(text.encode(), where, NAMES)
    assert (found.names or numbered(found.labels)) == classes and (
        found.labels is None if labels is None else found.labels.tolist() == labels
    )


@pytest.mark.parametrize(
    ("where", "text", "message"),
    [
        ("x.csv", "a/1.png,0\na/2.png,1\n", r"no row for a picture in x\.csv: b ü\.png\. Add a row"),
        ("x.csv", "b ü.png,0\n", r"no row for a picture in x\.csv: a/1\.png and 1 more"),
        (
            "x.csv",
            "file,label\na/1.png,0\na/2.png,1\nb ü.png,1\na/1.png,0\n",
            r"duplicate row in x\.csv: a/1\.png in row 5, first in row 2",
        ),
        ("x.csv", "a/1.png,0\na/2.png,-1\nb ü.png,1\n", r"label out of range in x\.csv: -1 in row 2\. Expected 0 to 9"),
        ("x.csv", "a/1.png,0\na/2.png,1\nb ü.png,10\n", r"label out of range in x\.csv: 10 in row 3\. Expected 0 to 9"),
        ("x.csv", "a/1.png,0\nother.png,1\n", r"no such picture in x\.csv: other\.png in row 2"),
        ("x.csv", "a/1.png,0\na/2.png,\n", r"no label in x\.csv: row 2 \(a/2\.png\)"),
        ("x.csv", "a/1.png,0\na/2.png\n", r"another number of columns in x\.csv: 1 in row 2, not 2"),
        ("x.csv", "a,b,c\n", r"no columns file and label in x\.csv: a,b,c"),
        ("x.csv", "", r"no row for a picture in x\.csv: a/1\.png and 2 more"),
        ("x.csv", b"\xff\xfe", r"not readable as CSV: x\.csv"),
        ("x.csv", 'a/1.png,"0\n', r"not readable as CSV: x\.csv"),
        ("x.json", '[["a/1.png", 1], ["a/2.png", 99], ["b ü.png", 1]]', r"label out of range in x\.json: 99 in row 2"),
        ("x.json", '[["a/1.png", 1], ["a/2.png", "x"], ["b ü.png", 1]]', r'not a class index in x\.json: "x" in row 2'),
        ("x.json", '[["a/1.png", 1], ["a/2.png", true], ["b ü.png", 1]]', r"not a class index in x\.json: true in row 2"),
        ("x.json", '[["a/1.png", "x"], ["a/2.png", [0, 1]], ["b ü.png", "x"]]', r"not a class name in x\.json: \[0, 1\] in row 2"),
        ("x.json", '{"a/1.png": 1, "a/2.png": 0, "a/1.png": 0}', r"duplicate row in x\.json: a/1\.png in row 3, first in row 1"),
        ("x.json", '[["a/1.png", 1], 7]', r"not a file and its label in x\.json: row 2"),
        ("x.json", "7", r"no labels in x\.json: int"),
        ("x.json", "{", r"not readable as JSON: x\.json"),
        ("x.json", "[" * 100_000, r"not readable as JSON: x\.json"),
    ],
)
def test_faults_by_row(where, text, message):
    with pytest.raises(InputError, match=message):
        from_file(text if isinstance(text, bytes) else text.encode(), where, NAMES, limit=10)


def test_file_beside_the_pictures_and_by_option(tmp_path):
    """A file of labels stands above sub-folders, also where pictures lie beside them; it is read again when it changes."""
    root, options = tmp_path / "set", {"cache_dir": tmp_path / "cache", "progress": False}
    pictures = write_folder(root, [(8, 8)], classes=("", "a", "b"))
    (root / "labels.csv").write_text("0.png,2\na/0.png,0\nb/0.png,1\n")
    dataset = open_dataset(root, **options)
    assert dataset.labels.tolist() == [2, 0, 1] and dataset.class_names == ("0", "1", "2")
    np.testing.assert_array_equal(dataset.images, np.stack(pictures).transpose(0, 3, 1, 2))
    (root / "labels.csv").write_text("0.png,1\na/0.png,0\nb/0.png,1\n")
    assert open_dataset(root, **options).labels.tolist() == [1, 0, 1]
    (tmp_path / "mine.json").write_text('{"0.png": "x", "a/0.png": "y", "b/0.png": "x"}')
    assert open_dataset(root, labels_file=tmp_path / "mine.json", **options).class_names == ("x", "y")
    (tmp_path / "mine.json").write_text('{"0.png": "x", "a/0.png": "y", "b/0.png": "z"}')
    assert open_dataset(root, labels_file=tmp_path / "mine.json", **options).class_names == ("x", "y", "z")
    with pytest.raises(InputError, match=r"unreadable file of labels: .*none\.csv \(No such file"):
        open_dataset(root, labels_file=tmp_path / "none.csv", **options)
    with pytest.raises(InputError, match=r"label out of range in .*set/labels\.csv: 1 in row 1\. Expected 0 to 0"):
        open_dataset(root, classes=1, **options)
    (root / "labels.json").write_text("{}")
    with pytest.raises(InputError, match=r"several files of labels in --data: .*labels\.csv, labels\.json"):
        open_dataset(root, **options)
