"""Pictures on their way out and in: labelled grids, animations, .npz files by batches, writing beside the drawing, pictures of any size."""

import threading
import time
import zipfile

import numpy as np
import pytest
from PIL import Image

import fastcm
from fastcm.errors import InputError
from fastcm.generation import pictures
from fastcm.generation.background import Background


def images(count=6, size=8, channels=3):
    return np.random.default_rng(0).integers(0, 256, (count, size, size, channels), dtype=np.uint8)


def test_a_labelled_grid_keeps_its_pictures_and_makes_room_for_words():
    bare = np.array(pictures.grid(images(), columns=3))
    sheet = pictures.grid(images(), columns=3, title="t", column_names=["ant", "bee", "cat"], row_names=["seed 0", "seed 11"])
    labelled = np.array(sheet)
    top, left = labelled.shape[0] - bare.shape[0], labelled.shape[1] - bare.shape[1]
    assert top == 2 * pictures.LINE and left > 20
    assert np.array_equal(labelled[top:, left:], bare)
    for words in (labelled[: pictures.LINE], labelled[pictures.LINE : top, left:], labelled[top:, :left]):
        assert words.min() < 100 < words.max()  # ink on white


def test_captions_stay_under_their_pictures():
    sheet = np.array(pictures.grid(images(2, channels=1), columns=2, captions=["a very long caption that would reach the next", ""]))
    below = sheet[2 + 64 : 2 + 64 + pictures.LINE]
    assert below[:, 2:66].min() < 100 and below[:, 66:].min() == 255


def test_a_wide_title_is_not_cut():
    narrow, wide = (pictures.grid(images(1), title=title).width for title in ("t", "a title that is wider than one picture of 64"))
    assert narrow == 68 < wide


def test_a_gif_says_how_it_was_made(tmp_path):
    frames = [pictures.to_pil(image) for image in images(3, channels=1)]
    pictures.save_gif(tmp_path / "a.gif", frames, text={"fastcm:seeds": "4,5", "fastcm:task": "interpolate"})
    animation = Image.open(tmp_path / "a.gif")
    assert animation.n_frames == 3 and animation.info["comment"] == b"fastcm:seeds: 4,5\nfastcm:task: interpolate"


def test_an_npz_by_batches_holds_what_numpy_would(tmp_path):
    labels, seeds, stack = np.arange(6), np.arange(10, 16), images()
    with pictures.npz_file(tmp_path / "sub" / "a.npz", stack.shape, labels=labels, seeds=seeds) as write:
        for start in (0, 4):
            write(stack[start : start + 4])
    with np.load(tmp_path / "sub" / "a.npz") as arrays:
        assert list(arrays) == ["arr_0", "arr_1", "seeds"] and arrays["arr_0"].dtype == np.uint8 and arrays["arr_1"].dtype == np.int64
        for name, expected in (("arr_0", stack), ("arr_1", labels), ("seeds", seeds)):
            assert np.array_equal(arrays[name], expected)
    with zipfile.ZipFile(tmp_path / "sub" / "a.npz") as archive:  # no moment in it: equal runs give equal files
        assert {member.date_time for member in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    pictures.save_npz(tmp_path / "c.npz", stack)
    assert list(np.load(tmp_path / "c.npz")) == ["arr_0"] and np.array_equal(np.load(tmp_path / "c.npz")["arr_0"], stack)


@pytest.mark.parametrize("batches", [[images(4)], [images(4), images(4)], [images(6, size=4)], [images(6).astype(float)]])
def test_an_npz_that_would_be_wrong_is_not_left(tmp_path, batches):
    with pytest.raises(ValueError, match=r"a\.npz"), pictures.npz_file(tmp_path / "a.npz", (6, 8, 8, 3)) as write:
        for batch in batches:
            write(batch)
    with pytest.raises(KeyError), pictures.npz_file(tmp_path / "a.npz", (6, 8, 8, 3)) as write:
        write(images(3))
        raise KeyError("interrupted")
    assert list(tmp_path.iterdir()) == []


def test_background_works_in_order_beside_its_caller():
    done, release = [], threading.Event()
    with Background(depth=3) as background:
        for number in range(3):
            background.run(lambda number=number: (release.wait(10), done.append(number)))
        assert done == []  # three pieces wait, and the caller does not
        release.set()
    assert done == [0, 1, 2]


def test_background_holds_its_caller_back_when_too_much_waits():
    running, most = [], []

    def work():
        running.append(0)
        time.sleep(0.01)
        running.pop()

    with Background(depth=2) as background:
        for _ in range(8):
            background.run(work)
            most.append(len(background._waiting))
    assert max(most) == 2 and not running


def test_an_error_in_the_background_reaches_the_caller():
    def fail():
        raise OSError(28, "no space")

    for pieces in (1, 20):
        written = []
        with pytest.raises(OSError, match="no space"), Background(depth=2) as background:
            background.run(fail)
            for _ in range(pieces - 1):
                background.run(written.append, 0)
        assert len(written) < 19


def test_a_picture_of_any_size_comes_to_the_models(tmp_path):
    """Halved with a box filter, resized by the short side, cut to the centre square: exact where the size is a power of two times it."""
    small = images(1)[0]
    wide = np.zeros((32, 48, 3), np.uint8)
    wide[:, 8:40] = small.repeat(4, axis=0).repeat(4, axis=1)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    for source in (tmp_path / "wide.png", str(tmp_path / "wide.png"), Image.open(tmp_path / "wide.png"), wide, small):
        assert np.array_equal(fastcm.picture(source, resolution=8), small)
    grey = fastcm.picture(small, resolution=8, channels=1)
    assert grey.shape == (8, 8, 1) and np.array_equal(fastcm.picture(grey, resolution=8), grey.repeat(3, axis=2))


def test_pictures_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG not")
    for source, words in (
        (tmp_path / "none.png", "no such file in source"),
        (tmp_path / "broken.png", "unreadable picture in source: .*broken.png"),
        (np.zeros((8, 8)), "wrong form of array in source: float64"),
        (Image.new("F", (8, 8)), "32-bit float"),
    ):
        with pytest.raises(InputError, match=words):
            fastcm.picture(source, resolution=8)
