"""What an exported graph takes and gives: names, shapes and types of its inputs and of its output."""

from typing import NamedTuple

import numpy as np

from fastcm.errors import InputError

GENERATE, INPAINT, SUPERRES, DENOISE = TASKS = ("generate", "inpaint", "superres", "denoise")
# Largest difference of a pixel in [-1, 1]. fp32 graphs differ from torch by about 1e-6; a constant that is wrong by 0.1 % shows as 5e-4.
TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2}
UINT8_TOLERANCE = {"fp32": 1, "fp16": 4}  # levels: a value next to a half may round to either side


def rounding(gain: np.ndarray | float) -> np.ndarray:
    """The share of the tolerance that rounding takes: of networks in fp32 about 1e-6, times |c_out|."""
    return np.maximum(1.0, 0.1 * np.asarray(gain, dtype=np.float64))


class Contract(NamedTuple):
    """A graph's form. precision: of the weights and activations inside; inputs and outputs are never half.

    task: "generate" makes images from noise, "inpaint" and "superres" edit a given one, superres enlarging it `factor` times; "denoise" is
    D(x, sigma, labels) itself, for a sampler outside the graph. steps: network calls at levels that are constants; denoise has none: 0.
    seeded: seeds in the place of noise. batch: None where it is symbolic. floats: for runtimes that compute with floats alone, classes come
    as rows that are 1 at the class and 0 elsewhere (all zeros are no class), and masks are arithmetic. gain: the largest |c_out|, by which
    the network's rounding is multiplied: 157 at the top of DDPM's chain.
    """

    steps: int
    channels: int
    resolution: int
    classes: int | None = None
    uint8: bool = False
    precision: str = "fp32"
    task: str = GENERATE
    factor: int | None = None
    seeded: bool = False
    batch: int | None = None
    floats: bool = False
    gain: float = 1.0

    def checked(self) -> "Contract":
        """Itself; ValueError where a field, read from a file, is of another kind than it should be."""
        counts = (self.channels, self.resolution, self.steps if self.task != DENOISE else 1)
        counts += tuple(value for value in (self.classes, self.factor, self.batch) if value is not None)
        if not all(isinstance(value, int) and value > 0 for value in counts) or self.task not in TASKS or self.precision not in TOLERANCE:
            raise ValueError(f"not a graph's form: {self}")
        if not (isinstance(self.gain, (int, float)) and self.gain >= 1):
            raise ValueError(f"not a gain: {self.gain}")
        if (self.task == SUPERRES) != (self.factor is not None):
            raise ValueError(f"a factor and no super-resolution: {self}")
        if self.task == DENOISE and self.steps != 0:
            raise ValueError(f"constant levels in a denoiser: {self}")
        return self

    @property
    def inputs(self) -> dict[str, tuple[tuple[int, ...], type]]:
        """Name -> (shape without the batch, NumPy type), in the graph's order.

        noise: unit normal [C, H, W], of several steps [K, C, H, W]. image: in [-1, 1]. mask: 1 where pixels are generated, 0 where kept.
        x: an image plus sigma times unit normal noise; sigma: a number per image.
        """
        image = (self.channels, self.resolution, self.resolution)
        inputs = {}
        if self.task == INPAINT:
            inputs = {"image": (image, np.float32), "mask": ((1, *image[1:]), np.float32)}
        elif self.task == SUPERRES:
            small = self.resolution // self.factor
            inputs = {"image": ((self.channels, small, small), np.float32)}
        if self.task == DENOISE:
            inputs = {"x": (image, np.float32), "sigma": ((), np.float32)}
        elif self.seeded:
            inputs["seeds"] = ((), np.int64)
        else:
            inputs["noise"] = (image if self.steps == 1 else (self.steps, *image), np.float32)
        if self.classes:
            inputs["labels"] = ((self.classes,), np.float32) if self.floats else ((), np.int64)
        return inputs

    @property
    def output(self) -> tuple[tuple[int, ...], type]:
        """Shape without the batch and NumPy type of `images`: [C, H, W] in [-1, 1] (superres, denoise: about that), uint8 [H, W, C]."""
        if self.uint8:
            return (self.resolution, self.resolution, self.channels), np.uint8
        return (self.channels, self.resolution, self.resolution), np.float32

    @property
    def tolerance(self) -> float:
        """How far a pixel may be from torch's in fp32, in units of the output; of a denoiser in those of `rounding`."""
        if self.uint8 or self.precision != "fp32" or self.task == DENOISE:
            return (UINT8_TOLERANCE if self.uint8 else TOLERANCE)[self.precision]
        return TOLERANCE["fp32"] * float(rounding(self.gain))

    def shape(self, name: str, batch: int) -> tuple[int, ...]:
        """The shape of an input with its batch."""
        return (batch, *self.inputs[name][0])

    def labels(self, numbers: np.ndarray) -> np.ndarray:
        """Classes int64 [B], -1 for none, as the graph takes them: themselves, or float32 rows [B, classes]."""
        return (numbers[:, None] == np.arange(self.classes)).astype(np.float32) if self.floats else numbers

    def check(self, feeds: dict[str, np.ndarray]) -> None:
        """InputError, one line, for names, types, shapes and values that the graph does not take."""
        if set(feeds) != set(self.inputs):
            raise InputError(f"other inputs than the graph's in inputs: {', '.join(feeds)}. It takes {', '.join(self.inputs)}.")
        counts = {len(array) if array.ndim else 0 for array in feeds.values()}
        for name, (shape, dtype) in self.inputs.items():
            array = feeds[name]
            if array.dtype != dtype:
                raise InputError(f"wrong type in input {name}: {array.dtype}. The graph takes {dtype.__name__}.")
            if array.shape[1:] != shape or array.ndim == 0 or len(counts) > 1:
                wanted = ", ".join(["batch", *map(str, shape)])
                raise InputError(f"wrong shape in input {name}: {list(array.shape)}. The graph takes [{wanted}].")
            if dtype == np.float32 and not np.isfinite(array).all():
                raise InputError(f"non-finite numbers in input {name}: NaN or infinity. Give finite ones.")
            if name == "labels" and dtype == np.int64 and array.size and not (array.min() >= -1 and array.max() < self.classes):
                raise InputError(f"class out of range in input labels: {array.min()} to {array.max()}. Use -1 to {self.classes - 1}.")
