"""How many bytes a training run will take on its device, by component, worked out on tensors that have shapes but no memory."""

import copy
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from fastcm.consistency.denoiser import Denoiser
from fastcm.consistency.lpips import LPIPS, STAGES
from fastcm.consistency.objective import Batch
from fastcm.data.dataset import Dataset
from fastcm.evaluation.features import LARGEST_SIDE, JudgeNetwork
from fastcm.generation.devices import choose_device
from fastcm.kernels import philox
from fastcm.training.config import TrainConfig
from fastcm.training.feature_distance import ClassifierDistance
from fastcm.training.method_loss import Guides
from fastcm.training.methods import TAUGHT_METHODS
from fastcm.training.run import build_network, resolve_precision, target_of
from fastcm.training.schedule import step_values
from fastcm.training.trainer import Trainer, piece
from fastcm.training.trainer_parts import build_trainer
from fastcm.weights.lpips_weights import TAP_CHANNELS

# Buffers of the optimizer by the component that they belong to.
COMPONENTS = {"weights": "weights", "target": "target", "exp_avg": "moments", "exp_avg_sq": "moments"}


def estimate(config: TrainConfig) -> dict[str, int]:
    """Bytes by component in one process whose share is the whole of config.batch; "total" is their sum, the peak of a step.

    activations: the most that lives at once during the passes of one microbatch, uncompiled, beside what stays from step to step. Not
    counted: CUDA's context, the libraries' workspaces, rounding by the allocator. Allocates next to nothing, also for large networks.
    """
    device = choose_device(config.device)
    with FakeTensorMode(allow_non_fake_inputs=True), _undrawn_noise(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = blank_trainer(config, device)
        batch = blank_batch(trainer)
        sizes = _lasting(trainer)
        sizes["batch"] = _bytes(tensor for tensor in batch if tensor is not None)
        with StorageWatch() as watch:
            trainer.scalars.set(step_values(config, trainer.nimg))
            trainer.losses(piece(batch, 0, trainer.microbatch)).sum().backward()
        sizes["activations"] = watch.peak
    return {**sizes, "total": sum(sizes.values())}


class StorageWatch(TorchDispatchMode):
    """Within, `now` and `peak` count the bytes of storages that were made within and still live."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, weakref.finalize] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self._note((args, kwargs), made=False)  # what comes in unseen was there before
        result = func(*args, **kwargs)
        self._note(result, made=True)
        return result

    def _note(self, tree: object, *, made: bool) -> None:
        for tensor in tree_iter(tree):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._seen:
                    size = storage.nbytes() if made else 0
                    self._seen[storage._cdata] = weakref.finalize(storage, self._freed, storage._cdata, size)
                    self.now += size
                    self.peak = max(self.peak, self.now)

    def _freed(self, key: int, size: int) -> None:
        del self._seen[key]
        self.now -= size


@contextmanager
def _undrawn_noise() -> Iterator[None]:
    """Within, the CPU's noise fields have their shapes alone: their blocks, small in memory, would take minutes to trace."""

    def field(seed, position, shape, stream, convert):
        return torch.empty(max(len(seed), len(position)), *shape, device=seed.device)

    drawn, philox._field = philox._field, field
    try:
        yield
    finally:
        philox._field = drawn


def blank_trainer(config: TrainConfig, device: torch.device) -> Trainer:
    """The run's own trainer with new weights; a teacher, which it would read from a file, is as large as the student."""
    distance = _feature_distance(config)
    with device:
        network = build_network(config).train()
    teacher = first_stage = None
    if config.method in TAUGHT_METHODS:
        teacher = Denoiser(copy.deepcopy(network), replace(config.noise, form=config.noise.base))
    guide = None if config.guide is None else copy.deepcopy(teacher)
    if config.method == "tcm":
        first_stage = Denoiser(copy.deepcopy(network), replace(config.noise, transition=None))
    return build_trainer(
        config,
        network,
        target_of(network, config),
        _blank(config),
        device=device,
        precision=resolve_precision(config.precision, device, config.noise),
        compiled=False,
        guides=Guides(
            teacher=teacher, guide=guide, first_stage=first_stage, feature_distance=None if distance is None else distance.to(device)
        ),
    )


def _blank(config: TrainConfig) -> Dataset:
    """A picture of the run's shape, for what the trainer reads of a data set."""
    side, channels = config.network["resolution"], config.network["in_channels"]
    return Dataset(np.zeros((1, channels, side, side), np.uint8), None, None, config.data, "")


def _feature_distance(config: TrainConfig) -> nn.Module | None:
    """The distance's network without its weights' values."""
    if config.objective.distance == "lpips":
        trunk, width_in = {}, 3
        for indices, width in zip(STAGES, TAP_CHANNELS, strict=True):
            for index in indices:
                trunk |= {f"{index}.weight": torch.empty(width, width_in, 3, 3), f"{index}.bias": torch.empty(width)}
                width_in = width
        return LPIPS(trunk, [torch.empty(width) for width in TAP_CHANNELS])
    if config.objective.distance == "classifier":
        network = config.network
        return ClassifierDistance(JudgeNetwork(network["in_channels"], min(network["resolution"], LARGEST_SIDE), network["num_classes"]))
    return None


def blank_batch(trainer: Trainer) -> Batch:
    """A batch of the run's shapes."""
    config, device = trainer.config, trainer.device
    side, channels = config.network["resolution"], config.network["in_channels"]
    labels = torch.zeros(config.batch, dtype=torch.int64, device=device) if config.network.get("num_classes") else None
    return Batch(
        torch.zeros(config.batch, channels, side, side, dtype=torch.uint8, device=device),
        labels,
        trainer.seed,
        torch.zeros(config.batch, dtype=torch.int64, device=device),
    )


def _lasting(trainer: Trainer) -> dict[str, int]:
    """What stays from step to step."""
    sizes = dict.fromkeys(("weights", "gradient", "moments", "target", "averages", "16-bit copies", "teacher and distance"), 0)
    for optimizer in trainer.optimizers.values():
        for role, buffer in optimizer.buffers.items():
            sizes[COMPONENTS.get(role, "averages")] += _bytes([buffer])
        sizes["gradient"] += _bytes([optimizer.gradient, optimizer.total])
        sizes["16-bit copies"] += _bytes([optimizer.low_precision, optimizer.target_low_precision])
    loss = trainer.method_loss
    for module in (loss.teacher, loss.guide, loss.first_stage, loss.distance):
        if isinstance(module, nn.Module):
            sizes["teacher and distance"] += _bytes([*module.parameters(), *module.buffers()])
    return sizes


def _bytes(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)
