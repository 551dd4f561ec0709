"""Images on disk: PNG grids and single PNGs that say how they were made, and .npz files in the field's convention."""

import contextlib
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from fastcm.generation import lettering
from fastcm.weights.outputs import complete_or_absent

# Images smaller than this are shown enlarged: each pixel becomes a square of whole pixels.
READABLE_PIXELS = 64
# Pixels between the images of a grid, and of a line of text.
GAP, LINE = 2, 12
# Pillow's mode by the number of channels; the fourth is opacity.
MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def to_pil(image: np.ndarray) -> Image.Image:
    """An image uint8 [H, W, C] with one, three (RGB) or four (RGBA) channels."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def enlarged(image: Image.Image, *, readable: int = READABLE_PIXELS) -> Image.Image:
    """The image by the smallest whole factor that reaches `readable` pixels, nearest neighbour."""
    factor = -(-readable // min(image.size))
    return image if factor <= 1 else image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def grid(
    images: np.ndarray,
    *,
    columns: int | None = None,
    captions: Sequence[str] | None = None,
    column_names: Sequence[str] | None = None,
    row_names: Sequence[str] | None = None,
    title: str | None = None,
) -> Image.Image:
    """One picture of images uint8 [N, H, W, C], row by row, tiny ones enlarged.

    Where given: a caption under each image, a name above each column and left of each row, a title above all.
    """
    columns = columns or max(1, int(np.ceil(np.sqrt(len(images)))))
    rows = -(-len(images) // columns)
    tiles = [enlarged(to_pil(image)) for image in images]
    width, height = tiles[0].size
    below = LINE if captions else 0
    left = max(int(lettering.width(name)) + 2 * GAP for name in row_names) if row_names else 0
    top = LINE * (bool(title) + bool(column_names))
    # The title may be wider than the images.
    right = max(left + columns * (width + GAP) + GAP, int(lettering.width(title)) + 2 * GAP if title else 0)
    sheet = Image.new(tiles[0].mode, (right, top + rows * (height + below + GAP) + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    if title:
        lettering.write(draw, (GAP, 0), title)
    for index, name in enumerate(column_names or ()):
        lettering.write(draw, (left + GAP + index * (width + GAP), top - LINE), name, width)
    for index, name in enumerate(row_names or ()):
        lettering.write(draw, (GAP, top + GAP + index * (height + below + GAP) + (height - LINE) // 2), name)
    for index, tile in enumerate(tiles):
        x, y = left + GAP + index % columns * (width + GAP), top + GAP + index // columns * (height + below + GAP)
        sheet.paste(tile, (x, y))
        if captions:
            lettering.write(draw, (x, y + height), captions[index], width)
    return sheet


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Calls write(temporary) and renames the result to `path`."""
    with complete_or_absent(path) as temporary:
        write(temporary)


def save_png(path: Path, image: Image.Image, *, text: dict[str, str] | None = None) -> None:
    """Writes a PNG whose text entries (tEXt) are `text`."""
    entries = PngInfo()
    for key, value in (text or {}).items():
        entries.add_text(key, value.encode("utf-8", "backslashreplace").decode())  # a path may hold bytes that are not UTF-8
    write_atomically(Path(path), lambda temporary: image.save(temporary, format="PNG", pnginfo=entries))


def save_gif(path: Path, frames: Sequence[Image.Image], *, frame_ms: int = 80, text: dict[str, str] | None = None) -> None:
    """Writes an endless animation; its comment holds `text`, a line per entry."""
    comment = "\n".join(f"{key}: {value}" for key, value in (text or {}).items()).encode("utf-8", "backslashreplace")

    def write(temporary: Path) -> None:
        options = {"save_all": True, "append_images": list(frames[1:]), "duration": frame_ms, "loop": 0, "comment": comment}
        frames[0].save(temporary, format="GIF", **options)

    write_atomically(Path(path), write)


@contextlib.contextmanager
def npz_file(
    path: Path, shape: Sequence[int], *, labels: np.ndarray | None = None, seeds: np.ndarray | None = None
) -> Iterator[Callable[[np.ndarray], None]]:
    """Yields write(images) for an .npz in the field's convention that takes its images batch by batch: a long job gathers none in memory.

    shape: [N, H, W, C] of all images. The file holds arr_0 uint8 of that shape, arr_1 int64 labels where there are any, and seeds int64.
    After an error, or with another number of images than N, no file is left.
    """
    shape, count = tuple(shape), 0
    with complete_or_absent(Path(path)) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, {"descr": "|u1", "fortran_order": False, "shape": shape})

            def write(images: np.ndarray) -> None:
                nonlocal count
                if images.dtype != np.uint8 or images.shape[1:] != shape[1:]:
                    raise ValueError(f"images of another form for {path}: {images.dtype} {images.shape}, not uint8 {shape}.")
                member.write(images.tobytes())
                count += len(images)

            yield write
        if count != shape[0]:
            raise ValueError(f"another number of images for {path}: {count}, not {shape[0]}.")
        for name, array in (("arr_1", labels), ("seeds", seeds)):
            if array is not None:
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, np.asarray(array))


def save_npz(path: Path, images: np.ndarray, *, labels: np.ndarray | None = None, seeds: np.ndarray | None = None) -> None:
    """Writes images uint8 [N, H, W, C] with their labels and seeds as an `npz_file`."""
    with npz_file(path, images.shape, labels=labels, seeds=seeds) as write:
        write(images)
