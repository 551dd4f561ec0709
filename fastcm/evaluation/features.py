"""The judge: a small classifier, trained deterministically on a part of a labelled data set; its inner layer gives every metric's features.

Figures in these features are comparable only with figures of the same judge on the same data; they are not Inception figures.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcm.errors import InputError
from fastcm.evaluation.extractors import module_sha256
from fastcm.evaluation.statistics import ordered
from fastcm.weights.model_folder import read_safetensors, write_safetensors

FEATURES, SLOPE = 64, 0.2
LARGEST_SIDE, HALVED_SIDE = 32, 24  # images are reduced to the first; from the second on, the first convolution halves them
BATCH, BLOCK = 64, 4096
STEPS, EPOCHS = (400, 2000), 8
LEARNING_RATE, WEIGHT_DECAY = 4e-3, 1e-2
ROTATION, LOG_SCALE, SHIFT = 0.1, 0.1, 0.15  # radians, natural logarithm, share of half the side


class JudgeNetwork(nn.Module):
    """[B, C, side, side] in [-1, 1] -> logits [B, classes]; two convolutions per level, halving to 4x4, then a 64-wide layer.

    Leaky rectifiers: with plain ones a third of the features is dead and the others have heavier tails, so that the Frechet distance
    of two real halves spreads by 0.35 of itself rather than 0.25.
    """

    def __init__(self, channels: int, side: int, classes: int):
        super().__init__()
        layers, width, size = [], 32, side

        def convolution(channels: int, *, stride: int = 1) -> list[nn.Module]:
            return [nn.Conv2d(channels, width, 3, stride=stride, padding=1), nn.LeakyReLU(SLOPE)]

        if size >= HALVED_SIDE:
            layers += convolution(channels, stride=2)
            channels, size = width, (size + 1) // 2
        while True:
            layers += [*convolution(channels), *convolution(width)]
            if size <= 4:
                break
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
            channels, width, size = width, min(2 * width, 64), (size + 1) // 2
        self.trunk = nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * size * size, FEATURES), nn.LeakyReLU(SLOPE))
        self.head = nn.Linear(FEATURES, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x))


class Judge:
    """A trained classifier. Images are uint8 [N, C, H, W] everywhere; larger sides than 32 are area-averaged to 32.

    network: in eval mode, its head as wide as there are classes.
    fit, reference: indices (int64, ascending) into the images given to `train_judge`: those it learned from and those it never saw.
    held_out_accuracy: its accuracy on the latter.
    """

    name = "judge"
    resize = "sides above 32 averaged down to 32"

    def __init__(self, network: JudgeNetwork, *, shape: tuple[int, int, int], seed: int, fit: np.ndarray, reference: np.ndarray):
        self.network, self.shape, self.seed = network, shape, seed
        self.fit, self.reference = fit, reference
        self.held_out_accuracy = float("nan")
        self.description = f"{FEATURES} features of a classifier trained on {len(fit):,} of these images"
        self.sha256 = module_sha256(network)

    def extract(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the activations of the layer before the class scores, float64 [N, 64], and the scores [N, classes] fp32."""
        if tuple(images.shape[1:]) != self.shape:
            raise InputError(f"images of another shape for the judge: {tuple(images.shape[1:])}. The data have {self.shape} (C, H, W).")
        parts = []
        with one_thread(), torch.inference_mode():
            # A fixed batch, the last one filled up, so that the features of an image do not depend on how many are asked for.
            for start in range(0, len(images), 256):
                part = images[start : start + 256]
                inner = self.network.trunk(to_input(np.concatenate([part, np.zeros((256 - len(part), *self.shape), np.uint8)])))
                parts.append([values[: len(part)].numpy() for values in (inner, self.network.head(inner))])
        features, scores = (np.concatenate(part) for part in zip(*parts, strict=True))
        return features.astype(np.float64), scores

    def features(self, images: np.ndarray) -> np.ndarray:
        return self.extract(images)[0]

    def predict(self, images: np.ndarray) -> np.ndarray:
        """Returns the most likely class of each image, int64 [N]."""
        return self.extract(images)[1].argmax(axis=1)

    def accuracy(self, images: np.ndarray, labels: np.ndarray) -> float:
        """Returns the share of images recognised as their label."""
        return float(np.mean(self.predict(images) == np.asarray(labels)))


