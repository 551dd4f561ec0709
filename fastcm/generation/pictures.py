"""Images on disk: PNG grids and single PNGs that say how they were made, and .npz files in the field's convention."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

# Images smaller than this are shown enlarged: each pixel becomes a square of whole pixels.
READABLE_PIXELS = 64
GAP = 2


def to_pil(image: np.ndarray) -> Image.Image:
    """An image uint8 [H, W, C] with one or three channels."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def enlarged(image: Image.Image, *, readable: int = READABLE_PIXELS) -> Image.Image:
    """The image by the smallest whole factor that reaches `readable` pixels, nearest neighbour."""
    factor = -(-readable // min(image.size))
    return image if factor <= 1 else image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def grid(images: np.ndarray, *, columns: int | None = None, captions: Sequence[str] | None = None) -> Image.Image:
    """One picture of images uint8 [N, H, W, C], row by row, tiny ones enlarged, with a caption under each where given."""
    count = len(images)
    columns = columns or max(1, int(np.ceil(np.sqrt(count))))
    rows = -(-count // columns)
    tiles = [enlarged(to_pil(image)) for image in images]
    width, height = tiles[0].size
    line = 12 if captions else 0
    size = (columns * (width + GAP) + GAP, rows * (height + line + GAP) + GAP)
    sheet = Image.new(tiles[0].mode, size, "white")
    draw = ImageDraw.Draw(sheet)
    for index, tile in enumerate(tiles):
        left, top = GAP + index % columns * (width + GAP), GAP + index // columns * (height + line + GAP)
        sheet.paste(tile, (left, top))
        if captions:
            draw.text((left, top + height), captions[index], fill="black")
    return sheet


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Calls write(temporary) and renames the result to `path`, so that the file is complete or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_png(path: Path, image: Image.Image, *, text: dict[str, str] | None = None) -> None:
    """Writes a PNG whose text entries (tEXt) are `text`."""
    entries = PngInfo()
    for key, value in (text or {}).items():
        entries.add_text(key, value)
    write_atomically(Path(path), lambda temporary: image.save(temporary, format="PNG", pnginfo=entries))


def save_gif(path: Path, frames: Sequence[Image.Image], *, frame_ms: int = 80) -> None:
    """Writes an endless animation."""

    def write(temporary: Path) -> None:
        frames[0].save(temporary, format="GIF", save_all=True, append_images=list(frames[1:]), duration=frame_ms, loop=0)

    write_atomically(Path(path), write)


def save_npz(path: Path, images: np.ndarray, *, labels: np.ndarray | None = None, seeds: np.ndarray | None = None) -> None:
    """Writes arr_0 uint8 [N, H, W, C], arr_1 int64 labels where there are any, and seeds int64."""
    arrays = {"arr_0": images}
    if labels is not None:
        arrays["arr_1"] = labels
    if seeds is not None:
        arrays["seeds"] = seeds

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)

    write_atomically(Path(path), write)