def halves(labels: np.ndarray, *, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Splits range(N), in the order of permutation `number`, in two halves with equal shares of each class: int64, by class."""
    order = ordered(len(labels), number=number)
    order = order[np.argsort(np.asarray(labels)[order], kind="stable")]
    return order[0::2], order[1::2]


def check_judged(labels: np.ndarray | None, *, option: str = "the judge") -> int:
    """The number of classes of labels, int [N], that a judge can learn from; InputError for others. option: what asks for one."""
    if labels is None:
        raise InputError(f"unlabelled data with {option}: the judge is a classifier of the data. Leave it out, or give classes.")
    classes = int(labels.max()) + 1 if len(labels) else 0
    if classes < 2 or len(labels) < 4 * classes or labels.min() < 0:
        what = f"too little data for {option}: {len(labels)} images, {classes} classes"
        raise InputError(f"{what}. The judge is a classifier: give labels of two classes or more, four images of each on average.")
    return classes


def train_judge(
    images: np.ndarray, labels: np.ndarray, *, seed: int = 0, cache: Path | None = None, held_out: np.ndarray | None = None
) -> Judge:
    """Trains the judge on half of a data set, or on all but the rows `held_out`.

    Equal arguments give equal bits on one machine, whatever its number of threads.

    images: uint8 [N, C, H, W]. labels: int [N], 0 .. classes-1. The global random state is neither read nor changed.
    cache: a folder where a trained judge is kept under a name that hashes the data, the seed, the recipe and the version of torch.
    """
    images, labels = np.asarray(images), np.asarray(labels, dtype=np.int64)
    if images.dtype != np.uint8 or images.ndim != 4 or len(images) != len(labels):
        what = f"wrong images for the judge: {images.dtype} {images.shape}, {len(labels)} labels"
        raise InputError(f"{what}. Give uint8 [N, C, H, W] and N labels.")
    classes = check_judged(labels)
    if held_out is None:
        fit, reference = (np.sort(half) for half in halves(labels, number=0))
    else:
        fit, reference = np.setdiff1d(np.arange(len(images)), held_out), np.sort(held_out)
    generator = torch.Generator().manual_seed(seed)
    side = to_input(np.array(images[:1])).shape[-1]
    network = initialised(JudgeNetwork, images.shape[1], side, classes, generator=generator)
    settings = (seed, BATCH, STEPS, EPOCHS, LEARNING_RATE, WEIGHT_DECAY, SLOPE, HALVED_SIDE, torch.__version__)
    recipe = " ".join(map(str, (data_sha256(images, labels, fit), *settings)))
    path = None if cache is None else Path(cache) / f"judge-{hashlib.sha256(recipe.encode()).hexdigest()[:20]}.safetensors"
    if not (path is not None and restored(network, path)):
        inputs = torch.cat([to_input(images[fit[start : start + BLOCK]]) for start in range(0, len(fit), BLOCK)])
        with one_thread():
            fit_network(network, inputs, torch.from_numpy(labels[fit]), generator)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_safetensors(path, network.state_dict())
    judge = Judge(network.eval().requires_grad_(False), shape=images.shape[1:], seed=seed, fit=fit, reference=reference)
    blocks = [reference[start : start + BLOCK] for start in range(0, len(reference), BLOCK)]
    judge.held_out_accuracy = float(np.mean(np.concatenate([judge.predict(images[rows]) == labels[rows] for rows in blocks])))
    return judge


def restored(network: JudgeNetwork, path: Path) -> bool:
    """Fills the network from a file of the cache; False where there is none or where it is damaged (it is then made again)."""
    try:
        network.load_state_dict(read_safetensors(path))
    except (InputError, RuntimeError):
        return False
    return True


def data_sha256(images: np.ndarray, labels: np.ndarray | None, rows: np.ndarray | None = None) -> str:
    """sha256 of the pixels [N, C, H, W] uint8, then the labels as little-endian int64; of `rows` alone where given."""
    state, rows = hashlib.sha256(), np.arange(len(images)) if rows is None else rows
    for start in range(0, len(rows), BLOCK):
        state.update(np.ascontiguousarray(images[rows[start : start + BLOCK]]))
    if labels is not None:
        state.update(np.asarray(labels)[rows].astype("<i8").tobytes())
    return state.hexdigest()


def fit_network(network: JudgeNetwork, inputs: Tensor, labels: Tensor, generator: torch.Generator) -> None:
    """AdamW with a one-cycle rate; every image is rotated, scaled and shifted a little, edges repeated."""
    count = len(inputs)
    steps = min(max(EPOCHS * count // BATCH, STEPS[0]), STEPS[1])
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LEARNING_RATE, total_steps=steps)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        while len(order) < BATCH:
            order = torch.cat([order, torch.randperm(count, generator=generator)])
        batch, order = order[:BATCH], order[BATCH:]
        loss = F.cross_entropy(network(jittered(inputs[batch], torch.rand(BATCH, 4, generator=generator) * 2 - 1)), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def jittered(x: Tensor, amount: Tensor) -> Tensor:
    """Bilinear affine change of x [B, C, side, side]; amount [B, 4] in [-1, 1]: rotation, scale, shift along x, shift along y."""
    angle, scale, shift = amount[:, 0] * ROTATION, torch.exp(amount[:, 1] * LOG_SCALE), amount[:, 2:] * SHIFT
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    matrix = torch.stack([torch.stack([cos, -sin, shift[:, 0]], dim=1), torch.stack([sin, cos, shift[:, 1]], dim=1)], dim=1)
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def to_input(images: np.ndarray) -> Tensor:
    """uint8 [N, C, H, W] -> fp32 in [-1, 1], at most 32 pixels a side, square."""
    x = torch.from_numpy(np.ascontiguousarray(images)).float() / 127.5 - 1
    side = min(max(x.shape[-2:]), LARGEST_SIDE)
    return x if x.shape[-2:] == (side, side) else F.adaptive_avg_pool2d(x, side)


def initialised(kind: type[nn.Module], *arguments: int, generator: torch.Generator) -> nn.Module:
    """Builds a module without touching the global random state: He-normal weights from `generator`, zero biases."""
    with torch.device("meta"):
        module = kind(*arguments)
    module.to_empty(device="cpu")
    for parameter in module.parameters():
        if parameter.ndim > 1:
            nn.init.kaiming_normal_(parameter, nonlinearity="relu", generator=generator)
        else:
            nn.init.zeros_(parameter)
    return module


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums in a gradient are split by thread: one thread makes the judge the same whatever the machine's thread count."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
